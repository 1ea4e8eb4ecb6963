"""Processes of their own for tests, forked from one that has imported what is slow to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

# All tests of a process share one server, so it imports what any of them needs; and nothing of the
# Hub's client, which reads its environment when it is imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    __name__, "harness.cli", "harness.campaign.run", "harness.estimator.distributed",
    "harness.training.loop", "pandas", "sklearn.datasets", "spectra_db.check",
    "spectra_db.publish", "spectra_db.store", "tests.harness.campaign.victim",
    # What torch imports at the first spectrum or optimizer, and the Hub's client at its import.
    "torch._inductor", "httpx2", "yaml",
])  # fmt: skip


class Process:
    """Python code, or `harness` with arguments, in a process and an environment of its own.

    Args:
        arguments: The code alone, or the arguments.
        env: What its environment has beside this process's, of which it gets nothing of the Hub.
        folder: Where it prints, to NUMBER.out and NUMBER.err.
    """

    def __init__(self, arguments: Sequence[object], env: Mapping[str, str], folder: Path) -> None:
        number = len(list(folder.glob("*.out")))
        self.outputs = [folder / f"{number}.{kind}" for kind in ("out", "err")]
        for path in self.outputs:
            path.touch()
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.process = FORKS.Process(
            target=_work, args=(arguments, ours | dict(env), os.getcwd(), self.outputs)
        )
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.process.exitcode

    def communicate(self) -> tuple[int, str, str]:
        """Wait, and return the exit code and what was printed."""
        self.process.join(timeout=500)
        assert self.poll() is not None
        return self.poll(), *(path.read_text() for path in self.outputs)


def _work(
    arguments: Sequence[object], env: dict[str, str], folder: str, outputs: list[Path]
) -> None:
    assert "huggingface_hub" not in sys.modules
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    warnings.filterwarnings("always", category=UserWarning, module="spectra_db")
    if len(arguments) > 1:
        from harness import cli

        cli.main([str(argument) for argument in arguments])
    else:
        exec(str(arguments[0]), {"__name__": "__main__"})
