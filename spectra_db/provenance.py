"""From a model's numbers to the rows, runs, commands, code and seeds that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from spectra_db import manifest
from spectra_db.densities import SCALE
from spectra_db.loading import folder_of, load, optional
from spectra_db.words import in_order

# The reading that the leaderboard shows first.
_READING = {"metric": "js0", "scale": SCALE}
# What tells one spectrum from another; its nodes and weights are not looked at.
_SPECTRUM = [
    "stage", "partition", "init_seed", "train_run", "run_id", "batch_hash", "data_source",
]  # fmt: skip
_COLUMNS = [*_SPECTRUM, "block", "method", "probe", "status"]
_MEASURED = ["sigma", "corrected", "standard_error"]
_TRIAL = ["optimizer", "num_steps", "lr", "seed", "final_loss", "diverged", "code_version"]


def trace(model: str, source: Path | str | None = None) -> dict[str, Any]:
    """Return where the numbers of a model come from.

    A statistic of table `leaderboard` is over models; each enters by a measurement (a row of
    `heterogeneity` at the stage; of blocks with biases, anew over the weights alone) and its row of
    `gaps`. The measurement comes from the rows of `spectra` of its stage, those from runs and,
    after init, a checkpoint; the gap comes from the ends of training runs, and the speed-up of
    protocol 2 from its trials. Every step is a list of rows, and the files that hold them come
    with their sha256, where the source is a release.

    Args:
        model: Name of the model.
        source: As of `load`.

    Returns:
        version (None if no release), model (its row), measurements, gap, training, speedup,
        trials, spectra, runs, files; of JSON's types.

    Raises:
        NotFound: The source has no such model.
    """
    row = load("models", source=source, model=model)
    measured = optional("heterogeneity", source, model=model, **_READING)
    spectra = optional("spectra", source, model=model, columns=_COLUMNS)
    stages = optional("stages", source, model=model)
    release = manifest.read(folder_of(source))
    order = in_order(measured["stage"])
    measured = measured.sort_values("stage", key=lambda stage: stage.map(order.index))
    return {
        "version": None if release is None else release.version,
        "model": _records(row)[0],
        "measurements": _records(
            measured[["stage", "init_seed", "partition", *_READING, *_MEASURED]]
        ),
        "gap": next(iter(_records(optional("gaps", source, model=model))), None),
        "training": _ends(optional("training", source, model=model, metric="loss", split="train")),
        "speedup": next(iter(_records(optional("speedups", source, model=model))), None),
        "trials": _records(optional("trials", source, model=model)[_TRIAL]),
        "spectra": _spectra(spectra, stages),
        "runs": _records(optional("runs", source, model=model)),
        "files": {
            path: file.sha256
            for path, file in ({} if release is None else release.files).items()
            if Path(path).stem == model
        },
    }


def _ends(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the last loss of every training run."""
    run = ["optimizer", "lr", "seed"]
    ends = rows.sort_values("step").groupby(run, as_index=False).last()
    return _records(ends[[*run, "step", "value", "diverged"]].rename(columns={"value": "loss"}))


def _spectra(rows: pd.DataFrame, stages: pd.DataFrame) -> list[dict[str, Any]]:
    """Return each spectrum with its counts, its run and seeds, its data and its checkpoint.

    At init there is none: the weights follow from the seed.
    """
    stages = stages[stages["optimizer"].eq("adamw") & stages["stage"].ne("init")]
    stages = stages.set_index(["stage", "seed"])
    checkpoints = stages["checkpoint_sha256"].to_dict()
    found = []
    for values, some in rows.groupby(_SPECTRUM, sort=False):
        sampled = some[some["method"] == "slq"]
        found.append(
            dict(zip(_SPECTRUM, map(_plain, values), strict=True))
            | {
                "rows": len(some),
                "blocks": int(some["block"].nunique()),
                "probes": int(sampled["probe"].max()) + 1 if len(sampled) else 0,
                "failed": int(some["status"].isin(["failed", "pending"]).sum()),
                "checkpoint_sha256": checkpoints.get((values[0], values[2])),
            }
        )
    order = in_order(spectrum["stage"] for spectrum in found)
    return sorted(found, key=lambda s: (order.index(s["stage"]), s["partition"]))


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as dicts of JSON's types."""
    return [
        {str(name): _plain(value) for name, value in record.items()}
        for record in rows.to_dict("records")
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if value is pd.NaT or value is pd.NA or value != value else value
