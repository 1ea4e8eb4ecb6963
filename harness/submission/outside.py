"""A model without an entry: of a library or a factory, with weights of a file or of the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness import registry
from harness.errors import UserError, reason_of
from harness.registry.entry import check_slug
from harness.submission.draft import check_size, draft, names
from harness.submission.source import OF_HUB
from harness.training import Problem, load_problem
from spectra_db.files import sha256_of

STAGE = "current"
_HUB_FILE = "model.safetensors"
# Where training loops put the weights in what they save, and what they put before names.
_INSIDE = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.")


def outside_problem(
    name: str,
    source: str,
    task: str,
    *,
    weights: str | None,
    seed: int,
    folder: Path | None,
    data_root: Path | None,
) -> Problem:
    """Build the problem of a model that no entry describes.

    Args:
        name: What its rows are to be called.
        source: What `harness add-model` takes as --from.
        task: What it takes as --task.
        weights: A .safetensors, or a state_dict that torch saved, or an id on the Hub; None: as it
            is initialised.
        seed: Of the initialisation, and of the probes.
        folder: Where a factory of one's own lies.
        data_root: Folder of data sets.

    Returns:
        The problem, of stage init, or with weights of stage `current`, whose train_run names them.

    Raises:
        UserError: The name is an entry's; the model, task or data can't be had; or the weights
            can't be read, or are not the model's.
    """
    check_slug("MODEL", name)
    if name in [entry.name for entry in registry.entries(registry_dir=folder)]:
        raise UserError(
            f"the registry has a model {name!r}; choose another name for that of --from"
        )
    entry, data = draft(name, source, task, folder=folder, data_root=data_root, stages=("init",))
    check_size(entry, data)
    problem = load_problem(entry, "init", seed, data_root=data_root)
    if weights is None:
        return problem
    path = Path(weights)
    if OF_HUB.fullmatch(weights) and not path.exists():
        path = _of_hub(weights)
    load_weights(problem.model, read_weights(path), weights)
    return replace(problem, stage=STAGE, train_run=f"weights-{sha256_of(path)[:12]}")


def _of_hub(repo: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, _HUB_FILE))
    except Exception as error:  # of the network, the Hub, or its client
        raise UserError(
            f"{_HUB_FILE} of {repo} can't be had of the Hub ({reason_of(error)}); a file of your "
            "own goes as --weights FILE.safetensors"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict; nothing in the file is executed.

    Raises:
        UserError: There is no such file, or it holds no tensors by name.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file, and no owner/name of the Hub")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle may raise anything
        raise UserError(
            f"--weights {path} can't be read as a state_dict ({reason_of(error)}); write one with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    tensors: dict[str, Tensor] = {}
    if isinstance(found, dict):
        found = next((found[k] for k in _INSIDE if isinstance(found.get(k), dict)), found)
        tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"--weights {path} holds a {type(found).__name__} without tensors by name")
    return tensors


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], given: str) -> None:
    """Give a model weights by their names, whatever was put before these.

    Args:
        model: Changed in place. All its parameters must be among the weights, tied ones once.
        weights: Tensors by name; what the model has no place for is warned of.
        given: Where they come from.

    Raises:
        UserError: A parameter has no weights, or weights of another shape.
    """
    own = model.state_dict()
    found = max(_renamed(model, weights), key=lambda renamed: len(own.keys() & renamed.keys()))
    for name, tensor in own.items():
        if name in found and found[name].shape != tensor.shape:
            raise UserError(
                f"--weights {given}: {name} has the shape {tuple(found[name].shape)}, the model's "
                f"is {tuple(tensor.shape)}; give --from the sizes that it was trained with, and "
                "--task its data"
            )
    every = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in every.items() if name in found}
    if missing := [name for name, parameter in every.items() if id(parameter) not in there]:
        raise UserError(
            f"--weights {given} lacks {len(missing)} of the model's {len(every)} parameters: "
            f"{names(missing)}; it has {names(sorted(weights))}"
        )
    buffers = [n for n, t in own.items() if n not in every and t.is_floating_point()]
    if missing := [name for name in buffers if name not in found]:
        warnings.warn(
            f"--weights {given} lacks {names(missing)}, which stay as the model is built: "
            "statistics of batch norms, such as running_mean, are part of a state_dict",
            stacklevel=2,
        )
    model.load_state_dict(found, strict=False)
    if left := [name for name in found if name not in own]:
        warnings.warn(f"--weights {given}: no place in the model for {names(left)}", stacklevel=2)


def _renamed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield weights under the names that they may have in the model."""
    yield dict(weights)
    for prefix in _PREFIXES:
        yield {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if base := getattr(model, "base_model_prefix", ""):  # files of transformers may leave it out
        own = model.state_dict()
        yield {n if n in own else f"{base}.{n}": tensor for n, tensor in weights.items()}
