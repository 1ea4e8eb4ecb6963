"""What the processes of test_distributed.py do: several spectra together."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import torch

from harness import estimate_spectra, find_blocks
from harness.estimator.batches import batch_hash
from harness.estimator.blocks import Block
from harness.estimator.cost import forecast
from harness.estimator.distributed import Team, rules_together, team
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.estimator.share import Share
from harness.estimator.spectrum import Row, gathered
from tests.harness.estimator.models import cross_entropy, num_terms, problem, split

SETTINGS = {"num_probes": 3, "num_steps": 8, "exact_size": 20, "batch_weights": num_terms}
# Name of the model, way, sizes of microbatches, further settings.
CASES = {
    "probes": ("gpt", "probes", (6,), {}),
    "probes in float32": ("vit", "probes", (3, 3), {"dtype": torch.float32}),
    "zero block": ("zero head", "probes", (6,), {}),
    "more processes than probes": ("mlp", "probes", (6,), {"num_probes": 1, "blocks": "full"}),
    "samples": ("gpt", "samples", (6,), {}),
    "samples of uneven microbatches": ("gpt", "samples", (4, 3, 1, 2, 1), {}),
    "samples of even microbatches": ("gpt", "samples", (2, 2, 1, 1), {}),
    "samples without kept graphs": ("cnn", "samples", (3, 3, 1), {"memory_budget": 62_000}),
    "batch statistics": ("cnn", "samples", (3, 2, 3), {"norm_mode": "train"}),
    "samples by differences": ("mlp", "samples", (4, 3, 1, 2, 1), {"product": "differences"}),
    "full by samples": ("mlp", "samples", (5,), {"blocks": "full"}),
}


def inputs(case: str):
    """Return (model, microbatches, settings) of a case."""
    name, _, sizes, further = CASES[case]
    model, batch = problem("mlp" if name == "zero head" else name, sum(sizes))
    if name == "zero head":
        torch.nn.init.zeros_(model[3].weight)  # the first layer's Hessian vanishes
    settings = SETTINGS | {"dtype": torch.float64} | further
    settings["blocks"] = find_blocks(model, str(settings.get("blocks", "weights")))
    model.to(settings["dtype"])
    return model, split(batch, sizes), settings


def values(case: str) -> tuple[Objective, list[Block], Settings]:
    """Return objective, blocks and settings of a case."""
    model, batches, settings = inputs(case)
    objective = Objective(model, cross_entropy, batches, settings.pop("batch_weights"))
    blocks = settings.pop("blocks")
    return objective, blocks, Settings("custom", **settings)


@cache
def alone(case: str) -> pd.DataFrame:
    """Return the rows that one process makes."""
    model, batches, settings = inputs(case)
    return estimate_spectra(model, cross_entropy, batches, **settings)


def work(folder: Path) -> None:
    """Do all cases, as process 0 leave FOLDER/CASE.pickle."""
    torch.set_num_threads(1)
    with team("cpu") as together:
        _work(together, folder)


def _work(together: Team, folder: Path) -> None:
    for case, (_, way, _, _) in CASES.items():
        objective, blocks, settings = values(case)
        cost = forecast(objective, blocks, settings) if together.leads else None
        together.way = way
        parts: list[list[Row]] = []
        source = {"model": type(objective.model).__name__, "stage": "current", "init_seed": 0}
        source |= {"train_run": "", "run_id": "", "step": 0, "progress": 0.0, "data_source": ""}
        source["batch_hash"] = batch_hash(objective.batches)
        of = (objective, blocks, settings, source)
        rules_together(together, cost, *of, on_block=parts.append)
        if together.leads:
            gathered(parts, blocks).to_pickle(folder / f"{case}.pickle")
        else:
            assert not parts
    objective, blocks, settings = values("samples of uneven microbatches")
    share = Share(together.rank, together.size, together.add_up)
    with opened(objective, blocks, settings, share=share) as hessian:
        gradient = hessian.gradient()
    if together.leads:
        torch.save(gradient, folder / "gradient.pt")
