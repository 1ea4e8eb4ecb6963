"""The spectrum of an entry at a stage: computed block by block into a folder."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.estimator.batches import batch_hash
from harness.estimator.cost import Forecast
from harness.estimator.distributed import Team, rules_together
from harness.estimator.hessian import BlockHessian
from harness.estimator.operators import opened
from harness.estimator.settings import CHOICES, Settings
from harness.estimator.spectrum import OnProgress, Row, gathered, rules
from harness.estimator.summary import block_summaries
from harness.records import version
from harness.records.ledger import Ledger
from harness.records.provenance import describe_run
from harness.training import Problem
from spectra_db.heterogeneity import metrics
from spectra_db.schema import KEYS, LISTS, PROTOCOL_VERSION
from spectra_db.words import WITH_RULE


def take_spectrum(
    problem: Problem,
    settings: Settings,
    ledger: Ledger,
    *,
    command: str,
    on_progress: OnProgress = lambda done, total: None,
    together: Team | None = None,
    cost: Forecast | None = None,
    only: Collection[str] = (),
) -> pd.DataFrame:
    """Compute what is missing of a problem's spectrum and write it block by block.

    Blocks of which the folder holds as many probes and steps, or more, are kept. When
    all blocks are there the tables `blocks` and `heterogeneity` follow (not for `full`).

    Args:
        problem: What is taken.
        settings: How.
        ledger: Where to; with several processes that of process 0, which alone uses it.
        command: What the table `runs` says of how it was started.
        on_progress: Called with (products done, products in all).
        together: The processes that share the work, if there are several.
        cost: What all blocks cost, by which process 0 divides the work.
        only: Blocks to take alone, without what is derived of all of them; empty: all.

    Returns:
        All rows of the spectrum; none in processes that only help.
    """
    blocks = [b for b in problem.blocks(settings.partition) if not only or b.name in only]
    leads = together is None or together.leads
    source = source_of(problem)
    names = {block.name for block in blocks}
    done = stored_rows(problem, settings, ledger) if leads else pd.DataFrame(columns=["block"])
    # The key of table `spectra` does not tell them apart: these would take the place of those.
    by = set(done["product"].fillna(CHOICES["product"][0])) - {settings.product} if leads else set()
    if by:
        raise UserError(
            f"{ledger.folder} holds this spectrum of {problem.entry.name} by {min(by)}: name "
            f"another --out for products by {settings.product}"
        )
    done = done[done["block"].isin(settings.complete(done) & names)] if leads else done
    if settings.gram and (sampled := done.loc[done["method"] == "slq", "block"].nunique()):
        warnings.warn(
            f"{ledger.folder} holds {sampled} of the blocks sampled, and they stay: where Gram "
            "matrices were not asked for, name another --out",
            stacklevel=2,
        )
    run = describe_run(source | settings.key, settings, command)
    stamp = source | {"run_id": run["run_id"]}
    parts: list[Any] = [done.to_dict("records")]

    def write(rows: list[Row]) -> None:
        if len(parts) == 1:  # the first block of this run
            version.note(problem.entry, ledger)
            ledger.write("runs", [run])
        ledger.write("spectra", rows)
        parts.append(rows)

    todo = sorted(names - set(done["block"]))
    if together is not None:
        todo = together.agree(todo)
        if some := [block for block in blocks if block.name in todo]:
            of = (problem.objective, some, settings, stamp)
            rules_together(together, cost, *of, on_block=write, on_progress=on_progress)
        if not leads:
            return gathered([], blocks)
    derives = not only and settings.derives
    if todo or derives:
        with opened(problem.objective, blocks, settings) as hessian:
            if together is None:
                probes = {name: range(settings.num_probes) for name in todo}
                for rows in rules(hessian, settings, stamp, probes=probes, on_progress=on_progress):
                    write(rows)
            if derives:
                write_derived(problem, ledger, hessian, gathered(parts, blocks))
    if not todo:
        on_progress(0, 0)
    return gathered(parts, blocks)


def write_derived(
    problem: Problem,
    ledger: Ledger,
    hessian: BlockHessian,
    rows: pd.DataFrame,
    *,
    names: Collection[str] | None = None,
) -> None:
    """Write what follows from a spectrum that is complete, of settings of which something does.

    Args:
        problem: The model at a stage, and its batch.
        ledger: Where to.
        hessian: All blocks.
        rows: Rows of table `spectra` of all of them.
        names: The metrics to write; None: all.

    Raises:
        UserError: There are several blocks, of which fewer than two are not zero.
    """
    summaries, found = derived_rows(hessian, rows, names)
    ledger.write("blocks", summaries)
    if found.empty and len(summaries) > 1:
        zero = rows.loc[rows["status"] == "zero", "block"].nunique()
        raise UserError(
            f"{zero} of the {len(summaries)} blocks of {problem.entry.name!r} are "
            "exactly zero, so there is nothing to compare; does its head, or the last scale of its "
            "branches, start at zero? Start it elsewhere"
        )
    larger = problem.entry.moments_batch_size
    if len(found) and larger is not None and problem.batch_size < larger:
        # Those of the larger batch that the folder has are kept.
        keys = list(KEYS["heterogeneity"])
        kept = ledger.rows("heterogeneity", problem.entry.name, batch_size=larger)[keys]
        known = pd.MultiIndex.from_frame(found[keys]).isin(pd.MultiIndex.from_frame(kept))
        found = found[~known]
    ledger.write("heterogeneity", found)


def derived_rows(
    hessian: BlockHessian, rows: pd.DataFrame, names: Collection[str] | None = None
) -> tuple[list[Row], pd.DataFrame]:
    """Return the rows of tables `blocks` and `heterogeneity` that follow from a spectrum.

    Args:
        hessian: All blocks.
        rows: Rows of table `spectra` of all of them.
        names: The metrics to take; None: all.

    Returns:
        Those of `heterogeneity` are none where fewer than two blocks are not zero.
    """
    summaries = block_summaries(hessian, rows)
    if rows.loc[rows["status"] == "ok", "block"].nunique() < 2:
        return summaries, pd.DataFrame()
    return summaries, metrics(rows, block_rows=pd.DataFrame(summaries), names=names)


def source_of(problem: Problem) -> dict[str, Any]:
    """Return the columns that say of what a spectrum's rows are."""
    return {
        "model": problem.entry.name,
        "stage": problem.stage,
        "init_seed": problem.init_seed,
        "train_run": problem.train_run,
        "batch_hash": batch_hash(problem.batches),
        "protocol_version": PROTOCOL_VERSION,
        "step": problem.step,
        "progress": problem.progress,
        "data_source": problem.data_source,
    }


