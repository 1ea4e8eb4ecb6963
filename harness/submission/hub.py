"""Sending a submission to the Hub, as a pull request."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import UserError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_can_send(repo: str | None) -> None:
    """Raise unless a pull request could be opened: a dataset is named, and a token is there."""
    import huggingface_hub

    if repo is None or not _REPO.fullmatch(repo):
        raise UserError(f"--repo is {repo!r}; name the dataset on the Hub, as in owner/name")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "--create-pr needs a token of the Hub: run `hf auth login`, or set HF_TOKEN; without "
            "--create-pr the submission is a folder that can be sent by other ways"
        )


def open_pull_request(folder: Path, model: str, repo: str) -> str:
    """Send a submission to `submissions/MODEL` of a dataset; return the pull request's address.

    Raises:
        UserError: The Hub can't be reached, or refuses; the folder stays as it is.
    """
    import huggingface_hub

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        huggingface_hub.CommitOperationAdd(
            path_in_repo=f"submissions/{model}/{path.relative_to(folder).as_posix()}",
            path_or_fileobj=path,
        )
        for path in files
    ]
    try:
        commit = huggingface_hub.HfApi().create_commit(
            repo_id=repo,
            repo_type="dataset",
            operations=operations,
            commit_message=f"Submit {model}",
            create_pr=True,
        )
    # What the network stack raises differs between versions of the Hub's client.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"the pull request on {repo} failed ({reason[:200]}); {folder} is ready to be sent: "
            "the same command tries again"
        ) from error
    return str(commit.pr_url or commit.commit_url)
