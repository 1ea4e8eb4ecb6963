"""The GPU's one command, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.gpu import drive
from benchmarks.gpu.desk import Desk, pack, report, unpack
from benchmarks.gpu.entries import TINY, gather, load
from benchmarks.gpu.rows import compare_rows
from benchmarks.gpu.spectra import affordable
from harness.estimator import estimate_spectra
from harness.records.provenance import code_version
from spectra_db import store

ROOT = Path(__file__).parents[2]
ABSENT = ("datasets", "matplotlib", "sklearn")  # may not be where there is a GPU


def rehearse(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), *options]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """Return the folder of a rehearsal without what may be absent."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = rehearse(folder / "out", "--minutes", "60", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def said(out: Path, stage: str, item: str) -> dict:
    return Desk(out, out, "cpu", rehearse=True, stage=stage).known(item)


@pytest.mark.slow
def test_a_rehearsal_does_every_stage(rehearsed):
    ends = [x for x in report(rehearsed) if x["item"] == "end"]
    assert [(x["stage"], x["status"]) for x in ends] == [(name, "done") for name in drive.STAGES]
    assert not [x for x in report(rehearsed) if x["item"] == "error"]


@pytest.mark.slow
def test_the_devices_rows_are_compared_in_every_arithmetic(rehearsed):
    found = said(rehearsed, "rows", TINY)
    assert found["agree"]
    assert found["twice_the_same"]
    assert set(found["against_float64"]) == {
        "cpu float32", "float64", "float32", "float32 again", "TF32",
    }  # fmt: skip
    assert found["against_float64"]["float64"]["first"] == 0
    assert found["against_float64"]["float32"]["first"] > 0


@pytest.mark.slow
def test_products_are_measured_against_a_matrix_product(rehearsed):
    for name in ("gpt float32", "gpt TF32", "cnn float32", "cnn TF32"):
        assert said(rehearsed, "products", f"{name} steps")["share_of_matmul"] > 0
        assert said(rehearsed, "products", f"{name} probes")["batched_seconds"] > 0
    # A CPU has no TF32: the same arithmetic gives the same numbers, but for the order of sums.
    assert said(rehearsed, "products", "gpt deviation")["largest"] < 1e-5


@pytest.mark.slow
def test_the_campaign_was_killed_and_finished_by_the_same_command(rehearsed):
    assert said(rehearsed, "campaign", "kill")["units_done"] >= 2
    continued = said(rehearsed, "campaign", "continuation")
    assert continued["units_left"] == 0
    assert continued["rows"] > continued["rows_before"] > 0


@pytest.mark.slow
def test_tables_come_home_in_few_files(rehearsed, tmp_path):
    files = list(rehearsed.rglob("*"))
    assert len(files) <= 8
    assert all(file.is_file() and file.stat().st_size <= 16 << 20 for file in files)
    unpack(rehearsed, tmp_path)
    rows = store.read(tmp_path / "spectra" / "spectra" / f"{TINY}.parquet", "spectra")
    assert set(rows["num_steps"].to_pylist()) >= {3}
    assert set(rows["batch_size"].to_pylist()) == {8}
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(rehearsed, monkeypatch):
    before = (rehearsed / "report.jsonl").read_text()
    command = ["gpu", "--rehearse", "--out", str(rehearsed), "--minutes", "60"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process's stays
    drive.main()
    new = (rehearsed / "report.jsonl").read_text().removeprefix(before)
    assert [json.loads(line)["item"] for line in new.splitlines()] == ["machine"]


def test_a_stage_that_fails_says_why_and_leaves_the_others_alone(tmp_path, monkeypatch):
    desk = Desk(tmp_path, tmp_path / "scratch", "cpu", rehearse=True).at("rows", 60)

    def broken(desk: Desk) -> bool:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(drive, "stage_of", lambda name: broken)
    monkeypatch.setattr(os, "setpgid", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        drive._do(desk)
    assert ended.value.code == 1
    assert "no kernel image" in desk.known("error")["reason"]


def test_archives_leave_out_what_finds_no_room_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.desk.VOLUME_BYTES", 5000)
    monkeypatch.setattr("benchmarks.gpu.desk.MAX_VOLUMES", 2)
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    for stage, size in (("rows", 3000), ("spectra", 3000), ("training", 3000)):
        (scratch / stage).mkdir(parents=True)
        (scratch / stage / "table.parquet").write_bytes(bytes(size))
    (scratch / "rows" / ".table.lock").touch()
    assert pack(scratch, out, list(drive.STAGES)) == ["training/table.parquet"]
    for name, stage in (("tables-1.tar", "rows"), ("tables-2.tar", "spectra")):
        with tarfile.open(out / name) as archive:
            assert archive.getnames() == [f"{stage}/table.parquet"]


@pytest.fixture(scope="module")
def rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return rows in float32 and in float64."""
    import torch

    problem = load(TINY, rehearse=True)
    settings = {"blocks": problem.blocks("weights"), "num_probes": 3, "num_steps": 4}
    narrow, wide = (
        estimate_spectra(problem.model, problem.loss_fn, problem.batches, dtype=dtype, **settings)
        for dtype in (torch.float32, torch.float64)
    )
    return narrow, wide


def test_rows_agree_to_rounding_and_no_further(rows):
    narrow, wide = rows
    found = compare_rows(narrow, wide)
    assert found.agree
    assert 0 < found.first < 1e-5
    assert not compare_rows(wide, narrow).agree  # float64's rounding does not explain float32's


@pytest.mark.parametrize("column", ["alphas", "nodes"])
def test_a_wrong_block_is_found(rows, column):
    narrow, wide = rows
    name = narrow.loc[narrow["method"] == "slq", "block"].iloc[0]
    wrong = narrow.copy()
    where = wrong["block"] == name
    wrong.loc[where, column] = wrong.loc[where, column].map(lambda x: [1.5 * v for v in x])
    found = compare_rows(wrong, wide)
    assert not found.agree
    if column == "nodes":
        assert found.second_moment == pytest.approx(1.25)


def test_rows_of_other_blocks_are_not_compared(rows):
    narrow, wide = rows
    with pytest.raises(ValueError, match="different blocks or probes"):
        compare_rows(narrow.iloc[1:], wide)


@pytest.mark.parametrize(
    ("samples", "size"), [(3, 4), (9, 8), (20, 16), (49, 32), (64, 50), (1e9, 50)]
)
def test_the_batch_is_the_entrys_doubled_as_often_as_is_affordable(samples, size):
    problem = replace(load(TINY, rehearse=True), batch_size=4)
    assert affordable(problem, 50, samples) == size


def test_the_data_that_travel_are_those_that_the_stages_read(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_DATA_ROOT", str(data_root))
    gather(tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 40 << 20


def test_the_code_says_its_version_where_it_is_not_installed(monkeypatch):
    known = code_version.__wrapped__()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert code_version.__wrapped__() == known


def test_a_time_that_is_none_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--rehearse", "--minutes", "0"])
    with pytest.raises(SystemExit) as ended:
        drive.main()
    assert ended.value.code == 2
    assert "--minutes is 0; it must be positive" in capsys.readouterr().err
