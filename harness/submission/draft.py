"""Draft the entry of a new model: its data, its recipe, its size."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import tasks
from harness.errors import UserError, one_line
from harness.estimator import Block, find_blocks
from harness.estimator.blocks import unclassified
from harness.estimator.device import device_memory
from harness.registry import recipes
from harness.registry.entry import ModelEntry, Recipe
from harness.submission.entry_file import TODO
from harness.submission.source import check_factory, parse_options, parse_source
from harness.tasks.base import Data, Task
from harness.tasks.images import ImageTask

# Bytes per parameter that training with AdamW takes at least: weight, gradient, two moments.
_TRAINING_BYTES = 16
_USUAL = (recipes.CIFAR10, recipes.MNIST, recipes.SHAKESPEARE, recipes.BOOKS)
_TASK_OPTIONS: dict[str, dict[str, Any]] = {
    usual["task"]: usual["task_options"] for usual in _USUAL
}
_EVAL_TOKENS = 65_536


@dataclass(frozen=True)
class Findings:
    """What a model looks like from inside.

    Attributes:
        num_params: Its parameters, frozen ones included.
        blocks: Its blocks of partition `weights`.
        unclassified: Matrices that belong to none of them, since they are called biases.
        frozen: Names of the parameters that are not trained.
        tied: Other names of parameters that have several.
    """

    num_params: int
    blocks: list[Block]
    unclassified: list[Block]
    frozen: list[str]
    tied: list[str]

    @property
    def guessed(self) -> dict[str, str]:
        """Return the kinds that are guesses, as an entry gives them: by pattern over names."""
        kinds: dict[str, str] = {}
        for block in (b for b in self.blocks if b.is_guessed):
            layers = re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", block.name)  # all layers at once
            alike = [b for b in self.blocks if fnmatchcase(b.name, layers)]
            of_one_kind = all(b.is_guessed and b.kind == block.kind for b in alike)
            kinds[layers if of_one_kind else block.name] = block.kind
        return kinds

    def notes(self) -> list[str]:
        """Say what the table of the blocks doesn't show, a line each."""
        lines = []
        if self.guessed:
            lines.append(
                "kind guessed, neither module nor name tells it; the entry's line `blocks` says "
                f"what it is: {names(list(self.guessed))}"
            )
        if self.unclassified:
            count = sum(b.num_params for b in self.unclassified)
            listed = names([b.name for b in self.unclassified])
            lines.append(
                f"called biases, in no block: {listed} ({count:,} parameters); if they are "
                "weights, the entry's line `blocks` can say so"
            )
        if self.tied:
            lines.append(f"tied, one block under the first name: {names(self.tied)}")
        if self.frozen:
            lines.append(f"frozen, in no block: {names(self.frozen)}")
        return lines


