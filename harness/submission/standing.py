"""How far an entry has come on its way into the dataset, and what comes next."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.campaign.unfinished import unfinished
from harness.errors import UserError
from harness.records import version
from harness.records.ledger import Ledger
from harness.registry import ModelEntry
from harness.submission import entry_file, submit
from spectra_db import store
from spectra_db.files import sha256_of, whole


@dataclass(frozen=True)
class Standing:
    """Where an entry stands.

    Attributes:
        status: draft, validated, complete, submitted, or accepted, as docs/add-a-model.md has them.
        following: What to do next.
    """

    status: str
    following: str


ACCEPTED = Standing("accepted", "")


def note_validated(entry: ModelEntry, registry: Path) -> None:
    """Note beside an entry that `harness validate` found it ready, with the code that it was.

    A submission, which holds the files that it lists and no others, and a folder that can't be
    written to stay without.
    """
    if (registry.parent / submit.NAME).is_file():
        return
    with suppress(OSError), whole(_path(entry, registry)) as part:
        text = json.dumps(_version(entry, registry, submit.modules_in(registry.resolve())))
        part.write_text(text + "\n", encoding="utf-8")


def standing(entry: ModelEntry, registry: Path, source: Path | None = None) -> Standing:
    """Return where an entry of one's own stands.

    Args:
        entry: The entry.
        registry: Folder that it comes from.
        source: Folder that `harness run` wrote, or a submission.

    Raises:
        UserError: The source is a submission with problems.
    """
    facts = None if source is None else submit.read(source)
    if source is not None and facts is not None and facts["model"] == entry.name:
        submit.tables_of(source)
        return Standing("submitted", "a maintainer reads the code and verifies it elsewhere")
    named = f"{entry.name} --registry {registry}"
    is_validated = _is_validated(entry, registry)
    status, following = "validated", f"`harness run {named} --out FOLDER`"
    if source is not None and store.path_of(source, "models", entry.name).is_file():
        if reason := _unfinished(entry, registry, source):
            following = f"`harness run {named} --out {source}`: {reason}"
        else:
            submission = f"harness submit {named} --source {source} --out FOLDER"
            status, following = "complete", f"`{submission}`"
            if entry.is_rehearsal:
                following = f"a rehearsal, no result; `{submission} --rehearsal` tries the way"
    if not is_validated:
        following = f"`harness validate {named}`"
        status = "draft" if status == "validated" else status
    if left := entry_file.todo(entry):
        following = f"fill in {', '.join(left)}"
    return Standing(status, following)


def _unfinished(entry: ModelEntry, registry: Path, source: Path) -> str | None:
    """Return why the results of a folder are not all of this entry, None if they are."""
    try:
        version.check(entry, Ledger(source))
    except UserError as error:
        return str(error)
    return unfinished(source, registry, rehearsals=True).get(entry.name)


def _is_validated(entry: ModelEntry, registry: Path) -> bool:
    """Tell whether an entry and its code are those that were found ready."""
    try:
        noted: Any = json.loads(_path(entry, registry).read_text(encoding="utf-8"))
        return bool(noted == _version(entry, registry, map(Path, noted["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _version(entry: ModelEntry, registry: Path, files: Any) -> dict[str, Any]:
    """Return what tells versions apart: hashes of the entry and of the author's modules."""
    text = entry_file.render(entry)
    return {
        "entry": hashlib.sha256(text.encode()).hexdigest(),
        "files": {str(name): sha256_of(registry / name) for name in sorted(files)},
    }


def _path(entry: ModelEntry, registry: Path) -> Path:
    return registry / f"{entry.name}.validated.json"
