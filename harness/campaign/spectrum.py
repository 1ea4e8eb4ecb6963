"""The spectrum of a registry entry at a stage: computed block by block into the store."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness import tasks
from harness.errors import UserError
from harness.records import version
from spectra_db import store
from spectra_db.derived import rows_of
from spectra_db.heterogeneity import metrics
from spectra_db.schema import KEYS, LISTS, PROTOCOL_VERSION

if TYPE_CHECKING:
    from harness.estimator import Block
    from harness.estimator.cost import Forecast
    from harness.estimator.distributed import Team
    from harness.training import Problem, TrainingRun


@dataclass(frozen=True)
class Settings:
    """How a spectrum is taken; defaults as in `estimate_spectra`, numbers as the entry says."""

    partition: str = "weights"
    num_probes: int = 3
    num_steps: int = 40
    dtype: str = "float32"
    device: str | None = None
    norm_mode: str = "eval"
    probe_distribution: str = "gaussian"
    reorthogonalize: bool = False
    matmul_precision: str = "highest"
    memory_budget: int | None = None

    @property
    def is_protocol(self) -> bool:
        """Whether the arithmetic and the mode are the protocol's defaults."""
        mode = (self.norm_mode, self.dtype, self.probe_distribution, self.matmul_precision)
        return mode == ("eval", "float32", "gaussian", "highest")


def blocks_of(problem: Problem, partition: str) -> list[Block]:
    """Return the blocks of a problem's model."""
    from harness.estimator import find_blocks

    entry = problem.entry
    return find_blocks(
        problem.model, partition, paper_blocks=entry.paper_blocks, kinds=entry.blocks
    )


def forecast_of(
    problem: Problem,
    partition: str,
    num_probes: int,
    num_steps: int,
    *,
    exact_size: int | None = None,
    norm_mode: str = "eval",
) -> Forecast:
    """Return what a spectrum of a problem costs.

    Found from one product per block on one sample; `exact_size` and `norm_mode` as in
    `estimate_spectra`.
    """
    from harness.estimator.cost import EXACT_SIZE, forecast

    return forecast(
        problem.model,
        problem.loss_fn,
        problem.batches,
        blocks_of(problem, partition),
        num_probes=num_probes,
        num_steps=num_steps,
        exact_size=EXACT_SIZE if exact_size is None else exact_size,
        norm_mode=norm_mode,
    )


def take_spectrum(
    problem: Problem,
    settings: Settings,
    out: Path,
    *,
    command: str,
    on_progress: Callable[[int, int], None] | None = None,
    together: Team | None = None,
    cost: Forecast | None = None,
    only: Collection[str] = (),
) -> pd.DataFrame:
    """Compute what is missing of a problem's spectrum and write it block by block.

    Blocks of which the store holds as many probes and steps, or more, are kept. When
    all blocks are there the tables `blocks` and `heterogeneity` follow (not for `full`).

    Args:
        problem: What is taken.
        settings: How.
        out: Folder of the tables; with several processes that of process 0, which alone uses it.
        command: What the table `runs` says of how it was started.
        on_progress: Called with (products done, products in all).
        together: The processes that share the work, if there are several.
        cost: What all blocks cost, by which process 0 divides the work.
        only: Blocks to take alone, without what is derived of all of them; empty: all.

    Returns:
        All rows of the spectrum; none in processes that only help.
    """
    from harness.estimator import estimate_spectra

    blocks = blocks_of(problem, settings.partition)
    if only:
        blocks = [block for block in blocks if block.name in only]
    identity = identity_of(problem, settings)
    leads = together is None or together.leads
    done = _finished_rows(out, identity, blocks, settings) if leads else pd.DataFrame()
    todo = [block for block in blocks if leads and block.name not in set(done["block"])]
    estimate: Callable[..., pd.DataFrame] = estimate_spectra
    if together is not None:
        from harness.estimator.distributed import estimate_together

        names = together.agree([block.name for block in todo])
        todo = [block for block in blocks if block.name in names]
        estimate = partial(estimate_together, together, cost)
    if not todo and on_progress is not None:
        on_progress(0, 0)
    if todo:
        run = describe_run(identity, settings, problem.init_seed, command)

        def write_block(rows: list[dict[str, Any]]) -> None:
            version.note(problem.entry, out)
            store.write(out, "runs", [run])
            store.write(out, "spectra", rows)

        fresh = estimate(
            problem.model,
            problem.loss_fn,
            problem.batches,
            blocks=todo,
            num_probes=settings.num_probes,
            num_steps=settings.num_steps,
            identity=identity | facts_of(problem, run),
            **options_of(problem, settings),
            on_progress=on_progress,
            on_block=write_block,
        )
        done = fresh if done.empty else pd.concat([done, fresh], ignore_index=True)
    if not leads:
        return done
    order = {block.name: i for i, block in enumerate(blocks)}
    rows = done.sort_values(
        ["block", "probe"], key=lambda c: c.map(order) if c.name == "block" else c
    ).reset_index(drop=True)
    if not only:
        write_derived(problem, settings, out, blocks, rows)
    return rows


