from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import main
from harness.leaderboard import evidence, preview, ranking, standings
from harness.leaderboard.verdict import NOTHING, SUPPORTS
from harness.predictors import PREDICTORS
from harness.registry import ranked
from spectra_db import store
from spectra_db.loading import BUNDLED
from spectra_db.manifest import InvalidRelease
from tests.harness.leaderboard.tables import speedup_row

GATE = {"cifar-resnet8": 0.1, "bpe-gpt": 1.2, "cifar-vit": 0.7, "softmax-balanced": -0.9}
GATE |= {"softmax-zipf": 1.8}


def predictor_rows(model: str, y: float, *, attention: bool) -> list[dict]:
    shared = {
        "model": model, "protocol_version": 2, "num_products": 3, "num_full_products": 0,
        "batch_size": 512, "num_terms": 512, "batch_hash": "0" * 16, "data_source": "test",
        "seconds": 0.1, "run_id": "", "status": "ok", "reason": None,
    }  # fmt: skip
    values = {p.name: y + 0.01 * i for i, p in enumerate(PREDICTORS)}
    values["has_attention"] = float(attention)
    return [
        shared | {"predictor": name, "init_seed": seed, "value": value + 0.001 * seed}
        for name, value in values.items()
        for seed in (1, 2, 3)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the tables of a world in which every measure ranks the entries as y does."""
    out = tmp_path_factory.mktemp("ranking")
    names = [entry.name for entry in registry.entries("ranked")]
    ys = {name: 0.05 + 0.07 * i for i, name in enumerate(sorted(names))} | GATE
    for i, (name, y) in enumerate(ys.items()):
        store.write(out, "speedups", [speedup_row(name, y)])
        if name in names:
            store.write(out, "predictors", predictor_rows(name, y, attention=i % 2 == 0))
    return out


@pytest.fixture(scope="module")
def found(folder):
    return ranking.ranking(folder)


def test_the_tables_of_a_campaign_give_a_verdict(found):
    assert found.verdict.answer == SUPPORTS
    assert len(found.entries) == 18
    assert found.pending == {}
    assert "ρ = 1.00 over 18 entries" in found.verdict.sentence
    assert set(found.references["model"]) == {"softmax-balanced", "softmax-zipf"}


def test_j_is_the_raw_reading_and_no_rival_of_its_own():
    assert ranking._J == "js0_raw"
    assert "js0_raw" not in ranking.RIVALS
    assert {"js0_own_rms", "energy_js", "noise_share"} <= set(ranking.RIVALS)
    assert ranking.RIVALS["noise_share"] == -1


def test_every_pair_names_two_ranked_entries_and_there_are_sixteen():
    names = {entry.name for entry in registry.entries("ranked")}
    assert len(names) == 18
    assert len(ranked.PAIRS) == 16
    assert {model for _, *pair in ranked.PAIRS for model in pair} <= names


@pytest.mark.parametrize(
    ("model", "y", "found", "expected"),
    [
        ("cifar-resnet8", 0.7, "yes", "no"),
        ("softmax-zipf", 0.2, "no", "yes"),
        ("bpe-gpt", 0.52, "unclear", "yes"),
    ],
)
def test_a_gate_that_fails_ranks_nothing_and_says_why(folder, tmp_path, model, y, found, expected):
    shutil.copytree(folder / "speedups", tmp_path / "speedups")
    store.write(tmp_path, "speedups", [speedup_row(model, y)])
    gate = ranking.gate(tmp_path)
    assert gate.reasons == (f"Adam needed for {model}: {found}, not {expected}",)


def test_the_command_says_what_is_pending(tmp_path):
    store.write(tmp_path, "speedups", [speedup_row("cifar-vit", 0.7)])
    result = CliRunner().invoke(main, ["verdict", "--source", str(tmp_path), "--json"])
    facts = json.loads(result.output)
    assert facts["answer"] == NOTHING
    assert [(row["model"], row["y"], row["J"]) for row in facts["entries"]] == [
        ("cifar-vit", 0.7, None)
    ]
    assert "Without J: cifar-vit." in facts["lines"]
    assert facts["pending"]["bpe-gpt"] == "training runs are missing"


def test_the_command_lists_every_measure_and_every_pair(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    args = ["verdict", "--source", str(folder)]
    facts = json.loads(CliRunner().invoke(main, [*args, "--json"]).output)
    assert len(facts["measures"]) == 1 + len(ranking.RIVALS) + len(evidence.DUMMIES)
    assert [pair["pair"] for pair in facts["pairs"]] == [name for name, *_ in ranked.PAIRS]
    shown = CliRunner().invoke(main, args).output
    for pair in facts["pairs"]:
        [line] = [line for line in shown.splitlines() if line.startswith(f" {pair['pair']}  ")]
        assert f" {pair['dj']:+.3f} " in line
        right = "right" if pair["right"] else "wrong"
        assert (f" {right} " if pair["decided"] else f" undecided: {pair['why']} ") in line
    assert " JS⁰ of raw eigenvalues (J) " in shown
    assert ", less of it " in shown


def test_a_pair_says_what_it_waits_for_and_whose_interval_has_no_bounds(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    unbounded = speedup_row("barcodes-vit", 0.1, ci_low=None, ci_high=None, adam_needed="unclear")
    store.write(tmp_path, "speedups", [unbounded])
    (tmp_path / "speedups" / "bpe-bert.parquet").unlink()
    rows = {row["pair"]: row for row in standings.pair_table(ranking.ranking(tmp_path))}
    assert rows.keys() == {name for name, *_ in ranked.PAIRS}
    assert rows["gpt or bert"]["outcome"] == "waits for training runs"
    assert [row["outcome"] for row in rows.values() if "barcodes-vit" in row["outcome"]] == [
        "right; the interval of barcodes-vit has no bounds"
    ]


def test_a_picture_draws_j_once_it_is_known_of_all_ranked_entries(found, tmp_path):
    whole = standings.of_entries(found)
    assert {row["model"] for row in standings.points(whole)} == {
        entry.name for entry in registry.entries("ranked")
    }
    for row in whole:
        if row["model"] == "cifar-vit":
            row["J"] = None
    assert standings.points(whole) == []
    for shown in (whole, []):
        preview.draw(tmp_path / "verdict.png", shown)
        assert (tmp_path / "verdict.png").read_bytes().startswith(b"\x89PNG")


def test_ends_without_a_bound_and_bounds_are_said(tmp_path):
    store.write(
        tmp_path,
        "speedups",
        [
            speedup_row("cifar-vit", 1.0, ci_low=None, ci_high=None, adam_needed="unclear"),
            speedup_row("bpe-gpt", 2.0, ci_low=1.5, ci_high=None, censored=True),
            speedup_row("softmax-balanced", -2.0, ci_low=None, ci_high=-1.5, censored=True),
            speedup_row("cifar-mlp", -0.001, ci_low=-0.3, ci_high=-0.002),
        ],
    )
    shown = standings.of_entries(ranking.ranking(tmp_path))
    assert {row["model"]: row["speedup"] for row in shown if not row["reason"]} == {
        "bpe-gpt": "> 2.00 [1.50, ∞]",
        "cifar-mlp": "0.00 [−0.30, 0.00]",
        "cifar-vit": "1.00 [−∞, ∞]",
        "softmax-balanced": "< −2.00 [−∞, −1.50]",
    }
    preview.draw(tmp_path / "verdict.png", shown)
    assert "> 2.00 [1.50, ∞]" in CliRunner().invoke(main, ["verdict", "--source", tmp_path]).output


def test_a_release_of_other_bytes_than_its_manifest_says_has_no_verdict(tmp_path):
    shutil.copyfile(BUNDLED / "manifest.json", tmp_path / "manifest.json")
    for table in ("speedups", "predictors"):
        shutil.copytree(BUNDLED / table, tmp_path / table)
    ranking.ranking(tmp_path)
    row = speedup_row("cifar-vit", 1.9)
    store.write(tmp_path, "speedups", [row], replace=True)
    with pytest.raises(InvalidRelease, match=r"cifar-vit\.parquet"):
        ranking.ranking(tmp_path)


def test_a_picture_that_can_not_be_written_is_refused(tmp_path):
    store.write(tmp_path, "speedups", [speedup_row("cifar-vit", 0.7)])
    path = tmp_path / "absent" / "verdict.png"
    args = ["verdict", "--source", str(tmp_path), "--picture", str(path)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert result.stderr == f"Error: {path} can't be written: No such file or directory\n"
