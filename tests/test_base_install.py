"""The base install reads, plots and compares the dataset; what it can't do it says in a line."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from harness.errors import EXTRA
from spectra_db.loading import BUNDLED
from tests.base_install import PROJECT, ROOT

MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # of what is imported by another name

# Runs command lines, and prints the exit code and the last line on standard error of each.
RUN = """
import json, sys
from click.testing import CliRunner
from harness.cli import main

for line in json.load(sys.stdin):
    result = CliRunner().invoke(main, line)
    print(json.dumps([result.exit_code, (result.stderr.splitlines() or [""])[-1]]))
"""
MODELS = ("cifar-mlp", "cifar-vit", "mlp-mnist-c1")
WITHOUT = [
    ["list"],
    ["spectrum", "--help"],
    ["describe", "mlp-mnist-c1", "--provenance"],
    ["verdict"],
    ["dataset", "merge", "some", "--out", "merged"],
    ["dataset", "diff", "merged", "some"],
    ["dataset", "derive", "merged"],
    ["dataset", "release", "some", "--out", "released", "--version", "0.1.0"],
    ["site", "--source", "merged", "--out", "site"],
]
NEEDING = [
    ["describe", "vit-digits"],
    ["list", "--tasks"],
    ["spectrum", "vit-digits", "--out", "out"],
    ["train", "vit-digits", "--optimizer", "sgd", "--out", "out"],
    ["run", "vit-digits", "--out", "out"],
    ["predictors", "vit-digits", "--out", "out"],
    ["predict", "vit-digits"],
    ["validate", "vit-digits"],
    ["verify", "--sample", "1"],
    ["paper"],
]
REMEDY = "is not installed: pip install 'hessian-spectra[harness]'"


def minimum(requirement: str) -> tuple[str, str]:
    name, _, version = requirement.partition(">=")
    return name, version


def test_the_base_install_takes_at_most_700_megabytes(base_install):
    assert base_install.num_bytes <= 700e6


def test_commands_on_tables_work_by_the_base_install_and_others_say_what_to_install(
    base_install, tmp_path
):
    for model in MODELS:
        for path in BUNDLED.glob(f"*/{model}.parquet"):
            (tmp_path / "some" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / "some" / path.parent.name / path.name)
    answer = base_install.run(RUN, input=json.dumps(WITHOUT + NEEDING), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    said = [json.loads(line) for line in answer.stdout.splitlines()]
    for command, (code, error) in zip(WITHOUT, said, strict=False):
        assert code == 0, (command, error)
    for command, (code, error) in zip(NEEDING, said[len(WITHOUT) :], strict=True):
        assert code == 1, (command, error)
        assert re.fullmatch(rf"Error: this command needs \w+, which {re.escape(REMEDY)}", error)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "docs").exists()


def test_an_export_of_the_harness_says_what_it_needs(base_install):
    answer = base_install.run("import harness; harness.estimate_spectra")
    assert answer.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: harness.estimate_spectra needs torch, which {REMEDY}"
    )


def test_the_modules_that_are_asked_for_are_those_of_the_extra():
    names = {minimum(text)[0] for text in PROJECT["optional-dependencies"]["harness"]}
    assert {MODULES.get(name, name) for name in names} - {"PIL"} == EXTRA  # matplotlib brings PIL


@pytest.mark.parametrize("extra", ["test", "ray"])
def test_an_extra_for_computing_brings_the_harness(extra):
    assert "hessian-spectra[harness]" in PROJECT["optional-dependencies"][extra]


def test_the_oldest_versions_tried_are_those_allowed():
    allowed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["harness"]]
    text, *_ = (ROOT / "tests/oldest.txt").read_text(encoding="utf-8").split("# Beside them")
    tried = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, flags=re.MULTILINE))
    not_tried = {"torch", "torchvision"}
    known = dict(map(minimum, allowed))
    assert set(tried) == set(known) - not_tried
    for name, version in tried.items():
        assert version.removeprefix(known[name]).strip(".0") == "", name