def write_derived(
    problem: Problem,
    settings: Settings,
    out: Path,
    blocks: list[Block],
    rows: pd.DataFrame,
    *,
    names: Collection[str] | None = None,
) -> None:
    """Write the tables `blocks` and `heterogeneity` of a spectrum that is complete.

    They have no column for other settings: they follow the protocol's alone.

    Args:
        problem: The model at a stage, and its batch.
        settings: How the spectrum was taken.
        out: Folder of the tables.
        blocks: All blocks.
        rows: Rows of table `spectra` of all of them.
        names: The metrics to write; None: all.

    Raises:
        UserError: Fewer than two blocks are not zero.
    """
    from harness.estimator.summary import block_summaries

    if settings.partition == "full" or not settings.is_protocol:
        return
    summaries = block_summaries(
        problem.model,
        problem.loss_fn,
        problem.batches,
        blocks,
        rows,
        batch_weights=options_of(problem, settings)["batch_weights"],
        device=settings.device,
        memory_budget=settings.memory_budget,
    )
    store.write(out, "blocks", summaries)
    nonzero = rows.loc[rows["status"] == "ok", "block"].nunique()
    if len(blocks) > 1 and nonzero < 2:
        raise UserError(
            f"{len(blocks) - nonzero} of the {len(blocks)} blocks of {problem.entry.name!r} are "
            "exactly zero, so there is nothing to compare; does its head, or the last scale of its "
            "branches, start at zero? Start it elsewhere"
        )
    if nonzero >= 2:
        found = metrics(rows, block_rows=pd.DataFrame(summaries), names=names)
        if problem.batch_size < (problem.entry.moments_batch_size or 0):
            found = _without_moments(found, problem, out)
        store.write(out, "heterogeneity", found)


def _without_moments(found: pd.DataFrame, problem: Problem, out: Path) -> pd.DataFrame:
    """Leave out the metrics that the store holds of the entry's larger batch."""
    stored = rows_of(out, "heterogeneity", problem.entry.name)
    stored = stored[stored["batch_size"] == problem.entry.moments_batch_size]
    keys = list(KEYS["heterogeneity"])
    larger = pd.MultiIndex.from_frame(stored[keys])
    return found[~pd.MultiIndex.from_frame(found[keys]).isin(larger)]


