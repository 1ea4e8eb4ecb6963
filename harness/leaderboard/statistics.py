"""Which measure predicts the SGD-Adam gap: tables in, statistics with intervals out. No torch.

docs/leaderboard.md defines the statistics. Everything here works on arrays of shape (B, n): B
draws of n models, of which draw b counts model i weights[b, i] times.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.errors import UserError
from harness.leaderboard.ranks import Array, concordance, pearson, ranks, signs
from harness.leaderboard.resampling import (
    MIN_MODELS,
    NUM_DRAWS,
    interval,
    left_out_accuracy,
    resampled,
)
from harness.training.gap import needs_adam
from spectra_db.heterogeneity import LEADING
from spectra_db.schema import PROTOCOL_VERSION, TABLES
from spectra_db.words import STAGES

READING = ["stage", "metric", "scale", "sigma"]
REFERENCE = ("js0", LEADING["js0"])
# What needs no spectrum, and what every measure must beat; at initialisation alone.
DUMMIES = ("has_attention", "num_params")
# Demo models are there to try the tools: 8×8 images, some seconds of training.
ENTERING_TIERS = ("small", "paper")
# Draws of a metric are kept above this part of its value: logarithms are taken.
_FLOOR = 0.1
# Signs of shape (B, n, n) are made for so many entries at a time, which a core's cache holds.
_CHUNK = 1 << 19


def measurements(
    models: pd.DataFrame, heterogeneity: pd.DataFrame, gaps: pd.DataFrame
) -> pd.DataFrame:
    """Join each model's metrics with its gap, both with their errors.

    Args:
        models: Table `models`.
        heterogeneity: Table `heterogeneity`, one spectrum per model and stage; `block_products`
            beside it if known.
        gaps: Table `gaps`.

    Returns:
        A row per model, stage and reading of a metric: `estimate` (corrected where there are
        enough probes, else plug-in), `standard_error` (0 where not known), the gap's columns, and
        whether the model `enters` the statistics.

    Raises:
        UserError: The tables are of several protocols.
    """
    versions = {int(v) for t in (models, gaps) for v in t["protocol_version"]}
    if versions - {PROTOCOL_VERSION}:
        raise UserError(
            f"the tables are of protocol versions {sorted(versions)}; a statistic is over rows of "
            f"one, and this code reads {PROTOCOL_VERSION} alone"
        )
    if len(set(heterogeneity["protocol_version"])) > 1:
        raise UserError(
            "table heterogeneity is of several protocol versions, and a statistic is over rows of "
            "one; `harness dataset derive FOLDER` derives the earlier ones anew"
        )
    of_model = models[["model", "family", "tier", "task", "num_params"]]
    columns = ["gap", "standard_error", "ci_low", "ci_high", "at_edge", "num_seeds", "adam_needed"]
    own = {c: f"gap_{c}" for c in ("standard_error", "ci_low", "ci_high", "status")}
    columns += ["status", "sgd_loss", "init_loss", "gap_from_reference", "trained"]
    of_gap = gaps[["model", *columns, "adam_needed_now"]].rename(columns=own)
    joined = heterogeneity.merge(of_model, on="model").merge(of_gap, on="model", how="left")
    if "block_products" not in joined:
        joined["block_products"] = joined["num_products"] / joined["num_blocks"]
    estimate = joined["corrected"].where(joined["corrected"] > 0, joined["value"])
    enters = joined["gap_status"].eq("ok") & joined["tier"].isin(ENTERING_TIERS) & (estimate > 0)
    enters &= joined["partition"].eq("weights")  # over other blocks it is another metric
    return joined.assign(
        estimate=estimate, standard_error=joined["standard_error"].fillna(0.0), enters=enters
    )


def leaderboard(
    models: pd.DataFrame,
    heterogeneity: pd.DataFrame,
    gaps: pd.DataFrame,
    *,
    num_draws: int = NUM_DRAWS,
) -> pd.DataFrame:
    """Return table `leaderboard`: every statistic of every reading at every stage.

    Intervals are percentiles over `num_draws` draws. A draw resamples families with replacement,
    all models of a family together, and adds to each metric and gap an error of its standard
    error's size: Gaussian, and Student's t with num_seeds - 1 degrees of freedom for the gap.

    Args:
        models: Table `models`.
        heterogeneity: Table `heterogeneity`, one spectrum per model and stage.
        gaps: Table `gaps`.
        num_draws: Draws of the bootstrap.

    Raises:
        UserError: The tables are of several protocols.
    """
    joined = measurements(models, heterogeneity, gaps)
    joined = joined[joined["enters"]]
    joined = pd.concat([joined, _dummies(joined, models)], ignore_index=True)
    rows = []
    for stage in STAGES:
        at_stage = joined[joined["stage"] == stage]
        if len(at_stage):
            rows += _stage_rows(at_stage, joined[joined["stage"] == "init"], num_draws)
    names = TABLES["leaderboard"].names
    board = pd.DataFrame(rows, columns=[n for n in names if n != "protocol_version"])
    board.insert(names.index("protocol_version"), "protocol_version", PROTOCOL_VERSION)
    return board.sort_values([*READING, "statistic", "left_out"], ignore_index=True)


def _dummies(joined: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Return a row of each dummy per model at initialisation, as if it were a measured metric.

    Whether a model has attention counts as 1 or 10, since logarithms are taken.
    """
    rows = joined[joined["stage"] == "init"].drop_duplicates("model")
    rows = rows.assign(scale="none", sigma=0.0, standard_error=0.0, block_products=0.0)
    parts = [rows.assign(metric="num_params", estimate=rows["num_params"].clip(lower=1))]
    if "has_attention" in models:
        has = rows["model"].map(models.set_index("model")["has_attention"])
        parts.append(rows.assign(metric="has_attention", estimate=10.0 ** has.astype(float)))
    return pd.concat(parts)


