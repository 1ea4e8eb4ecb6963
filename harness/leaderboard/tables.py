"""What the leaderboard is made of: the tables of a source, brought to one form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import spectra_db
from harness.registry import entries
from harness.registry.entry import FACTS, partition_of
from spectra_db import heterogeneity as measures
from spectra_db import manifest
from spectra_db.derived import standard
from spectra_db.loading import folder_of, optional
from spectra_db.schema import PROTOCOL_VERSION, SPECTRUM
from spectra_db.verified import NOTE, verified_models
from spectra_db.words import ATTENTION

_SPECTRUM = list(SPECTRUM)
_COUNTED = [*_SPECTRUM, "operator", "block", "block_kind", "method", "num_products"]


@dataclass(frozen=True)
class Dataset:
    """The tables that statistics are made from.

    Attributes:
        models: Table `models`, with entries of the registry that the tables don't hold as pending;
            `missing` says what a model lacks, `provenance` who vouches for its rows: verified
            (by `harness verify --mark`) or self-reported, `checked` how much of it was recomputed;
            `has_attention` whether one of its blocks is of attention.
        heterogeneity: Table `heterogeneity`, one spectrum per model and stage, of partition
            `weights` where the blocks allow it; with `block_products`, the products that a metric
            takes per block that is sampled.
        gaps: Table `gaps`.
        runs: Table `runs`.
        leaderboard: Table `leaderboard` of a release, which follows from its others and whose
            `dataset check` makes it anew; none of a folder that still grows.
    """

    models: pd.DataFrame
    heterogeneity: pd.DataFrame
    gaps: pd.DataFrame
    runs: pd.DataFrame
    leaderboard: pd.DataFrame

    @property
    def pending(self) -> pd.DataFrame:
        """The models that lack something, with what it is as `reason`."""
        rows = self.models[self.models["missing"] != ""]
        columns = ["model", "family", "tier", "task", "missing"]
        return rows[columns].rename(columns={"missing": "reason"}).reset_index(drop=True)

    @property
    def updated(self) -> datetime | None:
        """When the last of its runs started; None where there is none."""
        return None if self.runs.empty else self.runs["started"].max().to_pydatetime()

    @property
    def age(self) -> str:
        """Say how old the data are."""
        if self.updated is None:
            return "no runs are recorded"
        days = (datetime.now(UTC) - self.updated).days
        ago = "today" if days <= 0 else "a day ago" if days == 1 else f"{days} days ago"
        return f"last computed {self.updated:%Y-%m-%d}, {ago}"


def read(source: Path | str | None, *, registry_dir: Path | None = None) -> Dataset:
    """Read a source's tables.

    Metrics over different blocks are different metrics, and the blocks of partition `paper` have
    biases: a trained model of that partition is compared by its weights alone, the metrics taken
    anew from its spectra.

    Args:
        source: Folder of tables or id of a dataset on the Hub; None for the bundled release.
        registry_dir: Folder of further entries.

    Raises:
        NotFound: The source has no table `models`.
        InvalidTable: A file is not valid, or of another protocol.
    """
    models = spectra_db.load("models", source=source)
    gaps = optional("gaps", source)
    metrics = _one_spectrum(optional("heterogeneity", source), models)
    spectra = optional("spectra", source, columns=_COUNTED)
    spectra = spectra[spectra["operator"] == "hessian"]
    paper = set(models.loc[models["tier"].map(partition_of) == "paper", "model"])
    has_gap = set(gaps.loc[gaps["status"] == "ok", "model"])
    with_biases = metrics["model"].isin(paper & has_gap) & (metrics["partition"] == "paper")
    if with_biases.any():
        of_model = [ours for _, ours in metrics[with_biases].groupby("model")]
        derived = [_of_weights(source, rows) for rows in of_model]
        metrics = pd.concat([metrics[~with_biases], *derived], ignore_index=True)
    folder = folder_of(source, paths=[NOTE, "*/*.parquet"])
    verified = verified_models(folder)
    # That of a folder that grows may be of other rows, or of an earlier protocol: it is not read.
    board = optional("leaderboard", source) if manifest.read(folder) else pd.DataFrame()
    attention = set(spectra.loc[spectra["block_kind"].isin(ATTENTION), "model"])
    return Dataset(
        models=_with_pending(models, metrics, gaps, registry_dir).assign(
            provenance=lambda m: np.where(m["model"].isin(verified), "verified", "self-reported"),
            checked=lambda m: m["model"].map(lambda model: str(verified.get(model, ""))),
            has_attention=lambda m: m["model"].isin(attention),
        ),
        heterogeneity=metrics.assign(block_products=_block_products(metrics, spectra)),
        gaps=gaps,
        runs=optional("runs", source),
        leaderboard=board,
    )


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts c2 before c10."""
    words = re.findall(r"\d+|\D+", name)
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def in_network_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Sort blocks as a network is read: what comes first, layers by their numbers, the head."""
    ends = {"embedding": 0, "position": 0, "head": 2}
    heads = {b.rpartition(".")[0] for b in rows.loc[rows["block_kind"] == "head", "block"]}

    def place(row: Any) -> tuple[int, list[tuple[int, str]], int]:
        of_head = row.block_kind == "bias" and row.block.rpartition(".")[0] in heads
        # The first convolution, where it has a name of its own.
        middle = 0 if re.match(r"(stem|conv1|patch_embed)\b", row.block) else 1
        at = 2 if of_head else ends.get(row.block_kind, middle)
        return at, natural_key(row.block), row.probe

    places = [place(row) for row in rows.itertuples()]
    return rows.iloc[sorted(range(len(rows)), key=places.__getitem__)]


def _one_spectrum(metrics: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Keep one partition of a model, `weights` if there is, and one seed of a stage, the lowest."""
    known = metrics[metrics["model"].isin(set(models["model"]))]
    order = known.assign(rank=(known["partition"] != "weights").astype(int))
    order = order.sort_values(["model", "stage", "rank", "init_seed", "train_run"], kind="stable")
    first = order.groupby(["model", "stage"])[["partition", "init_seed", "train_run"]]
    kept = (order[["partition", "init_seed", "train_run"]] == first.transform("first")).all(axis=1)
    return order[kept].drop(columns="rank").reset_index(drop=True)


