"""Data sets and losses: what a model is trained on and what its Hessian is the Hessian of.

A task loads its data from the data root (or the Hub), draws batches through a generator passed in
and defines the mean loss and the number of terms that this mean averages. Importing this package
imports no torch; `get` imports the one file that holds the task.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib import import_module
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.tasks.base import Batch, Task

__all__ = ["UnknownTaskError", "get", "names", "split"]

_TASKS = {
    "digits": "images:Digits",
    "mnist": "images:Mnist",
    "mnist-barcodes": "barcodes:MnistBarcodes",
    "cifar10": "images:Cifar10",
    "imagenet": "images:ImageNet",
    "gaussian-classes": "synthetic:GaussianClasses",
    "pydoc": "text:Pydoc",
    "tiny-shakespeare": "text:TinyShakespeare",
    "books": "text:Books",
    "wikitext": "text:WikiText",
    "openwebtext": "text:OpenWebText",
    "cornell": "masked:Cornell",
    "masked-books": "masked:MaskedBooks",
    "sft": "sft:Instructions",
}

# What the data are and where they are from: with the harness, drawn by it, or in the data root.
_SIZES = {
    "digits": "1,437 + 360 of 8 × 8, embedded",
    "mnist": "60,000 + 10,000 of 28 × 28",
    "mnist-barcodes": "50,000 of MNIST and 51,200 of 10,240 rare classes, 28 × 28",
    "cifar10": "50,000 + 10,000 of 3 × 32 × 32",
    "imagenet": "3 × 224 × 224; 1,000 classes",
    "gaussian-classes": "2,048 of 128 dimensions, 256 classes, drawn",
    "pydoc": "about 0.5 MB of text, embedded",
    "tiny-shakespeare": "1.1 MB of text",
    "books": "8.1 MB of text",
    "wikitext": "2.4 MB of text, or the Hub's 13 MB",
    "openwebtext": "2,000 documents of the Hub",
    "cornell": "234,628 lines of dialogue",
    "masked-books": "8.1 MB of text",
    "sft": "2,000 or 6,400 instructions",
}

# Plain types of options, as they are written on the command line.
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    NoneType: "none",
}


class UnknownTaskError(UserError):
    """No task has this name."""


def names() -> list[str]:
    """List the names that `get` accepts.

    >>> names()[:2]
    ['digits', 'mnist']
    """
    return list(_TASKS)


def kind_of(task: type[Task] | Task) -> str:
    """Say what is predicted of what: the kind of network that a task is for."""
    kinds: dict[bool | None, str] = {True: "next token", False: "masked token"}
    return kinds.get(task.causal, "class" if task.metric == "accuracy" else "own")


def listing() -> list[dict[str, str]]:
    """List the tasks: what each predicts, its data, their size, and the terms of their use."""
    from spectra_db.card import TASKS

    rows = []
    for name, place in _TASKS.items():
        module, attribute = place.split(":")
        task = getattr(import_module(f"harness.tasks.{module}"), attribute)
        data, terms = TASKS[name]
        row = {"name": name, "predicts": kind_of(task), "size": _SIZES[name], "data": data}
        rows.append(row | {"terms": terms})
    return rows


def get(name: str, **options: Any) -> Task:
    """Return the task of this name with its options.

    >>> get("digits").metric
    'accuracy'

    Args:
        name: one of `names()`, or "module:Class" of a `Task` of your own.
        options: the task's fields.

    Raises:
        UnknownTaskError: no such name; the message gives close matches.
        UserError: the task has no such option, or not with such a value; the message says what
            it allows.
    """
    if ":" in name:
        task = _own(name)
    elif name in _TASKS:
        module, attribute = _TASKS[name].split(":")
        task = getattr(import_module(f"harness.tasks.{module}"), attribute)
    else:
        close = difflib.get_close_matches(name, _TASKS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"tasks: {', '.join(_TASKS)}"
        raise UnknownTaskError(f"unknown task {name!r}; {hint}, or module:Class of your own")
    allowed = [field.name for field in fields(task)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(
            f"task {name!r} has no option {', '.join(unknown)}; "
            f"its options are: {', '.join(allowed) or 'none'}"
        )
    hints = _hints(task)
    for option, value in options.items():
        if (allowed_kinds := _kinds(hints.get(option), value)) is not None:
            raise UserError(
                f"task {name!r}: {option} is {value!r}; it must be {' or '.join(allowed_kinds)}"
            )
    made = task(**options)
    for option in allowed:
        if not _is_hashable(value := getattr(made, option)):  # what is loaded once needs a key
            raise UserError(
                f"task {name!r}: {option} is {value!r}; it must be text, a number, true, false, "
                "none or a tuple of these"
            )
    return made


def _hints(task: type[Task]) -> dict[str, Any]:
    """Return the types of a task's options, none where its author's can't be resolved."""
    try:
        return get_type_hints(task)
    except Exception:
        return {}


def _kinds(hint: Any, value: Any) -> list[str] | None:
    """Return what an option of plain types may be; None if the value is that."""
    plain = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not set(plain) <= set(_KINDS):
        return None
    fits = type(value) in plain or (float in plain and type(value) is int)
    return None if fits else [_KINDS[kind] for kind in plain]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _own(name: str) -> type[Task]:
    """Import a task that is not of this package."""
    from harness.tasks.base import Task

    module, _, attribute = name.partition(":")
    try:
        task = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownTaskError(f"task {name!r} can't be imported ({error})") from error
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UnknownTaskError(f"task {name!r} is no subclass of harness.tasks.base.Task")
    missing = sorted(getattr(task, "__abstractmethods__", ()))
    missing += [a for a in ("name", "metric") if not hasattr(task, a)]
    if missing:
        raise UnknownTaskError(f"task {name!r} lacks {', '.join(missing)}; define them")
    return task


def split(batch: Batch, size: int) -> list[Batch]:
    """Slice a batch along its leading dimension into microbatches, the last one ragged.

    Args:
        batch: tensors with a common leading dimension B.
        size: samples per microbatch, at least 1.

    Returns:
        ceil(B / size) batches that share the memory of `batch`.
    """
    if size < 1:
        raise ValueError(f"microbatch size is {size}; it must be at least 1")
    return [
        tuple(tensor[start : start + size] for tensor in batch)
        for start in range(0, len(batch[0]), size)
    ]
