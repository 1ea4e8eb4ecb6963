"""From draft to submitted: where an entry of one's own stands."""

from __future__ import annotations

import json

import pytest

from .test_submit import NAME, add, call, finished, place, refused, sealed, submission, submitted

__all__ = ["finished", "place", "sealed", "submission"]  # fixtures


def stands(place, *more):
    where = ("--registry", place / "registry", *more)
    result = call("list", "--json", *where)
    assert result.exit_code == 0, result.output
    [row] = [row for row in json.loads(result.stdout) if row["name"] == NAME]
    return row["stands"], row["next"]


@pytest.mark.slow
def test_an_entry_goes_from_draft_to_submitted(place):
    source = ("--source", place / "out")
    assert stands(place, *source) == (
        "complete",
        f"`harness validate {NAME} --registry {place / 'registry'}`",
    )
    status, following = stands(place)
    assert status == "draft"
    assert "harness validate net" in following

    assert call("validate", NAME, "--registry", place / "registry").exit_code == 0
    status, following = stands(place)
    assert status == "validated"
    assert f"harness run {NAME} --registry {place / 'registry'} --out FOLDER" in following
    status, following = stands(place, *source)
    assert status == "complete"
    assert f"a rehearsal, no result; `harness submit {NAME}" in following
    assert following.endswith("--rehearsal` tries the way")

    assert submitted(place).exit_code == 0
    status, following = stands(place, "--source", place / "submission")
    assert status == "submitted"
    assert "maintainer" in following
    shown = call("list", "--registry", place / "registry", "--source", place / "submission").stdout
    assert f"{NAME}: submitted; next: a maintainer" in shown
    assert "accepted" in shown  # those of the registry


def test_what_was_changed_since_it_was_validated_is_a_draft_again(place):
    registry = place / "registry"
    assert call("validate", NAME, "--registry", registry).exit_code == 0
    code = registry / "strangers.py"
    before = code.read_text()
    code.write_text(before + "\n# changed\n")
    assert stands(place)[0] == "draft"
    code.write_text(before)
    assert stands(place)[0] == "validated"
    add(registry, reference="Rosenblatt 1962")
    assert stands(place)[0] == "draft"
    (registry / f"{NAME}.validated.json").write_text("[]")
    assert stands(place)[0] == "draft"


def test_what_is_left_to_do_is_said(place):
    registry = place / "registry"
    add(registry, reference="")
    assert stands(place) == ("draft", "fill in reference")
    add(registry)
    (place / "out" / "gaps" / f"{NAME}.parquet").unlink()
    (place / "out" / "training" / f"{NAME}.parquet").unlink()
    status, following = stands(place, "--source", place / "out")
    assert status == "draft"
    assert call("validate", NAME, "--registry", registry).exit_code == 0
    status, following = stands(place, "--source", place / "out")
    assert status == "validated"
    assert "units are missing" in following


def test_a_submission_is_validated_and_then_verified_from_its_own_folder(submission, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as in a workflow
    entry = submission / "entry"
    result = call("validate", NAME, "--registry", entry)
    assert result.exit_code == 0, result.output
    result = call("verify", submission, "--registry", entry, "--sample", 1, "--runs", 0)
    assert result.exit_code == 0, result.output


def test_a_source_without_a_registry_is_refused(tmp_path):
    assert "name their folder by --registry" in refused(call("list", "--source", tmp_path))
