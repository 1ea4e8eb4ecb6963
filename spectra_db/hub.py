"""The dataset on the Hugging Face Hub: fetch a revision, publish a release.

The token is the Hub's own: of `hf auth login`, or HF_TOKEN. It is never an argument here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra_db import check, manifest, store
from spectra_db.load import NotFound, hint
from spectra_db.manifest import InvalidRelease, Manifest
from spectra_db.release import replace_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TYPE = "dataset"
_MAIN = "main"


class HubError(RuntimeError):
    """The Hub can't be reached, or refuses; the text says what to do."""


def fetch(repo: str, revision: str | None = None, tables: list[str] | None = None) -> Path:
    """Return the local folder of a dataset at a revision, downloading what the cache lacks.

    The revision is what the Hub says it is now. Only where the Hub can't be reached is the cache
    asked, for that very revision, and a warning says so (not with HF_HUB_OFFLINE, which asks for
    it).

    Args:
        repo: Id of the dataset, owner/name.
        revision: Tag, branch or commit; None for main.
        tables: Tables to fetch, beside card and manifest; None for all.

    Raises:
        NotFound: There is no such dataset or revision, as far as the token may see.
        HubError: The Hub can't be reached and the cache lacks the revision, or it fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = revision or _MAIN
    commit, reason = _resolve(repo, revision)
    patterns = None if tables is None else ["*.md", manifest.NAME, *(f"{t}/*" for t in tables)]
    try:
        path = snapshot_download(
            repo,
            repo_type=_TYPE,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=commit is None,
        )
    except LocalEntryNotFoundError as error:
        # Reached before, but not to the end, or not reached at all.
        known = ", ".join(_cached_revisions(repo)) or "none"
        raise HubError(
            f"the Hub can't be reached ({reason or _first_line(error)}), and revision {revision} "
            f"of {repo} is not whole in the cache, which holds of it: {known}"
        ) from error
    except Exception as error:
        raise HubError(f"{repo} at {revision} can't be downloaded: {_first_line(error)}") from error
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
        raise InvalidRelease(f"{repo} at {revision or _MAIN} has no {manifest.NAME}: no release")
    for path in known.files:
        manifest.check_file(folder, known, path)
        if path.endswith(".parquet"):
            store.read(folder / path, path.partition("/")[0])
    if out is None:
        return folder, known
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        for path in [*known.files, manifest.NAME]:
            (staging / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, staging / path)
        replace_folder(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out, known


@dataclass(frozen=True)
class Plan:
    """What publishing a release would do.

    Attributes:
        repo: Id of the dataset.
        tag: Name of the version's tag.
        head: Commit of main that the release would follow.
        added, changed, removed: Paths.
        num_bytes: To be uploaded at most.
        tagged: The tag is there already, on these very files.
    """

    repo: str
    tag: str
    head: str
    added: list[str]
    changed: list[str]
    removed: list[str]
    num_bytes: int
    tagged: bool

    @property
    def is_empty(self) -> bool:
        """Whether main has these very files."""
        return not (self.added or self.changed or self.removed)


def plan(folder: Path, repo: str) -> Plan:
    """Check a release, compare it with the Hub, and say what publishing it would do.

    Raises:
        InvalidRelease: The release is not sound, does not follow the published one, or its version
            is published with other files.
        NotFound, HubError: As `fetch`.
    """
    from huggingface_hub import HfApi

    known = _sound(folder, None)
    api = HfApi()
    head, reason = _resolve(repo, _MAIN)
    if head is None:
        raise HubError(f"the Hub can't be reached ({reason}); nothing was published")
    local = _paths(folder)
    remote = _remote_files(api, repo, head)
    added, changed, removed = _differences(folder, local, remote)
    tag = f"v{known.version}"
    tagged = _tag_commit(api, repo, tag)
    if tagged is not None:
        more, others, fewer = _differences(folder, local, _remote_files(api, repo, tagged))
        differ = [*others, *more, *fewer]
        if differ:
            raise InvalidRelease(
                f"{tag} is published with other files (such as {differ[0]}), and a published "
                "version never changes: release another version"
            )
    elif manifest.NAME in remote:
        _sound(folder, fetch(repo, head))
    sizes = [(folder / path).stat().st_size for path in [*added, *changed]]
    return Plan(repo, tag, head, added, changed, removed, sum(sizes), tagged is not None)


def publish(folder: Path, planned: Plan, *, create_pr: bool = False) -> str:
    """Publish a release: one commit, then the tag; or a pull request, and no tag.

    Where the commit is there already, by an earlier call that ended before the tag or by a merged
    pull request, the tag alone is added.

    Returns:
        Address of the tag, or of the pull request.

    Raises:
        HubError: The Hub refuses or ends early. Before the commit nothing is published; after it
            the same call adds the tag.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, commit = HfApi(), planned.head
    page = f"{api.endpoint}/datasets/{planned.repo}/tree/{planned.tag}"
    if not planned.is_empty:
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path)
            for path in [*planned.added, *planned.changed]
        ]
        operations += [CommitOperationDelete(path_in_repo=path) for path in planned.removed]
        try:
            info = api.create_commit(
                planned.repo,
                operations,
                commit_message=f"Release {planned.tag}",
                repo_type=_TYPE,
                parent_commit=planned.head,
                create_pr=create_pr,
            )
        except Exception as error:
            if create_pr or not _is_committed(api, folder, planned):
                raise HubError(
                    f"nothing was published in {planned.repo}: {_explain(error)}"
                ) from error
            commit = _MAIN  # the answer was lost, not the commit
        else:
            commit = info.oid
            if create_pr:
                return str(info.pr_url)
    elif create_pr:
        raise HubError(f"{planned.repo} has these files already: there is nothing to request")
    if not planned.tagged:
        try:
            api.create_tag(planned.repo, tag=planned.tag, revision=commit, repo_type=_TYPE)
        except Exception as error:
            raise HubError(
                f"{planned.repo} has commit {commit[:12]} and no tag {planned.tag} yet: "
                f"{_explain(error)}; the same command adds it"
            ) from error
    return page


