from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import spectra_db
from spectra_db import store
from spectra_db.load import NotFound
from spectra_db.store import InvalidTable

from .synthetic import exact_row


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    rows = [
        exact_row(np.arange(1.0, 4.0), block) | {"model": model, "stage": stage}
        for model in ("digits-cnn", "digits-mlp")
        for stage in ("init", "final")
        for block in ("a", "b")
    ]
    rows[0]["tolerance"] = 0.1
    store.write(root, "spectra", rows)
    return root


def test_everything_is_loaded_with_arrays_in_list_columns(source):
    rows = spectra_db.load("spectra", source=source)
    assert len(rows) == 8
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in rows["nodes"])


def test_filters_take_a_value_or_several(source):
    load = spectra_db.load
    assert len(load("spectra", source=source, model="digits-cnn", stage="init")) == 2
    assert len(load("spectra", source=str(source), stage=["init", "final"], block="a")) == 4
    assert len(load("spectra", source=source, stage="p10")) == 0
    assert len(load("spectra", source=source, tolerance=0.1)) == 1
    assert len(load("spectra", source=source, tolerance=None)) == 7


def test_columns_are_those_that_were_asked_for(source):
    rows = spectra_db.load("spectra", source=source, columns=["block", "nodes"], stage="init")
    assert list(rows.columns) == ["block", "nodes"]
    assert len(rows) == 4
    assert list(spectra_db.load("spectra", source=source, columns="block").columns) == ["block"]


def test_models_come_in_the_order_of_their_names(source):
    rows = spectra_db.load("spectra", source=source, model=["digits-mlp", "digits-cnn"])
    assert list(rows["model"].unique()) == ["digits-cnn", "digits-mlp"]


def test_rows_of_several_models_are_sorted_by_key(tmp_path):
    rows = [exact_row(np.ones(1), "a") | {"model": model} for model in ("a-b", "a.b", "a", "ab")]
    store.write(tmp_path, "spectra", rows)
    assert list(spectra_db.load("spectra", source=tmp_path)["model"]) == ["a", "a-b", "a.b", "ab"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": "spectrum"}, r"unknown table 'spectrum'; did you mean spectra\?"),
        ({"table": "spectra", "modle": "x"}, r"no column 'modle'; did you mean model"),
        ({"table": "spectra", "columns": ["node"]}, r"no column 'node'; did you mean nodes"),
        ({"table": "spectra", "model": "digits-cn"}, r"no model 'digits-cn'.*mean digits-cnn"),
        ({"table": "spectra", "model": "vgg"}, "known are digits-cnn, digits-mlp"),
        ({"table": "spectra", "step": "first"}, "column step can't be 'first'"),
        ({"table": "spectra", "nodes": 1.0}, "column nodes holds lists"),
        ({"table": "gaps"}, "holds no table gaps; it has spectra"),
    ],
)
def test_unknown_names_get_close_matches(source, arguments, message):
    table = arguments.pop("table")
    with pytest.raises(NotFound, match=message):
        spectra_db.load(table, source=source, **arguments)


def test_a_source_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(NotFound, match="neither a folder nor a Hub id like owner/name"):
        spectra_db.load("spectra", source=tmp_path / "absent")
    with pytest.raises(NotFound, match="it has no tables at all"):
        spectra_db.load("spectra", source=tmp_path)


def test_without_a_bundled_release_the_error_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["spectra_db.load"], "BUNDLED", tmp_path)
    with pytest.raises(NotFound, match=r"no release is bundled .* give source=DIR"):
        spectra_db.load("spectra")


def test_the_bundled_release_is_read_by_default(source, monkeypatch):
    monkeypatch.setattr(sys.modules["spectra_db.load"], "BUNDLED", source)
    assert len(spectra_db.load("spectra")) == 8


def test_a_hub_id_downloads_the_tables_parquet_at_the_revision(source, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    rows = spectra_db.load("spectra", source="owner/name", revision="v1", model="digits-cnn")
    assert len(rows) == 4
    assert asked == {
        "repo": "owner/name",
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": ["spectra/*.parquet"],
    }


def test_a_hub_dataset_without_the_table_names_its_page(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(NotFound, match=r"'owner/name' holds no table gaps; .*name/tree/v1"):
        spectra_db.load("gaps", source="owner/name", revision="v1")


def test_a_hub_that_cannot_be_reached_is_one_readable_line(monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(NotFound, match=r"'owner/name' at revision main can't be had .* no route"):
        spectra_db.load("spectra", source="owner/name")


def test_a_corrupt_file_is_refused_by_name(source, tmp_path):
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(InvalidTable, match=r"bad\.parquet: not readable"):
        spectra_db.load("spectra", source=tmp_path)


def test_importing_is_quick_and_takes_no_torch_nor_harness():
    code = (
        "import sys, time; t = time.process_time(); import spectra_db;"
        "print(time.process_time() - t);"
        "print(*{m.split('.')[0] for m in sys.modules}, sep='\\n');"
        "assert callable(spectra_db.load) and callable(spectra_db.density);"
        "assert callable(spectra_db.plot.spectra)"
    )
    best = float("inf")
    for _ in range(5):  # processor time, but a busy machine slows that too
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds, *modules = answer.stdout.split()
        assert not {"torch", "harness", "matplotlib", "huggingface_hub"} & set(modules)
        best = min(best, float(seconds))
    assert best < 0.5
