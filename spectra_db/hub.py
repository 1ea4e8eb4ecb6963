"""The dataset on the Hugging Face Hub: fetch a revision of it, as a whole or in part.

The token is the Hub's own: of `hf auth login`, or HF_TOKEN. It is never an argument here.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from spectra_db import manifest, store
from spectra_db.errors import HubError, NotFound, hint
from spectra_db.manifest import InvalidRelease, Manifest
from spectra_db.release import replacing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TYPE = "dataset"
MAIN = "main"
_SECRETS = {
    re.compile(r"(Bearer )[^'\"]+"): r"\1***",
    re.compile(r"(://)[^/\s]+@"): r"\1***@",
    re.compile(r"(://[^\s?]+\?)[^\s'\")>]+"): r"\1***",
}


def fetch(repo: str, revision: str | None = None, paths: list[str] | None = None) -> Path:
    """Return the local folder of a dataset at a revision, downloading what the cache lacks.

    The revision is what the Hub says it is now. Only where the Hub can't be reached is the cache
    asked, for that very revision, and a warning says so (not with HF_HUB_OFFLINE, which asks for
    it).

    Args:
        repo: Id of the dataset, owner/name.
        revision: Tag, branch or commit; None for main.
        paths: Shell patterns of files to fetch, beside card and manifest; None for all.

    Raises:
        NotFound: There is no such dataset or revision, as far as the token may see.
        HubError: The Hub can't be reached and the cache lacks the revision, or it fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = revision or MAIN
    commit, reason = resolve(repo, revision)
    patterns = None if paths is None else ["*.md", manifest.NAME, *paths]
    try:
        path = snapshot_download(
            repo,
            repo_type=TYPE,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=commit is None,
        )
        if commit is None and _lacks(Path(path), patterns):
            raise LocalEntryNotFoundError("not all of it was downloaded")
    except LocalEntryNotFoundError as error:
        # Reached before, but not to the end, or not reached at all.
        known = ", ".join(_cached_revisions(repo)) or "none"
        raise HubError(
            f"the Hub can't be reached ({reason or reason_of(error)}), and revision {revision} "
            f"of {repo} is not whole in the cache, which holds of it: {known}"
        ) from error
    except Exception as error:
        raise HubError(f"{repo} at {revision} can't be downloaded: {reason_of(error)}") from error
    if commit is not None and Path(path).name != commit:
        raise HubError(
            f"{repo} at {revision} is commit {commit[:12]}, and the download ended before it was "
            f"there; the cache holds {Path(path).name[:12]}. Try again"
        )
    if commit is None and reason:
        warnings.warn(
            f"the Hub can't be reached ({reason}): {repo} at {revision} is as it was when last "
            f"downloaded, commit {Path(path).name[:12]}",
            stacklevel=2,
        )
    return Path(path)


def pull(repo: str, revision: str | None = None, out: Path | None = None) -> tuple[Path, Manifest]:
    """Fetch a whole release, compare every file with its manifest, and validate every table.

    Args:
        repo: Id of the dataset, owner/name.
        revision: Tag, branch or commit; None for main.
        out: Folder to put it in; None to leave it in the Hub's cache, where `load` finds it.

    Returns:
        The folder and the manifest.

    Raises:
        NotFound, HubError: As `fetch`.
        InvalidRelease, InvalidTable: The release is not what its manifest says, or no release.
    """
    folder = fetch(repo, revision)
    known = manifest.read(folder)
    if known is None:
        raise InvalidRelease(f"{repo} at {revision or MAIN} has no {manifest.NAME}: no release")
    for path in known.files:
        manifest.check_file(folder, known, path)
        if manifest.is_table(path):
            store.read(folder / path, path.partition("/")[0])
    if out is None:
        return folder, known
    with replacing(out) as staging:
        for path in [*known.files, manifest.NAME]:
            (staging / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, staging / path)
    return out, known


def resolve(repo: str, revision: str) -> tuple[str | None, str]:
    """Return the commit of a revision now; None where the Hub can't be reached, and why.

    The reason is empty where HF_HUB_OFFLINE asks for the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        return str(api.repo_info(repo, repo_type=TYPE, revision=revision).sha), ""
    except HFValidationError as error:
        raise NotFound(f"{repo!r} is no id of a dataset: {reason_of(error)}") from error
    except GatedRepoError as error:
        raise NotFound(f"dataset {repo} is gated: ask for access on its page") from error
    except OfflineModeIsEnabled:
        return None, ""
    except HfHubHTTPError as error:
        # Some servers answer 401 where a revision is missing, not the dataset.
        if isinstance(error, RevisionNotFoundError) or _status(error) in (401, 403, 404):
            raise _missing(api, repo, revision, error) from error
        raise HubError(f"{repo} at {revision}: {explain(error)}") from error
    except Exception as error:
        return None, reason_of(error)


def _missing(api: HfApi, repo: str, revision: str, error: Exception) -> NotFound:
    """Tell a missing revision from a missing dataset."""
    try:
        refs = api.list_repo_refs(repo, repo_type=TYPE)
    except Exception:
        return NotFound(
            f"the Hub has no dataset {repo}, or the token may not see it (it answered "
            f"{_status(error)}): check the id, and `hf auth login` or HF_TOKEN"
        )
    names = [ref.name for ref in [*refs.tags, *refs.branches]]
    return NotFound(f"dataset {repo} has no revision {revision!r}; {hint(revision, names)}")


def _lacks(folder: Path, patterns: list[str] | None) -> bool:
    """Tell whether a folder of the cache lacks files that its manifest lists."""
    from huggingface_hub.utils import filter_repo_objects

    known = manifest.read(folder)
    listed = [] if known is None else filter_repo_objects(known.files, allow_patterns=patterns)
    return any(not (folder / path).exists() for path in listed)


def _cached_revisions(repo: str) -> list[str]:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "refs"
    return sorted(p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file())


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception) -> str:
    """Return what went wrong in a line, with the remedy where it is known."""
    # Uploads run in threads: what they raise has the Hub's answer as its cause.
    while _status(error) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = _status(error)
    if status in (401, 403):
        return (
            f"the Hub refuses the token ({status}): log in with one that may write (hf auth login)"
        )
    if status in (409, 412):
        return f"main has changed meanwhile ({status}): run the command again"
    if status is not None:
        return f"the Hub answered {status}: {reason_of(error)}"
    return reason_of(error)


def redacted(text: str) -> str:
    """Return a text without what it may hold of secrets, to be shown or kept in a log.

    These are the token, in a header or anywhere, and of addresses the user with the password and
    the query, by which downloads are signed.
    """
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    for secret, shown in _SECRETS.items():
        text = secret.sub(shown, text)
    return text


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, without secrets."""
    return next(iter(redacted(str(error)).strip().splitlines()), "") or type(error).__name__