def options_of(problem: Problem, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `estimate_spectra` that settings stand for, but the numbers."""
    from harness.estimator.spectrum import DTYPES

    entry = problem.entry
    return {
        "seed": problem.init_seed,
        "device": settings.device,
        "dtype": DTYPES[settings.dtype],
        "batch_weights": tasks.get(entry.task, **entry.task_options).count_of(problem.batches),
        "probe_distribution": settings.probe_distribution,
        "reorthogonalize": settings.reorthogonalize,
        "norm_mode": settings.norm_mode,
        "matmul_precision": settings.matmul_precision,
        "memory_budget": settings.memory_budget,
    }


def facts_of(problem: Problem, run: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of rows that say where they come from."""
    return {
        "run_id": run["run_id"],
        "step": problem.step,
        "progress": problem.progress,
        "data_source": problem.data_source,
    }


def write_failed_blocks(problem: Problem, settings: Settings, out: Path, reason: str) -> None:
    """Write failed rows, with the reason, for the blocks that the store holds no rows of."""
    identity = identity_of(problem, settings)
    stored = stored_rows(out, identity)
    present = set(stored.loc[stored["status"].isin(["ok", "zero"]), "block"])
    common = identity | {
        "probe": 0,
        "run_id": "",
        "step": problem.step,
        "progress": problem.progress,
        "method": "slq",
        "probe_seed": 0,
        "num_steps": 0,
        "reorthogonalized": settings.reorthogonalize,
        "breakdown": False,
        "num_products": 0,
        "seconds": 0.0,
        "microbatch_size": problem.microbatch_size,
        "batch_size": problem.batch_size,
        "num_terms": problem.num_terms,
        "data_source": problem.data_source,
        "matmul_precision": settings.matmul_precision,
        "device": settings.device or "cpu",
        "status": "failed",
        "reason": reason,
    }
    common |= dict.fromkeys(LISTS, ())
    rows = [
        common | {"block": block.name, "block_kind": block.kind, "num_params": block.num_params}
        for block in blocks_of(problem, settings.partition)
        if block.name not in present
    ]
    store.write(out, "spectra", rows)


def write_training(run: TrainingRun, out: Path) -> None:
    """Write the rows of a training run; spectra of stages whose weights it changed are pending.

    They would be taken for those of the new weights, which nothing in their key tells apart.
    """
    from harness.training.stages import run_name

    if run.stage_rows:
        first = run.stage_rows[0]
        model, seed = first["model"], first["seed"]
        known = rows_of(out, "stages", model)
        known = known[(known["optimizer"] == first["optimizer"]) & (known["seed"] == seed)]
        before = dict(zip(known["stage"], known["checkpoint_sha256"], strict=True))
        now = {row["stage"]: row["checkpoint_sha256"] for row in run.stage_rows}
        changed = [stage for stage in now if before.get(stage, now[stage]) != now[stage]]
        rows = rows_of(out, "spectra", model)
        if changed:
            stale = rows["stage"].isin(changed) & (rows["train_run"] == run_name(seed))
            reason = "the stage was trained again, with other weights"
            one_each = rows[stale & (rows["probe"] == 0)].copy()
            for column in LISTS:
                one_each[column] = [()] * len(one_each)
            store.write(out, "spectra", one_each.assign(status="pending", reason=reason))
        store.write(out, "stages", run.stage_rows)
    store.write(out, "training", run.rows)


def checkpoint_sha256(out: Path, model: str, stage: str, seed: int) -> str | None:
    """Return the hash that table `stages` has of a checkpoint, None where it has none."""
    rows = rows_of(out, "stages", model)
    rows = rows[(rows["optimizer"] == "adamw") & (rows["seed"] == seed) & (rows["stage"] == stage)]
    return None if rows.empty else str(rows.iloc[0]["checkpoint_sha256"])


def identity_of(problem: Problem, settings: Settings) -> dict[str, Any]:
    """Return the columns that all rows of one spectrum share with no other spectrum."""
    from harness.estimator.checks import batch_hash

    return {
        "model": problem.entry.name,
        "stage": problem.stage,
        "init_seed": problem.init_seed,
        "train_run": problem.train_run,
        "partition": settings.partition,
        "operator": "hessian",
        "norm_mode": settings.norm_mode,
        "dtype": settings.dtype,
        "probe_distribution": settings.probe_distribution,
        "batch_hash": batch_hash(problem.batches),
        "protocol_version": PROTOCOL_VERSION,
    }


def stored_rows(out: Path, identity: dict[str, Any]) -> pd.DataFrame:
    """Return the rows of one spectrum in the store."""
    rows = rows_of(out, "spectra", identity["model"])
    for column, value in identity.items():
        rows = rows[rows[column] == value]
    return rows


def _finished_rows(
    out: Path, identity: dict[str, Any], blocks: list[Block], settings: Settings
) -> pd.DataFrame:
    """Return the stored rows of blocks that have these settings, no fewer probes and steps."""
    rows = stored_rows(out, identity)
    rows = rows[rows["status"].isin(["ok", "zero"]) & rows["block"].isin([b.name for b in blocks])]
    asked = (rows["num_steps"] >= settings.num_steps) | rows["breakdown"]
    asked &= rows["reorthogonalized"] == settings.reorthogonalize
    asked &= rows["matmul_precision"] == settings.matmul_precision
    single = (rows["method"] == "exact") | (rows["status"] == "zero")
    per_block = (asked | single).groupby(rows["block"]).sum()
    needed = single.groupby(rows["block"]).any().map({True: 1, False: settings.num_probes})
    complete = per_block[per_block >= needed].index
    return rows[rows["block"].isin(complete)]


def describe_run(
    identity: dict[str, Any], settings: Settings, seed: int, command: str
) -> dict[str, Any]:
    """Return the row of table `runs`; its id is a hash of what determines the spectra."""
    import torch

    facts = {
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "device": settings.device or "cpu",
        "num_threads": torch.get_num_threads(),
        "seeds": [seed],
    }
    text = json.dumps([identity, vars(settings) | facts], sort_keys=True, default=str)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    row = facts | {"model": identity["model"], "run_id": run_id, "command": command}
    return row | {"started": datetime.now(UTC), "protocol_version": PROTOCOL_VERSION}


@cache
def code_version() -> str:
    """Return the package's version, with the commit where the code is a git checkout."""
    root = Path(__file__).parents[1]
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
