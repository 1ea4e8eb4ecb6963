"""Whatever ends a run: what was finished stays, and the same command makes the same rows."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import spectra_db
from harness.campaign import agenda
from harness.campaign.claims import claim
from harness.campaign.plan import missing
from harness.campaign.run import run_entries
from harness.campaign.survey import survey
from harness.campaign.unit import Unit
from harness.campaign.work import Job
from harness.cli import main
from harness.errors import OutputError
from harness.records.ledger import Ledger
from harness.registry import ModelEntry
from harness.training.stages import STAGE_SEED
from spectra_db import store
from spectra_db.release import list_files
from tests.harness.campaign.test_run import (
    RECIPE,
    do,
    is_final,
    job_of,
    lose,
    nothing,
    tiny,
    values,
)  # fmt: skip
from tests.processes import FORKS, Process

from . import victim

COMPUTED = ("training", "stages", "spectra", "blocks", "heterogeneity", "gaps", "models")


def check_same(out: Path, whole: Path) -> None:
    """Compare all tables bit for bit but for timings; runs are described once."""
    for table in COMPUTED:
        pd.testing.assert_frame_equal(values(out, table), values(whole, table), check_exact=True)
    assert not list(out.rglob("*.tmp"))
    for stage in (whole / "checkpoints").rglob("*.safetensors"):
        assert (out / stage.relative_to(whole)).read_bytes() == stage.read_bytes()


def check_valid(out: Path) -> int:
    """Read all tables, which validates them; return how many rows of results there are."""
    count = 0
    for path in out.glob("*/*.parquet"):
        rows = store.read(path, path.parent.name)
        count += rows.num_rows if path.parent.name in ("training", "spectra") else 0
    return count


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_but_the_work_in_flight(tmp_path):
    draw, undisturbed = random.Random(1), tmp_path / "undisturbed"
    recipe = replace(RECIPE, num_steps=4, eval_size=64)
    surveyed = survey(tiny(recipe=recipe, full_stages=()), None)
    first = FORKS.Process(target=time.monotonic)  # waits until the server has imported all
    first.start()
    first.join()
    begin = time.monotonic()
    victim.start(undisturbed, surveyed).join()
    duration = time.monotonic() - begin
    kills = runs = 0
    while kills < 20:
        out = tmp_path / str(runs)
        there = 0
        while True:
            process = victim.start(out, surveyed)
            process.join(draw.uniform(0.0, duration / 3) if kills < 20 else None)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            now = check_valid(out)
            assert now >= there
            there = now
        check_same(out, undisturbed)
        runs += 1


class LastFirst(Job):
    """A job whose last units come first."""

    def missing(self, entry: ModelEntry) -> list[Unit]:
        return super().missing(entry)[::-1]


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_workers")
def test_neither_order_nor_jobs_change_a_bit(tmp_path, whole):
    assert do(tmp_path / "two", tiny(), jobs=2)[0] == {}
    check_same(tmp_path / "two", whole)
    out, started = tmp_path / "reversed", []
    job = LastFirst(**vars(job_of(out, tiny())))
    run_entries(
        [survey(tiny(), None)], job, on_event=lambda what, unit, facts: started.append(unit)
    )
    assert started[0].kind == "spectrum"
    check_same(out, whole)


def test_a_run_leaves_the_checkpoints_alone_that_another_is_writing(tmp_path):
    job = job_of(tmp_path, tiny())
    writing = job.ledger.checkpoints / "tiny" / ".adamw-seed1-other.tmp" / "p10.safetensors"
    writing.parent.mkdir(parents=True)
    writing.touch()
    job.do(Unit("tiny", "train", "sgd", 0.1, STAGE_SEED), nothing)
    assert writing.exists()


def test_two_processes_in_one_folder_share_the_units(tmp_path, whole):
    out = tmp_path / "out"
    surveyed = survey(tiny(), None)
    processes = [victim.start(out, surveyed, note=tmp_path / str(i)) for i in range(2)]
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    told = [json.loads((tmp_path / str(i)).read_text()) for i in range(2)]
    done = Counter(unit for notes in told for what, unit, _ in notes if what == "done")
    assert set(done.values()) == {1}
    assert len(done) == surveyed.num_units
    check_same(out, whole)


def test_a_run_waits_for_what_another_process_does_and_takes_it_over_when_that_dies(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(agenda, "PATIENCE", 0.05)
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    unit = Unit("tiny", "spectrum", stage="init", partition="weights")
    told = []
    other = claim(tmp_path, unit)
    assert other.__enter__()

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        told.append(what)
        if what == "elsewhere":
            other.__exit__(None, None, None)

    assert run_entries([survey(entry, None)], job_of(tmp_path, entry), on_event=on_event) == {}
    assert [what for what in told if what != "progress"] == ["start", "elsewhere", "start", "done"]
    assert list(missing(entry, Ledger(tmp_path))) == []


@pytest.mark.parametrize(
    ("command", "unit"),
    [
        ("spectrum", Unit("cnn-digits", "spectrum", stage="init", partition="weights")),
        ("train --lr 0.01", Unit("cnn-digits", "train", "adamw", 0.01, STAGE_SEED)),
    ],
)
def test_a_command_refuses_what_another_process_does(tmp_path, command, unit):
    name, *options = command.split()
    with claim(tmp_path, unit):
        arguments = (name, "cnn-digits", *options, "--out", tmp_path, "--device", "cpu")
        code, _, errors = Process(arguments, {}, tmp_path).communicate()
    assert code == 2
    assert "another process does this" in errors
    assert "name another --out" in errors


def test_claims_are_no_part_of_a_release(tmp_path):
    (tmp_path / "data").mkdir()
    with claim(tmp_path / "data", Unit("tiny", "train", "adamw", 0.01)) as ours:
        assert ours
        assert list((tmp_path / "data").rglob("*.lock"))
        assert list_files(tmp_path / "data") == []


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a small file system in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    if not mount(path, "size=16k"):
        pytest.skip("mounting a small disk needs the rights of root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def mount(path: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_a_full_disk_stops_the_run_and_with_more_room_the_same_command_continues(disk, whole):
    size, messages = 16, []
    while True:
        try:
            failed, _ = do(disk, tiny())
            break
        except OutputError as error:
            messages.append(str(error))
        assert not list(disk.rglob("*.tmp"))
        check_valid(disk)
        size += 12
        assert mount(disk, f"remount,size={size}k")
    assert not failed
    assert len(messages) >= 5  # tables and checkpoints alike met the end of the disk
    assert all("No space left on device; what was finished is kept" in m for m in messages)
    check_same(disk, whole)


@pytest.mark.usefixtures("_quick_workers")
def test_a_full_disk_stops_the_workers_too(disk):
    with pytest.raises(OutputError, match="No space left on device; what was finished is kept"):
        do(disk, tiny(), jobs=2)
    check_valid(disk)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_with_the_remedy(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    arguments = ["spectrum", "cnn-digits", "--out", str(tmp_path / "out"), "--device", "cpu"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "on a file system without locks" in refused.stderr
    assert "name a folder of another disk" in refused.stderr


def test_a_disk_that_becomes_read_only_stops_the_run(disk, whole):
    assert mount(disk, "remount,size=16m")
    entry, told = tiny(), []

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        told.append(what)
        if told.count("done") == 3 and what == "done":
            assert mount(disk, "remount,ro")

    with pytest.raises(OutputError, match="Read-only file system"):
        run_entries([survey(entry, None)], job_of(disk, entry), on_event=on_event)
    assert told.count("done") == 3
    arguments = ["run", "cnn-digits", "--out", str(disk), "--device", "cpu"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert f"--out {disk} can't be written to" in refused.stderr
    assert mount(disk, "remount,rw")
    assert do(disk, entry)[0] == {}
    check_same(disk, whole)


def test_a_spectrum_without_memory_is_failed_rows_with_the_remedy(tmp_path):
    entry = tiny(
        recipe=None, stages=("init",), full_stages=(), hessian_batch_size=1024,
        options={"widths": (1024,)},
    )  # fmt: skip
    surveyed = survey(entry, None)
    assert surveyed.graph_bytes > 600 << 20
    out, note = tmp_path / "out", tmp_path / "note"
    # Enough for what is imported, not for the check of the loss, which takes the batch whole.
    process = victim.start(out, surveyed, note=note, memory=500 << 20)
    process.join(400)
    assert process.exitcode == 0
    [(_, _, reason)] = [event for event in json.loads(note.read_text()) if event[0] == "failed"]
    assert reason.startswith("out of memory, use fewer --jobs or a smaller batch")
    rows = spectra_db.load("spectra", source=out)
    assert set(rows["status"]) == {"failed"}
    assert set(rows["reason"]) == {reason}


def test_runs_that_diverge_count_as_such_and_their_stages_fail_with_the_reason(tmp_path):
    # Every rate is absurd: the loss is nan or above the beginning.
    entry = tiny(recipe=replace(RECIPE, sgd_lrs=(1e6, 1e8), adamw_lrs=(1e18, 1e20)))
    failed, _ = do(tmp_path, entry)
    training = spectra_db.load("training", source=tmp_path)
    assert training["diverged"].all()
    assert spectra_db.load("spectra", source=tmp_path, stage="init")["status"].eq("ok").all()
    assert {str(unit) for unit in failed} == {"tiny: weights spectrum at final"}
    [gap] = spectra_db.load("gaps", source=tmp_path).to_dict("records")
    assert gap["status"] == "failed"
    assert "within noise" in gap["reason"]
    rows = spectra_db.load("spectra", source=tmp_path, stage="final")
    assert set(rows["status"]) == {"failed"}
    assert set(rows["reason"]) == set(failed.values())
    again, started = do(tmp_path, entry)
    assert [str(unit) for unit in started] == ["tiny: weights spectrum at final"]
    assert again == failed


def test_a_corrupted_checkpoint_is_named_with_the_remedy_and_made_again(tmp_path, whole):
    entry, out = tiny(), shutil.copytree(whole, tmp_path / "copy")
    for table in ("spectra", "heterogeneity"):
        lose(out, table, is_final)
    path = out / "checkpoints" / "tiny" / "adamw-seed1" / "final.safetensors"

    def corrupt(what: str, unit: Unit, facts: dict[str, object]) -> None:
        if what == "start" and unit.stage == "final":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    run_entries([survey(entry, None)], job_of(out, entry), on_event=corrupt)
    rows = spectra_db.load("spectra", source=out, stage="final")
    assert set(rows["status"]) == {"failed"}
    [reason] = set(rows["reason"])
    assert str(path) in reason
    assert "delete it and train again" in reason
    path.unlink()
    assert do(out, entry)[0] == {}
    check_same(out, whole)


def test_a_torn_table_is_named_and_left_alone(tmp_path, whole):
    out = shutil.copytree(whole, tmp_path / "copy")
    path = out / "training" / "tiny.parquet"
    torn = path.read_bytes()[:-100]
    path.write_bytes(torn)
    with pytest.raises(store.InvalidTable, match=str(path)):
        do(out, tiny())
    assert path.read_bytes() == torn
