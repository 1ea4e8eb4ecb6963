"""The guide docs/add-a-model.md and the example of docs/architecture.md, run as written."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import main

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = DOCS / "add-a-model.md"


def _shape(line: str) -> str:
    """Return a line without its numbers and without the widths of its columns."""
    return " ".join(re.sub(r"\d[\d.,e+-]*|─+|\b(yes|no)$", "#", line.strip()).split())


def _blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _commands(block: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a block, each with the lines that it is said to print."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


@pytest.mark.parametrize(
    ("page", "num_commands"),
    [pytest.param("add-a-model.md", 10, marks=pytest.mark.slow), ("architecture.md", 2)],
)
def test_a_page_does_what_it_says(tmp_path, monkeypatch, page, num_commands):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("HARNESS_DATA_ROOT", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    ran = 0
    for language, block in _blocks((DOCS / page).read_text(encoding="utf-8")):
        if language == "python":
            path = tmp_path / block.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(block, encoding="utf-8")
            continue
        for command, expected in _commands(block):
            program, *arguments = shlex.split(command)
            assert program == "harness"
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{command}\n{result.output}"
            ran += 1
            printed = [_shape(line) for line in result.output.splitlines()]
            for line in expected:
                if line != "…":
                    assert _shape(line) in printed, f"{command}\n{line}\n{result.output}"
                    printed = printed[printed.index(_shape(line)) + 1 :]
    assert ran >= num_commands


@pytest.mark.parametrize("command", ["add-model", "validate", "run", "submit", "verify"])
def test_the_guide_shows_every_command_of_the_way(command):
    assert f"$ harness {command} " in GUIDE.read_text(encoding="utf-8")
