"""A whole run in a process that can be killed, as quick to start as a fork."""

from __future__ import annotations

import json
import resource
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from harness.campaign.run import run_entries
from harness.campaign.survey import Survey
from harness.campaign.unit import Unit
from harness.errors import OutputError
from tests.harness.campaign.test_run import job_of
from tests.processes import FORKS


def start(out: Path, surveyed: Survey, **options: object) -> ForkServerProcess:
    """Start a run of an entry."""
    process = FORKS.Process(target=work, args=(out, surveyed), kwargs=options, daemon=True)
    process.start()
    return process


def work(out: Path, surveyed: Survey, *, note: Path | None = None, memory: int = 0) -> None:
    """Run an entry.

    Args:
        out: Folder of the tables.
        surveyed: What to run.
        note: File for the units that were done and failed, as JSON.
        memory: Bytes that may be allocated on top of what the process has; 0: any.
    """
    import torch

    torch.set_num_threads(1)
    told: list[tuple[str, str, str]] = []

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        told.append((what, str(unit), str(facts.get("reason", ""))))

    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, resource.RLIM_INFINITY)
        )
    try:
        run_entries([surveyed], job_of(out, surveyed.entry), on_event=on_event)
    except OutputError as error:
        told.append(("stopped", "", str(error)))
    if note is not None:
        note.write_text(json.dumps(told))
