"""Recompute published rows from their recorded seeds, one probe each."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import spectra_db
from harness.errors import UserError, reason_of
from harness.estimator import gram, shortcuts
from harness.estimator.batches import batch_hash
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import lanczos
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import CHOICES, Settings
from harness.records.derived import derived
from harness.registry import ModelEntry
from harness.submission import locate
from harness.training import Problem, load_problem
from harness.training.stages import STAGE_SEED, checkpoint_path
from spectra_db import rules, store, verified
from spectra_db.derived import DERIVED, differences, rows_of, wrong_rules
from spectra_db.files import sha256_of
from spectra_db.jackknife import MIN_PROBES
from spectra_db.loading import optional
from spectra_db.quadrature import gauss_rule
from spectra_db.verified import Extent


@dataclass(frozen=True)
class Check:
    """What came of one row.

    Attributes:
        model, stage, partition, block, probe: Which row; of a training run stage is "training",
            block its optimizer and rate, probe its seed; of a table made anew stage is "table".
        outcome: agrees, deviates, or unverifiable: it can't be recomputed here.
        deviation: Distance between the published rule and the recomputed one, as
            `spectra_db.rules.Difference` has it, over the published rule's rms eigenvalue; None
            where nothing was recomputed.
        allowed: The largest deviation that rounding and the truncation error explain.
        reason: Why the outcome is not agrees.
    """

    model: str
    stage: str
    partition: str
    block: str
    probe: int
    outcome: str
    deviation: float | None = None
    allowed: float | None = None
    reason: str | None = None


class TooLong(Exception):  # noqa: N818
    """What was begun would not end within the time that is left."""


class Unverifiable(UserError):  # noqa: N818
    """A row that can't be recomputed here; the text says why."""


def sample_rows(rows: pd.DataFrame, num_rows: int, seed: int) -> pd.DataFrame:
    """Draw rows of table `spectra`, without replacement, in random order."""
    return rows.sample(n=min(num_rows, len(rows)), random_state=seed)


def at_hand(
    rows: pd.DataFrame,
    find_entry: Callable[[str], ModelEntry],
    checkpoint_dir: Path | None,
) -> pd.DataFrame:
    """Return the rows whose weights follow from their seed, or whose checkpoint is there.

    Args:
        rows: Rows of table `spectra`.
        find_entry: As `verify_sample`; rows of entries that it doesn't know are left out.
        checkpoint_dir: Folder of checkpoints; None for none.
    """

    def is_there(model: str, stage: str, seed: int) -> bool:
        try:
            needed = _checkpoint_of(find_entry(model), stage, seed)
        except UserError:
            return False
        if needed is None or checkpoint_dir is None:
            return needed is None
        return checkpoint_path(checkpoint_dir, *needed).is_file()

    places = rows[["model", "stage", "init_seed"]]
    known = {p: is_there(*p) for p in places.drop_duplicates().itertuples(index=False, name=None)}
    return rows[[known[place] for place in places.itertuples(index=False, name=None)]]