def stored_rows(
    problem: Problem, settings: Settings, ledger: Ledger, *, any_batch: bool = False
) -> pd.DataFrame:
    """Return the rows that a folder holds of a spectrum, be they complete or not."""
    key = source_of(problem) | settings.key
    for fact in ("step", "progress", "data_source", *(["batch_hash"] if any_batch else [])):
        del key[fact]
    return ledger.rows("spectra", **key)


def write_failed(problem: Problem, settings: Settings, ledger: Ledger, reason: str) -> None:
    """Write failed rows, with the reason, for the blocks that the folder holds no rows of."""
    stored = stored_rows(problem, settings, ledger)
    present = set(stored.loc[stored["status"].isin(WITH_RULE), "block"])
    common = source_of(problem) | settings.columns | dict.fromkeys(LISTS, ())
    common |= dict.fromkeys(("probe", "probe_seed", "num_steps", "num_products"), 0)
    common |= {
        "run_id": "",
        "method": "slq",
        "breakdown": False,
        "seconds": 0.0,
        "microbatch_size": problem.microbatch_size,
        "batch_size": problem.batch_size,
        "num_terms": problem.num_terms,
        "device": settings.device or "cpu",
        "product": settings.product,
        "status": "failed",
        "reason": reason,
    }
    rows = [
        common | {"block": block.name, "block_kind": block.kind, "num_params": block.num_params}
        for block in problem.blocks(settings.partition)
        if block.name not in present
    ]
    ledger.write("spectra", rows)
