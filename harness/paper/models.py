"""Sections 3 and D.1: the quadratic models' figures, and the checks of the theory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.paper import release, theory
from harness.paper.drawing import panels
from harness.paper.quadratic import (
    BLOCK_SIZE,
    HETEROGENEOUS,
    HOMOGENEOUS,
    KAPPA,
    Array,
    Spectra,
    adam,
    from_spectra,
    joint_affine,
    least_steps,
    preconditioned_losses,
    sample_rule,
    steps_to,
)
from harness.paper.result import Result
from spectra_db import plot
from spectra_db.densities import blocks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = 0
TOLERANCE = 1e-6
NUM_STEPS = 20_000
# Starts, and Q, whose median curves are drawn.
NUM_RACES = 9
NUM_DRAWS = 10_000
# Of our GPTs with a third layer, and our residual networks, the first that the release holds.
GPTS = ("gpt2-nano-shakespeare", "gpt-6x48-untied-shakespeare", "gpt-nano-books")
GPT_BLOCKS = ("wte.weight", "h.2.attn.query.weight", "h.2.attn.value.weight", "h.2.mlp.0.weight")
RESNETS = ("resnet18-imagenet", "resnet14-mnist", "resnet8-cifar10")
TITLES = {
    "case1": "case 1: a GPT's blocks",
    "case2": "case 2: a ResNet's blocks",
    "case3": "case 3: three blocks apart",
    "case4": "case 4: three blocks alike",
}
_LINES = {
    "gd": ("gradient descent", *plot.OPTIMIZERS["sgd"][1:]),
    "adam": ("Adam, β₂ = 1", *plot.OPTIMIZERS["adamw"][1:]),
    "adam099": ("Adam, β₂ = 0.99", "#009E73", ":", "^"),
}


def sampled_case(
    source: release.Source, name: str
) -> tuple[str, list[str], tuple[Array, ...]] | None:
    """Return model, blocks and mapped eigenvalues of case 1 or 2; None if no model is there."""
    found = release.first_spectrum(source, GPTS if name == "case1" else RESNETS)
    if found is None:
        return None
    model, rows = found
    if name == "case2":
        convolutions = rows.loc[rows["block_kind"] == "conv", "block"]
        names = list(convolutions.drop_duplicates()[:4])
    else:
        names = list(GPT_BLOCKS)
    blocks = {b.name: b for b in blocks_of(rows[rows["block"].isin(names)])}
    samples = [sample_rule(*blocks[n].average(), None, BLOCK_SIZE) for n in names]
    return model, names, joint_affine(samples)


def cases(source: release.Source) -> tuple[dict[str, Any], dict[str, Spectra], list[str]]:
    """Return facts and spectra of the cases that can be built, and what is missing."""
    facts: dict[str, Any] = {}
    spectra: dict[str, Spectra] = {}
    missing = []
    for name in ("case1", "case2"):
        found = sampled_case(source, name)
        if found is None:
            wanted = GPTS if name == "case1" else RESNETS
            missing.append(f"{name} (needs an initial spectrum of {' or '.join(wanted)})")
            continue
        model, names, spectra[name] = found
        facts[name] = {"model": model, "blocks": names}
    return facts, spectra | {"case3": HETEROGENEOUS, "case4": HOMOGENEOUS}, missing


def fig8(source: release.Source) -> Result:
    """Run gradient descent and Adam on the four cases."""
    facts, spectra, missing = cases(source)
    values: dict[str, Any] = {"kappa": KAPPA, "tolerance": TOLERANCE}
    curves = {}
    for name, blocks in spectra.items():
        curves[name], values[name] = _race(blocks)
        values[name] |= facts.get(name, {})
    values["draws"] = theory.steps_of_cases(spectra, 100, SEED, TOLERANCE)
    values["num_draws"] = 100
    return Result(values, {"fig8": _draw_race(curves)}, tuple(missing))


def check_theory(source: release.Source) -> Result:
    """Check Propositions 1 and 2 and Theorem 1."""
    rng = np.random.default_rng(SEED)
    _, spectra, missing = cases(source)
    bounds: dict[str, Any] = {
        "random": theory.adam_bound_counts([theory.random_quadratic(rng) for _ in range(3000)], rng)
    }
    for name, blocks in spectra.items():
        drawn = [from_spectra(blocks, rng) for _ in range(300)]
        bounds[name] = theory.adam_bound_counts(drawn, rng)
    ratio = {
        name: theory.initial_ratio_probability(NUM_DRAWS, SEED, orthonormal=orthonormal)
        for name, orthonormal in (("orthonormal", True), ("gaussian", False))
    }
    values = {
        "num_draws": NUM_DRAWS,
        "proposition1": theory.gradient_descent_bound(),
        "theorem1": bounds,
        "ratio_at_most_1000": ratio,
        "preconditioned": theory.preconditioned_conditions(NUM_DRAWS, SEED),
        "preconditioned_gaussian": theory.preconditioned_conditions(
            NUM_DRAWS, SEED, orthonormal=False
        ),
        "proposition2": theory.limit_cycle(),
    }
    return Result(values, missing=tuple(missing))


def table2(source: release.Source) -> Result:
    """Measure the complexities of Table 2."""
    values = theory.complexity(50, SEED)
    return Result(dict(values), {"table2": _draw_complexity(values)})


def slq(source: release.Source) -> Result:
    """Measure the errors of SLQ at m = 100, n_v = 10."""
    from harness.paper.slq import BLOCKS, dense_block, slq_error

    errors = {f"{model}, {block}": slq_error(dense_block(model, block)) for model, block in BLOCKS}
    errors["uniform on [−1, 1]"] = slq_error(np.diag(np.linspace(-1, 1, 2000)))
    return Result({"errors": errors})


def _race(blocks: Spectra) -> tuple[dict[str, tuple[Array, Array]], dict[str, Any]]:
    """Run the three methods from the same starts; return median curves and median steps.

    With a constant rate and β₂ < 1 the loss ends in a cycle: of the grid, the rate after which the
    loss is first below the tolerance for good, or where none does, that of the lowest end.
    """
    times = np.insert(np.unique(np.geomspace(1, NUM_STEPS, 300).round()), 0, 0)
    rates = np.geomspace(1e-5, 1, 16)
    curves: dict[str, list[Array]] = {"gd": [], "adam": [], "adam099": []}
    facts: list[dict[str, float]] = []
    rng = np.random.default_rng(SEED)
    for _ in range(NUM_RACES):
        quadratic = from_spectra(blocks, rng)
        H, d = quadratic.hessian, len(quadratic.hessian)
        start = rng.standard_normal(d)
        low, high = quadratic.extremes
        ones, D, descent_rate = np.ones(d), np.abs(H @ start), 2 / (low + high)
        steps, eta = least_steps(H, start, D, TOLERANCE)
        for name, P, rate in (("gd", ones, descent_rate), ("adam", D, eta)):
            curves[name].append(preconditioned_losses(H, start, P, np.array([rate]), times)[0])
        losses = adam(H, start, rates, NUM_STEPS, beta2=0.99)
        # The first step from which the loss stays below the tolerance.
        above = losses[:, ::-1] > TOLERANCE * losses[:, :1]
        since = above.argmax(axis=1)  # steps from the end to the last one above
        reached = np.where(above.any(axis=1) & (since > 0), NUM_STEPS + 1 - since, np.inf)
        ends = losses[:, -100:].max(axis=1)
        best = int(reached.argmin() if np.isfinite(reached).any() else ends.argmin())
        curves["adam099"].append(losses[best, times.astype(int)])
        descent = steps_to(H, start, ones, descent_rate, TOLERANCE)
        found = {"steps_gd": descent, "steps_adam": steps, "steps_adam099": reached[best]}
        found |= {"end_adam099": ends[best] / losses[best, 0]}
        facts.append(found | {"r": theory.initial_ratio(quadratic, start)})
    median = {
        name: (times, np.median([y / y[0] for y in drawn], axis=0))
        for name, drawn in curves.items()
    }
    values: dict[str, Any] = {k: float(np.median([f[k] for f in facts])) for k in facts[0]}
    return median, values | {"kappa_blocks": quadratic.block_conditions.tolist()}


def _draw_race(curves: dict[str, dict[str, tuple[Array, Array]]]) -> Figure:
    figure, axes = panels(2.4, 1, 4, sharey=True)
    for ax, (name, title) in zip(axes, TITLES.items(), strict=True):
        ax.set_title(title)
        if name not in curves:
            ax.text(0.5, 0.5, "not in this release", transform=ax.transAxes, ha="center")
            continue
        for key, (label, colour, dashes, _) in _LINES.items():
            times, losses = curves[name][key]
            ax.plot(times + 1, losses, dashes, color=colour, label=label, linewidth=1.4)
    axes[0].set(xscale="log", yscale="log", ylim=(1e-12, 30))
    for ax in axes[1:]:
        ax.set_xscale("log")
    handles, labels = next(ax for ax in reversed(axes) if ax.lines).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    figure.supxlabel("step + 1", fontsize=8)
    axes[0].set_ylabel("L(w) / L(w₀)")
    return figure


def _histograms(source: release.Source, case: str, name: str) -> Result:
    found = sampled_case(source, case)
    if found is None:
        return Result(missing=tuple(m for m in cases(source)[2] if m.startswith(case)))
    model, names, spectra = found
    figure, axes = panels(2.0, 1, 4, sharey=True)
    for ax, block, values in zip(axes, names, spectra, strict=True):
        ax.hist(values, bins=np.geomspace(1, KAPPA, 31), color="#0072B2")
        ax.set_title(block, fontsize=7)
        ax.set_xscale("log")
    axes[0].set_ylabel("eigenvalues")
    figure.supxlabel(f"eigenvalue, mapped to [1, {KAPPA:g}] ({model})", fontsize=8)
    ranges = {
        n: [float(s.min()), float(np.median(s)), float(s.max())]
        for n, s in zip(names, spectra, strict=True)
    }
    return Result({"model": model, "min_median_max": ranges}, {name: figure})


fig12 = partial(_histograms, case="case1", name="fig12")
fig13 = partial(_histograms, case="case2", name="fig13")


def _draw_complexity(values: dict[str, Any]) -> Figure:
    figure, axes = panels(2.8, 1, 2, sharey=True)
    titles = {"heterogeneous": "κ_l ≤ 3 in every block", "homogeneous": "κ_l = κ in every block"}
    for ax, (family, title) in zip(axes, titles.items(), strict=True):
        found = values[family]
        for key, line in (("gradient_descent", "gd"), ("adam", "adam")):
            label, colour, dashes, marker = _LINES[line]
            said = f"{label}: κ^{found[f'{key}_slope']:.2f}"
            ax.plot(found["kappa"], found[key], marker + dashes, color=colour, label=said)
        ax.set(xscale="log", yscale="log")
        ax.set_title(title)
        ax.set_xlabel("κ of the whole Hessian")
        ax.legend()
    axes[0].set_ylabel(f"steps to {TOLERANCE:g} of the loss")
    return figure