def verify(
    row: dict[Any, Any],
    entry: ModelEntry,
    stages: pd.DataFrame,
    *,
    data_root: Path | None = None,
    checkpoint_dir: Path | None = None,
    device: str | None = None,
    deadline: float = float("inf"),
) -> Check:
    """Recompute one row of table `spectra` and compare.

    The rule must be that of its coefficients, data and batch those of the entry here, and the first
    coefficients and the rules as close as `spectra_db.rules` says.

    Args:
        row: The published row.
        entry: Its entry.
        stages: Rows of table `stages` published beside it; they have the checkpoints' sha256.
        data_root: Folder of data sets.
        checkpoint_dir: Folder of checkpoints; stages after init need theirs.
        device: Where to compute.
        deadline: When it must end, in the time of `time.monotonic`.

    Raises:
        TooLong: By the time of its second product it would end later.
    """
    try:
        if wrong_rules(pd.DataFrame([row])).any():
            raise _Wrong("the rule is not that of its alphas and betas")
        problem = _problem(row, entry, stages, data_root, checkpoint_dir)
        other = _recompute(row, problem, device, deadline)
    except TooLong:
        raise
    except UserError as error:
        return _check(row, "unverifiable", reason=str(error))
    except _Wrong as error:
        return _check(row, "deviates", reason=str(error))
    except Exception as error:  # of the author's code
        said = reason_of(error) + locate.frame_of(error)
        return _check(row, "unverifiable", reason=said)
    found = rules.compare(row | other, row)
    rms = float(np.sqrt(row["weights"] @ row["nodes"] ** 2))
    if rms == 0.0:
        return _check(row, "deviates", reason="the published rule is zero, its status is ok")
    reason = None
    if not found.is_first_alike:
        reason = (
            f"the first products differ by {found.first:.1e} of their size: another probe or batch"
        )
    elif not found.is_explained:
        reason = "the rules are further apart than rounding and truncation explain"
    outcome = "agrees" if reason is None else "deviates"
    size = {"deviation": found.distance / rms, "allowed": found.allowed / rms}
    return _check(row, outcome, **size, reason=reason)


def verify_sample(
    rows: pd.DataFrame,
    stages: pd.DataFrame,
    find_entry: Callable[[str], ModelEntry],
    *,
    budget: float,
    data_root: Path | None = None,
    checkpoint_dir: Path | None = None,
    device: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Check]:
    """Verify rows one after another; give up those that would not end within the budget.

    Args:
        rows: Rows of table `spectra`, as `sample_rows` returns them.
        stages: Table `stages` beside them.
        find_entry: Name ↦ entry; raises UserError for a name it doesn't know.
        budget: Seconds. What a row takes follows from its second product here.
        data_root: Folder of data sets.
        checkpoint_dir: Folder of checkpoints.
        device: Where to compute.
        on_progress: Called with (rows done, rows in all).

    Returns:
        One check per row that was not given up, in the order of the rows.
    """
    deadline = time.monotonic() + budget
    checks = []
    for done, row in enumerate(rows.to_dict("records")):
        on_progress(done, len(rows))
        if time.monotonic() > deadline:
            break
        try:
            entry = find_entry(row["model"])
        except UserError as error:
            checks.append(_check(row, "unverifiable", reason=str(error)))
            continue
        mine = stages[stages["model"].isin([entry.name, entry.pretrained])]
        where: dict[str, Any] = {
            "data_root": data_root,
            "checkpoint_dir": checkpoint_dir,
            "device": device,
            "deadline": deadline,
        }
        with suppress(TooLong):
            checks.append(verify(row, entry, mine, **where))
    on_progress(len(rows), len(rows))
    return checks