def _of_weights(source: Path | str | None, ours: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics of partition `weights` of a model whose spectra have biases too."""
    model = str(ours["model"].iloc[0])
    rows = spectra_db.load("spectra", source=source, model=model, partition="paper")
    blocks = optional("blocks", source, model=model)
    parts = []
    for _, spectrum in ours.drop_duplicates("stage")[_SPECTRUM].iterrows():
        at_stage = rows[(rows[_SPECTRUM] == spectrum).all(axis=1) & (rows["block_kind"] != "bias")]
        where = [c for c in _SPECTRUM if c != "partition"]
        beside = blocks[(blocks[where] == spectrum[where]).all(axis=1)]
        found = measures.metrics(
            standard(at_stage),
            block_rows=beside if len(beside) else None,
            version=int(ours["protocol_version"].iloc[0]),
        )
        parts.append(found.assign(partition="weights"))
    return pd.concat(parts, ignore_index=True)[ours.columns]


def _block_products(metrics: pd.DataFrame, spectra: pd.DataFrame) -> pd.Series:
    """Return the products per sampled block: without those that diagonalise small blocks.

    The mean over all blocks where none is sampled, or no spectrum is there to tell.
    """
    place = ["model", "stage"]
    chosen = metrics[_SPECTRUM].drop_duplicates(place)
    ours = spectra[spectra["partition"] != "full"].merge(chosen, on=_SPECTRUM[:-1])
    ours = ours[(ours["partition_y"] != "weights") | (ours["block_kind"] != "bias")]
    ours = ours.drop_duplicates([*place, "block"])
    exact = ours[ours["method"] == "exact"].groupby(place)["num_products"].sum()
    sampled = ours[ours["method"] == "slq"].groupby(place)["block"].nunique()
    index = pd.MultiIndex.from_frame(metrics[place])
    spent = metrics["num_products"] - exact.reindex(index, fill_value=0).to_numpy()
    per_block = spent.clip(lower=0) / sampled.reindex(index).to_numpy()
    per_block = per_block.fillna(metrics["num_products"] / metrics["num_blocks"])
    return per_block.where(metrics["num_products"] > 0, 0.0)


def _with_pending(
    models: pd.DataFrame, metrics: pd.DataFrame, gaps: pd.DataFrame, registry_dir: Path | None
) -> pd.DataFrame:
    """Give every model that lacks a metric or a gap the reason; add entries that are not there."""
    known = set(models["model"])
    tiers = set(models["tier"])
    absent = [
        {name: getattr(entry, name) for name in FACTS}
        | {"model": entry.name, "num_params": 0, "num_blocks": 0, "status": "pending"}
        | {"reason": entry.reason or "not computed yet", "protocol_version": PROTOCOL_VERSION}
        for entry in entries(registry_dir=registry_dir)
        if entry.tier in tiers and entry.name not in known
    ]
    if absent:
        models = pd.concat([models, pd.DataFrame(absent)], ignore_index=True)
    at_init = metrics[metrics["stage"] == "init"]
    measured = set(at_init["model"])
    of_weights = set(at_init.loc[at_init["partition"] == "weights", "model"])
    of_gap = gaps.set_index("model")

    def missing(row: Any) -> str:
        if row.status != "ok":
            return str(row.reason)
        if row.model not in measured:
            return "no spectrum at initialisation yet"
        if row.model not in of_gap.index:
            return "no gap: not trained with both optimizers yet"
        gap = of_gap.loc[row.model]
        if gap["status"] != "ok":
            return f"gap {gap['status']}: {gap['reason']}"
        return "" if row.model in of_weights else "no spectrum of partition weights yet"

    return models.assign(missing=[missing(row) for row in models.itertuples()]).sort_values(
        "model", ignore_index=True
    )
