"""`harness predict`: measure a model that is not trained yet, and ask the leaderboard about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness import registry
from harness.errors import UserError
from harness.leaderboard import classifier
from harness.leaderboard.statistics import measurements
from harness.leaderboard.tables import read
from harness.registry import ModelEntry
from spectra_db.heterogeneity import gradient_rms_spread, js0, spread
from spectra_db.jackknife import MIN_PROBES

if TYPE_CHECKING:
    from harness.estimator.cost import Forecast
    from harness.training import Problem

# v·Hv and |Hv|² follow from a rule of two steps.
CHEAP_STEPS = 2
SEED = 1


def resolve(
    target: str, task: str | None, *, registry_dir: Path | None, data_root: Path | None
) -> ModelEntry:
    """Return the entry that a target names.

    Args:
        target: A registry entry, or module:factory, timm:NAME or transformers:TYPE.
        task: Task of a target that is no entry.
        registry_dir: Folder of further entries, and of modules; modules of the working folder are
            found without it.
        data_root: Folder of data sets.

    Raises:
        UserError: There is no such entry; the task is missing or superfluous; the model can't be
            built.
    """
    if target.partition(":")[0].endswith(".py"):
        raise UserError(f"{target!r} names a file; write module:factory and --registry FOLDER")
    if ":" not in target:
        entry = registry.get(target, registry_dir=registry_dir)
        if task is not None:
            raise UserError(f"--task goes with a factory; the entry {target!r} has its own")
        return entry
    if task is None:
        raise UserError(f"{target!r} is no entry of the registry: pass --task, such as cifar10")
    from harness.submission.draft import check_size, draft

    folder = registry_dir or Path()
    registry.make_importable(folder)
    entry, data = draft("target", target, task, folder=folder, data_root=data_root)
    check_size(entry, data)
    return entry


def worth(held_out: Mapping[str, Any]) -> str:
    """Say in a sentence what answers are worth, by how often they are right on families left out.

    Args:
        held_out: As `predict` returns it.
    """
    right, majority = held_out["accuracy"], held_out["majority"]
    if not held_out["num_models"]:
        return "worth of such answers: not known, there are too few families"
    than = "no more than" if right <= majority else "more than"
    return (
        f"worth of such answers today: {than} the majority's (right for {right:.0%} against "
        f"{majority:.0%} of {held_out['num_models']} models of families left out), by gaps of "
        "protocol 1, which are taken before much is learnt"
    )


def check_checkpoints(entry: ModelEntry, checkpoint_dir: Path | None) -> None:
    """Raise if an entry starts from another's weights and no folder of checkpoints is given."""
    if entry.pretrained is not None and checkpoint_dir is None:
        raise UserError(
            f"{entry.name!r} starts from the weights of {entry.pretrained!r}: pass --checkpoints, "
            f"OUT/checkpoints of `harness run {entry.pretrained} --out OUT`"
        )