@dataclass(frozen=True)
class _Sample:
    """Draws of some models at a stage; the first draw is the data as they are.

    Attributes:
        names: The models, n of them.
        families: The family of each, as a number; F of them.
        family_names: Their names.
        weights: How often a draw holds a model, shape (B, n).
        gap: Shape (B, n).
        needed: "Adam needed" by the drawn gaps, shape (B, n).
        log_size: log10 of the number of parameters, shape (n,).
        normal: Standard normal errors for the metrics, shape (B, n).
    """

    names: list[str]
    families: npt.NDArray[np.intp]
    family_names: list[str]
    weights: Array
    gap: Array
    needed: Array
    log_size: Array
    normal: Array

    @classmethod
    def of(cls, rows: pd.DataFrame, num_draws: int) -> _Sample:
        """Draw families and errors; `rows` has a row per model."""
        rows = rows.sort_values("model")
        generator = np.random.default_rng(0)
        families, family_names, drawn = resampled(rows["family"], generator, num_draws)
        error = rows["gap_standard_error"].fillna(0.0).to_numpy(np.float64)
        dof = np.maximum(rows["num_seeds"].to_numpy(np.float64) - 1, 1)
        noise = generator.standard_t(dof, size=(num_draws, len(rows))) * error
        gap = rows["gap"].to_numpy(np.float64) + np.vstack([np.zeros(len(rows)), noise])
        normal = generator.standard_normal((num_draws, len(rows)))
        return cls(
            names=rows["model"].tolist(),
            families=families,
            family_names=list(family_names),
            weights=np.vstack([np.ones(len(rows)), drawn]),
            gap=gap,
            needed=needs_adam(gap, error).astype(np.float64),
            log_size=np.log10(np.maximum(rows["num_params"].to_numpy(np.float64), 1)),
            normal=np.vstack([np.zeros(len(rows)), normal]),
        )

    def log_metric(self, rows: pd.DataFrame) -> tuple[Array, Array]:
        """Return draws of log10 of a metric, shape (B, n), and the weights of models that have it.

        Models that lack it have a weight of 0.
        """
        numbers = rows.set_index("model")[["estimate", "standard_error"]].reindex(self.names)
        value, error = numbers.to_numpy(np.float64).T
        missing = np.isnan(value)
        value, error = np.where(missing, 1.0, value), np.where(missing, 0.0, error)
        drawn = np.maximum(value + error * self.normal, _FLOOR * value)
        return np.log10(drawn), np.where(missing, 0.0, self.weights)


def _stage_rows(
    at_stage: pd.DataFrame, at_init: pd.DataFrame, num_draws: int
) -> list[dict[str, object]]:
    sample = _Sample.of(at_stage.drop_duplicates("model"), num_draws)
    readings = dict(list(at_stage.groupby(READING, sort=False)))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy holds no lock
        of_each = threads.map(partial(_all_statistics, sample), readings.values())
        draws = dict(zip(readings, of_each, strict=True))
    reference = [r for r in readings if (r[1], r[2]) == REFERENCE]
    table: list[dict[str, object]] = []
    for reading, rows in readings.items():
        found, changes, both = dict(draws[reading]), {}, rows
        if reference and reading != reference[0]:
            other = draws[reference[0]]["spearman"]
            found["advantage"] = np.abs(found["spearman"]) - np.abs(other)
        if reading[0] != "init":
            before = at_init[(at_init[READING[1:]] == list(reading[1:])).all(axis=1)]
            changes = _changes(sample, rows, before)
            found |= changes
            both = rows[rows["model"].isin(set(before["model"]))]
        shared = dict(zip(READING, reading, strict=True))
        shared |= {"num_products": float(rows["block_products"].median())}
        for name, values in found.items():
            used = both if name in changes else rows
            counts = {"num_models": len(used), "num_families": used["family"].nunique()}
            low, high = interval(values[1:]) if counts["num_families"] > 1 else (np.nan, np.nan)
            value = {"value": values[0], "ci_low": low, "ci_high": high}
            if counts["num_models"] < MIN_MODELS:
                value = dict.fromkeys(value, np.nan)
            table.append(shared | counts | value | {"statistic": name, "left_out": ""})
        table += [shared | row for row in _without_each_family(sample, rows)]
    return table