def _is_committed(api: HfApi, folder: Path, planned: Plan) -> bool:
    """Tell whether main has moved on to the files of a release.

    Raises:
        HubError: It can't be known.
    """
    head, reason = _resolve(planned.repo, _MAIN)
    if head is None:
        raise HubError(
            f"the Hub can't be reached any more ({reason}), so it isn't known whether main of "
            f"{planned.repo} has the release: the same command finds out and goes on"
        )
    if head == planned.head:
        return False
    return not any(_differences(folder, _paths(folder), _remote_files(api, planned.repo, head)))


def _sound(folder: Path, previous: Path | None) -> Manifest:
    """Return the manifest of a release without problems."""
    found = check.problems(folder, previous)
    if found:
        more = f" (and {len(found) - 1} more problems; `harness dataset check`)"
        raise InvalidRelease(found[0] + (more if len(found) > 1 else ""))
    known = manifest.read(folder)
    assert known is not None  # problems() would say so
    return known


def _differences(
    folder: Path, local: set[str], remote: dict[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Return paths added, changed and removed; files that are none of a release's stay."""
    added = sorted(local - set(remote))
    shared = sorted(local & set(remote))
    changed = [path for path in shared if remote[path] not in _names(folder / path)]
    gone = sorted(set(remote) - local)
    return added, changed, [path for path in gone if manifest.belongs(path)]


def _paths(folder: Path) -> set[str]:
    """Return the paths of a release's files, the manifest's too."""
    known = manifest.read(folder)
    assert known is not None  # the release is sound
    return {*known.files, manifest.NAME}


def _names(path: Path) -> set[str]:
    """Return what the Hub may call a file's content: its sha256 (LFS), or its git blob's id."""
    content = path.read_bytes()
    blob = b"blob %d\0%b" % (len(content), content)
    return {hashlib.sha256(content).hexdigest(), hashlib.sha1(blob).hexdigest()}


def _remote_files(api: HfApi, repo: str, commit: str) -> dict[str, str]:
    """Return per path the sha256 of a file in LFS, or the id of its git blob."""
    try:
        tree = list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=_TYPE))
    except Exception as error:
        raise HubError(f"the files of {repo} can't be listed: {_explain(error)}") from error
    files = {}
    for entry in tree:
        lfs = getattr(entry, "lfs", None)
        if hasattr(entry, "blob_id"):  # else a folder
            files[entry.path] = lfs.sha256 if lfs is not None else entry.blob_id
    return files


def _tag_commit(api: HfApi, repo: str, tag: str) -> str | None:
    try:
        tags = api.list_repo_refs(repo, repo_type=_TYPE).tags
    except Exception as error:
        raise HubError(f"the tags of {repo} can't be listed: {_explain(error)}") from error
    return next((ref.target_commit for ref in tags if ref.name == tag), None)


def _resolve(repo: str, revision: str) -> tuple[str | None, str]:
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
        return str(api.repo_info(repo, repo_type=_TYPE, revision=revision).sha), ""
    except HFValidationError as error:
        raise NotFound(f"{repo!r} is no id of a dataset: {_first_line(error)}") from error
    except GatedRepoError as error:
        raise NotFound(f"dataset {repo} is gated: ask for access on its page") from error
    except OfflineModeIsEnabled:
        return None, ""
    except HfHubHTTPError as error:
        # Some servers answer 401 where a revision is missing, not the dataset.
        if isinstance(error, RevisionNotFoundError) or _status(error) in (401, 403, 404):
            raise _missing(api, repo, revision, error) from error
        raise HubError(f"{repo} at {revision}: {_explain(error)}") from error
    except Exception as error:
        return None, _first_line(error)


def _missing(api: HfApi, repo: str, revision: str, error: Exception) -> NotFound:
    """Tell a missing revision from a missing dataset."""
    try:
        refs = api.list_repo_refs(repo, repo_type=_TYPE)
    except Exception:
        return NotFound(
            f"the Hub has no dataset {repo}, or the token may not see it (it answered "
            f"{_status(error)}): check the id, and `hf auth login` or HF_TOKEN"
        )
    names = [ref.name for ref in [*refs.tags, *refs.branches]]
    return NotFound(f"dataset {repo} has no revision {revision!r}; {hint(revision, names)}")


def _cached_revisions(repo: str) -> list[str]:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "refs"
    return sorted(p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file())


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: Exception) -> str:
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
        return f"the Hub answered {status}: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
