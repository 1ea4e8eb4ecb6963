from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """Return a registry folder that holds the strangers' networks, and none of the tree."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "registry"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("strangers.py"), folder)
    sys.modules.pop("strangers", None)
    return folder
