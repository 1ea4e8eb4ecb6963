from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from harness import registry as catalogue
from harness import tasks
from harness.cli import main
from harness.errors import UserError
from harness.registry.entry import ModelEntry
from harness.submission import draft, entry_file
from harness.submission.source import parse_options
from tests.processes import Process

# Needs no registry of its own.
LINEAR = "torch.nn:Linear?in_features=8&out_features=10"
TASK = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional
from harness.tasks.base import Data, Task


@dataclass(frozen=True)
class Line(Task):
    sizes: tuple[int, ...] = ()

    name: ClassVar[str] = "line"
    metric: ClassVar[str] = "loss"

    def read(self, root):
        x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        return Data((x, x.sum(1)), (x[:0], x[:0, 0]), "made here", "0" * 64, {"num_features": 3})

    def take(self, data, split, indices, generator):
        return tuple(tensor[indices] for tensor in data.part(split))

    def loss_of(self, logits, batch):
        return functional.mse_loss(logits[:, 0], batch[1])

    def num_terms(self, batch):
        return len(batch[0])


def network(num_features):
    return torch.nn.Sequential(
        torch.nn.Linear(num_features, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )


class Unfinished(Task):
    pass
"""


def add(name: str, source: str, task: str, folder: Path, *more: str) -> Result:
    arguments = ["add-model", name, "--from", source, "--task", task, "--registry", str(folder)]
    return CliRunner().invoke(main, [*arguments, *more])


def added(*arguments, **options) -> str:
    result = add(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def entry_of(folder: Path, name: str) -> ModelEntry:
    return catalogue.get(name, registry_dir=folder)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("f", {}),
        ("f?a=1&b=2.5&c=(1,2)&d=relu", {"a": 1, "b": 2.5, "c": (1, 2), "d": "relu"}),
        ("f?a=true&b=None&c=1e-6&d='7'", {"a": True, "b": None, "c": 1e-6, "d": "7"}),
        ("f?a=x=y", {"a": "x=y"}),
        ("f?a=b'7'", {"a": "b'7'"}),
        ("f?a=", {"a": ""}),
    ],
)
def test_options_are_literals_or_text(text, options):
    assert parse_options(text) == ("f", options)


@pytest.mark.parametrize("text", ["f?", "f?a", "f?a=1&", "f?1a=2", "f?a=1&a=2"])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(Exception, match=r"no key=value|gives a twice"):
        parse_options(text)


def test_a_model_of_torch_is_added_outside_the_tree_and_found_by_every_command(registry):
    shown = added("encoder", "strangers:Encoder?width=8", "digits", registry, "--family", "tiny")
    assert "encoder.layers.0.self_att" in shown
    assert "forecast at 3 probes × 40 steps" in shown
    entry = entry_of(registry, "encoder")
    assert (entry.family, entry.task, dict(entry.options)) == ("tiny", "digits", {"width": 8})
    # Data of 1,437 images: the recipe's 2,048 don't exist.
    assert entry.recipe.eval_size == tasks.get("digits").size(tasks.get("digits").load(), "train")
    described = CliRunner().invoke(main, ["describe", "encoder", "--registry", str(registry)])
    assert described.exit_code == 0, described.output
    assert "in_proj_weight[q]" not in described.stderr


@pytest.mark.slow
def test_the_installed_program_finds_the_entry_from_anywhere(registry, tmp_path, monkeypatch):
    added("encoder", "strangers:Encoder", "digits", registry)
    monkeypatch.chdir(Path(catalogue.__file__).parents[2])
    program = Process(("list", "--json", "--registry", registry), {}, tmp_path)
    code, output, errors = program.communicate()
    assert code == 0, errors
    assert '"encoder"' in output


def test_the_file_says_what_the_entry_is(registry):
    added("encoder", "strangers:Encoder", "digits?train_size=300", registry, "--train-steps", "20")
    path = entry_file.path_of(registry, "encoder")
    entry = entry_of(registry, "encoder")
    assert entry_file.render(entry) == path.read_text()
    assert entry.recipe.num_steps == 20
    assert dict(entry.task_options) == {"train_size": 300}


@pytest.mark.parametrize("name", [e.name for e in catalogue.entries("demo")] + ["gpt2-sft"])
def test_a_rendered_entry_is_that_entry(name):
    entry = catalogue.get(name)
    namespace: dict = {}
    exec(entry_file.render(entry), namespace)
    assert namespace["ENTRIES"] == (entry,)


def test_values_that_are_hard_to_write_survive():
    hard = {"a": float("inf"), "b": 'quo"te\n', "c": (1,), "d": [(), {"x": None}], "é": -0.0}
    entry = replace(catalogue.get("cnn-digits"), options=hard)
    namespace: dict = {}
    exec(entry_file.render(entry), namespace)
    assert namespace["ENTRIES"] == (entry,)


def test_a_dry_run_shows_the_entry_and_writes_nothing(registry):
    before = sorted(registry.iterdir())
    shown = added("encoder", "strangers:Encoder", "digits", registry, "--dry-run")
    assert 'factory="strangers:Encoder"' in shown
    assert sorted(registry.iterdir()) == before
    new = registry.parent / "new"
    added("net", LINEAR, "digits", new, "--dry-run")
    assert not new.exists()


def test_the_author_is_told_what_is_left_to_fill_in(registry):
    assert "fill in there: licence" in added("encoder", "strangers:Encoder", "digits", registry)
    full = ("--licence", "MIT", "--reference", "Vaswani et al. 2017", "--description", "Small")
    assert "fill in" not in added("other", "strangers:Encoder", "digits", registry, *full)


def test_every_part_of_the_recipe_can_be_given_by_an_option(registry):
    given = ("--train-steps", "50", "--batch-size", "32", "--hessian-batch-size", "16")
    given += ("--sgd-lrs", "0.1,1", "--adamw-lrs", "1e-4,1e-2", "--recipe", "clip=0.5")
    given += ("--recipe", "schedule=constant", "--recipe", "adamw_betas=(0.9,0.99)")
    added("tuned", "strangers:Encoder", "digits", registry, *given)
    entry = entry_of(registry, "tuned")
    recipe = entry.recipe
    assert (recipe.num_steps, recipe.batch_size, entry.hessian_batch_size) == (50, 32, 16)
    assert (recipe.sgd_lrs, recipe.adamw_lrs) == ((0.1, 1.0), (1e-4, 1e-2))
    assert (recipe.clip, recipe.schedule, recipe.adamw_betas) == (0.5, "constant", (0.9, 0.99))
    assert entry.is_rehearsal


def test_initialisation_alone_needs_no_recipe(registry):
    added("encoder", "strangers:Encoder", "digits", registry, "--stages", "init")
    entry = entry_of(registry, "encoder")
    assert (entry.recipe, entry.stages, entry.full_stages) == (None, ("init",), ("init",))


def test_nothing_is_overwritten_without_force_and_no_code_with_it(registry):
    added("encoder", "strangers:Encoder", "digits", registry)
    path = entry_file.path_of(registry, "encoder")
    old = path.read_text()
    refused = add("encoder", "strangers:frozen", "digits", registry)
    assert "pass --force to replace it" in refused.stderr
    assert path.read_text() == old
    added("encoder", "strangers:frozen", "digits", registry, "--force")
    assert entry_of(registry, "encoder").factory == "strangers:frozen"
    path.write_text(path.read_text() + "\n\ndef mine():\n    return 1\n")
    refused = add("encoder", "strangers:Encoder", "digits", registry, "--force")
    assert "which --force would lose" in refused.stderr
    assert "mine" in path.read_text()
    refused = add("strangers", "strangers:Encoder", "digits", registry, "--force")
    assert "is no entry file" in refused.stderr


def test_a_task_of_one_s_own_may_lie_beside_the_network(registry):
    (registry / "regression.py").write_text(TASK)
    added("line", "regression:network", "regression:Line", registry)
    entry = entry_of(registry, "line")
    assert (entry.task, entry.recipe.eval_size) == ("regression:Line", 200)
    with pytest.raises(tasks.UnknownTaskError, match=r"lacks loss_of, .*, name, metric"):
        tasks.get("regression:Unfinished")
    with pytest.raises(tasks.UnknownTaskError, match=r"can't be imported .*no_such"):
        tasks.get("regression:no_such")
    assert tasks.get("regression:Line", sizes=(1,)).load() is not None
    with pytest.raises(UserError, match=r"sizes is \[1\]; it must be text, a number, .* a tuple"):
        tasks.get("regression:Line", sizes=[1])


def test_kinds_that_had_to_be_guessed_are_written_into_the_entry(registry):
    shown = added("matrix", "strangers:matrix", "digits", registry)
    assert "kind guessed, neither module nor name tells it; the entry's line" in shown
    assert re.search(r"middle.matrix +mlp \? ", shown)
    assert dict(entry_of(registry, "matrix").blocks) == {"middle.matrix": "mlp"}
    text = (registry / "matrix.py").read_text()
    assert "# Guessed: look whether they are right." in text
    added("known", "strangers:Encoder", "digits", registry)
    assert "blocks" not in (registry / "known.py").read_text()


def test_guesses_of_layers_alike_are_one_line():
    layers = [torch.nn.Bilinear(2, 3, 4) for _ in range(3)]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    assert draft.inspect_model(model).guessed == {"layers.*.weight": "mlp"}
    model["layers"].append(torch.nn.Linear(2, 2))
    assert draft.inspect_model(model).guessed == {f"layers.{i}.weight": "mlp" for i in range(3)}


def test_frozen_and_tied_parameters_and_matrices_called_biases_are_named(registry):
    shown = added("frozen", "strangers:frozen", "digits", registry)
    assert "frozen, in no block: hidden.weight, hidden.bias" in shown
    assert "called biases, in no block: middle.pair_bias (144 parameters)" in added(
        "matrix", "strangers:pair_bias", "digits", registry
    )
    tied = "transformers:mamba?hidden_size=8&num_hidden_layers=1&state_size=2"
    shown = added("mamba", tied, "pydoc?context=4", registry, "--stages", "init")
    assert "tied, one block under the first name: lm_head.weight" in shown
    assert "recurrent" in shown


@pytest.mark.parametrize(
    ("source", "task", "block"),
    [
        ("timm:resnet10t", "digits?image_size=32", "conv1.0.weight"),
        ("timm:xcit_nano_12_p16_224?img_size=32&depth=1", "digits", "query"),
        (
            "transformers:llama?hidden_size=16&num_hidden_layers=1&num_attention_heads=2"
            "&intermediate_size=8",
            "pydoc?context=8",
            "model.layers.0.self_attn.q",
        ),
        (
            "transformers:vit?hidden_size=16&num_hidden_layers=1&num_attention_heads=2"
            "&intermediate_size=8&patch_size=4",
            "digits",
            "query",
        ),
    ],
)
def test_models_of_libraries_take_their_sizes_from_the_task(registry, source, task, block):
    shown = added("theirs", source, task, registry, "--stages", "init")
    assert block in shown
    assert "no forecast" not in shown


def test_images_are_resized_to_what_the_model_takes(registry):
    added("xcit", "timm:xcit_nano_12_p16_224?img_size=32&depth=1", "digits", registry)
    entry = entry_of(registry, "xcit")
    task = tasks.get("digits", **entry.task_options)
    assert task.fixed(task.load(), "train", 2)[0].shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("dropout_on", "random numbers are drawn in middle"),
        ("in_place", "in-place operation"),
        ("fused_attention", "no second derivative"),
        ("once", "once_differentiable"),
        ("nan", "is nan"),
        ("complex_filter", "middle.filter is torch.complex64"),
        ("wrong_classes", "out of bounds"),
    ],
)
def test_a_model_without_a_forecast_is_written_for_validate_to_explain(registry, factory, said):
    shown = added("model", f"strangers:{factory}", "digits", registry)
    [line] = [line for line in shown.splitlines() if line.startswith("no forecast")]
    assert said in line
    assert entry_of(registry, "model")


D = "digits"


@pytest.mark.parametrize(
    ("name", "source", "task", "said"),
    [
        ("../up", "strangers:Encoder", D, "NAME is '../up'; use lower-case letters"),
        ("Upper", "strangers:Encoder", D, "NAME is 'Upper'"),
        ("vit-digits", "strangers:Encoder", D, "has a model 'vit-digits' already"),
        ("m", "strangers:Encoder", "digitz", "did you mean digits"),
        ("m", "strangers:Encoder", "digits?size=1", "its options are: train_size"),
        ("m", "strangers:Encoder", "digits?image_size=true", "image_size is True; it must be a"),
        ("m", "strangers:Encoder", "pydoc?context=9999999", "no training sequence of 9,999,999 to"),
        ("m", "strangers:Encoder", "no_such:Task", "can't be imported"),
        ("m", "strangers:Encoder", "strangers:Encoder", "no subclass of harness.tasks.base.Task"),
        ("m", "strangers", D, "write module:factory, timm:NAME or"),
        ("m", "strangers:", D, "write module:factory"),
        ("m", "../strangers:f", D, "write module:factory"),
        ("m", "no_such_module:f", D, "no_such_module is neither installed nor in"),
        ("m", "strangers:absent", D, "strangers has no 'absent'"),
        ("m", "strangers:D", D, "strangers has no 'D'"),
        ("m", "strangers:F", D, "is no function or class"),
        ("m", "strangers:Encoder?widht=4", D, "no argument 'widht'; it takes num_classes, image_"),
        ("m", "strangers:needs_arguments", D, "'strangers:needs_arguments?width=…&depth=…'"),
        ("m", "strangers:raises", D, "FileNotFoundError: weights.pt is not there"),
        ("m", "strangers:no_module", D, "must return a torch.nn.Module"),
        ("m", "strangers:huge", D, "choose a smaller configuration"),
        ("m", "strangers:huge_at_once", D, "can't allocate memory"),
        ("m", "strangers:Encoder", "mnist", "HARNESS_DATA_ROOT"),
        ("m", "timm:poolformer_s13", D, "did you mean poolformer_s"),
        ("m", "timm:poolformer_s12?depht=2", D, "poolformer_s12 doesn't take depht"),
        ("m", "timm:convmixer_768_32?depth=2", D, "its class takes what its name fixes"),
        ("m", "transformers:lama", "pydoc", "did you mean llama"),
        ("m", "transformers:llama?hiden_size=8", "pydoc", "did you mean hidden_size"),
        ("m", "transformers:llama", D, "no llama with the head ImageClassification"),
        (
            "m",
            "Qwen/Qwen2-0.5B",
            "pydoc",
            "initialised anew, in sizes that can be trained; write 'tra",
        ),
        ("m", "transformers:Qwen/Qwen2-0.5B", "pydoc", "'transformers:qwen2?hidden_size=…&num_hid"),
        ("m", "mistralai/Mixtral-8x7B-v0.1", "pydoc", "write 'transformers:mixtral?hidden_size"),
        ("m", "timm/resnet18.a1_in1k", D, "write 'timm:resnet18'"),
        ("m", "nobody/knows-this", "pydoc", "its config.json names its `model_type`"),
        (
            "m",
            "timm:resnet18",
            "pydoc",
            "timm's models are of images, and the task supplies vocab_size",
        ),
        (
            "m",
            "strangers:raises",
            D,
            "the images, 8 × 8, are not of its size: option image_size of",
        ),
    ],
)
def test_what_can_not_be_added_is_refused_in_a_line_and_writes_nothing(
    registry, monkeypatch, name, source, task, said
):
    monkeypatch.delenv("HARNESS_DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(registry.rglob("*.py"))
    result = add(name, source, task, registry)
    assert result.exit_code == 2, result.output
    [line] = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert said in line
    assert sorted(registry.rglob("*.py")) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--stages", "init,middle"), "choose from init, p10"),
        (("--stages", "final"), "must begin with init"),
        (("--stages", "final,init"), "--stages is final,init; it must begin with init"),
        (("--train-steps", "0"), "0 is not in the range"),
        (("--family", "Big Nets"), "--family is 'Big Nets'"),
        (("--licence", " "), "licence is ' '; it must not be empty"),
        (("--sgd-lrs", "0.1"), "--sgd-lrs is '0.1'; write the lowest and the highest: 0.01,1"),
        (("--adamw-lrs", "1,0.1"), "adamw_lrs is (1.0, 0.1); it must be 0 < lowest < highest"),
        (("--recipe", "lr=1"), "--recipe 'lr=1': write FIELD=VALUE; fields: num_steps, batch_size"),
        (("--recipe", "clip=yes"), "--recipe 'clip=yes': clip must be float | None"),
        (("--batch-size", "0"), "0 is not in the range"),
    ],
)
def test_options_out_of_range_are_refused(registry, more, said):
    result = add("m", "strangers:Encoder", "digits", registry, *more)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize("left_out", ["--task", "--from"])
def test_a_missing_task_or_source_is_refused(registry, left_out):
    given = {"--task": "digits", "--from": "strangers:Encoder"}
    given.pop(left_out)
    result = CliRunner().invoke(main, ["add-model", "m", *next(iter(given.items()))])
    assert result.exit_code == 2
    assert f"Missing option '{left_out}'" in result.stderr


def test_a_module_that_lies_elsewhere_is_to_be_brought_along(registry, monkeypatch):
    monkeypatch.chdir(registry)
    elsewhere = registry.parent / "elsewhere"
    refused = add("m", "strangers:Encoder", "digits", elsewhere)
    assert "strangers.py lies here, but not where the entry is to lie" in refused.stderr
    assert f"put it into {elsewhere}" in refused.stderr
    assert not elsewhere.exists()
    assert "entry: m.py" in added("m", "strangers:Encoder", "digits", Path("."))


def test_a_module_that_fails_when_imported_is_refused(registry):
    (registry / "raises_at_import.py").write_text("import json\njson.nothing\n")
    refused = add("m", "raises_at_import:f", "digits", registry)
    assert "raises_at_import can't be imported: AttributeError" in refused.stderr
    assert refused.exit_code == 2


def test_other_python_files_of_a_registry_are_not_executed(registry):
    (registry / "script.py").write_text("raise SystemExit('executed')\n")
    added("encoder", "strangers:Encoder", "digits", registry)


def test_a_folder_that_can_not_be_written_is_refused(registry):
    result = add("m", LINEAR, "digits", Path("/proc/nowhere"))
    assert result.exit_code == 2
    assert "can't be written" in result.stderr


def test_a_model_of_the_tree_is_one_file_that_the_registry_reads(registry, monkeypatch):
    tree = registry.parent / "tree"
    tree.mkdir()
    monkeypatch.setattr(catalogue, "SUBMITTED", tree)
    result = CliRunner().invoke(main, ["add-model", "linear", "--from", LINEAR, "--task", "digits"])
    assert result.exit_code == 0, result.output
    assert catalogue.get("linear").source == "torch.nn"
    assert draft.TODO in (tree / "linear.py").read_text()
