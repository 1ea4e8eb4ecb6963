"""Where rows come from: the run, the version of the code, the command."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.estimator.settings import Settings
from harness.registry.entry import FACTS, ModelEntry
from spectra_db.schema import PROTOCOL_VERSION


def describe_run(identity: Mapping[str, Any], settings: Settings, command: str) -> dict[str, Any]:
    """Return the row of table `runs`; its id is a hash of what determines the spectra.

    Args:
        identity: What is taken; names model and init_seed.
        settings: How.
        command: The command line.
    """
    import torch

    facts = {
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "device": settings.device or "cpu",
        "num_threads": torch.get_num_threads(),
        "seeds": [identity["init_seed"]],
    }
    text = json.dumps([dict(identity), vars(settings) | facts], sort_keys=True, default=str)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    row = facts | {"model": identity["model"], "run_id": run_id, "command": command}
    return row | {"started": datetime.now(UTC), "protocol_version": PROTOCOL_VERSION}


def describe_model(
    entry: ModelEntry, num_params: int | None, num_blocks: int, reason: str | None = None
) -> dict[str, Any]:
    """Return the row of table `models`.

    Args:
        entry: Its entry.
        num_params: Parameters of the model, None where it could not be built.
        num_blocks: Blocks of the entry's partition.
        reason: Why nothing of it is computed, if that is so.
    """
    return {name: getattr(entry, name) for name in FACTS} | {
        "model": entry.name,
        "num_params": num_params,
        "num_blocks": num_blocks,
        "status": "ok" if reason is None else "pending" if entry.status != "ok" else "failed",
        "reason": reason,
        "protocol_version": PROTOCOL_VERSION,
    }


@cache
def code_version() -> str:
    """Return the package's version, with the commit where the code is a git checkout."""
    root = Path(__file__).parents[2]
    try:
        number = metadata.version("hessian-spectra")
    except metadata.PackageNotFoundError:  # run from its folder, not installed
        number = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    # Installed, the package may lie inside some other project's checkout.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return number
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{number}+{answer.stdout.strip()}" if answer.returncode == 0 else number


def command_line() -> str:
    """Return the command that started this process, without the path of the interpreter."""
    return shlex.join(["harness", *sys.argv[1:]])
