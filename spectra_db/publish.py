"""Publishing on the Hugging Face Hub: a release as a dataset, a folder as a pull request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra_db import check, manifest
from spectra_db.derived import DERIVED, Derive
from spectra_db.errors import NotFound
from spectra_db.hub import MAIN, TYPE, HubError, explain, fetch, reason_of, redacted, resolve
from spectra_db.manifest import InvalidRelease, Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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


def plan(folder: Path, repo: str, *, derived: Mapping[str, Derive] = DERIVED) -> Plan:
    """Check a release, compare it with the Hub, and say what publishing it would do.

    Args:
        folder: The release.
        repo: The dataset's id.
        derived: As `spectra_db.check.problems`.

    Raises:
        InvalidRelease: The release is not sound, does not follow the published one, or its version
            is published with other files.
        NotFound, HubError: As `fetch`.
    """
    from huggingface_hub import HfApi

    known = _sound(folder, None, derived)
    api = HfApi()
    head, reason = resolve(repo, MAIN)
    if head is None:
        raise HubError(f"the Hub can't be reached ({reason}); nothing was published")
    remote = _remote_files(api, repo, head)
    added, changed, removed = _differences(folder, known, remote)
    tag = f"v{known.version}"
    tagged = _tag_commit(api, repo, tag)
    if tagged is not None:
        more, others, fewer = _differences(folder, known, _remote_files(api, repo, tagged))
        differ = [*others, *more, *fewer]
        if differ:
            raise InvalidRelease(
                f"{tag} is published with other files (such as {differ[0]}), and a published "
                "version never changes: release another version"
            )
    elif manifest.NAME in remote:
        _sound(folder, fetch(repo, head), {})  # what follows was compared
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
    page = f"{redacted(api.endpoint)}/datasets/{planned.repo}/tree/{planned.tag}"
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
                repo_type=TYPE,
                parent_commit=planned.head,
                create_pr=create_pr,
            )
        except Exception as error:
            if create_pr or not _is_committed(api, folder, planned):
                raise HubError(
                    f"nothing was published in {planned.repo}: {explain(error)}"
                ) from error
            commit = MAIN  # the answer was lost, not the commit
        else:
            commit = info.oid
            if create_pr:
                return redacted(str(info.pr_url))
    elif create_pr:
        raise HubError(f"{planned.repo} has these files already: there is nothing to request")
    if not planned.tagged:
        try:
            api.create_tag(planned.repo, tag=planned.tag, revision=commit, repo_type=TYPE)
        except Exception as error:
            raise HubError(
                f"{planned.repo} has commit {commit[:12]} and no tag {planned.tag} yet: "
                f"{explain(error)}; the same command adds it"
            ) from error
    return page


def check_can_write(repo: str) -> None:
    """Raise unless a dataset is named as the Hub does, and there is a token to write with.

    Raises:
        NotFound: The name is none.
        HubError: There is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise NotFound(f"{repo!r} is no id of a dataset: {reason_of(error)}") from error
    if get_token() is None:
        raise HubError("there is no token of the Hub: run `hf auth login`, or set HF_TOKEN")


def open_pull_request(folder: Path, repo: str, prefix: str, title: str) -> str:
    """Send the files of a folder to `prefix` of a dataset as a pull request; return its address.

    Raises:
        HubError: The Hub can't be reached, or refuses; nothing was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(
            path_in_repo=f"{prefix}/{path.relative_to(folder).as_posix()}", path_or_fileobj=path
        )
        for path in files
    ]
    try:
        info = HfApi().create_commit(
            repo, operations, commit_message=title, repo_type=TYPE, create_pr=True
        )
    except Exception as error:
        raise HubError(
            f"the pull request on {repo} failed: {explain(error)}; {folder} is ready to be sent: "
            "the same command tries again"
        ) from error
    return redacted(str(info.pr_url))


def _is_committed(api: HfApi, folder: Path, planned: Plan) -> bool:
    """Tell whether main has moved on to the files of a release.

    Raises:
        HubError: It can't be known.
    """
    head, reason = resolve(planned.repo, MAIN)
    if head is None:
        raise HubError(
            f"the Hub can't be reached any more ({reason}), so it isn't known whether main of "
            f"{planned.repo} has the release: the same command finds out and goes on"
        )
    if head == planned.head:
        return False
    known = manifest.read(folder)
    assert known is not None  # the release is sound
    return not any(_differences(folder, known, _remote_files(api, planned.repo, head)))


def _sound(folder: Path, previous: Path | None, derived: Mapping[str, Derive]) -> Manifest:
    """Return the manifest of a release without problems."""
    found = check.problems(folder, previous, derived=derived)
    if found:
        more = f" (and {len(found) - 1} more problems; `harness dataset check`)"
        raise InvalidRelease(found[0] + (more if len(found) > 1 else ""))
    known = manifest.read(folder)
    assert known is not None  # problems() would say so
    return known


def _differences(
    folder: Path, known: Manifest, remote: dict[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Return paths added, changed and removed; files that are none of a release's stay."""
    local = {*known.files, manifest.NAME}
    added = sorted(local - set(remote))
    shared = sorted(local & set(remote))
    changed = [path for path in shared if remote[path] not in _names(folder / path)]
    gone = sorted(set(remote) - local)
    return added, changed, [path for path in gone if manifest.belongs(path)]


def _names(path: Path) -> set[str]:
    """Return what the Hub may call a file's content: its sha256 (LFS), or its git blob's id."""
    content = path.read_bytes()
    blob = b"blob %d\0%b" % (len(content), content)
    return {hashlib.sha256(content).hexdigest(), hashlib.sha1(blob).hexdigest()}


def _remote_files(api: HfApi, repo: str, commit: str) -> dict[str, str]:
    """Return per path the sha256 of a file in LFS, or the id of its git blob."""
    try:
        tree = list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=TYPE))
    except Exception as error:
        raise HubError(f"the files of {repo} can't be listed: {explain(error)}") from error
    files = {}
    for entry in tree:
        lfs = getattr(entry, "lfs", None)
        if hasattr(entry, "blob_id"):  # else a folder
            files[entry.path] = lfs.sha256 if lfs is not None else entry.blob_id
    return files


def _tag_commit(api: HfApi, repo: str, tag: str) -> str | None:
    try:
        tags = api.list_repo_refs(repo, repo_type=TYPE).tags
    except Exception as error:
        raise HubError(f"the tags of {repo} can't be listed: {explain(error)}") from error
    return next((ref.target_commit for ref in tags if ref.name == tag), None)
