from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import spectra_db
from harness.campaign.unfinished import unfinished
from harness.cli import main
from harness.submission import submit
from spectra_db import store
from spectra_db.verified import verified_models
from tests.spectra_db import hub_server

NAME = "net"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def add(registry: Path, name: str = NAME, **options: str) -> Result:
    given = {"licence": "MIT", "reference": "Rosenblatt 1958", "stages": "init,final"} | options
    factory = given.pop("factory", "strangers:Perceptron?width=5")
    more = [part for key, value in given.items() if value for part in (f"--{key}", value)]
    source = ["--from", factory, "--task", "digits", "--train-steps", "4"]
    return call("add-model", name, *source, "--registry", registry, "--force", *more)


@contextmanager
def nothing_imported() -> Iterator[None]:
    """Leave the modules of a registry, and its folder, as if they had never been imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "dont_write_bytecode", True)
        sys.modules.pop("strangers", None)
        yield
    sys.modules.pop("strangers", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a folder with a registry, and the tables of its model in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    registry = folder / "registry"
    registry.mkdir()
    shutil.copy(Path(__file__).with_name("strangers.py"), registry)
    with nothing_imported():
        for result in (
            add(registry),
            call("run", NAME, "--registry", registry, "--out", folder / "out", "--device", "cpu"),
        ):
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def sealed(finished, tmp_path_factory) -> Path:
    """Return the submission of that model."""
    folder = tmp_path_factory.mktemp("sealed") / "submission"
    with nothing_imported():
        result = submitted(finished, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Iterator[Path]:
    """Return a copy of that folder; nothing of it was imported yet."""
    with nothing_imported():
        yield Path(shutil.copytree(finished, tmp_path / "place"))


def submitted(place: Path, *more: object) -> Result:
    where = ("--registry", place / "registry", "--source", place / "out")
    return call("submit", NAME, *where, "--out", place / "submission", "--rehearsal", *more)


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture
def submission(sealed, tmp_path) -> Iterator[Path]:
    """Return a copy of the submission; nothing of it was imported yet."""
    with nothing_imported():
        yield Path(shutil.copytree(sealed, tmp_path / "submission"))


def test_a_submission_holds_tables_entry_code_weights_and_a_report(submission):
    assert submit.problems(submission) == []
    files = {path.relative_to(submission).as_posix() for path in submission.rglob("*.*")}
    weights = f"checkpoints/{NAME}/adamw-seed1/final.safetensors"
    assert {f"entry/{NAME}.py", "entry/strangers.py", weights, "README.md"} <= files
    rows = spectra_db.load("spectra", source=submission / "data")
    assert set(rows["stage"]) == {"init", "final"}
    facts = submit.read(submission)
    assert facts["model"] == NAME
    assert facts["code_version"]


def test_the_report_says_what_was_found_and_where_the_model_would_stand(submission):
    report = (submission / "README.md").read_text()
    assert "Rosenblatt 1958" in report
    [js0] = spectra_db.load(
        "heterogeneity", source=submission / "data", metric="js0", scale="own_rms", stage="init"
    )["corrected"]
    assert f"| init | {js0:.3f} |" in report
    assert "SGD-Adam gap" in report
    assert "place " in report


def test_a_page_shows_a_submission(submission, tmp_path):
    result = call("site", "--source", submission, "--out", tmp_path / "page")
    assert result.exit_code == 0, result.output
    pages = {path.name for path in (tmp_path / "page").rglob(f"{NAME}*")}
    assert f"{NAME}.html" in pages
    assert f"models/{NAME}.html" in (tmp_path / "page" / "index.html").read_text()


def test_a_rehearsal_is_no_result_and_stays_out_of_a_release(place, tmp_path):
    found = unfinished(place / "out", place / "registry")
    assert found == {NAME: "its runs of 4 steps are a rehearsal, from 100 on they are results"}
    where = (place / "out", "--registry", place / "registry", "--out", tmp_path / "release")
    result = call("dataset", "release", *where, "--version", "0.1.0")
    assert f"left out: {NAME}: its runs of 4 steps are a rehearsal" in result.output
    assert not list((tmp_path / "release").rglob("*.parquet"))


def test_the_place_among_others_is_that_of_its_values(finished):
    import pandas as pd

    from harness.submission.report import _place

    others = pd.DataFrame({"model": ["a", "b", "c"], "gap": [0.3, 0.1, 0.2]})
    assert _place(0.15, others, "gap") == (
        "place 3 of 4 from the largest, after c (0.200), before b (0.100)"
    )
    assert _place(0.5, others, "gap") == "place 1 of 4 from the largest, before a (0.300)"
    assert _place(0.0, others, "gap") == "place 4 of 4 from the largest, after b (0.100)"


def test_a_submission_verifies_elsewhere_from_its_own_folder(submission):
    result = call("verify", submission, "--registry", submission / "entry", "--sample", 4)
    assert result.exit_code == 0, result.output
    assert "4 agree" in result.stderr
    assert submit.problems(submission) == []


def test_a_verified_submission_says_so_and_is_still_sound(submission):
    arguments = ("verify", submission, "--registry", submission / "entry", "--sample", 2)
    assert call(*arguments).exit_code == 0
    assert not (submission / "data" / "verified.json").exists()
    assert call(*arguments, "--mark").exit_code == 0
    assert verified_models(submission / "data")[NAME].rows_checked == 2
    assert submit.problems(submission) == []


def test_reading_a_submission_executes_nothing_of_it(submission):
    for name in (f"{NAME}.py", "strangers.py"):
        path = submission / "entry" / name
        path.write_text(f"ENTRIES = ()\nraise SystemExit('{name} was executed')\n")
    submit._seal(submission, submit.read(submission))
    assert submit.problems(submission) == []
    line = refused(call("verify", submission))
    assert f"pass --registry {submission / 'entry'}, which executes it" in line
    assert "strangers" not in sys.modules


def test_what_was_submitted_once_is_replaced_and_nothing_else(place):
    assert submitted(place).exit_code == 0
    (place / "submission" / "stray.txt").write_text("of the submission that is replaced\n")
    assert submitted(place, "--no-checkpoints").exit_code == 0
    assert not (place / "submission" / "stray.txt").exists()
    assert not (place / "submission" / "checkpoints").exists()
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("kept")
    again = submitted(place, "--out", place / "mine")
    assert "is there already; name another folder" in refused(again)
    assert (place / "mine" / "thesis.tex").read_text() == "kept"
    assert [path.name for path in place.glob(".*")] == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda s: (s / "README.md").unlink(), "README.md: submission.json lists it, it is not"),
        (lambda s: (s / "entry" / "x.py").write_text("1"), "x.py: submission.json does not list"),
        (lambda s: (s / "entry" / f"{NAME}.py").write_text("1"), "not the file that submission"),
        (lambda s: (s / "README.md").write_text("better"), "README.md: not the file that"),
        (lambda s: (s / "link").symlink_to("/etc"), "link: a link; a submission holds files"),
        (lambda s: (s / "submission.json").write_text("{}"), "submission.json is broken"),
        (lambda s: (s / "submission.json").write_text("[" * 10**5), "submission.json is broken"),
    ],
)
def test_a_submission_that_was_altered_is_refused(submission, harm, said):
    harm(submission)
    assert said in refused(call("verify", submission, "--registry", submission / "entry"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda s: (s / "entry" / "fast.so").write_bytes(b"\x7fELF"), "fast.so: no Python source"),
        (lambda s: (s / "entry" / f"{NAME}.py").write_text("x = 1\n"), "no file of the entry"),
        (lambda s: (s / "entry" / f"{NAME}.py").write_text("x = (\n"), "can't be read: SyntaxErr"),
        (lambda s: (s / "README.md").unlink(), "no README.md, the report"),
        (lambda s: _multiply_rules(s / "data"), "manifest"),
    ],
)
def test_contents_are_checked_however_well_they_are_sealed(submission, harm, said):
    facts = submit.read(submission)
    harm(submission)
    submit._seal(submission, facts)
    assert any(said in problem for problem in submit.problems(submission))


def _multiply_rules(data: Path) -> None:
    rows = spectra_db.load("spectra", source=data)
    store.write(data, "spectra", rows.assign(seconds=2 * rows["seconds"]))


def test_tables_of_another_model_do_not_belong_to_a_submission(submission):
    facts = submit.read(submission)
    models = spectra_db.load("models", source=submission / "data")
    store.write(submission / "data", "models", models.assign(model="other"))
    submit.reseal(submission)
    assert facts["model"] == NAME
    assert any("a table of another model" in p for p in submit.problems(submission))


def test_an_entry_that_was_changed_after_its_run_is_refused(place):
    assert add(place / "registry", reference="Someone else 2020").exit_code == 0
    line = refused(submitted(place))
    assert "reference is 'Rosenblatt 1958' there and 'Someone else 2020' in the entry" in line
    path = place / "registry" / "strangers.py"
    add(place / "registry")
    path.write_text(
        path.read_text().replace(
            "nn.Linear(width, num_classes)", "nn.Linear(width, 10, bias=False)"
        )
    )
    sys.modules.pop("strangers", None)
    assert "holds another net: num_params is 385 there and 375" in refused(submitted(place))
    assert not (place / "submission").exists()


@pytest.mark.parametrize("width", [5, 20])  # blocks of at most 1,000 parameters are exact
def test_code_that_was_changed_after_its_run_is_refused(finished, place, width):
    out = place / "out"
    if width != 5:
        out = place / "wide"
        add(place / "registry", factory=f"strangers:Perceptron?width={width}", stages="init")
        where = ("--registry", place / "registry", "--out", out, "--device", "cpu")
        assert call("run", NAME, *where).exit_code == 0
    assert submitted(place, "--source", out).exit_code == 0
    path = place / "registry" / "strangers.py"
    path.write_text(path.read_text().replace("torch.tanh(self.hidden", "torch.relu(self.hidden"))
    sys.modules.pop("strangers", None)
    line = refused(submitted(place, "--source", out))
    assert "holds another net: a row of" in line
    assert "run it again into another folder" in line


def test_settings_that_were_changed_after_the_run_are_refused(place):
    path = place / "registry" / f"{NAME}.py"
    text = path.read_text()
    path.write_text(text.replace("hessian_batch_size=128", "hessian_batch_size=64"))
    assert "spectra of net on 128 samples, its batch has 64" in refused(submitted(place))
    path.write_text(text.replace("num_steps=4", "num_steps=4, weight_decay=0.5"))
    assert "its recipe's weight_decay was 0.0, it is 0.5 now" in refused(submitted(place))
    assert not (place / "submission").exists()


def test_what_forward_alone_imports_is_submitted_too_and_missed_where_it_is_not(place):
    registry = place / "registry"
    (registry / "helper.py").write_text("def call(x):\n    return x\n")
    path = registry / "strangers.py"
    before = "        return self.head(self.middle(torch.tanh"
    lazy = "        from helper import call\n\n        call(images)\n"
    path.write_text(path.read_text().replace(before, lazy + before))
    try:
        result = submitted(place)
        assert result.exit_code == 0, result.output
        helper = place / "submission" / "entry" / "helper.py"
        assert helper.is_file()
        helper.unlink()
        submit._seal(place / "submission", submit.read(place / "submission"))
        sys.path[:] = [path for path in sys.path if str(place) not in path]
        for name in ("strangers", "helper"):
            sys.modules.pop(name, None)
        entry = place / "submission" / "entry"
        result = call("verify", place / "submission", "--registry", entry, "--sample", 2)
        assert result.exit_code == 1, result.output
        assert "No module named 'helper'" in " ".join(result.stdout.split())
        assert "2 can't be verified here" in result.stderr
    finally:
        sys.modules.pop("helper", None)


@pytest.mark.slow
def test_a_model_that_starts_from_another_s_weights_can_be_submitted(place):
    registry, out = place / "registry", place / "out"
    path = registry / f"{NAME}.py"
    text = path.read_text()
    tuned = text.replace('name="net"', 'name="tuned"').replace(
        "        recipe=", '        pretrained="net",\n        recipe='
    )
    (registry / "tuned.py").write_text(tuned)
    where = ("--registry", registry, "--out", out, "--device", "cpu")
    result = call("run", "tuned", *where)
    assert result.exit_code == 0, result.output
    where = ("--registry", registry, "--source", out, "--out", place / "tuned")
    result = call("submit", "tuned", *where, "--rehearsal")
    assert result.exit_code == 0, result.output


def test_what_is_not_ready_is_refused_and_writes_nothing(place):
    registry = place / "registry"
    for result, said in (
        (call("submit", NAME, "--registry", registry, "--out", place / "s"), "--source is missing"),
        (call("submit", "nte", "--source", place / "out", "--out", place / "s"), "unknown model"),
        (submitted(place, "--create-pr", "--repo", "a/b/c"), "'a/b/c' is no id of a dataset"),
        (submitted(place, "--create-pr"), "--create-pr needs --repo: the dataset on the Hub"),
        (submitted(place, "--source", place), "has no table of net"),
    ):
        assert said in refused(result)
    add(registry, licence="")
    assert "licence not filled in yet" in refused(submitted(place))
    add(registry, stages="init,p50,final")
    assert "is not finished" in refused(submitted(place))
    assert not (place / "submission").exists()
    assert not (place / "s").exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with hub_server.serve(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch):
    """Serve a Hub with one dataset, which the client talks to as to the real one."""
    server.reset()
    repo = server.root / "datasets" / "owner" / "name"
    shutil.rmtree(repo, ignore_errors=True)
    server.repo = hub_server.create(repo)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    # The client read it at its import, which may have been in a test that is offline.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return server


def test_a_pull_request_sends_the_submission_and_says_where_it_is(place, hub):
    result = submitted(place, "--create-pr", "--repo", "owner/name")
    assert result.exit_code == 0, result.output
    assert "/datasets/owner/name/discussions/1" in result.stdout.splitlines()[-1]
    sent = hub_server.git(hub.repo, "ls-tree", "-r", "--name-only", "refs/pr/1").splitlines()
    files = [p for p in (place / "submission").rglob("*") if p.is_file()]
    names = {f"submissions/{NAME}/{p.relative_to(place / 'submission').as_posix()}" for p in files}
    assert set(sent) == {".gitattributes", *names}
    assert hub_server.git(hub.repo, "rev-list", "--count", "main") == "1"


def test_a_pull_request_that_fails_leaves_a_folder_ready_to_be_sent(place, hub):
    hub.failing = {"/commit/": 403}
    line = refused(submitted(place, "--create-pr", "--repo", "owner/name"), code=1)
    assert "the pull request on owner/name failed" in line
    assert "is ready to be sent" in line
    assert submit.problems(place / "submission") == []


def test_without_a_token_nothing_is_begun(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    line = refused(submitted(place, "--create-pr", "--repo", "owner/name"), code=1)
    assert "run `hf auth login`" in line
    assert not (place / "submission").exists()
