from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import main
from harness.estimator.settings import Settings
from harness.estimator.spectrum import gathered, rules
from harness.submission.predict import measure
from harness.training import checkpoints, load_problem, stages
from spectra_db import store
from spectra_db.heterogeneity import metrics
from tests.harness.leaderboard.tables import made_up

MEASURES = ("gradient_rms_spread", "lambda_rms_spread", "trace_spread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return tables of 24 models whose gap each cheap measure tells."""
    out = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(0)
    level = np.linspace(-0.6, 0.6, 24)
    values = {m: 10 ** (level + 0.05 * generator.normal(size=24)) for m in MEASURES}
    gaps = np.where(level > 0, 0.3, 0.01)
    families = [f"f{i // 2}" for i in range(24)]
    tables = ("models", "heterogeneity", "gaps")
    for table, rows in zip(tables, made_up(values, gaps, families, errors=1e-3), strict=True):
        store.write(out, table, rows)
    return out


@pytest.fixture
def folder(made, tmp_path):
    """Return a copy of them, to be changed."""
    return shutil.copytree(made, tmp_path / "data")


def call(*arguments: object):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_the_cheap_measures_are_those_of_a_whole_spectrum_of_sampled_blocks():
    # The first two moments don't need more than two steps.
    entry = registry.get("cnn-digits")
    found, cost = measure(entry, with_js0=False)
    problem = load_problem(entry)
    settings = Settings(num_probes=3, num_steps=6, exact_size=0)
    source = {"model": entry.name, "stage": "init", "init_seed": 1}
    with problem.hessian(settings) as hessian:
        rows = gathered(rules(hessian, settings, source), hessian.blocks)
    expected = metrics(rows).set_index("metric")
    cheap = found.set_index("metric")
    for name in ("lambda_rms_spread", "trace_spread"):
        for column in ("corrected", "standard_error"):
            assert cheap.loc[name, column] == pytest.approx(expected.loc[name, column], rel=1e-3)
    assert cost["num_products"] == 6 * cost["num_blocks"]


def test_an_entry_gets_an_answer_with_its_place_its_uncertainty_and_its_cost(folder):
    result = call("cnn-digits", "--source", folder, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["answer"] in ("SGD should do", "use Adam", "unclear")
    cost = facts["cost"]
    assert result.stderr.startswith(f"forecast at 3 probes × 2 steps: {cost['num_products']} pro")
    assert 0 <= facts["low"] <= facts["probability"] <= facts["high"] <= 1
    assert [row["metric"] for row in facts["measures"]] == list(MEASURES)
    for row in facts["measures"]:
        assert 0 <= row["num_smaller"] <= 24
        assert len(row["nearest"]) == 3
    assert facts["held_out"]["accuracy"] > facts["held_out"]["majority"]
    assert facts["cost"]["num_products"] == 6 * facts["cost"]["num_blocks"]
    assert (facts["answer"] == "unclear") == bool(facts["reasons"])


def test_a_rule_without_skill_gives_no_clear_answer(folder):
    generator = np.random.default_rng(2)
    values = {m: 10 ** generator.normal(size=24) for m in MEASURES}
    gaps = np.where(np.arange(24) % 3 == 0, 0.3, 0.01)
    _, metrics_, gaps_ = made_up(values, gaps, ["f"] * 24, errors=1e-3)
    store.write(folder, "heterogeneity", metrics_)
    store.write(folder, "gaps", gaps_)
    result = call("cnn-digits", "--source", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("cnn-digits: unclear")
    assert "no better than the majority's answer" in " ".join(result.stdout.split())


def test_a_factory_with_a_task_is_predicted_without_an_entry(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def two_layers(num_classes, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(image_size ** 2, 16), nn.Tanh(),\n"
        "                         nn.Linear(16, num_classes))\n"
    )
    (tmp_path / "other.py").write_text("raise SystemExit('executed')\nENTRIES = ()\n")
    result = call("nets:two_layers", "--task", "digits", "--source", folder, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["cost"]["num_params"] == 64 * 16 + 16 + 160 + 10
    assert facts["cost"]["num_blocks"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet8-cifar"], "did you mean resnet8-cifar10"),
        (["timm:resnet18"], "pass --task"),
        (["cnn-digits", "--task", "mnist"], "has its own"),
        (["nets.py", "--task", "digits"], "write module:factory and --registry FOLDER"),
        (["nets.py:factory", "--task", "digits"], "names a file; write module:factory"),
        (["nothere", "--task", "digits"], "unknown model"),
        (["gpt-nano-sft"], "weights of 'gpt-nano-books': pass --checkpoints, OUT/checkpoints of"),
        (["nowhere:factory", "--task", "digits"], "neither installed nor in"),
    ],
)
def test_targets_that_can_not_be_are_refused_with_the_remedy(folder, arguments, message):
    result = call(*arguments, "--source", folder)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_entry_that_starts_from_another_s_weights_is_predicted_from_them(folder, tmp_path):
    registry_dir = tmp_path / "registry"
    registry_dir.mkdir()
    (registry_dir / "tuned.py").write_text(
        "from dataclasses import replace\n"
        "from harness.registry import get\n"
        "first = replace(get('cnn-digits'), name='first')\n"
        "ENTRIES = (first, replace(first, name='tuned', pretrained='first'))\n"
    )
    first = registry.get("first", registry_dir=registry_dir)
    path = stages.checkpoint_path(tmp_path, "first", stages.STAGE_SEED, "final")
    checkpoints.save(load_problem(first, seed=5).model, path, {"entry_hash": ""})
    arguments = ["tuned", "--registry", registry_dir, "--source", folder, "--json"]
    result = call(*arguments, "--checkpoints", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "tuned"
    described = CliRunner().invoke(main, ["describe", "tuned", "--registry", str(registry_dir)])
    assert described.exit_code == 0, described.output


def test_a_leaderboard_of_too_few_models_is_refused(folder, tmp_path):
    for table in ("models", "heterogeneity", "gaps"):
        target = tmp_path / "few" / table
        target.mkdir(parents=True)
        (target / "m0.parquet").write_bytes(store.path_of(folder, table, "m0").read_bytes())
    result = call("cnn-digits", "--source", tmp_path / "few")
    assert result.exit_code == 2
    assert "too few to predict from" in result.stderr
    assert "products" not in result.stderr  # refused before anything is measured


def test_a_source_without_tables_is_refused_before_anything_is_measured(tmp_path):
    result = call("cnn-digits", "--source", tmp_path)
    assert result.exit_code == 2
    assert "holds no table models" in result.stderr
    assert "products" not in result.stderr


def test_two_families_of_one_kind_each_can_not_test_the_rule(tmp_path):
    values = {m: np.exp(np.random.default_rng(0).normal(size=8)) for m in MEASURES}
    parts = made_up(values, np.repeat([0.0, 1.0], 4), list("aaaabbbb"), errors=1e-3)
    for table, rows in zip(("models", "heterogeneity", "gaps"), parts, strict=True):
        store.write(tmp_path, table, rows)
    result = call("cnn-digits", "--source", tmp_path, "--json")
    assert result.exit_code == 0, result.output

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads(result.stdout, parse_constant=refuse)
    assert facts["answer"] == "unclear"
    assert "no model of the leaderboard can be predicted from other families" in facts["reasons"]
    assert facts["held_out"]["accuracy"] is None
    shown = call("cnn-digits", "--source", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "nan" not in shown.stdout
