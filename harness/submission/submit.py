"""A submission: a model's tables, its entry and code, and a report, in one folder.

    README.md         the report
    submission.json   what was made where, and the sha256 of every file
    entry/            the entry's file and the author's modules that it needs
    data/             the tables, as a release of one model
    checkpoints/      the weights of the stages, by which they can be verified

Reading one executes nothing of it.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from harness.errors import UserError, one_line
from harness.estimator.batches import take
from harness.records.derived import derived
from harness.records.ledger import Ledger
from harness.registry import MAX_BYTES, ModelEntry, defines_entries, entries
from harness.registry.entry import FACTS
from harness.submission import entry_file, report
from harness.submission.recompute import Means
from harness.submission.verify import verify
from harness.training.problem import load_problem
from harness.training.stages import STAGE_SEED
from spectra_db import check, store
from spectra_db.derived import DERIVED, Derive
from spectra_db.files import replaced, sha256_of, whole
from spectra_db.loading import optional
from spectra_db.release import release
from spectra_db.schema import PROTOCOL_VERSION, TABLES

NAME = "submission.json"
VERSION = "0.0.0"  # of the data: not of a release yet
_FORMAT = 1
_MOST_BYTES = 1 << 20  # of a submission.json


def assemble(
    entry: ModelEntry,
    source: Path,
    out: Path,
    *,
    code_version: str,
    registry: Path | None = None,
    data_root: Path | None = None,
    checkpoints: bool = True,
) -> list[str]:
    """Write the submission of a finished entry; an earlier one of the model is replaced.

    Args:
        entry: The entry.
        source: Folder that `harness run` wrote.
        out: Folder of the submission.
        code_version: Of this program.
        registry: Folder that the entry and its modules come from; None for the tree.
        data_root: Folder of data sets.
        checkpoints: Send the weights of the stages along.

    Returns:
        What `problems` says of it.

    Raises:
        UserError: The entry or the tables are not ready, or `out` is something else.
    """
    if left := entry_file.todo(entry):
        raise UserError(f"{entry.name}: {', '.join(left)} not filled in yet; edit the entry's file")
    _check_free(out, entry.name)
    code = _check_tables(entry, source, registry, data_root)
    with replaced(out) as staging:
        release(source, staging / "data", VERSION, models=[entry.name])
        _write_entry(entry, registry, code, staging / "entry")
        if checkpoints:
            _copy_checkpoints(entry, source, staging)
        text = report.render(entry, staging / "data")
        (staging / "README.md").write_text(text, encoding="utf-8")
        facts = {
            "format": _FORMAT,
            "model": entry.name,
            "protocol_version": PROTOCOL_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": code_version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        }
        _seal(staging, facts)
    return problems(out, entry)


def read(folder: Path) -> dict[str, Any] | None:
    """Return what submission.json says; None if the folder is no submission.

    Raises:
        UserError: The file is broken.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise ValueError(f"format {facts['format']!r}; this program reads {_FORMAT}")
        store.path_of(folder, "models", facts["model"])  # a name that names files
        files = {str(name): str(digest) for name, digest in facts["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is broken: {one_line(error)}") from error
    return facts | {"files": files}


def tables_of(folder: Path) -> tuple[Path, Path]:
    """Return the folders of the tables and of the checkpoints in a folder, submission or not.

    Raises:
        UserError: It is a submission with problems.
    """
    checkpoints = Ledger(folder).checkpoints
    if read(folder) is None:
        return folder, checkpoints
    if found := problems(folder):
        raise UserError(f"{found[0]}; problems: {len(found)}")
    return folder / "data", checkpoints


def check_registry(folder: Path, registry: Path | None) -> None:
    """Raise if a folder is the submission of a model that the registry doesn't know.

    Raises:
        UserError: Says how to execute the submission's code.
    """
    facts = read(folder)
    if facts is None:
        return
    if facts["model"] in [entry.name for entry in entries(registry_dir=registry)]:
        return
    raise UserError(
        f"{folder} is of {facts['model']}, which the registry does not have; read the code in "
        f"{folder / 'entry'}, then pass --registry {folder / 'entry'}, which executes it"
    )


def problems(folder: Path, entry: ModelEntry | None = None) -> list[str]:
    """Return what is wrong with a submission; nothing of it is executed.

    Args:
        folder: The submission.
        entry: Its entry, whose recipe the gap is made anew by; `harness verify` does where it is
            not known here.
    """
    facts = read(folder)
    if facts is None:
        return [f"{folder}: no {NAME}, so it is no submission; `harness submit` makes one"]
    made = DERIVED if entry is None else derived(lambda name: entry)
    return [*_wrong_files(folder, facts), *_wrong_content(folder, facts["model"], made)]


def reseal(folder: Path) -> None:
    """Bring the hashes of a submission up to date, after `harness verify` has marked it."""
    facts = read(folder)
    if facts is None:
        raise UserError(f"{folder}: no {NAME}, so it is no submission")
    release(folder / "data", folder / "data", VERSION)
    _seal(folder, facts)


def _check_free(out: Path, model: str) -> None:
    """Raise unless `out` is free, or an earlier submission of the model."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    facts = read(out) if out.is_dir() else None
    if facts is None or facts["model"] != model:
        what = "is there already" if facts is None else f"is the submission of {facts['model']}"
        raise UserError(f"{out} {what}; name another folder as --out")


def _check_tables(
    entry: ModelEntry, source: Path, registry: Path | None, data_root: Path | None
) -> list[Path]:
    """Raise unless the tables are those of the entry; return the author's modules it needs."""
    path = store.path_of(source, "models", entry.name)
    if not path.is_file():
        raise UserError(
            f"{source} has no table of {entry.name}: `harness run {entry.name} --out {source}` "
            "makes it"
        )
    [row] = store.read(path, "models").to_pylist()
    if row["status"] != "ok":
        raise UserError(f"{entry.name} has status {row['status']}: {row['reason']}")
    # What the pretraining decides are values alone.
    problem = load_problem(replace(entry, pretrained=None), data_root=data_root)
    facts = {name: getattr(entry, name) for name in FACTS}
    facts["num_params"] = sum(p.numel() for p in problem.model.parameters())
    found = problem.blocks(entry.partition)
    facts["num_blocks"] = len(found)
    for name, value in facts.items():
        if row[name] != value:
            raise UserError(
                f"{source} holds another {entry.name}: {name} is {row[name]!r} there and {value!r} "
                f"in the entry; run `harness run {entry.name}` again, into another folder where "
                "the network, the task or the recipe has changed"
            )
    spectra = store.read(store.path_of(source, "spectra", entry.name), "spectra").to_pandas()
    columns = ["block", "num_params"]
    sizes = dict(spectra[spectra["partition"] == entry.partition][columns].values)
    if sizes != {block.name: block.num_params for block in found}:
        raise UserError(
            f"the spectra of {entry.name} in {source} are of other blocks than the entry builds; "
            "run it again into another folder"
        )
    _check_product(entry, spectra, source, data_root)
    # Whatever is imported by and by is part of the code.
    problem.loss_fn(problem.model, take(problem.batches[0], 0, 2))
    return [] if registry is None else sorted(modules_in(registry.resolve()))


def _check_product(
    entry: ModelEntry, spectra: pd.DataFrame, source: Path, data_root: Path | None
) -> None:
    """Raise if the entry as it is now gives another product than some initial row's first.

    Where all blocks are exact the smallest one's eigenvalues are compared instead.
    """
    mine = (spectra["stage"] == "init") & (spectra["init_seed"] == STAGE_SEED)
    mine &= (spectra["partition"] == entry.partition) & (spectra["status"] == "ok")
    rows = [
        row
        for row in spectra[mine].to_dict("records")
        if row["method"] == "exact" or row["alphas"][0] != 0
    ]
    if not rows:
        return
    row = min(rows, key=lambda row: (row["method"] == "exact", row["num_params"]))
    if row["method"] != "exact":
        first = {name: row[name][:1] for name in ("alphas", "betas")}
        row |= first | {"num_steps": 1, "nodes": first["alphas"], "weights": np.ones(1)}
    means = Means(data_root, Ledger(source).checkpoints)
    found = verify(row, entry, optional("stages", source), means)
    if found.outcome == "deviates":
        raise UserError(
            f"{source} holds another {entry.name}: a row of {row['block']} is not what the entry "
            f"gives now ({found.reason}); run it again into another folder"
        )


def modules_in(folder: Path) -> Iterator[Path]:
    """Yield the files of imported modules that lie in a folder, relative to it."""
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/").resolve()
        if folder in file.parents and "site-packages" not in file.parts:
            yield file.relative_to(folder)


def _write_entry(entry: ModelEntry, registry: Path | None, code: list[Path], folder: Path) -> None:
    folder.mkdir()
    for path in code:
        assert registry is not None
        original = registry / path
        if path.suffix != ".py" or original.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{original} is no Python source of at most {MAX_BYTES:,} bytes, so it can't be "
                "reviewed: let the network do without it, or publish it as a package"
            )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, folder / path)
    path = entry_file.path_of(folder, entry.name)
    if not path.exists():
        path.write_text(entry_file.render(entry), encoding="utf-8")
    elif not defines_entries(path):
        raise UserError(f"{path.name} is a module of the author; rename it, or the model")


