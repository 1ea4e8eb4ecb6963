"""Checkpoints: how the weights of a stage are written, and how they are read back.

A file's bytes are a function of the weights and the recorded facts alone, so that a training
repeated on the same machine gives a file of the same sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from harness import registry
from harness.errors import UserError
from harness.registry.entry import ModelEntry
from harness.training.stages import STAGE_SEED, checkpoint_path, file_name, out_option
from spectra_db.errors import first_line
from spectra_db.files import sha256_of, whole
from spectra_db.schema import PROTOCOL_VERSION

_FACTS = "harness"  # the key of our facts in the safetensors metadata


def initial_model(
    entry: ModelEntry,
    model_options: Mapping[str, Any],
    seed: int,
    checkpoint_dir: Path | str | None = None,
) -> nn.Module:
    """Build the model of an entry as it is before the first step.

    A pretrained one starts from the final AdamW checkpoint of seed 1 of the entry that it names,
    whatever the seed: the weights are given, as published ones are, and the seed decides the order
    of the data alone.

    Args:
        entry: what to build.
        model_options: what the data say of the model.
        seed: of the initialisation.
        checkpoint_dir: where the pretraining saved its stages.

    Raises:
        UserError: the pretraining is not done (the message names the command), or its checkpoint
            cannot be read or is of another version of it than the tree's.
    """
    model = entry.build(model_options, seed)
    if entry.pretrained is not None:
        path = checkpoint_path(checkpoint_dir or "", entry.pretrained, STAGE_SEED, "final")
        if checkpoint_dir is None or not path.is_file():
            where = f"no checkpoint {path}" if checkpoint_dir else "no checkpoint folder is given"
            raise UserError(
                f"{entry.name!r} starts from {entry.pretrained!r}, which is not trained yet "
                f"({where}); run: harness run {entry.pretrained} {out_option(checkpoint_dir)}"
            )
        # None for an entry that is not of the tree, whose folder is not known here.
        known = next((e for e in registry.entries() if e.name == entry.pretrained), None)
        load(model, path, entry=known)
    return model


def entry_hash(entry: ModelEntry) -> str:
    """Hash what decides the weights: the network, the task and the recipe (16 hex digits)."""
    recipe = None if entry.recipe is None else asdict(entry.recipe)
    facts = [entry.name, entry.factory, dict(entry.options), entry.task]
    facts += [] if entry.pretrained is None else [entry.pretrained]
    facts += [] if entry.speedup is None else [asdict(entry.speedup)]
    text = json.dumps([*facts, dict(entry.task_options), recipe], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(model: nn.Module, path: Path, facts: Mapping[str, Any]) -> str:
    """Write a checkpoint atomically; tied weights once.

    Args:
        model: the network, on any device.
        path: where to; folders are made. A killed save leaves the old file, or none.
        facts: what the checkpoint is (step, loss, lr, entry hash, ...), in plain JSON types.

    Returns:
        The sha256 of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps({**facts, "tensors_sha256": _digest(model)}, sort_keys=True)
    with whole(path) as part:
        try:
            save_model(model, str(part), metadata={_FACTS: record})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            number = int(found.group(1))  # such as that of a full disk
            raise OSError(number, os.strerror(number), str(part)) from error
        content = _sorted_header(part.read_bytes())
        part.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def keep(
    model: nn.Module, folder: Path, entry: ModelEntry, *, metric: float | None, **facts: Any
) -> dict[str, Any]:
    """Write the checkpoint of a stage and return its row of table `stages`.

    Args:
        model: the network at that stage.
        folder: of the run's stages.
        entry: what is trained.
        metric: score on the test split, where the task has one.
        **facts: stage, step, loss, optimizer, lr and seed.
    """
    facts = {"model": entry.name, **facts}
    path = folder / file_name(facts["stage"])
    sha256 = save(model, path, {**facts, "entry_hash": entry_hash(entry)})
    known = {"metric": metric, "checkpoint_sha256": sha256}
    return facts | known | {"protocol_version": PROTOCOL_VERSION}


def load(
    model: nn.Module, path: Path, *, sha256: str | None = None, entry: ModelEntry | None = None
) -> dict[str, Any]:
    """Read a checkpoint into the model and check it.

    Args:
        model: the network it was saved from, freshly built; changed in place.
        path: the file.
        sha256: what the file's hash must be, where it is known.
        entry: the entry it must have been trained for, where it matters.

    Returns:
        The facts that were saved with it.

    Raises:
        UserError: the file is torn or altered, or belongs to another version of the entry.
    """
    retrain = "delete it and train again"
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise UserError(f"checkpoint {path} does not have the sha256 {sha256}; {retrain}")
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
        recorded = facts["tensors_sha256"]
        if entry is not None and facts["entry_hash"] != entry_hash(entry):
            raise UserError(
                f"checkpoint {path} was trained for another version of {entry.name!r} "
                f"(network, task or recipe differ); {retrain}: harness run {entry.name} "
                f"{out_option(path.parents[2])}"
            )
        load_model(model, path)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({first_line(error)}); {retrain}"
        ) from error
    if _digest(model) != recorded:
        raise UserError(f"checkpoint {path} is corrupted: its weights were altered; {retrain}")
    return facts


def _digest(model: nn.Module) -> str:
    """Hash names, dtypes, shapes and bytes of the state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sorted_header(content: bytes) -> bytes:
    """Order a safetensors file's metadata, whose order is otherwise that of a random hash.

    The layout: length of the header (8 bytes, little endian), the header in JSON padded by spaces
    to a multiple of 8, the tensors at offsets relative to the end of the header.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
