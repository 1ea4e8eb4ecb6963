"""README and the tutorial docs/tutorial.md, run as they are written, on the bundled release."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
from click.testing import CliRunner

import spectra_db
from harness.cli import main
from spectra_db.loading import BUNDLED
from spectra_db.release import release
from tests.processes import Process

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)

# Runs code a block at a time, and separates what they print.
RUN = """
names = {{"__name__": "tutorial"}}
for block in {blocks}:
    exec(compile(block, "page", "exec"), names)
    print("--- end of block ---", flush=True)
"""


def printed(run, blocks):
    """Return what each block prints, run by `run` in one process."""
    code, output, errors = run(RUN.format(blocks=blocks))
    assert code == 0, errors
    return output.split("--- end of block ---\n")[:-1]


def lines(text):
    """Return the lines of a text without the widths of its columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
@pytest.mark.parametrize(
    ("page", "beyond", "images"),
    [
        ("README.md", "## A model of yours", ["spectra", "mine"]),
        (
            "docs/tutorial.md",
            "## Without spectra_db",
            ["spectra", "heatmap", "stages", "stages-raw", "training"],
        ),
    ],
)
def test_a_page_reads_by_the_base_install_and_does_what_it_says(
    tmp_path, monkeypatch, base_install, page, beyond, images
):
    text = (ROOT / page).read_text(encoding="utf-8")
    reading, parts = FENCE.findall(text.partition(beyond)[0]), FENCE.findall(text)
    assert len(reading) < len(parts)
    count = [language for language, _ in reading].count("python")
    blocks = [code for language, code in parts if language == "python"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    monkeypatch.chdir(tmp_path)

    def by_the_base_install(code):
        answer = base_install.run(code, env=offline)
        return answer.returncode, answer.stdout, answer.stderr

    def here(code):
        (tmp_path / "printed").mkdir()
        return Process([code], offline, tmp_path / "printed").communicate()

    output = printed(by_the_base_install, blocks[:count])
    output += printed(here, ["import spectra_db", *blocks[count:]])[1:]
    compared = 0
    for i, (language, text) in enumerate(parts):
        if language == "text":
            block = sum(part[0] == "python" for part in parts[:i]) - 1
            assert lines(output[block]) == lines(text), "a new release changes what is printed"
            compared += 1
    assert compared >= 1
    for name in images:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
def test_the_commands_of_the_tutorial_run(tmp_path):
    release(BUNDLED, tmp_path / "some", "0.1.0", models=["mlp-mnist-c1"])
    text = "".join(t for lang, t in FENCE.findall(TUTORIAL.read_text()) if lang == "console")
    for command in re.findall(r"^\$ harness (.*)$", text, flags=re.MULTILINE):
        # Checked whole the release takes minutes: what is heterogeneous is made anew.
        some = [str(tmp_path / "some")] if command == "dataset check" else []
        result = CliRunner().invoke(main, [*shlex.split(command), *some])
        assert result.exit_code == 0, result.output


def test_the_code_for_the_hub_calls_what_is_there():
    text = "".join(t for lang, t in FENCE.findall(TUTORIAL.read_text()) if lang == "py")
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    functions = {"load": spectra_db.load, "load_dataset": datasets.load_dataset}
    assert len(calls) == 2
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        arguments = inspect.signature(functions[name]).bind(*call.args, **keywords).arguments
        assert arguments["revision"].startswith("v")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "your-model.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
    assert list(names["js0"]["step"]) == [0, 20, 40, 60]
    assert capsys.readouterr().out.count("\n") > 10
