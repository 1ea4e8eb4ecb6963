from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import spectra_db
from spectra_db import store
from spectra_db.loading import NotFound
from spectra_db.manifest import InvalidRelease
from spectra_db.release import release
from spectra_db.store import InvalidTable

from .synthetic import exact_row, model_row


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


@pytest.mark.parametrize("filters", [{"probe": 0.5}, {"probe": 10**30}, {"method": "SLQ"}])
def test_values_that_no_row_can_have_are_refused(source, filters):
    with pytest.raises(NotFound, match=next(iter(filters))):
        spectra_db.load("spectra", source=source, **filters)
    assert len(spectra_db.load("spectra", source=source, probe=0.0, method="exact")) == 8


def test_filters_take_a_value_or_several(source):
    load = spectra_db.load
    assert len(load("spectra", source=source, model="digits-cnn", stage="init")) == 2
    assert len(load("spectra", source=str(source), stage=["init", "final"], block="a")) == 4
    assert len(load("spectra", source=source, stage="p10")) == 0
    assert len(load("spectra", source=source, tolerance=0.1)) == 1
    assert len(load("spectra", source=source, tolerance=None)) == 7
    assert len(load("spectra", source=source, partition="custom")) == 0
    assert load("spectra", source=source, model=[], columns=["block"]).columns.tolist() == ["block"]


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
        ({"table": "spectra", "stage": "p5"}, r"no stage 'p5'; did you mean p50"),
        ({"table": "spectra", "stage": ["init", "end"]}, "no stage 'end'; .* init, p10, p25, p50"),
        ({"table": "spectra", "partition": "weight"}, r"no partition 'weight'; did you mean weig"),
        ({"table": "spectra", "status": "OK"}, "no status 'OK'; known are ok, zero, pending, fai"),
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
    monkeypatch.setattr(sys.modules["spectra_db.loading"], "BUNDLED", tmp_path)
    with pytest.raises(NotFound, match=r"no release is bundled .* give source=DIR"):
        spectra_db.load("spectra")


def test_the_bundled_release_is_read_by_default(source, monkeypatch):
    monkeypatch.setattr(sys.modules["spectra_db.loading"], "BUNDLED", source)
    assert len(spectra_db.load("spectra")) == 8


@pytest.fixture
def released(source, tmp_path):
    store.write(tmp_path / "tables", "models", [model_row(m) for m in ("digits-cnn", "digits-mlp")])
    shutil.copytree(source / "spectra", tmp_path / "tables" / "spectra")
    release(tmp_path / "tables", tmp_path / "data", "0.1.0")
    return tmp_path / "data"


def test_a_release_has_the_one_version_that_it_says(released):
    load = spectra_db.load
    assert len(load("spectra", source=released, revision="v0.1.0")) == 8
    assert len(load("spectra", source=released, revision="0.1.0")) == 8
    with pytest.raises(NotFound, match=r"data is version 0\.1\.0; revision 'v0\.2\.0' is not"):
        load("spectra", source=released, revision="v0.2.0")


def test_a_folder_without_a_manifest_has_no_revisions(source):
    with pytest.raises(NotFound, match="has no versions; revision 'v1' is not to be had"):
        spectra_db.load("spectra", source=source, revision="v1")


def test_files_of_a_release_are_compared_with_its_manifest(released):
    store.write(released, "spectra", [exact_row(np.ones(1), "a") | {"model": "digits-cnn"}])
    assert len(spectra_db.load("spectra", source=released, model="digits-mlp")) == 4
    with pytest.raises(InvalidRelease, match=r"digits-cnn\.parquet: not the file that the manif"):
        spectra_db.load("spectra", source=released)
    (released / "spectra" / "digits-cnn.parquet").unlink()
    with pytest.raises(InvalidRelease, match=r"digits-cnn\.parquet: .* it is not there"):
        spectra_db.load("spectra", source=released)


def test_files_that_the_manifest_does_not_list_are_no_part_of_a_release(released):
    store.write(released, "spectra", [exact_row(np.ones(1), "a") | {"model": "stranger"}])
    assert set(spectra_db.load("spectra", source=released)["model"]) == {"digits-cnn", "digits-mlp"}


def test_a_corrupt_file_is_refused_by_name(source, tmp_path):
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(InvalidTable, match=r"bad\.parquet: not readable"):
        spectra_db.load("spectra", source=tmp_path)


def test_importing_takes_no_torch_nor_harness_nor_what_only_some_need():
    code = (
        "import sys; import spectra_db;"
        "print(*{m.split('.')[0] for m in sys.modules}, sep='\\n');"
        "assert callable(spectra_db.load) and callable(spectra_db.density);"
        "assert callable(spectra_db.plot.spectra)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0
    modules = set(answer.stdout.split())
    assert not {"torch", "harness", "matplotlib", "huggingface_hub"} & modules


def test_a_name_that_no_row_has_is_refused_and_one_that_other_rows_have_is_not(source):
    load = spectra_db.load
    with pytest.raises(NotFound, match=r"no block 'c' in table spectra; known are a, b"):
        load("spectra", source=source, block=["a", "c"])
    rows = load("spectra", source=source, block="a", stage="p10", columns=["stage"])
    assert rows.columns.tolist() == ["stage"]
    assert rows.empty
    assert load("spectra", source=source, model=[], block="c").empty
    with pytest.raises(NotFound, match=r"no left_out 'resnett' in table leaderboard; .*resnet\?"):
        load("leaderboard", left_out="resnett")


def test_a_misspelt_metric_gets_a_close_match(tmp_path):
    row = dict.fromkeys(spectra_db.schema.TABLES["training"].names, 1)
    row |= {"model": "m", "optimizer": "sgd", "split": "train", "metric": "loss"}
    store.write(tmp_path, "training", [row | {"diverged": False}])
    assert len(spectra_db.load("training", source=tmp_path, metric="loss", optimizer="sgd")) == 1
    with pytest.raises(NotFound, match=r"no metric 'los' in table training; did you mean loss"):
        spectra_db.load("training", source=tmp_path, metric="los")
    with pytest.raises(NotFound, match=r"no optimizer 'adam' .*known are sgd"):
        spectra_db.load("training", source=tmp_path, optimizer="adam")
