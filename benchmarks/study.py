"""How far estimates are from the truth, measured: `make accuracy` writes docs/accuracy.md.

Each piece is kept in build/accuracy, so that the command goes on where it was stopped; about 40
minutes of one core in all, half of them for the GPT of 10.8 million parameters. Needs no
data but what comes with the packages.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from scipy.stats import wasserstein_distance

import spectra_db
from benchmarks.cases import KINDS, small
from harness import estimate_spectra, find_blocks, registry
from harness.estimator.adaptive import estimate_to_tolerance, limits
from harness.estimator.batches import take
from harness.estimator.lanczos import Recurrence, lanczos
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import EXACT_SIZE, Settings
from harness.registry import ModelEntry
from harness.training import load_problem
from spectra_db.densities import SCALE, SIGMA
from spectra_db.quadrature import gauss_rule

PROBES, STEPS = (3, 5, 10), (10, 20, 40, 80)
POOL = 180  # probes per block that the repetitions share out
SCALED_PROBES, SCALED_STEPS, SCALED_REPETITIONS = (3, 10), 40, 60
REFERENCE = (30, 200)
# Parts of the reference, and one more tenth of the paper's products.
FEW = (*((p, m) for p in PROBES for m in (33, 66, 100)), (4, 25))
TOLERANCE = 0.02


def reference_entries() -> dict[str, tuple[ModelEntry, int]]:
    """Return entries on real data, with the samples of a batch that make a step short."""
    gpt, cnn = registry.get("gpt-pydoc"), registry.get("cnn-digits")
    wide = replace(gpt, name="gpt-pydoc-64", options={**gpt.options, "width": 64})
    mlp = replace(
        cnn,
        name="mlp-digits",
        factory="harness.registry.networks.mlp:MLP",
        options={"widths": (64, 64)},
    )
    return {
        "gpt": (gpt, 8),
        "gpt-64": (wide, 4),
        "vit": (registry.get("vit-digits"), 8),
        "cnn": (cnn, 64),
        "mlp": (mlp, 256),
    }


def exact(kind: str, num_updates: int = 0) -> pd.DataFrame:
    """Diagonalise every block of a small net, in float64, after so many steps of AdamW."""
    case = small(kind)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(num_updates):
        optimizer.zero_grad()
        case.loss_fn(case.model, case.batch).backward()
        optimizer.step()
    rows = case.spectra(dtype=torch.float64, exact_size=10**6)
    return rows.drop(columns=["reason", "tolerance"])


def repeated(truth: pd.DataFrame) -> pd.DataFrame:
    """Sample spectra that are known, again and again, with each number of probes and steps.

    Gaussian probes look the same in every basis, so that Lanczos on the diagonal matrix of the
    eigenvalues has the distribution of Lanczos on the Hessian; this costs no products.
    """
    pools = sampled(truth, POOL, max(STEPS))
    return pd.DataFrame(
        {"num_probes": p, "num_steps": m} | estimate(rows) | errors_of_blocks(truth, rows)
        for p, m in itertools.product(PROBES, STEPS)
        for rows in groups_of(truth, pools, p, m, POOL // p)
    )


def sampled(truth: pd.DataFrame, count: int, num_steps: int) -> dict[str, list[Recurrence]]:
    """Return so many probes of each block by Lanczos on the diagonal matrix of its eigenvalues."""
    return {
        block: [lanczos(lambda v, d=diagonal: d * v, s, num_steps) for s in starts]
        for block, diagonal, starts in drawn(truth, count)
    }


def drawn(truth: pd.DataFrame, count: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each block, its eigenvalues, shape (n,), and Gaussian probes, shape (count, n)."""
    generator = torch.Generator().manual_seed(0)
    for row in truth.itertuples():
        diagonal = torch.tensor(row.nodes, dtype=torch.float64)
        yield (
            row.block,
            diagonal,
            torch.randn(count, len(diagonal), generator=generator, dtype=torch.float64),
        )


