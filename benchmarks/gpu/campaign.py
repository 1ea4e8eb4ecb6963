"""What a user of a GPU would do: the tests there, a campaign that is killed, and entries whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.gpu.desk import Desk
from benchmarks.gpu.entries import REHEARSAL, TINY
from harness.campaign.plan import missing
from harness.records.ledger import Ledger
from harness.registry import ModelEntry, entries, get
from spectra_db import store

ROOT = Path(__file__).parents[2]
TESTS = ("estimator", "training", "campaign")  # folders of tests/harness
_UNITS_BEFORE_KILL = 2
_END = 15.0  # seconds that a campaign has to end after it is asked to


def run_tests(desk: Desk) -> bool:
    """Run the tests that take a device on it; their output is kept in tests.txt."""
    places = [f"tests/harness/{name}" for name in TESTS]
    if desk.rehearse:
        places = ["tests/harness/estimator/test_lanczos.py"]
    command = [sys.executable, "-m", "pytest", "--device", desk.device, "-p", "no:cacheprovider"]
    command += ["--tb=short", "-rfEs", *places]
    path = desk.out / "tests.txt"
    with path.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=output, timeout=desk.left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = path.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    desk.say("tests", exit_code=code, said=lines[-1] if lines else "", failed=failed)
    return code is not None


def kill_and_continue(desk: Desk) -> bool:
    """Run the demo entries, kill the command in the midst, and let the same command go on."""
    out, log = desk.folder / "demo", desk.folder / "demo.jsonl"
    command = ["run", *_some(desk, "demo"), "--device", desk.device, "--out", str(out)]
    command += ["--jobs", "1" if desk.rehearse else "4", "--log", str(log)]
    if not desk.known("kill"):
        process = harness(*command)
        while process.is_alive() and _done(log) < _UNITS_BEFORE_KILL and desk.left > 0:
            time.sleep(0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        desk.say("kill", units_done=_done(log), rows=check_tables(out))
    before = check_tables(out)
    finish(harness(*command), desk.left)
    left = [str(unit) for entry in _demo(desk, out) for unit in missing(entry, Ledger(out))]
    facts = {"rows_before": before, "rows": check_tables(out), "units_done": _done(log)}
    desk.say("continuation", units_left=len(left), left=left, **facts)
    return not left


def train_entries(desk: Desk) -> bool:
    """Let the campaign of the ranked entries go on as far as the time allows."""
    out, log = desk.folder / "tables", desk.folder / "log.jsonl"
    jobs = 1 if desk.rehearse else max(1, (os.cpu_count() or 2) // 2)
    command = ["run", *_some(desk, "ranked"), "--device", desk.device, "--out", str(out)]
    process = harness(*command, "--jobs", str(jobs), "--log", str(log))
    ended = finish(process, desk.left - _END)
    rows = check_tables(out)
    desk.say("training", tier="ranked", jobs=jobs, ended=ended, units=_done(log), rows=rows)
    return ended


def harness(*arguments: str) -> BaseProcess:
    """Start a command of the harness in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(arguments,))
    process.start()
    return process


def _main(arguments: tuple[str, ...]) -> None:
    from harness.cli import main

    sys.argv = ["harness", *arguments]
    main()


def finish(process: BaseProcess, seconds: float) -> bool:
    """Wait for a command, and ask it to stop when the time is over; tell whether it ended."""
    process.join(max(0.0, seconds))
    ended = not process.is_alive()
    if not ended:
        process.terminate()
        process.join(_END)
        process.kill()
    return ended


def check_tables(out: Path) -> int:
    """Read all tables, which validates them; return the number of rows."""
    paths = out.glob("*/*.parquet")
    return sum(store.read(path, path.parent.name).num_rows for path in paths)


def _some(desk: Desk, tier: str) -> list[str]:
    return [TINY, "--registry", str(REHEARSAL)] if desk.rehearse else ["--tier", tier]


def _demo(desk: Desk, out: Path) -> list[ModelEntry]:
    """Return the entries of the campaign whose data are here."""
    chosen = [get(TINY, registry_dir=REHEARSAL)] if desk.rehearse else entries("demo")
    return [e for e in chosen if not Ledger(out).rows("models", e.name, status="ok").empty]


def _done(log: Path) -> int:
    """Count the units that a log says are done."""
    text = log.read_text() if log.exists() else ""
    lines = [line for line in text.splitlines() if line.endswith("}")]
    return sum(json.loads(line)["event"] == "done" for line in lines)
