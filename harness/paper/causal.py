"""A test that the paper does not make: does the gap close if blocks get their own learning rates?

SGD with momentum, block l at the rate η (λ_l / λ̄)^−p, where λ_l is the block's largest
|eigenvalue|: p = 0 is SGD, p = 1 gives every block a rate in proportion to 1/λ_l. The same is the
reparametrisation w_l = s_l u_l with s_l = (λ_l / λ̄)^−p/2: SGD on u with one rate η moves w as above
(a test holds the two equal), and in u the blocks' largest eigenvalues are λ_l s_l² ∝ λ_l^(1−p): at
p = 1 they are equal, at p = ½ their spread on a logarithmic axis is halved. So p takes
heterogeneity of *size* away step by step and changes nothing else. Heterogeneity of *shape*, which
JS⁰ measures, stays.

Everything else is as in `harness.training.train`: initialisation, data, schedule, clipping. SGD
(p = 0) and AdamW are the runs of the release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from harness import tasks
from harness.estimator import find_blocks
from harness.paper import release
from harness.paper.drawing import panels
from harness.paper.result import Result
from harness.registry import get
from harness.registry.entry import ModelEntry
from harness.tasks.base import Data
from harness.training import train
from harness.training.gap import SEEDS, relative_gap
from spectra_db import plot
from spectra_db.loading import optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of several families, cheapest first.
MODELS = (
    "mlp-deep-cifar10",
    "gpt-2x64-shakespeare",
    "llama-2x64-shakespeare",
    "convnext-cifar10",
    "vit-cifar10",
)
# (stage at which λ_l is taken, p). At init some blocks are nearly flat, and will not stay so.
VARIANTS = (("init", 1.0), ("init", 0.5), ("p10", 1.0))
RATIO = 10**0.5
MAX_EXTENSIONS = 4
Values = dict[str, float]


def units(source: release.Source) -> list[str]:
    """List models and variants whose plain runs and eigenvalues the release holds."""
    gaps = optional("gaps", source)
    known = set(gaps.loc[gaps["status"] == "ok", "model"])
    return [
        _unit(model, stage, p)
        for model in MODELS
        if model in known
        for stage, p in VARIANTS
        if len(_curvatures(source, model, stage))
    ]


def forecast(todo: Sequence[str], data_root: Path | None) -> str:
    """Say what the units cost."""
    low, high = (len(todo) * (count + len(SEEDS)) for count in (3, 3 + MAX_EXTENSIONS))
    return f"{low} to {high} training runs, 3 to 30 s each on a core"


def measure(unit: str, source: release.Source, data_root: Path | None) -> dict[str, Any]:
    """Train one model at one variant: rates on seed 0, then seeds 1 to 3 at the best."""
    model, stage, text = unit.rsplit("-", 2)
    power = float(text.removeprefix("p"))
    entry = get(model)
    data = tasks.of(entry).load(data_root)
    curvatures = _curvatures(source, model, stage)
    factors = block_factors(curvatures, power)
    [plain] = optional("gaps", source, model=model).to_dict("records")
    grid: dict[int, float] = {}

    def final(exponent: int, seed: int) -> float:
        lr = plain["sgd_lr"] * RATIO**exponent
        return train_blockwise(entry, data, lr=lr, seed=seed, factors=factors)[1]

    wanted = [0, 1, -1]
    while wanted:
        exponent = wanted.pop(0)
        grid[exponent] = final(exponent, 0)
        best = min(grid, key=lambda k: (grid[k], k))
        if not wanted and len(grid) < 3 + MAX_EXTENSIONS and best in (min(grid), max(grid)):
            wanted = [best - 1 if best == min(grid) else best + 1]
    losses = [final(best, seed) for seed in SEEDS]
    runs = optional("training", source, model=model)
    init = _stored(runs, "sgd", plain["sgd_lr"], at_end=False)
    sgd = _stored(runs, "sgd", plain["sgd_lr"])
    adam = _stored(runs, "adamw", plain["adam_lr"])
    return {
        "model": model,
        "stage": stage,
        "power": power,
        "spread": float(np.std(np.log10(curvatures))),
        "rates": [plain["sgd_lr"] * RATIO**k for k in sorted(grid)],
        "grid_losses": [grid[k] for k in sorted(grid)],
        "lr": plain["sgd_lr"] * RATIO**best,
        "losses": losses,
        "gap": _with_error(losses, adam, init),
        "sgd_gap": _with_error(sgd, adam, init),
        "closed": closed_share(losses, sgd, adam),
    }


def block_factors(curvatures: pd.Series, power: float) -> dict[str, float]:
    """Return per block (λ_l / λ̄)^−p, λ̄ the geometric mean over blocks.

    A block that is exactly zero gets the factor 1.

    >>> block_factors(pd.Series({"a": 1.0, "b": 100.0}), 0.5)
    {'a': 3.1622776601683795, 'b': 0.31622776601683794}
    """
    positive = curvatures[curvatures > 0]
    centre = float(np.exp(np.log(positive).mean())) if len(positive) else 1.0
    return {
        str(name): float((value / centre) ** -power) if value > 0 else 1.0
        for name, value in curvatures.items()
    }


def train_blockwise(
    entry: ModelEntry, data: Data, *, lr: float, seed: int, factors: Mapping[str, float]
) -> tuple[float, float]:
    """Train by SGD with momentum with a rate per block; as `harness.training.train` otherwise.

    A factor of the gradient is a factor of the rate: momentum is linear in the gradient. Gradients
    are clipped before. A bias takes the factor of its weight, what else is in no block 1.

    Args:
        entry: What to train.
        data: Its data.
        lr: Peak learning rate η.
        seed: Of initialisation and order of the data.
        factors: Per block of partition `weights` its rate over η.

    Returns:
        Initial and final loss on the fixed training subset; a diverged run ends at the first.

    Raises:
        UserError: The entry has no recipe.
    """
    scales = _scales(entry.build(data.model_options, seed), factors)

    def scale(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in scales:
                parameter.grad.mul_(scales[name])

    run = train(entry, data, optimizer="sgd", lr=lr, seed=seed, on_gradients=scale)
    return run.init_loss, run.final_loss


def _with_error(losses: Sequence[float], adam: Sequence[float], init: Sequence[float]) -> Values:
    return dict(zip(("value", "error"), relative_gap(losses, adam, init), strict=True))


def closed_share(losses: Sequence[float], sgd: Sequence[float], adam: Sequence[float]) -> Values:
    """Return the share of SGD's gap that is closed, (L_sgd − L) / (L_sgd − L_adam), with error."""
    return _with_error([-x for x in losses], [-x for x in sgd], [-x for x in adam])


