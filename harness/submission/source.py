"""What `--from` and `--task` say: a factory with its options, a task with its."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import UserError, one_line
from harness.tasks.base import Data, Task
from spectra_db.errors import hint

ROOT = Path(__file__).parents[2]
_LIBRARIES = "harness.registry.networks.libraries"
_WORDS = {"true": True, "false": False, "none": None}
_FORMS = "write module:factory, timm:NAME or 'transformers:TYPE?hidden_size=64&...'"
OF_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        factory: module:callable, as an entry has it.
        options: Keyword arguments of the factory.
        family: The family that suggests itself.
        source: Where the code comes from.
        licence: Its licence, "" where it is not known.
    """

    factory: str
    options: Mapping[str, Any]
    family: str
    source: str
    licence: str


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Split "head?key=value&key=value" into its head and its options.

    Values are Python literals (numbers, tuples, ...), true, false or none; all else is text.

    >>> parse_options("timm:convmixer_768_32?depth=4&act_layer=relu&kernel_size=3")
    ('timm:convmixer_768_32', {'depth': 4, 'act_layer': 'relu', 'kernel_size': 3})

    Raises:
        UserError: A part is no key=value.
    """
    head, mark, tail = text.partition("?")
    options: dict[str, Any] = {}
    for part in tail.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals):
            raise UserError(f"{part!r} in {text!r} is no key=value; write '{head}?key=value&...'")
        if key in options:
            raise UserError(f"{text!r} gives {key} twice")
        try:
            options[key] = _WORDS[value.lower()] if value.lower() in _WORDS else _literal(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return head, options


def _literal(value: str) -> Any:
    """Evaluate a literal; what an entry file couldn't hold counts as text."""
    found = ast.literal_eval(value)
    if isinstance(found, int | float | str | tuple | list | dict | bool | type(None)):
        return found
    raise ValueError(value)


def parse_source(text: str, task: Task) -> Source:
    """Read what names a model; which head a transformers model gets is the task's matter.

    Raises:
        UserError: The text has none of the three forms.
    """
    head, options = parse_options(text)
    place, _, name = head.partition(":")
    if OF_HUB.fullmatch(name or place):
        raise UserError(_of_hub(name or place))
    if not (place and name):
        raise UserError(f"{text!r} names no model; {_FORMS}")
    if place in ("timm", "transformers"):
        family = name.replace("_", "-")
        given = {"model_type": name, "head": _head(task), **options}
        if place == "timm":
            family = re.sub(r"\d\d+$", "", name.partition(".")[0].partition("_")[0])  # resnet18
            given = {"model_name": name, **options}
        source = f"{place} {version(place)}"
        return Source(f"{_LIBRARIES}:{place}_model", given, family, source, "Apache-2.0")
    if not all(word.isidentifier() for word in [*place.split("."), name]):
        raise UserError(f"{text!r} names no model; {_FORMS}")
    return Source(head, options, place.rpartition(".")[2].lower().replace("_", "-"), place, "")


def check_factory(source: Source, data: Data, folder: Path | None) -> None:
    """Raise unless the factory can be called with its options and what the task supplies.

    Args:
        source: What `parse_source` returned.
        data: The task's data.
        folder: The folder that the entry is to lie in, None for the tree; the factory must lie
            there too, or be installed.

    Raises:
        UserError: It can't be imported or lies elsewhere; an argument is missing or unknown.
    """
    module, _, attribute = source.factory.partition(":")
    _check_place(module, folder)
    try:
        place = import_module(module)
    except Exception as error:  # whatever a module does when it is imported
        raise UserError(f"{module} can't be imported: {one_line(error)}") from error
    if not hasattr(place, attribute):
        what = hint(attribute, dir(place), "name a function or class of it")
        raise UserError(f"{module} has no {attribute!r}; {what}")
    factory = getattr(place, attribute)
    if not callable(factory):
        raise UserError(f"{source.factory} is no function or class, but {factory!r}")
    try:
        named = inspect.signature(factory).parameters
    except ValueError:  # written in C
        return
    kinds = inspect.Parameter
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in named.values())
    usual = {
        n: p
        for n, p in named.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    strange = [] if takes_any else [name for name in source.options if name not in usual]
    if strange:
        raise UserError(
            f"{source.factory} has no argument {strange[0]!r}; it takes "
            f"{', '.join(usual) or 'none'}"
        )
    supplied = {*source.options, *data.model_options}
    if source.factory.endswith(":timm_model") and "image_size" not in data.model_options:
        raise UserError(
            "timm's models are of images, and the task supplies "
            f"{', '.join(data.model_options)}: take a task of images (`harness list --tasks`), or "
            "a model of text, such as 'transformers:llama?…'"
        )
    required = [n for n, p in usual.items() if p.default is kinds.empty and n not in supplied]
    if required:
        example = "&".join(f"{name}=…" for name in required)
        raise UserError(
            f"{source.factory} needs {', '.join(required)}; the task supplies "
            f"{', '.join(data.model_options)} by these names: pass the others as "
            f"'{source.factory}?{example}'"
        )


def _check_place(module: str, folder: Path | None) -> None:
    """Raise unless a module is installed, of the tree, or in the folder of the entry."""
    here = Path.cwd().resolve()
    file = Path(*module.split("."))
    local = [p for p in (here / file.with_suffix(".py"), here / file / "__init__.py") if p.exists()]
    where = folder.resolve() if folder is not None else ROOT
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    except Exception as error:  # of the package around it
        raise UserError(f"{module} can't be imported: {one_line(error)}") from error
    origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if spec is None and not local:
        place = "is not installed" if folder is None else f"is neither installed nor in {folder}"
        raise UserError(f"the module {module} {place}")
    stays = origin is None or where in origin.parents or ROOT in origin.parents
    if spec is not None and (stays or origin not in local or Path(sys.prefix) in origin.parents):
        return
    remedy = "pass --registry ." if folder is None else f"put it into {folder}"
    raise UserError(
        f"{local[0].relative_to(here)} lies here, but not where the entry is to lie, so "
        f"that other commands would not find it; {remedy}"
    )


def _of_hub(name: str) -> str:
    """Say which type of model an id of the Hub stands for, as far as its name tells."""
    from transformers import CONFIG_MAPPING

    owner, _, model = name.partition("/")
    if owner == "timm":
        remedy = f"write 'timm:{model.partition('.')[0]}'"
    else:
        plain = re.sub(r"\W|_", "", model.lower())
        known = [t for t in CONFIG_MAPPING if re.sub(r"\W|_", "", t) in plain]
        kind = max(known, key=len, default=None)
        remedy = (
            f"write 'transformers:{kind}?hidden_size=…&num_hidden_layers=…'"
            if kind
            else "its config.json names its `model_type`: write 'transformers:MODEL_TYPE?…'"
        )
    return (
        f"{name} is a model of the Hub, whose weights are not used here: models are initialised "
        f"anew, in sizes that can be trained; {remedy}"
    )


def _head(task: Task) -> str:
    if task.metric == "accuracy":
        return "ImageClassification"
    return "MaskedLM" if task.causal is False else "CausalLM"
