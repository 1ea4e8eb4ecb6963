from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from harness.campaign.engines.ray import Tasks
from harness.campaign.plan import missing
from harness.campaign.run import run_entries
from harness.campaign.survey import survey
from harness.campaign.unit import Unit
from harness.records.ledger import Ledger
from tests.harness.campaign.test_run import job_of, tiny

from .test_faults import check_same

pytest.importorskip("ray", reason="Ray is not installed: pip install 'hessian-spectra[ray]'")


def tasks() -> list[int]:
    """Return the processes of this machine that are executing a Ray task of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_do"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_campaign_on_ray_makes_the_same_rows_though_a_worker_is_killed(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    out, entry = tmp_path / "out", tiny()
    surveyed = survey(entry, None)
    killed: list[int] = []
    done: list[Unit] = []

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        if what == "done":
            done.append(unit)
        if len(done) >= 2 and not killed and (victims := tasks()):
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims[0])

    # So small a group that each spectrum is cut in two.
    engine = partial(Tasks, costs={"tiny": surveyed.costs}, jobs=2, group_flops=1e6)
    failed = run_entries([surveyed], job_of(out, entry), engine=engine, on_event=on_event)
    assert failed == {}
    assert killed
    assert len(done) == len(set(done))
    assert list(missing(entry, Ledger(out))) == []
    check_same(out, whole)
