from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectra_db import project

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


def test_the_citation_is_of_the_project_as_its_card_says(citation):
    [author] = citation["authors"]
    assert (citation["title"], author["name"]) == (project.TITLE, project.AUTHORS)
    numbers = {i["value"] for r in citation["references"] for i in r["identifiers"]}
    assert numbers == {project.PAPER}


@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/dataset.md"])
def test_the_docs_name_the_dataset_as_it_is_published(page):
    assert project.DATASET in (ROOT / page).read_text(encoding="utf-8")


def test_the_citation_refers_to_the_paper(citation):
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] == "Why Transformers Need Adam: A Hessian Perspective"
    assert [author["family-names"] for author in paper["authors"]] == [
        "Zhang", "Chen", "Ding", "Li", "Sun", "Luo",
    ]  # fmt: skip
    assert "2402.16788" in paper["url"]


def test_the_changelog_names_every_release_of_the_data():
    heading = r"^## (\d+\.\d+\.\d+ \(.*\))$"
    data = (ROOT / "spectra_db" / "data" / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| (\d+\.\d+\.\d+) \| ([\d-]+) \|", rows, flags=re.MULTILINE)
    assert [f"{version} ({day})" for version, day in named] == re.findall(
        heading, data, flags=re.MULTILINE
    )