def scaled(
    truth: pd.DataFrame, scales: Sequence[str] = ("lambda10", "raw"), exact_size: int = 0
) -> pd.DataFrame:
    """Sample known spectra scaled by each sample's own λ10, as js0 does, and by the exact one.

    So the noise of λ10 is told from that of the densities. `jump` is the largest ratio of
    neighbours among the 8th to the 13th largest |eigenvalue|, over all blocks.

    Args:
        truth: Exact rows.
        scales: lambda10, and raw: the eigenvalues are divided by the exact λ10 already.
        exact_size: Blocks of at most so many parameters are not sampled.
    """
    sizes = [np.sort(np.abs(nodes))[::-1] for nodes in truth["nodes"]]
    jump = max(float((x[7:12] / x[8:13]).max()) for x in sizes)
    by_exact = truth.assign(nodes=[n / x[9] for n, x in zip(truth["nodes"], sizes, strict=True)])
    larger = by_exact[by_exact["num_params"] > exact_size]
    pools = sampled(larger, SCALED_REPETITIONS * max(SCALED_PROBES), SCALED_STEPS)
    return pd.DataFrame(
        {"num_probes": p, "scale": scale, "jump": jump} | estimate(rows, scale, sigma=SIGMA)
        for p in SCALED_PROBES
        for rows in groups_of(by_exact, pools, p, SCALED_STEPS, SCALED_REPETITIONS)
        for scale in scales
    )


def errors_of_blocks(truth: pd.DataFrame, rows: pd.DataFrame) -> dict[str, float]:
    """Return the mean over blocks of the errors of trace, second moment and spectrum.

    Of the trace relative to n · rms eigenvalue (it may be zero), of the second moment to itself,
    of the spectrum (Wasserstein-1) to the rms eigenvalue.
    """
    errors = []
    for (_, exact_row), (_, mine) in zip(
        truth.groupby("block"), rows.groupby("block"), strict=True
    ):
        t = np.asarray(exact_row["nodes"].iloc[0])
        theta = np.concatenate(list(mine["nodes"]))
        w = np.concatenate(list(mine["weights"])) / len(mine)
        rms = np.sqrt(np.mean(t**2))
        trace = abs(w @ theta - t.mean()) / rms
        square = abs(w @ theta**2 / rms**2 - 1)
        errors.append((trace, square, wasserstein_distance(t, theta, None, w) / rms))
    return dict(zip(("trace", "square", "w1"), np.mean(errors, axis=0), strict=True))


def to_tolerance(kind: str, exact: pd.DataFrame) -> pd.DataFrame:
    """Ask for js0 to 2 %, with three seeds; the truth is that of the exact spectra."""
    case = small(kind)
    found = []
    for seed in range(3):
        settings = Settings("weights", *limits("js0", TOLERANCE, None, None), exact_size=0)
        source = {"model": kind, "stage": "current", "init_seed": seed}
        objective = Objective(case.model, case.loss_fn, [case.batch])
        with opened(objective, find_blocks(case.model), settings) as hessian:
            reached = estimate_to_tolerance(hessian, settings, source, tolerance=TOLERANCE)
        names = ("num_probes", "num_steps", "truncation_error")
        numbers = {name: getattr(reached, name) for name in names} | {"within": reached.is_within}
        found.append(estimate(reached.rows, SCALE, extend=True) | numbers)
    return pd.DataFrame(found).assign(truth=spectra_db.js0(exact).value)


