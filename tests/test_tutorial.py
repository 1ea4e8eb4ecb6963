"""The tutorial docs/tutorial.md, run as it is written, on the bundled release."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import main
from spectra_db.load import BUNDLED

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)

# Runs what it is given on standard input, a block at a time, and separates what they print.
RUN = """
import json, sys
names = {"__name__": "tutorial"}
for block in json.load(sys.stdin):
    exec(compile(block, "docs/tutorial.md", "exec"), names)
    print("--- end of block ---", flush=True)
"""


def shape(text):
    """Return what a block prints without its numbers and without the widths of columns."""
    return [" ".join(re.sub(r"-?\d[\d.,]*", "#", line).split()) for line in text.splitlines()]


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
def test_the_tutorial_does_what_it_says(tmp_path):
    parts = FENCE.findall(TUTORIAL.read_text(encoding="utf-8"))
    blocks = [text for language, text in parts if language == "python"]
    assert len(blocks) >= 9
    answer = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(blocks),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    printed = answer.stdout.split("--- end of block ---\n")
    compared = 0
    for i, (language, text) in enumerate(parts):
        if language == "text":
            block = sum(part[0] == "python" for part in parts[:i]) - 1
            # Which models come first, and what resembles a name, changes with the release.
            known = "no model" in text or "bert" in text
            assert known or shape(printed[block]) == shape(text), text
            compared += 1
    assert compared >= 6
    for name in ("spectra", "heatmap", "stages", "stages-raw", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
def test_the_commands_of_the_tutorial_run():
    text = "".join(t for lang, t in FENCE.findall(TUTORIAL.read_text()) if lang == "console")
    for command in re.findall(r"^\$ harness (.*)$", text, flags=re.MULTILINE):
        result = CliRunner().invoke(main, shlex.split(command))
        assert result.exit_code == 0, result.output


def test_the_code_for_the_hub_names_things_that_are_there():
    text = "".join(t for lang, t in FENCE.findall(TUTORIAL.read_text()) if lang == "py")
    with contextlib.redirect_stdout(io.StringIO()):
        compile(text, "docs/tutorial.md", "exec")
    assert 'source="OWNER/NAME", revision="v0.1.0"' in text
