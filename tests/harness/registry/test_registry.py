from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from harness import registry, tasks
from harness.errors import UserError
from spectra_db.words import TIERS

ENTRY_FILE = """
from harness.registry import ModelEntry

ENTRIES = (
    ModelEntry(
        name={name!r}, family="linear", tier="demo", factory="torch.nn:Linear", task="digits",
        hessian_batch_size=4, source="here", reference="none", licence="MIT", description="A map",
    ),
)
"""
PAPER = {
    "resnet18-imagenet",
    "vgg16-imagenet",
    "vit-base-imagenet",
    "mixer-imagenet",
    "bert-cornell",
    "gpt2-nano-shakespeare",
    "gpt2-openwebtext",
    "gpt2-sft",
    *(f"mlp-mnist-c{c}" for c in range(1, 16)),
}


def test_entries_come_by_tier_and_name() -> None:
    keys = [(TIERS.index(entry.tier), entry.name) for entry in registry.entries()]
    assert keys == sorted(keys)


def test_every_system_of_the_paper_has_an_entry() -> None:
    assert {entry.name for entry in registry.entries("paper")} >= PAPER


def test_tier_small_has_the_29_models_of_the_readme_most_families_two() -> None:
    families = Counter(entry.family for entry in registry.entries("small"))
    assert families.total() == 29
    assert len(families) == 11
    assert sum(count >= 2 for count in families.values()) > len(families) / 2


def test_no_two_entries_differ_in_name_only() -> None:
    facts = [
        (
            *(e.factory, sorted(e.options.items()), e.task, sorted(e.task_options.items())),
            *(e.pretrained, e.speedup),
        )
        for e in registry.entries()
    ]
    repeated = [count for count in Counter(map(repr, facts)).values() if count > 1]
    assert not repeated


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_an_entry_names_a_task_with_its_options_and_a_known_pretraining(
    entry: registry.ModelEntry,
) -> None:
    tasks.get(entry.task, **entry.task_options)
    if entry.pretrained is not None:
        assert "final" in registry.get(entry.pretrained).stages


def test_small_entries_are_trained_by_five_rates_half_a_decade_apart() -> None:
    for entry in registry.entries("small"):
        assert entry.grid_recipe
        assert entry.recipe is not None
        assert 300 <= entry.recipe.num_steps <= 500
        assert entry.recipe.num_lrs == 5
        for low, high in (entry.recipe.sgd_lrs, entry.recipe.adamw_lrs):
            assert high / low == pytest.approx(100)


def test_an_unknown_model_gets_close_matches() -> None:
    with pytest.raises(UserError, match=r"unknown model 'vit-digit'; did you mean vit-digits"):
        registry.get("vit-digit")
    with pytest.raises(UserError, match=r"unknown model 'xyzzy'; see `harness list`"):
        registry.get("xyzzy")


def test_an_unknown_tier_is_an_error() -> None:
    with pytest.raises(UserError, match=r"unknown tier 'big'; choose one of demo, small, paper"):
        registry.entries("big")


def test_entries_outside_the_tree_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENTRY_FILE.format(name="my-model"))
    (tmp_path / "helpers.py").write_text("VALUE = 1\n")
    assert registry.get("my-model", registry_dir=tmp_path).family == "linear"
    with pytest.raises(UserError, match="unknown model 'my-model'"):
        registry.get("my-model")


def test_a_network_beside_an_outside_entry_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "network_beside.py").write_text("from torch.nn import Flatten as Network\n")
    text = ENTRY_FILE.format(name="my-model").replace("torch.nn:Linear", "network_beside:Network")
    (tmp_path / "mine.py").write_text(text)
    model = registry.get("my-model", registry_dir=tmp_path).build({}, 0)
    assert type(model).__name__ == "Flatten"


def test_a_name_taken_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENTRY_FILE.format(name="cnn-digits"))
    with pytest.raises(UserError, match="two entries are named 'cnn-digits'; rename one"):
        registry.entries(registry_dir=tmp_path)


def test_an_entry_file_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\nENTRIES = ()\n")
    with pytest.raises(UserError, match=r"broken\.py can't be read: ModuleNotFoundError"):
        registry.entries(registry_dir=tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        registry.entries(registry_dir=tmp_path / "nowhere")


def test_a_broken_file_without_entries_is_passed_over_and_one_with_entries_is_named(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text("print 'of another Python'\n")
    registry.entries(registry_dir=tmp_path)
    (tmp_path / "mine.py").write_text("ENTRIES = (\n")
    with pytest.raises(UserError, match=r"mine\.py can't be read: SyntaxError: .*line 1"):
        registry.entries(registry_dir=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "ENTRIES = '" + "x" * 36_000_000 + "'",
        "ENTRIES = " + "(" * 5000,
        "ENTRIES = a" + ".a" * 5000,
    ],
    ids=["large", "nested", "dots"],
)
def test_a_hostile_file_of_entries_is_refused_by_name(tmp_path, text):
    path = tmp_path / "hostile.py"
    path.write_text(text)
    with pytest.raises(UserError, match=r"hostile\.py"):
        registry.entries(registry_dir=tmp_path)