def _all_statistics(sample: _Sample, rows: pd.DataFrame) -> dict[str, Array]:
    """Return the statistics of one reading in every draw, each of shape (B,)."""
    every_x, every_weight = sample.log_metric(rows)
    num_families, step = len(sample.family_names), max(1, _CHUNK // every_x.shape[1] ** 2)
    parts = []
    for i in (slice(start, start + step) for start in range(0, len(every_x), step)):
        x, y, needed, weights = every_x[i], sample.gap[i], sample.needed[i], every_weight[i]
        found = _correlations(x, y, sample.log_size, needed, weights)
        found["spearman_families"] = _between(x, y, sample.families, num_families, weights)
        accuracy = left_out_accuracy(x, needed, sample.families, weights)
        found["accuracy"], found["accuracy_majority"] = accuracy
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _correlations(
    x: Array, y: Array, log_size: Array, needed: Array, weights: Array
) -> dict[str, Array]:
    """Return rank statistics, and Pearson's correlation."""
    of_x, of_y, of_size = signs(x), signs(y), signs(log_size[None])
    a, b, c = (ranks(some, weights) for some in (of_x, of_y, of_size))
    xy, xz, yz = (pearson(*pair, weights) for pair in ((a, b), (a, c), (b, c)))
    with np.errstate(invalid="ignore", divide="ignore"):
        # Undefined where all models are of one size, or size says all.
        rest = (1 - xz**2) * (1 - yz**2)
        partial = (xy - xz * yz) / np.sqrt(np.where(rest > 1e-12, rest, np.nan))
        pairs = np.sqrt(concordance(of_x, of_x, weights) * concordance(of_y, of_y, weights))
        kendall = concordance(of_x, of_y, weights) / pairs
        positive, negative = weights * needed, weights * (1 - needed)
        beaten = ranks(of_x, negative) + negative.sum(1, keepdims=True)
        auc = (positive * beaten).sum(1) / 2 / (positive.sum(1) * negative.sum(1))
    return {
        "spearman": xy,
        "kendall": kendall,
        "pearson_log": pearson(x, y, weights),
        "partial_spearman": partial,
        "auc": auc,
    }


def _between(
    x: Array, y: Array, families: npt.NDArray[np.intp], num_families: int, weights: Array
) -> Array:
    """Return Spearman's correlation of the families' means, each family drawn counting once."""
    one_hot = np.eye(num_families)[families]
    counts = weights @ one_hot
    size = np.maximum(counts, 1e-300)
    sizes = (weights > 0).astype(float) @ one_hot  # a family twice drawn counts twice
    times = counts / np.maximum(sizes, 1)
    means = [(weights * v) @ one_hot / size for v in (x, y)]
    one, other = (ranks(signs(mean), times) for mean in means)
    return pearson(one, other, times)


def _changes(sample: _Sample, now: pd.DataFrame, before: pd.DataFrame) -> dict[str, Array]:
    """Return how a metric stands against initialisation: its mean ratio, and how often it rose.

    Over the models that have it at both; nan in draws without any.
    """
    x, weights = sample.log_metric(now)
    start, there = sample.log_metric(before)
    # The errors of two stages are independent; the first draw has none.
    shifted = start.copy()
    shifted[1:] = np.roll(start[1:], 1, axis=0)
    weights = np.where(there > 0, weights, 0.0)
    total = weights.sum(axis=1)
    total = np.where(total > 0, total, np.nan)  # no model of the draw has both
    change = x - shifted
    return {
        "ratio_to_init": 10 ** ((weights * change).sum(axis=1) / total),
        "fraction_rising": (weights * (change > 0)).sum(axis=1) / total,
    }


def _without_each_family(sample: _Sample, rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return Spearman's correlation and the AUC without one family at a time."""
    x, weights = sample.log_metric(rows)
    count = len(sample.family_names)
    if count < 2:
        return []
    kept = weights[0] * (np.arange(count)[:, None] != sample.families)
    repeated = [np.repeat(a[:1], count, axis=0) for a in (x, sample.gap, sample.needed)]
    found = _correlations(repeated[0], repeated[1], sample.log_size, repeated[2], kept)
    table: list[dict[str, object]] = []
    for f, family in enumerate(sample.family_names):
        num_models = int(kept[f].sum())
        counts = {"num_models": num_models, "num_families": count - 1, "left_out": family}
        for name in ("spearman", "auc"):
            value = found[name][f] if num_models >= MIN_MODELS else np.nan
            table.append(counts | {"statistic": name, "value": value})
    return table
