"""Data sets and losses: what a model is trained on and what its Hessian is the Hessian of.

A task loads its data from the data root (or the Hub), draws batches through a generator passed in
and defines the mean loss and the number of terms that this mean averages. Importing this package
imports no torch; `get` imports the one file that holds the task.
"""

from __future__ import annotations

import ast
import pkgutil
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from harness.errors import UserError
from spectra_db.errors import hint

if TYPE_CHECKING:
    from harness.registry.entry import ModelEntry
    from harness.tasks.base import Batch, Task

__all__ = ["UnknownTaskError", "get", "names", "of", "split"]

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
    ['books', 'cifar10']
    """
    return sorted(_places())


@cache
def _places() -> dict[str, tuple[str, str]]:
    """Find module and class of each task of this folder by its `name`, without importing it."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        tree = ast.parse((Path(__file__).parent / f"{module.name}.py").read_text(encoding="utf-8"))
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for line in (line for line in node.body if isinstance(line, ast.AnnAssign)):
                if ast.unparse(line.target) == "name" and isinstance(line.value, ast.Constant):
                    found[str(line.value.value)] = (module.name, node.name)
    return found


def _ours(name: str) -> type[Task]:
    module, attribute = _places()[name]
    task: type[Task] = getattr(import_module(f"harness.tasks.{module}"), attribute)
    return task


def kind_of(task: type[Task] | Task) -> str:
    """Say what is predicted of what: the kind of network that a task is for."""
    kinds: dict[bool | None, str] = {True: "next token", False: "masked token"}
    return kinds.get(task.causal, "class" if task.metric == "accuracy" else "own")


def listing() -> list[dict[str, str]]:
    """List the tasks: what each predicts, its data, their size, and the terms of their use."""
    from spectra_db.card import TASKS

    rows = []
    for name in names():
        task, (data, terms) = _ours(name), TASKS.get(name, ("", ""))
        of = {"predicts": kind_of(task), "size": task.extent, "data": data, "terms": terms}
        rows.append({"name": name, **of})
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
    elif name in _places():
        task = _ours(name)
    else:
        ours = hint(name, names())
        raise UnknownTaskError(f"unknown task {name!r}; {ours}, or module:Class of your own")
    allowed = [field.name for field in fields(task)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(
            f"task {name!r} has no option {', '.join(unknown)}; "
            f"its options are: {', '.join(allowed) or 'none'}"
        )
    try:
        hints = get_type_hints(task)
    except Exception:  # its author's can't be resolved
        hints = {}
    for option, value in options.items():
        if (allowed_kinds := _kinds(hints.get(option), value)) is not None:
            raise UserError(
                f"task {name!r}: {option} is {value!r}; it must be {' or '.join(allowed_kinds)}"
            )
    made = task(**options)
    for option in allowed:
        value = getattr(made, option)
        try:
            hash(value)  # what is loaded once needs a key
        except TypeError:
            raise UserError(
                f"task {name!r}: {option} is {value!r}; it must be text, a number, true, false, "
                "none or a tuple of these"
            ) from None
    return made


def of(entry: ModelEntry) -> Task:
    """Return the task of an entry, with the entry's options.

    Raises:
        UnknownTaskError, UserError: As `get`.
    """
    return get(entry.task, **entry.task_options)


def _kinds(hint: Any, value: Any) -> list[str] | None:
    """Return what an option of plain types may be; None if the value is that."""
    plain = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not set(plain) <= set(_KINDS):
        return None
    fits = type(value) in plain or (float in plain and type(value) is int)
    return None if fits else [_KINDS[kind] for kind in plain]


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
