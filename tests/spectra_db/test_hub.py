"""The Hub over real HTTP on loopback: olah for reading, a test server for publishing."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest

from spectra_db import check, manifest, store, verified
from spectra_db import publish as publish_module
from spectra_db.hub import reason_of
from spectra_db.manifest import InvalidRelease
from spectra_db.release import release
from tests.processes import Process

from . import hub_server
from .hub_server import TOKEN, commit_folder, create, git
from .synthetic import training_rows, write_tables

REPO = "owner/spectra"
NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Versions 0.1.0 and 0.2.0: in the second a loss of step 3 is another one.

    Without gaps, which follow from a recipe, and these models have no entry.
    """
    folder = tmp_path_factory.mktemp("releases")
    tables = write_tables(folder / "tables")
    shutil.rmtree(tables / "gaps")
    release(tables, folder / "0.1.0", "0.1.0")
    shutil.copytree(folder / "0.1.0", folder / "0.2.0")
    store.write(folder / "0.2.0", "training", training_rows("digits-cnn", at_3=0.7))
    release(folder / "0.2.0", folder / "0.2.0", "0.2.0")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with hub_server.serve(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The server with one dataset that has one commit, and nothing that fails."""
    server.reset()
    repo = server.root / "datasets" / REPO
    shutil.rmtree(repo, ignore_errors=True)
    server.repo = create(repo)
    return server


@pytest.fixture
def published(hub, releases):
    """The dataset with both versions, tagged, the second on main."""
    for version in ("0.1.0", "0.2.0"):
        commit_folder(hub.repo, releases / version, tag=f"v{version}")
    return hub


@pytest.fixture
def python(server, tmp_path):
    """Run Python, or `harness` with the arguments, in a process with a home of its own."""
    (tmp_path / "processes").mkdir()

    def start(*arguments, **env):
        ours = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return Process(arguments, ours | env, tmp_path / "processes")

    def run(*arguments, **env):
        return start(*arguments, **env).communicate()

    run.start = start
    return run


LOAD = """
import json, spectra_db
def loss(revision, model="digits-cnn", **options):
    try:
        rows = spectra_db.load(
            "training", source="owner/spectra", revision=revision, model=model, **options
        )
        return float(rows["value"].iloc[3])
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
"""


def losses(python, *revisions, **env):
    """Return what `load` gives at each revision: a number, or the error's text; and warnings."""
    code, output, errors = python(
        LOAD + f"print(json.dumps([loss(r) for r in {revisions}]))", **env
    )
    assert code == 0, errors
    return json.loads(output), errors


def refs(hub):
    return git(hub.repo, "for-each-ref", "--format", "%(refname) %(objectname)").splitlines()


# Reading


def test_rows_are_those_of_the_revision_and_stay_when_offline(published, python):
    commit = git(published.repo, "rev-parse", "v0.1.0")
    found, errors = losses(python, "v0.1.0", "v0.2.0", "main", None, commit)
    assert found == [0.5, 0.7, 0.7, 0.7, 0.5]
    assert "Warning" not in errors
    asked = len(published.requests)
    found, errors = losses(python, "v0.1.0", "v0.2.0", None, "v0.3.0", HF_HUB_OFFLINE="1")
    assert found[:3] == [0.5, 0.7, 0.7]
    assert "HubError" in found[3]
    assert "of it: main, v0.1.0, v0.2.0" in found[3]
    assert "Warning" not in errors
    assert len(published.requests) == asked


def test_release_and_note_are_read_from_the_hub_too(published, releases, python, tmp_path):
    folder = shutil.copytree(releases / "0.2.0", tmp_path / "0.3.0")
    verified.mark(folder, {"digits-cnn": verified.Extent(3, 12, 0, 1)}, ())
    release(folder, folder, "0.3.0")
    commit_folder(published.repo, folder, tag="v0.3.0")
    code, output, errors = python("""
from harness.leaderboard import tables
from spectra_db.provenance import trace
found = trace("digits-cnn", "owner/spectra")
models = tables.read("owner/spectra").models.set_index("model")
print(found["version"], sorted(found["files"])[-1], models.loc["digits-cnn", "provenance"])
""")
    assert code == 0, errors
    assert output.split() == ["0.3.0", "training/digits-cnn.parquet", "verified"]


def test_without_a_network_a_cached_revision_comes_with_a_warning_and_no_other(published, python):
    losses(python, "v0.1.0")
    found, errors = losses(python, "v0.1.0", "v0.2.0", HF_ENDPOINT=NOWHERE)
    assert found[0] == 0.5
    assert "v0.1.0 is as it was when last downloaded" in errors
    assert found[1].startswith("HubError: the Hub can't be reached")
    told = "is not whole in the cache, which holds of it: v0.1.0; nor is there a folder "
    assert told in found[1]


def test_of_a_model_only_its_files_are_downloaded_and_offline_no_others_are_there(
    published, python, tmp_path
):
    assert losses(python, "v0.1.0")[0] == [0.5]
    cached = {p.relative_to(p.parents[1]).as_posix() for p in tmp_path.rglob("*.parquet")}
    assert cached == {"training/digits-cnn.parquet"}
    code = LOAD + "print(loss('v0.1.0', 'digits-mlp')); print(loss('v0.1.0', 'digits-cmn'))"
    _, output, _ = python(code, HF_HUB_OFFLINE="1")
    assert "revision v0.1.0 of owner/spectra is not whole in the cache" in output
    assert "no model 'digits-cmn' in table training; did you mean digits-cnn" in output
    _, output, errors = python(code)
    assert output.startswith("0.5\nNotFound: no model 'digits-cmn'"), errors


def test_a_missing_revision_is_no_other_one_though_the_server_says_401(published, python):
    found, _ = losses(python, "v0.1.0", None, "v0.1.1", "0" * 40)
    assert found[:2] == [0.5, 0.7]
    assert found[2].startswith("NotFound: dataset owner/spectra has no revision 'v0.1.1'; did you")
    assert "v0.1.0" in found[2]
    assert isinstance(found[3], str)


def test_a_revision_that_was_withdrawn_is_not_served_from_the_cache(published, python):
    losses(python, "v0.1.0")
    git(published.repo, "tag", "-d", "v0.1.0")
    [found], _ = losses(python, "v0.1.0")
    assert "NotFound: dataset owner/spectra has no revision 'v0.1.0'" in found


def test_main_is_what_it_is_now_and_no_older_one_when_the_server_fails(published, python, releases):
    assert losses(python, None)[0] == [0.7]
    commit_folder(published.repo, releases / "0.1.0")
    assert losses(python, None)[0] == [0.5]
    published.failing = {"/revision/": 500}
    [found], _ = losses(python, None)
    assert found.startswith("HubError: owner/spectra at main: the Hub answered 500")


def test_what_the_token_may_not_see_is_told_with_the_remedy(published, python):
    [found], _ = losses(python, "main", HF_TOKEN="hf_wrongtoken")
    assert found.startswith(
        "NotFound: the Hub has no dataset owner/spectra, or the token may not see it (it answered "
        "401): check the id, and `hf auth login`"
    )
    assert "hf_wrongtoken" not in found


@pytest.mark.slow
def test_no_message_holds_what_is_secret(published, python, releases):
    address = f"http://user:pass-word@{NOWHERE.removeprefix('http://')}"
    for env in (
        {"HF_ENDPOINT": address},
        {"HF_TOKEN": "hf_secret\x01token"},  # which a client's error may quote
        {"HF_TOKEN": "hf_secrettoken", "HF_ENDPOINT": address},
    ):
        folder = releases / "0.2.0"
        _, output, errors = python("publish", REPO, "--dry-run", "--source", folder, **env)
        [found], warned = losses(python, "main", **env)
        assert found.startswith(("HubError", "NotFound")), found
        for text in (output, errors, found, warned):
            assert "secret" not in text
            assert "pass-word" not in text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("at https://me:pw@hub.co/x?a=b&sig=123 (404)", "at https://***@hub.co/x?*** (404)"),
        ("Illegal header value b'Bearer hf_a\\x01b'", "Illegal header value b'Bearer ***'"),
        ("token hf_known is refused\nsecond line", "token *** is refused"),
        ("", "RuntimeError"),
    ],
)
def test_what_an_error_says_is_shown_without_secrets(monkeypatch, said, shown):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_known")
    assert reason_of(RuntimeError(said)) == shown


def test_a_file_that_is_not_the_manifests_is_refused(hub, python, releases, tmp_path):
    folder = Path(shutil.copytree(releases / "0.1.0", tmp_path / "spoilt"))
    path = folder / "training" / "digits-cnn.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    commit_folder(hub.repo, folder)
    [found], _ = losses(python, "main")
    assert found.startswith("InvalidRelease: ")
    assert "training/digits-cnn.parquet: not the file that the manifest lists" in found
    code, _, errors = python("pull", REPO, "--out", tmp_path / "out")
    assert code == 2
    assert "training/digits-cnn.parquet: not the file that the manifest lists" in errors
    assert not (tmp_path / "out").exists()


def test_the_hubs_own_functions_read_the_files_of_the_revision(published, python, releases):
    code = f"""
import hashlib, pathlib, huggingface_hub as hub
for tag in ("v0.1.0", "v0.2.0"):
    file = hub.hf_hub_download(
        "{REPO}", "training/digits-cnn.parquet", repo_type="dataset", revision=tag
    )
    print(hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest())
    folder = pathlib.Path(hub.snapshot_download("{REPO}", repo_type="dataset", revision=tag))
    print(hashlib.sha256((folder / "training/digits-cnn.parquet").read_bytes()).hexdigest())
"""
    _, output, errors = python(code)
    sums = [
        manifest.read(releases / version).files["training/digits-cnn.parquet"].sha256
        for version in ("0.1.0", "0.2.0")
    ]
    assert output.split() == [sums[0]] * 2 + [sums[1]] * 2, errors


def test_datasets_loads_every_table_by_its_name_at_the_revision(published, python, releases):
    code = f"""
import json, datasets, spectra_db
at = {{"revision": "v0.1.0"}}
names = datasets.get_dataset_config_names("{REPO}", **at)
answer = {{"names": names, "default": datasets.get_dataset_default_config_name("{REPO}", **at)}}
for revision in ("v0.1.0", "v0.2.0"):
    rows = datasets.load_dataset("{REPO}", "training", revision=revision, split="train")
    answer[revision] = rows["value"][3::5]
theirs = datasets.load_dataset("{REPO}", "spectra", revision="v0.1.0", split="train")
ours = spectra_db.load("spectra", source="{REPO}", revision="v0.1.0")
answer["same"] = [
    list(theirs[c]) == [None if v is None else v.tolist() if hasattr(v, "tolist") else v
                        for v in ours[c]]
    for c in ("model", "block", "probe", "num_params", "nodes", "weights", "alphas", "betas")
]
local = datasets.load_dataset({str(releases / "0.1.0")!r}, "training", split="train")
answer["local"] = local["value"][3::5]
print(json.dumps(answer))
"""
    _, output, errors = python(code)
    answer = json.loads(output.splitlines()[-1]) if output else errors
    tables = sorted(manifest.read(releases / "0.1.0").rows())
    assert sorted(answer.pop("names")) == tables
    assert answer.pop("same") == [True] * 8
    assert answer == {
        "default": "heterogeneity",  # the synthetic tables have no leaderboard
        "v0.1.0": [0.5, 0.5],
        "v0.2.0": [0.7, 0.5],
        "local": [0.5, 0.5],
    }


def test_pull_puts_a_checked_copy_in_a_folder_and_leaves_it_for_offline(
    published, python, tmp_path, releases
):
    out = tmp_path / "copy"
    code, output, errors = python("pull", REPO, "--revision", "v0.1.0", "--out", out)
    assert code == 0, errors
    assert f"{REPO} 0.1.0: 2 models, every file as the manifest lists it\nin {out}" in output
    assert check.problems(out) == []
    assert manifest.read(out) == manifest.read(releases / "0.1.0")
    assert losses(python, "v0.1.0", HF_HUB_OFFLINE="1")[0] == [0.5]
    code, _, errors = python("pull", REPO, HF_ENDPOINT=NOWHERE)
    assert code == 1
    assert errors.startswith("Error: the Hub can't be reached")


# Publishing


def publish(python, folder, *options, token=TOKEN, **env):
    code, output, errors = python(
        "publish", REPO, "--source", folder, *options, HF_TOKEN=token, **env
    )
    assert TOKEN not in output + errors
    return code, output, errors


def test_a_dry_run_says_what_would_change_and_changes_nothing(hub, python, releases):
    before = refs(hub)
    code, output, errors = publish(python, releases / "0.1.0")
    assert code == 0, errors
    added = [line[2:] for line in output.splitlines() if line.startswith("+ ")]
    assert added == sorted([*manifest.read(releases / "0.1.0").files, manifest.NAME])
    assert "nothing is published; --no-dry-run publishes v0.1.0" in output
    assert refs(hub) == before
    assert not [r for r in hub.requests if r.startswith(("POST", "PUT"))]


def test_a_release_is_one_commit_and_a_tag_and_is_read_back(hub, python, releases):
    code, output, errors = publish(python, releases / "0.1.0", "--no-dry-run")
    assert code == 0, errors
    assert f"{hub.url}/datasets/{REPO}/tree/v0.1.0" in output
    assert git(hub.repo, "rev-list", "--count", "main") == "2"
    assert git(hub.repo, "rev-parse", "v0.1.0") == git(hub.repo, "rev-parse", "main")
    code, output, _ = publish(python, releases / "0.1.0", "--no-dry-run")
    assert (code, "v0.1.0 is published already" in output) == (0, True)
    assert git(hub.repo, "rev-list", "--count", "main") == "2"
    objects = [p for p in (hub.repo / ".git" / "lfs" / "objects").rglob("*") if p.is_file()]
    assert objects
    for path in objects:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert losses(python, "v0.1.0")[0] == [0.5]


def test_the_next_version_changes_what_changed_and_leaves_files_of_others(
    hub, python, releases, tmp_path
):
    commit_folder(hub.repo, releases / "0.1.0", tag="v0.1.0")
    (hub.repo / "notes.txt").write_text("of somebody else")
    (hub.repo / "leaderboard").mkdir()
    (hub.repo / "leaderboard" / "old.csv").write_text("a\n")
    git(hub.repo, "add", "-A")
    git(hub.repo, "commit", "-q", "-m", "more")
    code, output, errors = publish(python, releases / "0.2.0", "--no-dry-run")
    assert code == 0, errors
    changed = ["CHANGELOG.md", "README.md", "manifest.json", "training/digits-cnn.parquet"]
    assert [line for line in output.splitlines() if line[1] == " "] == [
        *(f"~ {path}" for path in changed),
        "- leaderboard/old.csv",
    ]
    names = git(hub.repo, "ls-tree", "-r", "--name-only", "v0.2.0").splitlines()
    kept = {".gitattributes", "notes.txt", manifest.NAME}
    assert set(names) == kept | set(manifest.read(releases / "0.2.0").files)
    assert losses(python, "v0.1.0", "v0.2.0")[0] == [0.5, 0.7]


def test_a_pull_request_leaves_main_and_is_tagged_once_merged(hub, python, releases):
    before = git(hub.repo, "rev-parse", "main")
    code, output, errors = publish(python, releases / "0.1.0", "--no-dry-run", "--create-pr")
    assert code == 0, errors
    assert f"published: {hub.url}/datasets/{REPO}/discussions/1" in output
    assert git(hub.repo, "rev-parse", "main") == before
    assert git(hub.repo, "tag") == ""
    git(hub.repo, "update-ref", "refs/heads/main", "refs/pr/1")
    assert publish(python, releases / "0.1.0", "--no-dry-run")[0] == 0
    assert git(hub.repo, "rev-parse", "v0.1.0") == git(hub.repo, "rev-parse", "refs/pr/1")


@pytest.mark.parametrize("token", ["hf_wrongtoken", ""])
def test_a_token_that_may_not_write_publishes_nothing(hub, python, releases, token):
    before = refs(hub)
    code, output, errors = publish(python, releases / "0.1.0", "--no-dry-run", token=token)
    assert code in (1, 2)
    assert "hf auth login" in errors
    assert len(errors.splitlines()) == 1
    assert "hf_wrongtoken" not in output + errors
    assert refs(hub) == before


def test_main_that_moved_meanwhile_is_not_overwritten(hub, python, releases):
    def move(request):
        if "/commit/" in request:
            git(hub.repo, "commit", "-q", "--allow-empty", "-m", "of somebody else")

    hub.before = move
    code, _, errors = publish(python, releases / "0.1.0", "--no-dry-run")
    assert code == 1
    assert "nothing was published in owner/spectra: main has changed meanwhile (412)" in errors
    assert git(hub.repo, "log", "-1", "--format=%s", "main") == "of somebody else"


def test_an_upload_that_is_killed_publishes_nothing_and_goes_on(hub, python, releases):
    before = refs(hub)
    arrived = []

    def slowly(request):
        if request.startswith("PUT"):
            arrived.append(request)
            if len(arrived) > 3:
                time.sleep(60)

    hub.before = slowly
    process = python.start(
        *("publish", REPO, "--source", releases / "0.1.0", "--no-dry-run"), HF_TOKEN=TOKEN
    )
    while len(arrived) < 4 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert len(arrived) >= 4
    assert refs(hub) == before
    hub.reset()
    assert publish(python, releases / "0.1.0", "--no-dry-run")[0] == 0
    again = {request for request in hub.requests if request.startswith("PUT")}
    assert set(arrived[:3]) - again  # what had arrived is not sent again
    assert losses(python, "v0.1.0")[0] == [0.5]


@pytest.mark.parametrize("route", ["PUT /lfs/", "/commit/main"])
def test_a_server_that_fails_before_the_commit_leaves_nothing(hub, python, releases, route):
    before = refs(hub)
    hub.failing = {route: 0 if "commit" in route else 400}
    code, _, errors = publish(python, releases / "0.1.0", "--no-dry-run")
    assert code == 1
    assert "Error: nothing was published in owner/spectra: " in errors
    assert "Traceback" not in errors
    assert refs(hub) == before


def test_a_tag_that_failed_is_added_by_the_same_command(hub, python, releases):
    hub.failing = {"/tag/": 503}
    code, _, errors = publish(python, releases / "0.1.0", "--no-dry-run")
    assert code == 1
    assert "no tag v0.1.0 yet" in errors
    assert "the same command adds it" in errors
    hub.reset()
    assert publish(python, releases / "0.1.0", "--no-dry-run")[0] == 0
    assert git(hub.repo, "rev-list", "--count", "main") == "2"
    assert git(hub.repo, "rev-parse", "v0.1.0") == git(hub.repo, "rev-parse", "main")


def test_an_answer_that_is_lost_after_the_commit_is_no_failure(hub, python, releases):
    hub.loses_answers = True
    code, output, errors = publish(python, releases / "0.1.0", "--no-dry-run")
    assert (code, "published: " in output) == (0, True), errors
    assert git(hub.repo, "rev-list", "--count", "main") == "2"
    assert git(hub.repo, "rev-parse", "v0.1.0") == git(hub.repo, "rev-parse", "main")


def test_a_published_version_never_changes(published, python, releases, tmp_path):
    before = refs(published)
    other = Path(shutil.copytree(releases / "0.1.0", tmp_path / "other"))
    store.write(other, "training", training_rows("digits-cnn", at_3=0.9))
    release(other, other, "0.1.0")
    code, _, errors = publish(python, other, "--no-dry-run")
    assert code == 2
    assert "v0.1.0 is published with other files (such as" in errors
    assert refs(published) == before


def test_a_release_that_lost_rows_is_not_published(published, python, releases, tmp_path):
    before = refs(published)
    fewer = tmp_path / "fewer"
    release(releases / "0.2.0", fewer, "0.3.0", models=["digits-mlp"])
    code, _, errors = publish(python, fewer, "--no-dry-run")
    assert code == 2
    assert "rows of 0.2.0 are lost" in errors
    assert refs(published) == before


def test_a_release_that_is_not_sound_is_not_published(tmp_path, releases):
    folder = Path(shutil.copytree(releases / "0.1.0", tmp_path / "spoilt"))
    (folder / "training" / "digits-mlp.parquet").write_bytes(b"x")
    with pytest.raises(InvalidRelease, match="not the file that the manifest lists"):
        publish_module.plan(folder, REPO)  # before the Hub is asked