def mark_verified(
    root: Path, checks: Sequence[Check], chosen: pd.DataFrame, rows: pd.DataFrame
) -> None:
    """Note which models everything that was drawn agreed of, and how much that was.

    Args:
        root: Folder of tables.
        checks: What came of the rows, runs and tables.
        chosen: The rows that were drawn.
        rows: All rows that could be drawn.

    Raises:
        UserError: The tables are not in a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder of tables: what is verified is noted beside them")
    agreed, wrong = {}, set()
    for model, drawn in chosen.groupby("model"):
        mine = [check for check in checks if check.model == model]
        outcomes = {check.outcome for check in mine}
        places = Counter(check.stage for check in mine)
        runs, tables = places.pop("training", 0), places.pop("table", 0)
        if "deviates" in outcomes:
            wrong.add(str(model))
        elif outcomes == {"agrees"} and len(mine) - runs - tables == len(drawn):
            known = runs_of(rows_of(root, "training", str(model)))
            holds = int(rows["model"].eq(model).sum())
            agreed[str(model)] = Extent(len(drawn), holds, runs, len(known))
    verified.mark(root, agreed, wrong)


def runs_of(training: pd.DataFrame) -> list[tuple[str, float, int]]:
    """Return (optimizer, rate, seed) of each training run that did not diverge."""
    found = training.loc[~training["diverged"], ["optimizer", "lr", "seed"]].drop_duplicates()
    return list(found.itertuples(index=False, name=None))


def _check(row: dict[Any, Any], outcome: str, **found: Any) -> Check:
    names = ("model", "stage", "partition", "block", "probe")
    return Check(**{name: row[name] for name in names}, outcome=outcome, **found)


class _Wrong(Exception):  # noqa: N818
    """What a row says of itself is not so."""


def _problem(
    row: dict[Any, Any],
    entry: ModelEntry,
    published: pd.DataFrame,
    data_root: Path | None,
    checkpoint_dir: Path | None,
) -> Problem:
    """Load the row's problem, from weights and data that are provably the published ones."""
    needed = _checkpoint_of(entry, row["stage"], row["init_seed"])
    if needed is not None:
        _check_checkpoint(published, *needed, checkpoint_dir)
    problem = load_problem(
        entry,
        row["stage"],
        row["init_seed"],
        data_root=data_root,
        checkpoint_dir=checkpoint_dir,
    )
    elsewhere = f"the data here are {problem.data_source}, not {row['data_source']}"
    if batch_hash(problem.batches) != row["batch_hash"]:
        same = problem.data_source == row["data_source"]
        raise _Wrong("the data are the same, the batch is not" if same else elsewhere)
    if problem.data_source != row["data_source"]:
        raise _Wrong(elsewhere)
    return problem


def _checkpoint_of(entry: ModelEntry, stage: str, seed: int) -> tuple[str, int, str] | None:
    """Return model, seed and stage of the weights that a stage has; None: its seed gives them."""
    if stage != "init":
        return entry.name, seed, stage
    return None if entry.pretrained is None else (entry.pretrained, STAGE_SEED, "final")


def _check_checkpoint(
    published: pd.DataFrame, model: str, seed: int, stage: str, checkpoint_dir: Path | None
) -> None:
    """Raise unless the checkpoint lies here and is the published one."""
    known = published[
        (published["model"] == model)
        & (published["stage"] == stage)
        & (published["seed"] == seed)
        & (published["optimizer"] == "adamw")
    ]
    if known.empty:
        raise Unverifiable(f"table stages has no checkpoint of {model} at {stage}")
    path = checkpoint_path(checkpoint_dir or "", model, seed, stage)
    if checkpoint_dir is None or not path.is_file():
        raise Unverifiable(f"the checkpoint of {model} at {stage} is not here")
    if sha256_of(path) != known.iloc[0]["checkpoint_sha256"]:
        raise Unverifiable(f"the checkpoint of {model} at {stage} here is not the published one")


