"""How far the forecast of a run is from the run: `python -m benchmarks.forecast NAME...`.

Both in processor time of one thread, which other processes on the machine hardly change.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from harness import registry
from harness.campaign.forecast import measured, outlook
from harness.campaign.run import run_entries
from harness.campaign.survey import survey
from harness.campaign.unit import Unit
from harness.campaign.work import Job
from harness.errors import UserError
from harness.records.ledger import Ledger


def compare(name: str, data_root: Path | None) -> None:
    """Forecast an entry, run it into a folder that is thrown away, and print both."""
    entry = registry.get(name)
    surveyed = survey(entry, data_root)
    if surveyed.reason is not None:
        raise UserError(f"{name} can't be run: {surveyed.reason}")
    rate = measured(surveyed, data_root, "cpu", clock=time.process_time)
    foretold = outlook(surveyed, rate)
    training = surveyed.training_flops / rate.training
    forecast = {"training": training, "spectra": 3600 * foretold.hours - training}
    spent: Counter[str] = Counter()
    begin = time.process_time()

    def on_event(what: str, unit: Unit, facts: dict[str, Any]) -> None:
        nonlocal begin
        if what == "start":
            begin = time.process_time()
        elif what == "done":
            # The forecast of spectra has that of moments in it.
            kind = "training" if unit.kind in ("train", "trial") else "spectra"
            spent[kind] += time.process_time() - begin

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        job = Job(Ledger(out), {name: entry}, data_root, "cpu", "benchmarks.forecast")
        for unit, reason in run_entries([surveyed], job, on_event=on_event).items():
            raise UserError(f"{unit} failed, so that there is nothing to compare: {reason}")
        kept = [*out.glob("*/*.parquet"), *out.glob("checkpoints/**/*.safetensors")]
        disk = sum(path.stat().st_size for path in kept)
    forecast["all"], spent["all"] = sum(forecast.values()), spent.total()
    for what, seconds in forecast.items():
        if not spent[what]:  # an entry that isn't trained
            continue
        ratio = seconds / spent[what]
        print(f"{name:20} {what:9} {seconds:8.1f} s  {spent[what]:8.1f} s  {ratio:.2f}")
    print(
        f"{name:20} disk      {foretold.disk_bytes / 1e6:8.2f} MB {disk / 1e6:8.2f} MB", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    torch.set_num_threads(1)
    root = os.environ.get("HARNESS_DATA_ROOT")
    try:
        for name in parser.parse_args().names:
            compare(name, Path(root) if root else None)
    except UserError as error:
        parser.error(str(error))
