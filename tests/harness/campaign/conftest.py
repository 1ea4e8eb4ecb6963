from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.processes import FORKS


@pytest.fixture
def _quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork workers from a process that has imported what they need."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, to be read or copied."""
    from tests.harness.campaign.test_run import do, survey, tiny

    out = tmp_path_factory.mktemp("whole")
    failed, started = do(out, tiny())
    assert not failed
    assert len(started) == survey(tiny(), None).num_units
    return out
