from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import spectra_db
from harness.campaign.plan import settings_of
from harness.cli import main
from harness.cli.display import print_results
from harness.registry import get
from harness.submission.recompute import Means
from harness.submission.verify import verify
from spectra_db.gauss_newton import ggn_share
from spectra_db.loading import BUNDLED

SPECTRUM = ("spectrum", "cnn-digits", "--no-gram", "--num-probes", "2", "--num-steps", "4")
SPECTRUM += ("--device", "cpu")


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv("HARNESS_DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """Check that a command was refused in one line, and return it."""
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_help_names_the_commands_and_loads_no_torch():
    code = (
        "import sys; from harness.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'pandas', 'rich'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("list", "describe", "spectrum", "train", "run", "site"):
        assert f"\n  {name} " in answer.stdout


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_list_shows_the_demo_models():
    result = call("list", "--tier", "demo")
    assert all(name in result.stdout for name in ("cnn-digits", "vit-digits", "gpt-pydoc"))


def test_list_shows_every_name_in_full():
    shown = call("list").stdout
    assert all(entry["name"] in shown for entry in json.loads(call("list", "--json").stdout))


def test_list_gives_json_with_name_family_and_tier():
    listed = json.loads(call("list", "--json").stdout)
    assert {"name": "cnn-digits", "family": "cnn", "tier": "demo"}.items() <= listed[0].items()


def test_list_shows_the_tasks_with_their_terms(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = call("list", "--tasks").stdout
    assert "masked token" in shown
    assert "or module:Class of your own" in shown
    listed = json.loads(call("list", "--tasks", "--json").stdout)
    assert [task["name"] for task in listed][:2] == ["books", "cifar10"]
    assert "--tier is of models" in refused(call("list", "--tasks", "--tier", "demo"))


def test_list_knows_the_entries_of_a_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from harness.registry import get\n"
        "ENTRIES = (replace(get('cnn-digits'), name='cnn-mine'),)\n"
    )
    listed = json.loads(call("list", "--json", "--registry", tmp_path).stdout)
    assert "cnn-mine" in [entry["name"] for entry in listed]


def test_describe_shows_blocks_and_forecast():
    result = call("describe", "vit-digits")
    assert "26,474 parameters, 15 blocks" in result.stdout
    assert "3 probes × 40 steps: 2,080 products, 1 block by 10 passes, " in result.stdout


def test_describe_gives_json_whose_blocks_add_up_with_partition_all():
    facts = json.loads(call("describe", "gpt-pydoc", "--partition", "all", "--json").stdout)
    assert sum(block["num_params"] for block in facts["blocks"]) == facts["num_params"]
    assert facts["flops"] > 0
    assert facts["graph_bytes"] > 0


def test_spectrum_writes_rows_that_load_reads(tmp_path):
    result = call(*SPECTRUM, "--seed", "5", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "forecast at 2 probes × 4 steps" in result.stdout
    assert "plug-in" in result.stdout
    rows = spectra_db.load("spectra", source=tmp_path, model="cnn-digits")
    assert set(rows["init_seed"]) == {5}
    assert rows["block"].nunique() == 4
    [run] = spectra_db.load("runs", source=tmp_path).to_dict("records")
    assert set(rows["run_id"]) == {run["run_id"]}
    assert list(run["seeds"]) == [5]
    assert len(spectra_db.load("blocks", source=tmp_path)) == 4


def test_spectrum_again_computes_nothing_and_ends_with_the_same_rows(tmp_path):
    call(*SPECTRUM, "--out", tmp_path)
    before = spectra_db.load("spectra", source=tmp_path)
    result = call(*SPECTRUM, "--out", tmp_path)
    assert result.exit_code == 0
    after = spectra_db.load("spectra", source=tmp_path)
    # Wall time would differ had anything been computed again.
    assert before["seconds"].tolist() == after["seconds"].tolist()


def test_spectrum_with_three_probes_states_its_error(tmp_path):
    result = call(*SPECTRUM, "--num-probes", "3", "--out", tmp_path)
    assert " ± " in result.stdout.splitlines()[-1]


def test_a_stage_is_there_once_its_model_is_trained(tmp_path):
    final = (*SPECTRUM, "--stage", "final", "--out", tmp_path)
    assert "run: harness run cnn-digits" in refused(call(*final))
    result = call("train", "cnn-digits", "--lr", "0.01", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert call(*final).exit_code == 0
    assert set(spectra_db.load("spectra", source=tmp_path)["train_run"]) == {"adamw-seed1"}


def test_a_learning_rate_too_high_diverges_without_failing(tmp_path):
    result = call("train", "cnn-digits", "--optimizer", "sgd", "--lr", "1e6", "--out", tmp_path)
    assert result.exit_code == 0
    assert "diverged" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("describe", "vit-digitz"), "did you mean vit-digits"),
        (("spectrum", "vit-digitz"), "did you mean vit-digits"),
        ((*SPECTRUM, "--num-probes", "-1"), "-1 is not in the range"),
        ((*SPECTRUM, "--num-steps", "0"), "0 is not in the range"),
        ((*SPECTRUM, "--num-probes", "many"), "not a valid integer"),
        ((*SPECTRUM, "--seed", "-3"), "-3 is not in the range"),
        ((*SPECTRUM, "--stage", "middle"), "its stages: init, final"),
        ((*SPECTRUM, "--device", "abacus"), "device 'abacus' cannot be used"),
        ((*SPECTRUM, "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (
            (*SPECTRUM, "--partition", "rows"),
            "'rows' is not one of",
        ),
        ((*SPECTRUM, "--dtype", "int8"), "'int8' is not one of"),
        ((*SPECTRUM, "--norm-mode", "test"), "'test' is not one of"),
        ((*SPECTRUM, "--probe-distribution", "cauchy"), "'cauchy' is not one of"),
        ((*SPECTRUM, "--matmul-precision", "low"), "'low' is not one of"),
        ((*SPECTRUM, "--memory-budget", "-1"), "must be positive"),
        ((*SPECTRUM, "--memory-budget", "1e-9"), "memory"),
        ((*SPECTRUM, "--memory-budget", "inf"), "must be positive"),
        ((*SPECTRUM, "--log", "/proc/no/log"), "--log /proc/no/log can't be written to"),
        (("train", "cnn-digits", "--lr", "1", "--log", "/proc/log"), "--log /proc/log can't be"),
        ((*SPECTRUM, "--metric", "js1"), "'js1' is not one of"),
        (("spectrum", "cnn-digits", "--tol", "2"), "--tol is 2.0; it must be between 0 and 1"),
        ((*SPECTRUM, "--tol", "0.1"), "--num-probes is 2; an error needs at least 3 probes"),
        (("spectrum", "cnn-digits", "--tol", "0.1", "--partition", "full"), "has one"),
        ((*SPECTRUM, "--registry", "no-such-folder"), "not a folder"),
        (("spectrum", "resnet8-cifar10"), "HARNESS_DATA_ROOT"),
        (("train", "cnn-digits"), "pass --lr"),
        (("train", "bible-gpt", "--lr", "1"), "run: harness run bible-gpt --only trial --out"),
        (("train", "cnn-digits", "--lr", "0"), "must be positive"),
        (("train", "cnn-digits", "--lr", "nan"), "must be positive"),
        (("train", "cnn-digits", "--optimizer", "lion", "--lr", "1"), "'lion' is not one of"),
        (("run",), "name models, or pass --tier"),
        (("run", "cnn-digits", "--tier", "demo"), "not both"),
        (("run", "cnn-digits", "--jobs", "0"), "0 is not in the range"),
        (("run", "cnn-digits", "--throughput", "2"), "pass --dry-run too"),
        (("run", "resnet8-cifar10"), "HARNESS_DATA_ROOT"),
        (("site", "--source", "no-such-folder"), "neither a folder nor a Hub id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_done_is_refused_in_a_line_and_writes_nothing(tmp_path, arguments, said):
    out = tmp_path / "new"
    where = () if arguments[0] == "describe" else ("--out", out)
    assert said in refused(call(*arguments, *where))
    assert not out.exists()


@pytest.mark.parametrize(
    "command", ["spectrum cnn-digits", "train cnn-digits", "run cnn-digits", "leaderboard"]
)
def test_an_out_that_is_a_file_or_can_not_be_written_is_refused(tmp_path, command):
    file = tmp_path / "file"
    file.write_text("kept")
    assert "can't be written to" in refused(call(*command.split(), "--out", file))
    assert "can't be written to" in refused(call(*command.split(), "--out", "/proc/nowhere"))
    assert file.read_text() == "kept"


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "cnn-digits.parquet").write_bytes(b"PAR1 torn")
    assert "cnn-digits.parquet" in refused(call(*SPECTRUM, "--out", tmp_path))


def test_the_choices_are_those_of_the_estimator():
    from harness.estimator.hessian import DTYPES
    from harness.estimator.settings import CHOICES
    from spectra_db.heterogeneity import METRICS
    from spectra_db.words import PARTITIONS

    choices = {
        p.name: set(p.type.choices)
        for p in main.commands["spectrum"].params
        if hasattr(p.type, "choices")
    }
    assert choices["dtype"] == set(DTYPES)
    assert {name: choices[name] for name in CHOICES} == {k: set(v) for k, v in CHOICES.items()}
    assert choices["partition"] == set(PARTITIONS)
    assert choices["metric"] == set(METRICS)


def test_a_failure_is_a_line_and_exit_code_1(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory for\n 3 graphs")

    monkeypatch.setattr("harness.campaign.spectrum.take_spectrum", fail)
    result = call(*SPECTRUM, "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.strip() == "Error: no memory for 3 graphs"


def test_an_end_of_file_is_a_failure_and_no_interruption(tmp_path, monkeypatch):
    def end(*_: object, **__: object) -> None:
        raise EOFError("3 bytes missing")

    monkeypatch.setattr("harness.campaign.spectrum.take_spectrum", end)
    result = call(*SPECTRUM, "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.strip() == "Error: a file or pipe ended early: 3 bytes missing"


def test_an_interruption_says_that_the_same_command_continues(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.campaign.spectrum.take_spectrum", interrupt)
    result = call(*SPECTRUM, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command continues" in result.stderr


def test_a_terminal_without_unicode_gets_question_marks():
    """As cp1252 of Windows has no ⁰, and the C locale no ×."""
    done = CliRunner(charset="ascii").invoke(main, ["describe", "cnn-digits"])
    assert done.exit_code == 0, done.stderr
    assert "16 ? 1 ? 3 ? 3" in done.stdout


ENTRY = """
from dataclasses import replace
from harness.registry import get
ENTRIES = (replace(get("cnn-digits"), name="mine", options={{"widths": {widths}}}, recipe=None,
                   stages=("init",), full_stages=(), hessian_batch_size=4),)
"""


def test_a_spectrum_of_another_version_of_the_entry_is_not_added_to(tmp_path):
    file = tmp_path / "registry" / "mine.py"
    file.parent.mkdir()
    command = ["spectrum", "mine", "--num-probes", "1", "--num-steps", "1", "--registry"]
    command += [str(file.parent), "--out", str(tmp_path / "out")]
    file.write_text(ENTRY.format(widths=(4, 4)))
    assert call(*command).exit_code == 0
    file.write_text(ENTRY.format(widths=(4, 8)))
    assert "its options was" in (said := refused(call(*command)))
    assert "name another --out" in said


def test_products_of_two_kinds_do_not_take_each_other_s_place(tmp_path):
    (tmp_path / "mine.py").write_text(ENTRY.format(widths=(4, 4)))
    command = ["spectrum", "mine", "--registry", str(tmp_path), "--out", tmp_path / "out"]
    assert call(*command).exit_code == 0
    answer = call(*command, "--product", "differences")
    assert answer.exit_code == 2
    assert "holds this spectrum of mine by autograd: name another --out" in answer.stderr
    assert set(spectra_db.load("spectra", source=tmp_path / "out")["product"]) == {"autograd"}


def test_exact_spectra_of_both_operators_stand_side_by_side_and_verify(tmp_path):
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mine.py").write_text(ENTRY.format(widths=(4, 16)))
    out = tmp_path / "out"
    command = ["spectrum", "mine", "--gram", "--registry", str(tmp_path / "registry"), "--out", out]
    for operator in ("ggn", "hessian"):
        assert call(*command, "--operator", operator).exit_code == 0
    rows = spectra_db.load("spectra", source=out)
    assert set(rows["method"]) == {"exact"}
    assert ggn_share(rows).to_list() == pytest.approx([1.0] * rows["block"].nunique())
    metrics = spectra_db.load("heterogeneity", source=out, metric="js0", scale="lambda10")
    assert metrics["standard_error"].item() == metrics["truncation_error"].item() == 0
    entry = get("mine", registry_dir=tmp_path / "registry")
    for row in rows[rows["num_params"] == rows["num_params"].max()].to_dict("records"):
        assert len(row["nodes"]) < row["num_params"]
        assert verify(row, entry, rows[:0], Means()).outcome == "agrees"


def test_results_say_whether_adam_is_needed_as_the_pages_do(capsys):
    """By the gap from R of protocol 1, by the speed-up of protocol 2."""
    names = ("vit-cifar10", "vit-cls-mnist", "bert-2x64-cornell", "cifar-vit", "bpe-bert")
    print_results(BUNDLED, [get(name) for name in names])
    lines = capsys.readouterr().out.splitlines()
    words = {line.split()[0]: line.strip() for line in lines if line.split()}
    assert words["vit-cifar10"].endswith("yes")
    assert words["vit-cls-mnist"].endswith("unclear")
    assert words["bert-2x64-cornell"].endswith("not trained")
    assert "0.76 [0.68, 0.83]" in words["cifar-vit"]
    assert words["cifar-vit"].endswith("yes")
    assert words["bpe-bert"].endswith("not trained")


def test_names_stay_whole_where_a_terminal_is_narrow(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_results(BUNDLED, [get("bert-2x64-cornell")])
    assert "…" not in capsys.readouterr().out


def test_the_partition_is_the_entry_s_unless_told():
    assert settings_of(get("mlp-mnist-c1")).partition == "paper"
    assert settings_of(get("mlp-mnist-c1"), "weights").partition == "weights"
    for command in ("describe", "spectrum"):
        assert "[default: the entry's]" in " ".join(call(command, "--help").output.split())
