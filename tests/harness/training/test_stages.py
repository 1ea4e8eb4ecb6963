from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from harness import tasks
from harness.errors import UserError
from harness.registry.entry import ModelEntry
from harness.training import checkpoints, load_problem, stages, train

MakeEntry = Callable[..., ModelEntry]


@pytest.fixture
def tied() -> nn.Module:
    torch.manual_seed(0)
    from small_networks import TiedLanguageModel

    return TiedLanguageModel(vocab_size=11)


@pytest.fixture
def untrained() -> nn.Module:
    torch.manual_seed(1)
    from small_networks import TiedLanguageModel

    return TiedLanguageModel(vocab_size=11)


def test_stages_fall_on_their_fractions_of_the_budget() -> None:
    names = ("init", "p10", "p25", "p50", "final")
    assert list(stages.stage_steps(names, 200).values()) == [0, 20, 50, 100, 200]
    with pytest.raises(ValueError, match="unknown stage 'p99'"):
        stages.stage_steps(("p99",), 10)


def test_tied_weights_come_back_tied(tied: nn.Module, untrained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "final.safetensors"
    checkpoints.save(tied, path, {"step": 7})
    assert checkpoints.load(untrained, path)["step"] == 7
    assert untrained.head.weight is untrained.embedding.weight
    for name, tensor in tied.state_dict().items():
        assert untrained.state_dict()[name].equal(tensor), name


def test_the_file_is_a_function_of_weights_and_facts(tied: nn.Module, tmp_path: Path) -> None:
    facts = {"step": 7, "loss": 1.5, "lr": 0.1}
    hashes = {checkpoints.save(tied, tmp_path / f"{i}.safetensors", facts) for i in range(8)}
    assert len(hashes) == 1
    content = (tmp_path / "0.safetensors").read_bytes()
    assert hashes == {hashlib.sha256(content).hexdigest()}


def test_a_killed_save_leaves_the_old_file(
    tied: nn.Module, untrained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p50.safetensors"
    old = checkpoints.save(tied, path, {"step": 1})

    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(untrained, path, {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["p50.safetensors"]
    assert checkpoints.load(untrained, path, sha256=old)["step"] == 1


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "text"])
def test_a_corrupted_checkpoint_names_the_file_and_the_remedy(
    damage: str, tied: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "final.safetensors"
    checkpoints.save(tied, path, {"step": 7})
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    elif damage == "torn":
        content = content[:-40]
    else:
        content = bytearray(b"" if damage == "empty" else b"not a checkpoint at all")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint .*final\.safetensors .*delete it and train"):
        checkpoints.load(tied, path)


@pytest.mark.parametrize("facts", ["{}", "7"])
def test_a_checkpoint_that_this_program_did_not_write_is_refused(
    facts: str, tied: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "final.safetensors"
    save_model(tied, str(path), metadata={"harness": facts})
    with pytest.raises(UserError, match=r"cannot be read .*; delete it and train again"):
        checkpoints.load(tied, path)


def test_a_checkpoint_of_another_hash_or_entry_is_refused(
    tied: nn.Module, tmp_path: Path, make_entry: MakeEntry
) -> None:
    path = tmp_path / "final.safetensors"
    entry = make_entry()
    checkpoints.save(tied, path, {"step": 7, "entry_hash": checkpoints.entry_hash(entry)})
    with pytest.raises(UserError, match="does not have the sha256 00"):
        checkpoints.load(tied, path, sha256="00")
    other = dataclasses.replace(entry, options={"width": 4})
    with pytest.raises(UserError, match="another version of 'tiny'"):
        checkpoints.load(tied, path, entry=other)
    described = dataclasses.replace(entry, description="in other words")
    assert checkpoints.load(tied, path, entry=described)["step"] == 7


@pytest.mark.parametrize(("factory", "task"), [("cnn", "digits"), ("TiedLanguageModel", "pydoc")])
def test_a_problem_is_the_model_that_training_saved(
    factory: str, task: str, make_entry: MakeEntry, tmp_path: Path
) -> None:
    entry = make_entry(factory, task)
    data = tasks.get(task).load()
    run = train(entry, data, optimizer="adamw", lr=0.01, seed=1, checkpoint_dir=tmp_path)
    assert [(row["stage"], row["step"]) for row in run.stage_rows] == [
        ("init", 0),
        ("p50", 10),
        ("final", 20),
    ]
    for row in run.stage_rows:
        path = stages.checkpoint_path(tmp_path, "tiny", 1, row["stage"])
        assert path == tmp_path / "tiny" / "adamw-seed1" / f"{row['stage']}.safetensors"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["checkpoint_sha256"]

    final = load_problem(entry, "final", 1, checkpoint_dir=tmp_path)
    assert (final.step, final.progress, final.train_run) == (20, 1.0, "adamw-seed1")
    batch = tasks.get(task).fixed(data, "train", 128)
    loss = tasks.get(task).loss(final.model, batch).item()
    assert loss == pytest.approx(run.final_loss, rel=1e-5)
    assert not final.model.training

    initial = load_problem(entry, "init", 1)
    assert (initial.step, initial.progress, initial.train_run) == (0, 0.0, "")
    loss = tasks.get(task).loss(initial.model, batch).item()
    assert loss == pytest.approx(run.init_loss, rel=1e-5)


def test_the_same_training_gives_the_same_checkpoint_bytes(
    make_entry: MakeEntry, tmp_path: Path
) -> None:
    data = tasks.get("digits").load()
    hashes = [
        [
            row["checkpoint_sha256"]
            for row in train(
                make_entry(),
                data,
                optimizer="adamw",
                lr=0.01,
                seed=1,
                checkpoint_dir=tmp_path / folder,
            ).stage_rows
        ]
        for folder in ("first", "second")
    ]
    assert hashes[0] == hashes[1]


def test_sgd_saves_no_stages(make_entry: MakeEntry, tmp_path: Path) -> None:
    data = tasks.get("digits").load()
    run = train(make_entry(), data, optimizer="sgd", lr=0.1, seed=1, checkpoint_dir=tmp_path)
    assert run.stage_rows == []
    assert list(tmp_path.iterdir()) == []


def test_saving_stages_does_not_change_the_run(make_entry: MakeEntry, tmp_path: Path) -> None:
    data = tasks.get("digits").load()
    kept = train(
        make_entry("linear"), data, optimizer="adamw", lr=0.01, seed=1, checkpoint_dir=tmp_path
    )
    plain = train(make_entry("linear"), data, optimizer="adamw", lr=0.01, seed=1)
    assert kept.rows == plain.rows


def test_a_problem_is_cut_into_microbatches_weighted_by_terms(make_entry: MakeEntry) -> None:
    problem = load_problem(make_entry())
    assert [len(batch[0]) for batch in problem.batches] == [20, 20, 10]
    assert problem.objective.count == problem.task.num_terms
    assert (problem.batch_size, problem.microbatch_size, problem.num_terms) == (50, 20, 50)
    whole = load_problem(make_entry(microbatch_size=None))
    assert len(whole.batches) == 1
    assert "sha256" in whole.data_source
    tokens = load_problem(make_entry("TiedLanguageModel", "pydoc", task_options={"context": 8}))
    assert tokens.num_terms == 50 * 8


def test_a_seed_decides_the_initialisation(make_entry: MakeEntry) -> None:
    weights = [load_problem(make_entry(), "init", seed).model[0].weight for seed in (1, 1, 2)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_a_network_whose_train_and_eval_return_nothing_is_loaded(make_entry: MakeEntry) -> None:
    model = load_problem(make_entry("Silent")).model
    assert isinstance(model, nn.Module)
    assert not model.training


def test_the_weights_of_another_version_of_the_pretraining_are_refused(
    make_entry: MakeEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_entry()
    tuned = make_entry(name="tuned", pretrained="tiny")
    model = load_problem(first).model
    path = stages.checkpoint_path(tmp_path, "tiny", stages.STAGE_SEED, "final")
    checkpoints.save(model, path, {"entry_hash": checkpoints.entry_hash(first)})
    changed = dataclasses.replace(first, task_options={"train_size": 100})
    for known in ([], [first]):  # of an entry outside the tree nothing is known
        monkeypatch.setattr("harness.registry.entries", lambda known=known: known)
        load_problem(tuned, checkpoint_dir=tmp_path)
    monkeypatch.setattr("harness.registry.entries", lambda: [changed])
    with pytest.raises(UserError, match=r"another version of 'tiny' .*again: harness run tiny"):
        load_problem(tuned, checkpoint_dir=tmp_path)


def test_an_untrained_stage_names_the_command(make_entry: MakeEntry, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"run: harness run tiny --out my, then harness train tiny --seed 2 --out my$",
    ):
        load_problem(make_entry(), "final", 2, checkpoint_dir=Path("my/checkpoints"))
    with pytest.raises(UserError, match=r"is given\); run: harness run tiny --out OUT$"):
        load_problem(make_entry(), "final")
    with pytest.raises(UserError, match="no stage 'p10'; its stages: init, p50, final"):
        load_problem(make_entry(), "p10")
