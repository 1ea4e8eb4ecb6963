from __future__ import annotations

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from spectra_db import check, manifest, merged, project, store
from spectra_db.heterogeneity import LEADING
from spectra_db.release import release

from .synthetic import write_tables

MODELS = ["digits-cnn", "digits-mlp"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    source = write_tables(folder / "tables")
    release(source, folder / "data", "0.1.0")
    release(folder / "data", folder / "hub", "0.1.0", merge=True)
    return folder / "hub"


def card_of(folder):
    return (folder / manifest.CARD).read_text(encoding="utf-8")


def test_a_merged_release_is_sound_and_goes_on_from_the_changelog(made):
    assert check.problems(made) == []
    plain = (made.with_name("data") / manifest.CHANGELOG).read_text(encoding="utf-8")
    assert (made / manifest.CHANGELOG).read_text(encoding="utf-8") == plain
    rows = [manifest.read(folder).rows() for folder in (made, made.with_name("data"))]
    assert rows[0] == rows[1]


def test_a_merged_table_has_every_row_and_a_group_per_model(made):
    for name in merged.names(made)[1:]:
        file = pq.ParquetFile(merged.path_of(made, name))
        parts = [store.read(path, name) for path in sorted((made / name).glob("*.parquet"))]
        assert file.metadata.num_rows == sum(map(len, parts))
        groups = [file.read_row_group(i, ["model"])["model"] for i in range(file.num_row_groups)]
        assert [set(group.to_pylist()) for group in groups] == [
            {part["model"][0].as_py()} for part in parts
        ]


def test_the_overview_is_a_row_per_model_with_its_measures(made):
    rows = pd.read_parquet(merged.path_of(made, merged.OVERVIEW)).set_index("model")
    assert list(rows.index) == MODELS
    gap = pd.read_parquet(made / "gaps" / "digits-cnn.parquet")
    assert rows.loc["digits-cnn", "sgd_loss"] == gap["sgd_loss"].item()
    metrics = pd.read_parquet(made / "heterogeneity" / "digits-cnn.parquet")
    js0 = metrics[metrics["metric"].eq("js0") & metrics["scale"].eq(LEADING["js0"])]
    js0 = js0[js0["stage"] == "init"]
    assert rows.loc["digits-cnn", "js0"] == js0["corrected"].fillna(js0["value"]).item()


def test_the_page_opens_on_the_overview_and_cites_as_the_project_does(made):
    _, header, text = card_of(made).split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["language"] == ["en"]
    assert "arxiv:2402.16788" in facts["tags"]
    names = merged.names(made)
    assert [config["config_name"] for config in facts["configs"]] == names
    assert facts["configs"][0]["default"] is True
    for name, config in zip(names, facts["configs"], strict=True):
        assert (made / config["data_files"][0]["path"]).name == f"{name}.parquet"
    assert (made / merged.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert merged.PICTURE in text
    for column in pd.read_parquet(merged.path_of(made, merged.OVERVIEW)).columns:
        assert f"`{column}`" in text
    assert f"author = {{{{{project.AUTHORS}}}}}" in text
    assert f"year   = {{{project.YEAR}}}" in text
    assert f"`{project.DATASET}` is a placeholder" in text


def test_merged_rows_that_are_not_those_of_the_tables_are_named(made, tmp_path):
    folder = tmp_path / "hub"
    release(made.with_name("data"), folder, "0.1.0", merge=True)
    path = merged.path_of(folder, "gaps")
    content = pq.read_table(path)
    pq.write_table(content.slice(1), path)
    known = manifest.read(folder)
    files = {name: manifest.describe(folder / name, f.rows) for name, f in known.files.items()}
    manifest.write(folder, manifest.Manifest("0.1.0", 1, files))
    [problem] = check.problems(folder, derived={})
    assert problem.startswith(f"{path}: not the rows of the tables")