def _recompute(
    row: dict[Any, Any], problem: Problem, device: str | None, deadline: float
) -> dict[str, Any]:
    """Return alphas, betas, nodes and weights of the row's block and probe."""
    found = problem.blocks(row["partition"])
    block = next((b for b in found if b.name == row["block"]), None)
    if block is None:
        raise _Wrong(f"{problem.entry.name} has no block {row['block']!r} in {row['partition']}")
    if block.num_params != row["num_params"]:
        raise _Wrong(f"the block has {block.num_params} parameters, not {row['num_params']}")
    product = row.get("product")  # null in rows that are older than the column
    settings = Settings(
        row["partition"],
        dtype=row["dtype"],
        device=device,
        norm_mode=row["norm_mode"],
        matmul_precision=row["matmul_precision"],
        operator=row["operator"],
        product=product if isinstance(product, str) else CHOICES["product"][0],
    )
    with opened(problem.objective, [block], settings) as hessian:
        if row["norm_mode"] == "train" and hessian.microbatch_size != row["microbatch_size"]:
            raise Unverifiable(f"batch statistics of {row['microbatch_size']} samples don't fit")
        count = block.num_params if row["method"] == "exact" else row["num_steps"]
        if row["method"] == "slq":  # as it was taken, with as many probes as an error needs
            shortcuts.prepare(hessian, [0], MIN_PROBES * count)
        multiply = _timed(lambda v: hessian.products([(0, v)])[0], count, deadline)
        if row["method"] == "exact":
            if found := _by_gram(row, hessian):
                return found
            for _ in range(min(2, count)):
                multiply(torch.ones(count, dtype=hessian.dtype, device=hessian.device))
            eigenvalues = torch.linalg.eigvalsh(hessian.dense(0).double()).cpu().numpy()
            weights = np.full(len(eigenvalues), 1 / len(eigenvalues))
            return {"alphas": [], "betas": [], "nodes": eigenvalues, "weights": weights}
        names = (row["init_seed"], row["model"], row["stage"], row["block"], row["probe"])
        if probe_seed(*names) != row["probe_seed"]:
            raise _Wrong("the probe's seed is not the one of its name")
        v0 = draw_probe(block.num_params, row["probe_seed"], row["probe_distribution"])
        run = lanczos(
            multiply,
            v0.to(hessian.device, hessian.dtype),
            row["num_steps"],
            reorthogonalize=row["reorthogonalized"],
        )
    nodes, weights = gauss_rule(run.alphas, run.betas)
    return {"alphas": run.alphas, "betas": run.betas, "nodes": nodes, "weights": weights}


def _by_gram(row: dict[Any, Any], hessian: BlockHessian) -> dict[str, Any] | None:
    """Return nodes and weights of an exact row that is of a Gram matrix; None if it is not."""
    n = row["num_params"]
    if row["num_products"] == n:  # one for each parameter
        return None
    for _, (nodes, weights), _ in gram.spectra(hessian, [0]):
        return {"alphas": [], "betas": [], "nodes": np.array(nodes), "weights": np.array(weights)}
    return None


def _timed(
    product: Callable[[torch.Tensor], torch.Tensor], count: int, deadline: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the product; the second call of `count` tells when the last would end."""
    calls = itertools.count(1)

    def timed(v: torch.Tensor) -> torch.Tensor:
        begin, call = time.monotonic(), next(calls)
        result = product(v)
        now = time.monotonic()
        if now > deadline or (call == 2 and now + (now - begin) * (count - 2) > deadline):
            raise TooLong
        return result

    return timed


def verify_tables(
    folder: Path, models: Collection[str], find_entry: Callable[[str], ModelEntry]
) -> list[Check]:
    """Make tables anew that follow from others, and compare; one check per model and table.

    Args:
        folder: Folder of tables.
        models: Their names; the gap of one whose entry is not known can't be made anew.
        find_entry: As `verify_sample`.
    """
    checks = []
    for model in sorted(models):
        row = {"model": model, "stage": "table", "partition": "", "probe": 0}
        known, unknown = derived(find_entry), ""
        try:
            find_entry(model)
        except UserError as error:
            unknown = str(error)
        for table, derive in known.items():
            if not store.path_of(folder, table, model).is_file():
                continue
            if unknown and table not in DERIVED:
                checks.append(_check(row | {"block": table}, "unverifiable", reason=unknown))
                continue
            found = differences(folder, {table: derive}, models=[model])
            outcome = "deviates" if found else "agrees"
            checks.append(_check(row | {"block": table}, outcome, reason="; ".join(found) or None))
    return checks


def load_published(source: Path | None, model: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of table `spectra` that hold a rule, and table `stages`.

    Args:
        source: A folder of tables; None for the bundled release.
        model: Of which; None for all.

    Raises:
        NotFound: The folder holds no spectra, or none of the model.
        UserError: None of them came of it.
    """
    only = {} if model is None else {"model": model}
    spectra = spectra_db.load("spectra", source=source, **only)
    rows = spectra[spectra["status"] == "ok"]
    if rows.empty:
        raise UserError(f"none of {len(spectra)} rows holds a spectrum: all failed, wait or are 0")
    return rows, optional("stages", source)  # there is none beside initial spectra alone