def measure(
    entry: ModelEntry,
    *,
    with_js0: bool,
    data_root: Path | None = None,
    checkpoint_dir: Path | None = None,
    device: str | None = None,
    on_forecast: Callable[[int, int, Forecast], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure a model at initialisation, on the blocks of partition `weights`.

    Args:
        entry: Its entry; nothing is trained.
        with_js0: Take the whole spectrum, for JS⁰, at the entry's number of steps; else two steps.
        data_root: Folder of data sets.
        checkpoint_dir: Folder of checkpoints, for an entry that starts from another's.
        device: Where to compute.
        on_forecast: Called with (probes, steps, what they cost) before the first product.
        on_progress: Called with (products done, products in all).

    Returns:
        A row per measure (metric, value, corrected, standard_error), and what it cost:
        num_products, seconds, num_params, num_blocks.

    Raises:
        UserError: The model has fewer than two blocks that are not zero, or can't be measured.
    """
    from harness.campaign.spectrum import source_of
    from harness.estimator.settings import EXACT_SIZE, Settings
    from harness.estimator.spectrum import gathered, rules
    from harness.estimator.summary import block_summaries
    from harness.training import load_problem

    problem: Problem = load_problem(
        entry, "init", SEED, data_root=data_root, checkpoint_dir=checkpoint_dir
    )
    settings = Settings(
        num_probes=max(entry.num_probes, MIN_PROBES),
        num_steps=entry.num_steps if with_js0 else CHEAP_STEPS,
        device=device,
        exact_size=EXACT_SIZE if with_js0 else 0,  # small blocks are sampled too
    )
    if on_forecast is not None:
        on_forecast(settings.num_probes, settings.num_steps, problem.forecast(settings))
    begin = time.perf_counter()
    with problem.hessian(settings) as hessian:
        # The probes are those of a published spectrum of the same name.
        source = source_of(problem) | {"run_id": ""}
        parts = rules(hessian, settings, source, on_progress=on_progress)
        rows = gathered(parts, hessian.blocks)
        summaries = pd.DataFrame(block_summaries(hessian, rows))
    names = rows.loc[rows["status"] == "ok", "block"].unique().tolist()
    if len(names) < 2:
        raise UserError(
            f"{entry.name!r} has {len(names)} blocks that are not exactly zero at initialisation; "
            "heterogeneity is between at least two"
        )
    estimates = {
        "gradient_rms_spread": gradient_rms_spread(summaries, names),
        "lambda_rms_spread": spread(rows, "lambda_rms"),
        "trace_spread": spread(rows, "trace"),
        **({"js0": js0(rows)} if with_js0 else {}),
    }
    columns = ("value", "corrected", "standard_error")
    found = pd.DataFrame(
        [{"metric": m} | {c: getattr(e, c) for c in columns} for m, e in estimates.items()]
    )
    spent = {
        "num_products": int(rows["num_products"].sum()),
        "seconds": time.perf_counter() - begin,
        "num_params": sum(p.numel() for p in problem.model.parameters()),
        "num_blocks": rows["block"].nunique(),
    }
    return found, spent


# The leaderboard's models, those but for the model itself, and how old the data are.
Known = tuple[classifier.Examples, classifier.Examples, str]


def read_known(entry: ModelEntry, source: Path | str | None, *, with_js0: bool) -> Known:
    """Read the leaderboard's models that a model is predicted from.

    Args:
        entry: The model.
        source: Tables of the leaderboard.
        with_js0: JS⁰ is among the measures.

    Raises:
        NotFound: The source has no table `models`.
        UserError: It has too few models.
    """
    data = read(source)
    measured = measurements(data.models, data.heterogeneity, data.gaps)
    every = classifier.Examples.of(measured, classifier.WITH_JS0 if with_js0 else classifier.CHEAP)
    others = every.only(np.array([name != entry.name for name in every.names], dtype=bool))
    classifier.check(others)
    return every, others, data.age


def predict(entry: ModelEntry, found: pd.DataFrame, known: Known) -> dict[str, Any]:
    """Say whether a model needs Adam, from its measures and the leaderboard's models.

    Args:
        entry: The model.
        found: Its measures, from `measure`.
        known: From `read_known`, with the same measures.

    Returns:
        answer, and the `reasons` if it is unclear; probability, low, high, outside; `measures`:
        each with its value, error, and place among the leaderboard's models; num_models,
        num_families, held_out (what `summary` says), worth (a sentence of it), data (how old they
        are).

    Raises:
        UserError: A measure is not positive.
    """
    every, others, age = known
    rows, names = found.set_index("metric"), list(every.measures)
    corrected = rows["corrected"].where(rows["corrected"] > 0, rows["value"])
    value = corrected.loc[names].to_numpy(np.float64)
    error = rows["standard_error"].fillna(0.0).loc[names].to_numpy(np.float64)
    if not (value > 0).all():
        flat = names[int(np.argmin(value))]
        raise UserError(f"{flat} of {entry.name!r} is 0: its blocks don't differ in it at all")
    x, spread = np.log10(value), error / value / np.log(10)
    result = asdict(classifier.classify(others, x, spread))
    test = classifier.summary(classifier.held_out(every))
    reasons = [f"{name} lies outside the leaderboard's range" for name in result["outside"]]
    # A rule that has shown no skill where it could be tested has no clear answer to give.
    if not test["num_models"]:
        reasons.append("no model of the leaderboard can be predicted from other families")
    elif not test["accuracy"] > test["majority"]:
        reasons.append("on families left out the rule is no better than the majority's answer")
    if not reasons and result["answer"] == classifier.ANSWERS[2]:
        reasons.append("the interval holds one half")
    if reasons:
        result["answer"] = classifier.ANSWERS[2]
    result |= {
        "model": entry.name,
        "measures": [
            {"metric": name, "value": float(value[j]), "standard_error": float(error[j])}
            | _place(others, j, float(x[j]))
            for j, name in enumerate(names)
        ],
        "num_models": len(others.names),
        "num_families": len(set(others.families)),
        "in_leaderboard": entry.name in every.names,
        "reasons": reasons,
        "held_out": test,
        "worth": worth(test),
        "data": age,
    }
    return result


def _place(examples: classifier.Examples, j: int, x: float) -> dict[str, Any]:
    """Return how many models have a smaller measure, and the nearest with their gaps."""
    column = examples.x[:, j]
    nearest = np.argsort(np.abs(column - x), kind="stable")[:3]
    return {
        "num_smaller": int((column < x).sum()),
        "nearest": [
            {"model": examples.names[i], "value": float(10 ** column[i]), "gap": examples.gap[i]}
            for i in nearest
        ],
    }
