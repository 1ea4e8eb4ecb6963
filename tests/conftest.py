"""What all tests share: the data sets, and the device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests that take a device compute")


@pytest.fixture(scope="session")
def data_root() -> Path:
    root = Path(
        os.environ.get("HARNESS_DATA_ROOT")
        or Path(__file__).resolve().parents[1].parent / "shared/data"
    )
    if not root.is_dir():
        pytest.skip(f"the data packs are not at {root}; set HARNESS_DATA_ROOT")
    return root