def _copy_checkpoints(entry: ModelEntry, source: Path, staging: Path) -> None:
    """Copy the weights that table `stages` lists, as far as they are there and are those."""
    ledger, ours = Ledger(source), Ledger(staging)
    for row in ledger.rows("stages", entry.name).to_dict("records"):
        of = entry.name, row["stage"], row["seed"]
        original, copy = ledger.checkpoint(*of), ours.checkpoint(*of)
        if original.is_file() and sha256_of(original) == row["checkpoint_sha256"]:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write submission.json, with the sha256 of every other file."""
    files = {name: sha256_of(folder / name) for name in _files(folder)}
    text = json.dumps(facts | {"files": files}, indent=2) + "\n"
    with whole(folder / NAME) as part:
        part.write_text(text, encoding="utf-8")


def _wrong_files(folder: Path, facts: dict[str, Any]) -> Iterator[str]:
    """Compare the files with the list."""
    there = set(_files(folder))
    for name in sorted(there | set(facts["files"])):
        path = folder / name
        if path.is_symlink():
            yield f"{path}: a link; a submission holds files alone"
        elif name not in facts["files"]:
            yield f"{path}: {NAME} does not list it"
        elif name not in there:
            yield f"{path}: {NAME} lists it, it is not there"
        elif sha256_of(path) != facts["files"][name]:
            yield f"{path}: not the file that {NAME} lists"


def _wrong_content(folder: Path, model: str, made: Mapping[str, Derive]) -> Iterator[str]:
    """Check the parts: report, entry and tables."""
    if not (folder / "README.md").is_file():
        yield f"{folder}: no README.md, the report"
    path = entry_file.path_of(folder / "entry", model)
    try:
        if not path.is_file() or not defines_entries(path):
            yield f"{path}: no file of the entry"
    except UserError as error:
        yield str(error)
    for name in _files(folder):
        if name.startswith("entry/") and not name.endswith(".py"):
            yield f"{folder / name}: no Python source; entry/ holds nothing else"
    yield from check.problems(folder / "data", derived=made)
    for table in TABLES:
        for path in sorted((folder / "data" / table).glob("*.parquet")):
            if path.stem != model:
                yield f"{path}: a table of another model"


def _files(folder: Path) -> list[str]:
    """Return the relative paths of all files and links but submission.json."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(folder).as_posix() for path in found]
    return sorted(name for name in names if name != NAME)
