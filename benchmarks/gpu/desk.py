"""What the stages write to: a report, line by line, and tables in a few archives.

The folder that is named holds all there is to go on from: at most eight files below 16 MiB each,
so that it can be carried from a machine that is lent for minutes to the next one.
"""

from __future__ import annotations

import json
import tarfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spectra_db.files import whole

VOLUME_BYTES = 15 << 20  # of an archive
MAX_VOLUMES = 6  # beside the report and the tests' output


@dataclass(frozen=True)
class Desk:
    """Where one stage works.

    Attributes:
        out: Folder of the report and the archives.
        scratch: Folder of the tables themselves.
        device: Where to compute.
        rehearse: Everything tiny.
        stage: Its name.
        deadline: When it must have ended, of `time.monotonic`.
    """

    out: Path
    scratch: Path
    device: str
    rehearse: bool
    stage: str = ""
    deadline: float = float("inf")

    def at(self, stage: str, seconds: float) -> Desk:
        """Return the desk of a stage that has so many seconds."""
        return replace(self, stage=stage, deadline=time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that the stage has left."""
        return self.deadline - time.monotonic()

    @property
    def folder(self) -> Path:
        """Folder of the stage's tables."""
        folder = self.scratch / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def say(self, item: str, **facts: Any) -> None:
        """Append a line to the report, and print it without its long lists."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "stage": self.stage, "item": item, **facts})
        with (self.out / "report.jsonl").open("a") as report:
            report.write(line + "\n")
        shown = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in facts.items()
            if not isinstance(v, list | dict)
        )
        print(f"{self.stage}: {item}:", ", ".join(shown), flush=True)

    def known(self, item: str) -> dict[str, Any] | None:
        """Return what the report says of an item of this stage, the latest."""
        lines = [x for x in report(self.out) if (x["stage"], x["item"]) == (self.stage, item)]
        return lines[-1] if lines else None


def report(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a report; one that was cut off by a kill is left out."""
    path = out / "report.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def pack(scratch: Path, out: Path, stages: list[str]) -> list[str]:
    """Write the tables to OUT/tables-N.tar, those of earlier stages first.

    Checkpoints, locks and what is half written stay behind.

    Returns:
        The files that found no room.
    """
    volumes: list[list[Path]] = [[]]
    used, left_out = 0, []
    for path in (p for stage in stages for p in sorted((scratch / stage).rglob("*"))):
        away = "checkpoints" in path.relative_to(scratch).parts or path.name.startswith(".")
        if away or not path.is_file():
            continue
        size = path.stat().st_size + 1024
        if size > VOLUME_BYTES or (used + size > VOLUME_BYTES and len(volumes) == MAX_VOLUMES):
            left_out.append(str(path.relative_to(scratch)))
            continue
        if used + size > VOLUME_BYTES:
            volumes.append([])
            used = 0
        volumes[-1].append(path)
        used += size
    for number, paths in enumerate(volumes, 1):
        with whole(out / f"tables-{number}.tar") as part, tarfile.open(part, "w") as archive:
            for path in paths:
                archive.add(path, str(path.relative_to(scratch)), recursive=False)
    return left_out


def unpack(out: Path, scratch: Path) -> None:
    """Put the tables of the archives where the stages go on with them."""
    for path in sorted(out.glob("tables-*.tar")):
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
