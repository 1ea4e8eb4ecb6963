"""The file of an entry: readable, data alone, written whole or not at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import isfinite
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.registry import defines_entries, recipes
from harness.registry.entry import ModelEntry, Recipe
from spectra_db.files import whole
from spectra_db.words import STAGES

TODO = "TODO"  # begins what the author has to fill in
_WIDTH = 100
_RECIPES = {"IMAGES": recipes.IMAGES, "LANGUAGE": recipes.LANGUAGE}


def path_of(folder: Path, name: str) -> Path:
    """Return where the entry of that name lies."""
    return folder / f"{name}.py"


def check_free(path: Path, *, force: bool) -> None:
    """Raise unless an entry may be written to a path.

    Raises:
        UserError: A file is there, and `force` is off or would lose code.
    """
    if not path.exists():
        return
    if not defines_entries(path):
        raise UserError(
            f"{path} is there and is no entry file (it defines no ENTRIES): give the model another "
            "name; its file takes the name of the model"
        )
    if not force:
        raise UserError(f"{path} is there already; pass --force to replace it, or another name")
    kept = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
    body = ast.parse(path.read_bytes()).body
    code = [node for node in body if not isinstance(node, kept)]
    if code:
        raise UserError(
            f"{path} defines more than ENTRIES (line {code[0].lineno}), which --force would lose: "
            "edit it by hand, or give the model another name"
        )


def render(entry: ModelEntry) -> str:
    """Return the text of a file that defines ENTRIES as this one entry."""
    uses: set[str] = set()
    lines = []
    for name, default in _FIELDS.items():
        value = getattr(entry, name)
        if value == default:
            continue
        if isinstance(value, Recipe):
            text = _recipe(value, uses)
        elif name == "stages" and value == STAGES:
            uses.add("STAGES")
            text = "STAGES"
        else:
            text = _literal(value, len(name) + 2)
        if name == "blocks":
            lines.append("        # Guessed: look whether they are right.")
        lines.append(f"        {name}={text},")
    names = [*(["STAGES"] if "STAGES" in uses else []), "ModelEntry"]
    head = ["from dataclasses import replace", ""] if "replace" in uses else []
    head.append(f"from harness.registry.entry import {', '.join(names)}")
    if used := sorted(uses & set(_RECIPES)):
        head.append(f"from harness.registry.recipes import {', '.join(used)}")
    title = f'"""{entry.name} on {entry.task}."""\n\nfrom __future__ import annotations\n'
    body = ["", "ENTRIES = (", "    ModelEntry(", *lines, "    ),", ")", ""]
    return "\n".join([title, *head, *body])


def todo(entry: ModelEntry) -> list[str]:
    """List the fields that the author has yet to fill in."""
    names = ("source", "reference", "licence", "description")
    return [name for name in names if getattr(entry, name).startswith(TODO)]


def write(path: Path, text: str) -> None:
    """Write a file by an atomic rename; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


# In the order of the file; left out where they have the default of ModelEntry.
_ORDER = (
    *("name", "family", "tier", "factory", "options", "task", "task_options"),
    *("hessian_batch_size", "microbatch_size", "moments_batch_size", "num_probes", "num_steps"),
    *("paper_blocks", "blocks"),
    *("recipe", "stages", "full_stages", "pretrained", "status", "reason"),
    *("source", "reference", "licence", "description"),
)
_DEFAULTS = {
    f.name: f.default_factory() if f.default_factory is not MISSING else f.default
    for f in fields(ModelEntry)
}
_FIELDS = {name: _DEFAULTS[name] for name in _ORDER}


def _recipe(value: Recipe, uses: set[str]) -> str:
    """Name a recipe of the registry, with what differs from it."""
    differs = {
        base: {k: v for k, v in vars(value).items() if v != getattr(known, k)}
        for base, known in _RECIPES.items()
    }
    base = min(differs, key=lambda name: len(differs[name]))
    uses.add(base)
    if not differs[base]:
        return base
    uses.add("replace")
    return f"replace({base}, {', '.join(f'{k}={_literal(v)}' for k, v in differs[base].items())})"


def _literal(value: Any, before: int = 0) -> str:
    """Write a value as Python; a mapping too long for its line goes over several."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not isfinite(value):
        return f'float("{value}")'
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_literal, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, Mapping):
        items = [f"{_literal(k)}: {_literal(v)}" for k, v in value.items()]
        line = "{" + ", ".join(items) + "}"
        if not before or 8 + before + len(line) <= _WIDTH:
            return line
        return "{\n" + "".join(f"{' ' * 12}{item},\n" for item in items) + " " * 8 + "}"
    return repr(value)
