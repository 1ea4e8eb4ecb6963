"""An environment that holds the base install alone, made of the packages that are here."""

from __future__ import annotations

import subprocess
import tomllib
import venv
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class BaseInstall:
    """An environment with what pyproject.toml requires without an extra, and nothing else."""

    folder: Path
    num_bytes: int

    def run(self, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run Python code in it, with no variable of this environment but what is passed."""
        options = {"capture_output": True, "text": True, "timeout": 500, "env": {}} | options
        return subprocess.run([self.folder / "bin/python", "-I", "-c", code], **options)


def make(folder: Path) -> BaseInstall:
    """Link the base requirements, theirs in turn, and the two packages into a new environment."""
    venv.create(folder, symlinks=True, with_pip=False)
    [site] = folder.glob("lib/python3*/site-packages")
    num_bytes = 0
    for found in _closure(PROJECT["dependencies"]):
        files = [path for path in found.files or [] if ".." not in path.parts]
        for top in {path.parts[0] for path in files} - {"__pycache__"}:
            (site / top).symlink_to(Path(found.locate_file(top)))
        paths = [Path(path.locate()) for path in files]
        num_bytes += sum(path.stat().st_size for path in paths if path.exists())
    for package in ("harness", "spectra_db"):
        (site / package).symlink_to(ROOT / package)
        num_bytes += sum(p.stat().st_size for p in (ROOT / package).rglob("*") if p.is_file())
    return BaseInstall(folder, num_bytes)


def _closure(requirements: list[str]) -> list[Distribution]:
    """Return the installed distributions that pip would install for some requirements."""
    found: dict[str, Distribution] = {}
    left = [(Requirement(text), "") for text in requirements]
    while left:
        wanted, extra = left.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        found[name] = distribution(name)
        extras = ["", *wanted.extras]
        needed = [Requirement(text) for text in found[name].requires or []]
        left += [(need, extra) for need in needed for extra in extras]
    return list(found.values())
