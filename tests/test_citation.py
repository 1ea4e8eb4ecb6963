from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Of the Citation File Format 1.2.0, whose schema forbids other keys.
ALLOWED = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi",
    "identifiers", "keywords", "license", "license-url", "message", "preferred-citation",
    "references", "repository", "repository-artifact", "repository-code", "title", "type", "url",
    "version",
}  # fmt: skip


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_has_the_required_keys_and_no_unknown_ones(citation):
    assert {"cff-version", "message", "title", "authors"} <= set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(author.get("name") for author in citation["authors"])


def test_the_citation_has_the_version_and_licence_of_the_package(citation):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_citation_refers_to_the_paper(citation):
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] == "Why Transformers Need Adam: A Hessian Perspective"
    assert [author["family-names"] for author in paper["authors"]] == [
        "Zhang", "Chen", "Ding", "Li", "Sun", "Luo",
    ]  # fmt: skip
    assert "2402.16788" in paper["url"]
