"""What the processes of test_sharded.py do: spectra of models that they hold together."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from harness import Block, Recorder, estimate_spectra, find_blocks
from harness.errors import UserError
from harness.estimator.batches import Batch
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe
from harness.estimator.settings import Settings
from tests.harness.estimator.models import cross_entropy, num_terms, problem, split

OPTIONS = {"product": "differences", "dtype": "float64", "num_probes": 1, "num_steps": 3}
# What so many processes do.
CASES = {2: ("gpt", "batch statistics"), 4: ("gpt", "empty shards", "copies of shards")}


def inputs(case: str) -> tuple[nn.Module, list[Batch], dict[str, Any]]:
    """Return (model, microbatches, settings) of a case."""
    if case == "gpt":  # wte is tied to the head, and wpe frozen
        model, batch = problem("gpt", 8)
        model.wpe.requires_grad_(False)
        named = {block.name: block for block in find_blocks(model)}
        parts = (*named["wte.weight"].parts, *named["h.1.attn.qkv.weight[v]"].parts)
        block = Block("both", "layer", parts, 88 + 64, (88 + 64,))
        further = {"blocks": [block], "exact_size": 0, "batch_weights": num_terms}
        return model, split(batch, (5, 3)), OPTIONS | further
    if case == "batch statistics":
        model, batch = problem("cnn", 8)
        further = {"blocks": find_blocks(model)[:1], "norm_mode": "train", "exact_size": 0}
        return model, split(batch, (3, 2, 3)), OPTIONS | further
    _, batch = problem("mlp", 5)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    # One bias is diagonalised, the other exhausted by Lanczos.
    weight, short, other, bias = find_blocks(model, "all")
    blocks = [other] if case == "copies of shards" else [weight, short, bias]
    further = {"blocks": blocks, "exact_size": 3, "num_steps": 5}
    return model, [batch], OPTIONS | further


def sharded(case: str) -> nn.Module:
    """Return the model of a case, sharded by layers and what is left."""
    model, _, _ = inputs(case)
    options = {}
    if case == "copies of shards":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
        options["mesh"] = mesh
    fully_shard(model[1] if isinstance(model, nn.Sequential) else model.h[1], **options)
    return fully_shard(model, **options)


@cache
def alone(case: str) -> pd.DataFrame:
    """Return the rows that one process makes of the whole model."""
    model, batches, settings = inputs(case)
    return estimate_spectra(model, cross_entropy, batches, **settings)


def work(folder: Path, program: str) -> None:
    """Do the cases, leave FOLDER/CASE-RANK.pickle and FOLDER/RANK.json; two run a program too."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # The program meets the others at torchrun's port.
    dist.init_process_group("gloo", f"file://{folder}/met", rank=rank, world_size=size)
    facts: dict[str, Any] = {"changed": {case: _changed(case, folder) for case in CASES[size]}}
    facts |= {"sizes": _sizes(), "errors": {name: _error(name) for name in ERRORS if size == 2}}
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()
    if size == 2:
        exec(program, {"__name__": "__main__"})


def _changed(case: str, folder: Path) -> list[str]:
    """Take a spectrum, leave its rows; return what of the model is not as it was before."""
    _, batches, settings = inputs(case)
    model = sharded(case).train()
    cross_entropy(model, batches[0]).backward()  # gradients, which are to be kept
    with torch.no_grad():
        cross_entropy(model, batches[0])  # after which the last parameters are left gathered
    before = _state(model)
    rows = estimate_spectra(model, cross_entropy, batches, **settings)
    rows.to_pickle(folder / f"{case}-{dist.get_rank()}.pickle")
    after = _state(model)
    return [name for name in before if not torch.equal(before[name], after[name])]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return shards, gradients, buffers and modes of a model, all of them copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = dict(model.named_parameters())
    state = {n: p.to_local().detach().clone() for n, p in parameters.items()}
    slopes = {n: p.grad.to_local() for n, p in parameters.items() if p.grad is not None}
    assert slopes
    state |= {f"gradient of {n}": slope.clone() for n, slope in slopes.items()}
    state |= {n: b.clone() for n, b in model.named_buffers()}
    modes = torch.tensor([m.training for m in model.modules()])
    return state | {
        "modes": modes,
        "frozen": torch.tensor([p.requires_grad for p in parameters.values()]),
    }


def _sizes() -> dict[str, tuple[int, int, int]]:
    """Return of each weight its size, and those of a probe and of a product in this process."""
    model, batches, _ = inputs("empty shards")
    fully_shard(model)
    objective, blocks, found = Objective(model, cross_entropy, batches), find_blocks(model), {}
    how = Settings(dtype="float64", product="differences")
    with opened(objective, blocks, how) as hessian:
        for i, block in enumerate(blocks):
            probe = hessian.shard(i, draw_probe(block.num_params, 0, "gaussian").double())
            [product] = hessian.products([(i, probe)])
            found[block.name] = (block.num_params, len(probe), len(product))
    return found


# What is asked of a small model, and the beginning of what is said.
ERRORS = {
    "autograd": "the model's parameters are sharded, which leaves no second derivative",
    "float32": "the parameter 1.weight is torch.float64, and can't be cast",
    "batches": "the processes were given different batches",
    "steps": "the processes were given different settings",
    "factor": "the gradients of the sharded model are",
    "sync": "no gradients came back",
    "mixed": "the sharded model computes in {torch.bfloat16}",
    "parallel": "the model's parameters are DTensors, but not of fully_shard",
    "rest": "the parameter 3.bias is not sharded",
    "hook": "the parameter 1.weight has a hook",
    "device": "the parameter 1.weight is on cpu, and device is 'meta'",
    "recorder": "a Recorder takes no model that is sharded",
}


def _error(name: str) -> str:
    """Return what is said where something can't be had."""
    model, batches, settings = inputs("empty shards")
    settings |= {"num_steps": 1}
    if name == "mixed":
        model, settings["dtype"] = model.float(), "float32"
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    elif name == "parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh))
    else:
        fully_shard(model[1] if name == "rest" else model)
    if name == "autograd":
        settings["product"] = "autograd"
    elif name == "float32":
        settings["dtype"] = "float32"
    elif name == "device":
        settings["device"] = "meta"
    elif name == "batches":
        batches = [(x + dist.get_rank(), y) for x, y in batches]
    elif name == "steps":
        settings["num_steps"] += dist.get_rank()
    elif name == "factor":
        model.set_gradient_divide_factor(1.0)
    elif name == "sync":
        model.set_requires_gradient_sync(False)
    elif name == "hook":
        model[1].weight.register_post_accumulate_grad_hook(lambda p: None)
    before = [_shard(p).clone() for p in model.parameters()]
    try:
        if name == "recorder":
            Recorder("nowhere", "mine", cross_entropy, batches, every=1)(model, 0)
        else:
            estimate_spectra(model, cross_entropy, batches, **settings)
    except UserError as error:
        assert all(map(torch.equal, before, map(_shard, model.parameters())))
        return str(error)
    return "nothing"


def _shard(parameter: nn.Parameter) -> torch.Tensor:
    """Return what of a parameter, sharded or not, lies in this process."""
    return getattr(parameter, "to_local", parameter.detach)()
