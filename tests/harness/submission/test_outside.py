from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import spectra_db
from harness import estimate_spectra
from harness.cli import main
from harness.errors import UserError
from harness.submission.outside import load_weights, outside_problem, read_weights

GPT = "transformers:gpt2?n_layer=1&n_embd=8&n_head=2&n_inner=8"
TASK = "pydoc?context=8"


def problem(weights=None, name="mine", source=GPT, seed=1):
    return outside_problem(
        name, source, TASK, weights=weights, seed=seed, folder=None, data_root=None
    )


@pytest.fixture(scope="module")
def trained():
    model = problem(seed=7).model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(form, tensors, tmp_path):
    path = tmp_path / f"mine.{form}"
    if form == "safetensors":
        save_file({k: v.clone() for k, v in tensors.items() if k != "lm_head.weight"}, path)
    else:
        torch.save({"model": tensors, "step": 3}, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("change", ["", "module.", "_orig_mod.module.", "without the base's name"])
def test_weights_are_the_model_s_whatever_is_before_their_names(trained, tmp_path, form, change):
    renamed = {f"{change}{name}": tensor for name, tensor in trained.items()}
    if change.startswith("without"):
        renamed = {name.removeprefix("transformer."): t for name, t in trained.items()}
    path = save(form, renamed, tmp_path)
    found = problem(str(path))
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, trained[name])
    assert found.stage == "current"
    assert found.train_run.startswith("weights-")


@pytest.mark.slow
def test_the_spectrum_of_weights_is_that_of_the_model_that_has_them(trained, tmp_path):
    path, out = save("safetensors", trained, tmp_path), tmp_path / "tables"
    command = ["spectrum", "mine", "--from", GPT, "--task", TASK, "--weights", str(path)]
    command += ["--out", str(out), "--num-probes", "3", "--num-steps", "5", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = spectra_db.load("spectra", source=out, stage="current")
    there = problem(str(path))
    expected = estimate_spectra(
        there.model, there.loss_fn, there.batches,
        num_probes=3, num_steps=5, seed=1, batch_weights=there.objective.count,
    ).set_index(["block", "probe"])  # fmt: skip
    exact = rows[rows["method"] == "exact"]
    assert len(exact) > 3
    for _, row in exact.iterrows():
        np.testing.assert_allclose(row["nodes"], expected.loc[(row["block"], 0), "nodes"])
    assert spectra_db.load("models", source=out)["family"].item() == "gpt2"
    assert len(spectra_db.load("heterogeneity", source=out))


def test_a_model_of_the_hub_is_fetched_by_its_id(trained, tmp_path, monkeypatch):
    path = save("safetensors", trained, tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or path)
    problem("someone/mine")
    assert asked == [("someone/mine", "model.safetensors")]

    def offline(*names):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match=r"someone/mine can't be had of the Hub.*no route"):
        problem("someone/mine")


def test_weights_of_another_model_are_refused_by_what_differs(trained, tmp_path):
    def loaded(tensors):
        load_weights(problem().model, tensors, "it.pt")

    short = {name: tensor for name, tensor in trained.items() if "mlp" not in name}
    with pytest.raises(UserError, match=r"lacks 4 of the model's \d+ parameters: .*mlp"):
        loaded(short)
    wide = trained | {"transformer.wpe.weight": torch.zeros(16, 8)}
    with pytest.raises(UserError, match=r"wpe.weight has the shape \(16, 8\), .* is \(8, 8\)"):
        loaded(wide)
    with pytest.warns(UserWarning, match="no place in the model for extra"):
        loaded(trained | {"extra": torch.zeros(1)})


def test_statistics_of_batch_norms_that_the_weights_lack_are_warned_of():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"lacks 1.running_mean, 1.running_var"):
        load_weights(model, dict(model.named_parameters()), "it.pt")


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"a,b\n1,2\n", {"model": {"a": 1}}, {1: torch.ones(1)}]
)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_files_that_hold_no_weights_are_refused_in_a_line(tmp_path, form, content):
    path = tmp_path / f"it.{form}"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--weights .*it"):
        read_weights(path)
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--from", GPT], "goes with --task"),
        (["--task", TASK], "goes with --task"),
        (["--weights", "x.pt"], "--weights with both"),
        (["--from", GPT, "--task", TASK, "--stage", "final"], "is taken as it is"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, command, said):
    command = ["spectrum", "mine", *command, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_the_name_of_an_entry_is_not_taken():
    with pytest.raises(UserError, match="the registry has a model 'gpt-pydoc'"):
        problem(name="gpt-pydoc")
