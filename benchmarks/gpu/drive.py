"""Everything that a GPU is asked, in stages by value: one command, minutes.

    python -m benchmarks.gpu --minutes 10 --out DIR

Writes what it finds at once, and goes on where it was stopped. Needs the data sets at
HARNESS_DATA_ROOT (`--pack FOLDER` gathers what it needs of them) and of the dependencies torch,
numpy, scipy, pandas, pyarrow, click, rich, filelock, jinja2, safetensors, timm and transformers,
for the tests pytest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.desk import Desk, pack, unpack
from harness.errors import UserError, reason_of

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Shares of the time; what a stage leaves passes on to those that follow.
STAGES = {"rows": 15, "tests": 15, "products": 15, "spectra": 30, "campaign": 10, "training": 15}
_PACK_EVERY = 15.0  # seconds
_GRACE = 10.0  # seconds that a stage has to end after its time
_UNFINISHED = 3  # exit code of a stage that could go on
_LEAST = 5.0  # seconds that a stage is worth starting with


def main() -> None:
    """Run the stages that are not done yet, each in a process and within its time."""
    options = _options()
    if options.pack is not None:
        from benchmarks.gpu.entries import gather

        gather(options.pack)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-"))
    desk = Desk(options.out, scratch, options.device, options.rehearse)
    try:
        unpack(desk.out, scratch)
        _describe(desk)
        _run_stages(desk, options.only or list(STAGES), end)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not all(_is_done(desk, stage) for stage in options.only or STAGES):
        print(f"stages are left: the same command goes on in {desk.out}")
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of results")
    parser.add_argument("--device", help="(default: cuda, in a rehearsal cpu)")
    parser.add_argument("--rehearse", action="store_true", help="the same stages, tiny")
    parser.add_argument("--only", action="append", choices=list(STAGES), help="a stage, repeatable")
    parser.add_argument("--pack", type=Path, help="gather the data sets here, and stop")
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.rehearse else "cuda")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}; it must be positive")
    return options


def _describe(desk: Desk) -> None:
    """Note what this is computed on."""
    import torch

    from harness.estimator.device import choose_device, device_memory, device_name
    from harness.records.provenance import code_version

    try:
        device = choose_device(torch.nn.Module(), desk.device)
    except UserError as error:
        sys.exit(f"Error: {error}")
    desk.say(
        "machine",
        device=device_name(device),
        memory_gib=device_memory(device) / 2**30,
        cores=os.cpu_count(),
        torch=torch.__version__,
        code=code_version(),
    )


def _run_stages(desk: Desk, names: list[str], end: float) -> None:
    todo = [name for name in names if not _is_done(desk, name)]
    for position, name in enumerate(todo):
        left = end - time.monotonic()
        seconds = left * STAGES[name] / sum(STAGES[n] for n in todo[position:]) - _GRACE / 2
        if seconds < _LEAST:
            desk.at(name, 0).say("end", status="no time left")
            continue
        begin = time.monotonic()
        status = _run(desk.at(name, seconds))
        left_out = pack(desk.scratch, desk.out, list(STAGES))
        facts = {"left_out": left_out} if left_out else {}
        desk.at(name, 0).say("end", status=status, seconds=time.monotonic() - begin, **facts)


def _is_done(desk: Desk, stage: str) -> bool:
    said = desk.at(stage, 0).known("end")
    return said is not None and said["status"] == "done"


def _run(desk: Desk) -> str:
    """Run a stage in a process of its own, so that what breaks one leaves the others whole."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["harness.campaign.metric", "harness.cli.compute", "benchmarks.cases", "torch._inductor"]
    )
    process = context.Process(target=_do, args=(desk,))
    process.start()
    try:
        while process.is_alive() and desk.left > -_GRACE / 2:
            process.join(min(_PACK_EVERY, max(0.1, desk.left + _GRACE / 2)))
            pack(desk.scratch, desk.out, list(STAGES))
    finally:
        stopped = process.is_alive()
        _end(process)
    if stopped or process.exitcode == _UNFINISHED:
        return "its time was over"
    return "done" if process.exitcode == 0 else f"failed: exit code {process.exitcode}"


def _end(process: BaseProcess) -> None:
    """End a stage and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid or 0, sign)
        except ProcessLookupError:
            break
        process.join(_GRACE / 2)


def _do(desk: Desk) -> None:
    os.setpgid(0, 0)
    try:
        finished = stage_of(desk.stage)(desk)
    except Exception as error:
        desk.say("error", reason=reason_of(error), trace=traceback.format_exc().splitlines())
        sys.exit(1)
    sys.exit(0 if finished else _UNFINISHED)


def stage_of(name: str) -> Callable[[Desk], bool]:
    """Return the function that does a stage, and tells whether nothing is left of it."""
    from benchmarks.gpu import campaign, products, rows, spectra

    return {
        "rows": rows.compare_devices,
        "tests": campaign.run_tests,
        "products": products.measure_products,
        "spectra": spectra.take_spectra,
        "campaign": campaign.kill_and_continue,
        "training": campaign.train_entries,
    }[name]