def reference(entry: ModelEntry, num_samples: int) -> pd.DataFrame:
    """Take js0 of a real model with 30 probes × 200 steps, and with parts of them.

    The first row is the reference, the others are disjoint groups of its probes.
    """
    problem = load_problem(entry)
    [batch] = problem.batches
    begin = time.process_time()
    rows = estimate_spectra(
        problem.model,
        problem.loss_fn,
        [take(batch, 0, num_samples)],
        num_probes=REFERENCE[0],
        num_steps=REFERENCE[1],
    )
    seconds = (time.process_time() - begin) / (REFERENCE[0] * REFERENCE[1])
    runs = runs_of(rows[rows["method"] == "slq"])
    known = rows[rows["probe"] == 0]
    found = [estimate(rows) | {"num_probes": REFERENCE[0], "num_steps": REFERENCE[1]}]
    found += [
        estimate(few) | {"num_probes": p, "num_steps": m}
        for p, m in FEW
        for few in groups_of(known, runs, p, m, REFERENCE[0] // p)
    ]
    return pd.DataFrame(found).assign(
        num_blocks=rows["block"].nunique(), num_sampled=len(runs), seconds=seconds
    )


def runs_of(rows: pd.DataFrame) -> dict[str, list[Recurrence]]:
    """Return the recurrences of sampled rows, by block, in the order of the rows."""
    return {
        str(name): [
            Recurrence(torch.empty(0), None, list(r.alphas), list(r.betas), None, r.breakdown)
            for r in group.itertuples()
        ]
        for name, group in rows.groupby("block")
    }


def rows_of(
    blocks: pd.DataFrame, runs: dict[str, list[Recurrence]], probes: Sequence[int], num_steps: int
) -> pd.DataFrame:
    """Return rows of table `spectra` from some probes' leading steps; exact ones as they are."""
    rows = []
    for row in blocks.to_dict("records"):
        if row["block"] not in runs:
            rows.append(row)
            continue
        for probe in probes:
            run = runs[row["block"]][probe]
            alphas, betas = run.alphas[:num_steps], run.betas[:num_steps]
            nodes, weights = gauss_rule(alphas, betas)
            ended = run.breakdown and len(run.alphas) <= num_steps
            lists = {"alphas": alphas, "betas": betas, "nodes": nodes, "weights": weights}
            numbers = {"num_steps": len(alphas), "num_products": len(alphas), "breakdown": ended}
            rows.append(row | lists | numbers | {"probe": probe, "method": "slq"})
    return pd.DataFrame(rows).assign(reason=None)


def groups_of(
    blocks: pd.DataFrame,
    runs: dict[str, list[Recurrence]],
    num_probes: int,
    num_steps: int,
    count: int,
) -> Iterator[pd.DataFrame]:
    """Yield `rows_of` so many groups of probes, no probe in two of them."""
    for i in range(count):
        yield rows_of(blocks, runs, range(i * num_probes, (i + 1) * num_probes), num_steps)


def estimate(
    rows: pd.DataFrame,
    scale: str = "lambda10",
    *,
    sigma: float | None = None,
    extend: bool = False,
) -> dict[str, float]:
    """Return js0 of some rows with its errors; of rules that end, unless they are to go on."""
    e = spectra_db.js0(rows, scale=scale, sigma=sigma, extend=extend)
    names = ("value", "corrected", "standard_error", "ci_low", "ci_high")
    return {name: getattr(e, name) for name in names}


@click.command()
@click.option("--pieces", type=click.Path(path_type=Path), default=Path("build/accuracy"))
@click.option("--page", type=click.Path(path_type=Path), default=Path("docs/accuracy.md"))
def main(pieces: Path, page: Path) -> None:
    """Measure the estimator's errors and write the page about them."""
    from benchmarks import few
    from benchmarks.arithmetic import arithmetic, full
    from benchmarks.continued import UPDATES, continued, section
    from benchmarks.study_page import NAMES, render

    torch.set_num_threads(1)
    begin = time.process_time()

    def kept(name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return a piece from its file, made first if it is not there."""
        file = pieces / f"{name}.parquet"
        if not file.exists():
            pieces.mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            made = make()
            click.echo(f"{name}: {time.process_time() - started:.0f} s of processor", err=True)
            made.to_parquet(file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        return pd.read_parquet(file)

    def of_nets(name: str, make: Callable[[str], pd.DataFrame]) -> dict[str, pd.DataFrame]:
        """Return a piece of each small net."""
        return {kind: kept(f"{name}-{kind}", partial(make, kind)) for kind in KINDS}

    truths = {k: rows.assign(reason=None) for k, rows in of_nets("exact", exact).items()}
    trained = of_nets("trained", lambda k: exact(k, UPDATES))
    cases = {
        f"{NAMES[k]}, {stage}": kept(f"continued-{k}-{stage}", partial(continued, rows[k]))
        for k in KINDS
        for stage, rows in (("init", truths), ("trained", trained))
    }
    text = render(
        truths=truths,
        sections=[
            section(cases),
            few.section(
                of_nets("few", lambda k: few.few(truths[k])),
                kept("large", few.large_rows).assign(reason=None),
            ),
        ],
        repeated=of_nets("repeated", lambda k: repeated(truths[k])),
        scaled=of_nets("scaled", lambda k: scaled(truths[k])),
        exact_heads=of_nets("heads", lambda k: scaled(truths[k], ["lambda10"], EXACT_SIZE)),
        tolerance=of_nets("tolerance", lambda k: to_tolerance(k, truths[k])),
        reference={
            entry.name: kept(f"reference-{kind}", partial(reference, entry, num_samples))
            for kind, (entry, num_samples) in reference_entries().items()
        },
        arithmetic=of_nets("arithmetic", arithmetic),
        full=kept("full", full),
    )
    page.write_text(text, encoding="utf-8")
    click.echo(f"wrote {page}; {time.process_time() - begin:.0f} s of processor", err=True)


if __name__ == "__main__":
    main()