def summarise(records: Mapping[str, dict[str, Any]], source: release.Source) -> Result:
    """Gather the measured variants by model."""
    values: dict[str, Any] = {}
    wanted = [_unit(m, s, p) for m in MODELS for s, p in VARIANTS]
    for unit in wanted:
        if unit in records:
            record = records[unit]
            found = values.setdefault(record["model"], {"sgd_gap": record["sgd_gap"]})
            found[f"{record['stage']}, p = {record['power']:g}"] = {
                key: record[key] for key in ("spread", "lr", "gap", "closed")
            }
    missing = [unit for unit in wanted if unit not in records]
    figures = {"causal": _draw(values)} if values else {}
    return Result({"models": values} if values else {}, figures, tuple(missing))


def _unit(model: str, stage: str, power: float) -> str:
    return f"{model}-{stage}-p{power:g}"


def _curvatures(source: release.Source, model: str, stage: str) -> pd.Series:
    """Return the largest |eigenvalue| of each block at a stage."""
    blocks = optional("blocks", source, model=model, stage=stage, init_seed=1)
    largest = blocks[["lambda_max", "lambda_min"]].abs().max(axis=1)
    return pd.Series(largest.to_numpy(dtype=float), index=blocks["block"].to_numpy())


def _stored(runs: pd.DataFrame, optimizer: str, lr: float, *, at_end: bool = True) -> list[float]:
    """Return the last losses on the training subset of the release's runs, or the first ones."""
    kept = (runs["optimizer"] == optimizer) & np.isclose(runs["lr"], lr)
    kept &= (runs["split"] == "train") & (runs["metric"] == "loss") & ((runs["step"] > 0) == at_end)
    return [float(runs.loc[kept & (runs["seed"] == seed), "value"].iloc[0]) for seed in SEEDS]


def _scales(model: nn.Module, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return, by name of the parameter, the tensor that its gradient is multiplied by."""
    named = dict(model.named_parameters())
    scales: dict[str, Tensor] = {}
    for block in find_blocks(model, "weights"):
        for part in block.parts:
            parameter = named[part.parameter]
            scale = scales.setdefault(part.parameter, torch.ones_like(parameter))
            part.of(scale).fill_(factors.get(block.name, 1.0))
            bias = part.parameter.removesuffix("weight") + "bias"
            if part.dim is None and bias in named and bias != part.parameter:
                scales[bias] = torch.full_like(named[bias], factors.get(block.name, 1.0))
    return scales


def _draw(values: Mapping[str, Any]) -> Figure:
    figure, (ax,) = panels(3.2)
    styles = {"SGD": (plot.OPTIMIZERS["sgd"][1], "o")}
    looks = (("#D55E00", "s"), ("#E69F00", "^"), ("#009E73", "D"))
    for (stage, p), look in zip(VARIANTS, looks, strict=True):
        styles[f"{stage}, p = {p:g}"] = look
    for i, found in enumerate(values.values()):
        gaps = {"SGD": found["sgd_gap"]}
        gaps |= {k: v["gap"] for k, v in found.items() if k != "sgd_gap"}
        for j, (name, (colour, marker)) in enumerate(styles.items()):
            if name in gaps:
                label = name if i == 0 else None
                x, gap = i + 0.15 * (j - 1.5), gaps[name]
                ax.errorbar(x, gap["value"], 2 * gap["error"], fmt=marker, color=colour,
                            capsize=2, label=label)  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(values)), list(values), rotation=15)
    ax.set_ylabel("gap to AdamW (± 2 standard errors)")
    ax.legend(ncols=4, loc="best")
    return figure