def draft(
    name: str,
    source_text: str,
    task_text: str,
    *,
    folder: Path | None,
    data_root: Path | None,
    **given: Any,
) -> tuple[ModelEntry, Data]:
    """Draft an entry from what the command line says.

    Args:
        name: Of the model.
        source_text: --from.
        task_text: --task, a name or module:Class, with `?option=value` where wanted.
        folder: Where the entry is to lie; None for the tree.
        data_root: Folder of data sets.
        given: Fields of the entry that win over what suggests itself; None counts as not given.
            `train_steps` is the recipe's num_steps; `batch_size`, `sgd_lrs`, `adamw_lrs` and the
            FIELD=VALUE of `recipe` are its others.

    Raises:
        UserError: Something of it can't be; the data are missing; the factory can't be called.
    """
    task_name, options = parse_options(task_text)
    options = _TASK_OPTIONS.get(task_name, {}) | options
    task = tasks.get(task_name, **options)
    source = parse_source(source_text, task)
    if isinstance(task, ImageTask) and isinstance(side := source.options.get("img_size"), int):
        options["image_size"] = side  # the images are resized to what the model takes
        task = tasks.get(task_name, **options)
    try:
        data = task.load(data_root)
    except UserError:
        raise
    except Exception as error:  # of a task that is not ours
        raise UserError(f"the task {task_text!r} can't load its data: {one_line(error)}") from error
    if task.size(data, "train") < 1:
        context = data.model_options.get("context")
        sample = "sample" if context is None else f"sequence of {context:,} tokens"
        raise UserError(
            f"the data of task {task_text!r} hold no training {sample}; choose other options"
        )
    check_factory(source, data, folder)
    given = {key: value for key, value in given.items() if value is not None}
    changes = _recipe_changes(given)
    entry = ModelEntry(
        **{
            "name": name,
            **vars(source),
            "tier": "small",
            "task": task_name,
            "task_options": options,
            "reference": f"{TODO}: the paper or page that defines the architecture",
            "licence": source.licence or f"{TODO}: the licence of the architecture's code",
            "description": f"{source_text.partition('?')[0]} on {task_name}",
            "stages": recipes.SMALL["stages"],
            **_sizes(task, data),
            **given,
        }
    )
    if entry.recipe is not None and changes:
        if "num_steps" in changes:  # warm-up at most a tenth of them
            warmup = min(entry.recipe.warmup_steps, changes["num_steps"] // 10)
            changes = {"warmup_steps": warmup, **changes}
        entry = replace(entry, recipe=replace(entry.recipe, **changes))
    if entry.stages[:1] != ("init",):
        raise UserError(f"--stages is {','.join(entry.stages)}; it must begin with init")
    full = tuple(s for s in recipes.SMALL["full_stages"] if s in entry.stages)
    if entry.stages == ("init",):
        entry = replace(entry, recipe=None)
    return replace(entry, full_stages=full), data


def _recipe_changes(given: dict[str, Any]) -> dict[str, Any]:
    """Take what is of the recipe out of what is given, and return it by the recipe's fields.

    Raises:
        UserError: A field is unknown, or its value is of another type.
    """
    changes: dict[str, Any] = {}
    for part in given.pop("recipe", ()):
        name, equals, _ = part.partition("=")
        known = {field.name: field for field in fields(Recipe)}
        if name not in known or not equals:
            raise UserError(f"--recipe {part!r}: write FIELD=VALUE; fields: {', '.join(known)}")
        changes |= parse_options(f"?{part}")[1]
        kind, value = known[name].type, changes[name]
        if not _fits(str(kind), value):
            raise UserError(f"--recipe {part!r}: {name} must be {kind}, as in the entry's file")
    for name in ("sgd_lrs", "adamw_lrs"):
        if (text := given.pop(name, None)) is not None:
            try:
                low, high = (float(part) for part in text.split(","))
            except ValueError:
                raise UserError(
                    f"--{name.replace('_', '-')} is {text!r}; write the lowest and the highest: "
                    "0.01,1"
                ) from None
            changes[name] = low, high
    names = {"train_steps": "num_steps", "batch_size": "batch_size"}
    return changes | {new: given.pop(old) for old, new in names.items() if old in given}


def _fits(kind: str, value: Any) -> bool:
    """Tell whether a value is of the type that a field's annotation names."""
    allowed = {"int": int, "float": int | float, "str": str, "bool": bool, "None": type(None)}
    if kind.startswith("tuple"):
        return isinstance(value, tuple)
    is_bool = isinstance(value, bool) and "bool" not in kind
    return not is_bool and any(isinstance(value, allowed[k]) for k in kind.split(" | "))


def _sizes(task: Task, data: Data) -> dict[str, Any]:
    """Choose the recipe and the Hessian's batch, as far as the data go."""
    images = task.metric == "accuracy"
    recipe, batch = (recipes.IMAGES, 128) if images else (recipes.LANGUAGE, 32)
    if not images:
        samples = _EVAL_TOKENS // data.model_options.get("context", 64)
        recipe = replace(recipe, eval_size=max(1, samples))
    if task.causal is False:  # a seventh of the words are terms
        batch *= 2
    available = task.size(data, "train")
    least = {name: min(getattr(recipe, name), available) for name in ("eval_size", "batch_size")}
    return {"recipe": replace(recipe, **least), "hessian_batch_size": min(batch, available)}


def check_size(entry: ModelEntry, data: Data) -> int | None:
    """Raise if the model is too large for this machine; nothing is allocated for it.

    Returns:
        The number of parameters; None where the factory doesn't work on the meta device.
    """
    try:
        with torch.device("meta"):
            model = entry.build(data.model_options, seed=0)
    except UserError:
        return None  # whatever it is, building it in earnest says so
    num_params = sum(p.numel() for p in model.parameters())
    memory = device_memory(torch.device("cpu"))
    if _TRAINING_BYTES * num_params > memory:
        raise UserError(
            f"the model has {num_params:,} parameters: to train it takes at least "
            f"{_TRAINING_BYTES * num_params / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f} GiB; choose a smaller configuration"
        )
    return num_params


def build(entry: ModelEntry, data: Data) -> nn.Module:
    """Build the model, in no more memory than this machine has.

    Raises:
        UserError: It doesn't fit, or the factory fails.
    """
    with _memory_limit(device_memory(torch.device("cpu"))):
        return entry.build(data.model_options, seed=1)


@contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    """Let allocations beyond so many further bytes fail instead of filling the machine."""
    pages = Path("/proc/self/statm")
    if not pages.exists():  # no Linux
        yield
        return
    used = int(pages.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + num_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def inspect_model(model: nn.Module, kinds: Mapping[str, str] | None = None) -> Findings:
    """Find the blocks of a model and what is left out of them.

    Args:
        model: The model.
        kinds: Those that its entry gives.

    Raises:
        UserError: It has no block.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    once = dict(model.named_parameters())
    return Findings(
        num_params=sum(p.numel() for p in once.values()),
        blocks=find_blocks(model, kinds=kinds),
        unclassified=unclassified(model, kinds),
        frozen=[n for n, p in once.items() if not p.requires_grad],
        tied=[n for n in every if n not in once],
    )


def names(found: list[str], most: int = 4) -> str:
    """List the first of some names, and how many more there are."""
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest
