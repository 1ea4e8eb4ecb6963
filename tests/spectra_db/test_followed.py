"""What was found to follow from other tables is noted, and made anew where a byte changed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from spectra_db import check, followed, store
from spectra_db.derived import DERIVED, differences
from spectra_db.release import release

from .synthetic import gap_row, write_tables


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def made_anew(monkeypatch, tmp_path):
    """Return the tables that are made anew, in turn; nothing was found to follow before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []
    for table, derive in list(DERIVED.items()):
        monkeypatch.setitem(
            DERIVED, table, lambda *a, t=table, d=derive, made=made: (made.append(t), d(*a))[1]
        )
    return made


def test_what_was_found_to_follow_is_not_made_anew_but_with_other_bytes(tmp_path, made_anew):
    source, out = write_tables(tmp_path / "tables", ["digits-cnn"]), tmp_path / "data"
    release(source, out, "0.1.0")
    assert check.problems(out) == []
    assert sorted(made_anew) == ["heterogeneity", "stages"]
    copied = Path(shutil.copytree(out, tmp_path / "copied"))
    assert check.problems(copied) == []
    assert len(made_anew) == 2

    rows = store.read(source / "heterogeneity/digits-cnn.parquet", "heterogeneity").to_pandas()
    (source / "heterogeneity/digits-cnn.parquet").unlink()
    store.write(source, "heterogeneity", rows.assign(value=0.9))
    release(source, tmp_path / "forged", "0.1.0")
    for _ in range(2):  # what does not follow is not noted
        [problem] = check.problems(tmp_path / "forged")
        assert "rows are not what other tables give" in problem


def test_what_follows_from_all_models_is_made_anew_where_a_byte_of_one_changed(
    source, tmp_path, made_anew
):
    root = Path(shutil.copytree(source, tmp_path / "tables"))
    times = []

    def board(folder, stored, times=times):
        times.append(folder)
        return stored

    def bound(folder, stored):
        return board(folder, stored)

    keys = {"stage": "init", "metric": "js0", "scale": "own_rms", "sigma": 0.05, "left_out": ""}
    row = keys | {"statistic": "spearman", "protocol_version": 1, "num_models": 1}
    store.write(root, "leaderboard", [row | {"num_families": 1}])
    for expected in (1, 1):
        assert differences(root, {"leaderboard": board}) == []
        assert len(times) == expected
    store.write(root, "gaps", [gap_row("digits-mlp", gap=0.3)], replace=True)
    assert differences(root, {"leaderboard": board}) == []
    assert len(times) == 2
    # Bound to what no table holds it is made anew each time.
    for expected, made_by in enumerate([partial(board), partial(board), bound, bound], 3):
        assert differences(root, {"leaderboard": made_by}) == []
        assert len(times) == expected


def test_what_is_of_all_models_is_never_noted_by_one(source, tmp_path):
    root, board = Path(shutil.copytree(source, tmp_path / "tables")), DERIVED["blocks"]
    for table in ("models", "spectra"):
        rows = store.read(root / table / "digits-cnn.parquet", table).to_pandas()
        store.write(root, table, rows.assign(model="all"))
    path = root / "leaderboard" / "all.parquet"
    before = followed.note_of(root, path, board)
    store.write(root, "gaps", [gap_row("digits-mlp", gap=0.3)], replace=True)
    assert followed.note_of(root, path, board) != before


def test_code_that_changed_finds_out_again(tmp_path, made_anew, monkeypatch):
    release(write_tables(tmp_path / "tables", ["digits-cnn"]), tmp_path / "data", "0.1.0")
    check.problems(tmp_path / "data")
    monkeypatch.setattr(followed, "_code", lambda package: ["another"])
    assert check.problems(tmp_path / "data") == []
    assert sorted(made_anew) == ["heterogeneity"] * 2 + ["stages"] * 2


@pytest.mark.parametrize("cache", ["file", "n" * 300])
def test_a_cache_that_can_not_be_used_is_none(tmp_path, made_anew, monkeypatch, cache):
    """A file in its place; a name that no file system takes, as a closed folder an OSError."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    release(write_tables(tmp_path / "tables", ["digits-cnn"]), tmp_path / "data", "0.1.0")
    for _ in range(2):
        assert check.problems(tmp_path / "data") == []
    assert sorted(made_anew) == ["heterogeneity"] * 2 + ["stages"] * 2
