"""Files that are killed, damaged, hostile or random: refused by name, never torn, never a crash."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra_db import check, manifest, store
from spectra_db.diff import compare, removed
from spectra_db.manifest import InvalidRelease
from spectra_db.release import release
from spectra_db.schema import KEYS, PROTOCOL_VERSION, TABLES
from spectra_db.store import InvalidTable
from tests.processes import Process

from .synthetic import exact_row, gap_row, slq_row, write_tables

# The same command at every start: it writes blocks one by one, with what is there left alone.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from spectra_db import store
from tests.spectra_db.synthetic import slq_row
root = Path(sys.argv[1])
path = store.path_of(root, "spectra", "made-up")
done = set(store.read(path, "spectra")["block"].to_pylist()) if path.exists() else set()
print("started", flush=True)
for block in range(20):
    if f"layer{block}" not in done:
        starts = np.random.default_rng(block).standard_normal((3, 300))
        eigenvalues = np.arange(1.0, 301.0) * (block + 1)
        rows = [slq_row(eigenvalues, f"layer{block}", p, starts[p], 40) for p in range(3)]
        store.write(root, "spectra", rows)
"""


def start(folder, code, *arguments):
    """Start Python code that says when it has begun."""
    code = f"import sys\nsys.argv[1:] = {[str(a) for a in arguments]}\n{code}"
    return Process([code], {}, folder)


def killed_after(process, seconds):
    """Kill a process some time after it has begun."""
    while not process.outputs[0].stat().st_size and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def test_writers_killed_at_random_moments_tear_no_file_and_end_with_the_same_rows(tmp_path):
    code, _, errors = start(tmp_path, WRITER, tmp_path / "reference").communicate()
    assert code == 0, errors
    expected = store.read(store.path_of(tmp_path / "reference", "spectra", "made-up"), "spectra")

    path = store.path_of(tmp_path / "killed", "spectra", "made-up")
    moments, counts = random.Random(0), [0]
    for _ in range(4):
        killed_after(start(tmp_path, WRITER, tmp_path / "killed"), moments.uniform(0.0, 0.4))
        if path.exists():
            rows = store.read(path, "spectra")
            counts.append(rows.num_rows)
            assert rows.num_rows % 3 == 0  # all probes of a block, or none
    assert counts == sorted(counts)  # what was written stays
    code, _, errors = start(tmp_path, WRITER, tmp_path / "killed").communicate()
    assert code == 0, errors
    assert store.read(path, "spectra").equals(expected)


RELEASE = """
import sys
from pathlib import Path
from spectra_db.release import release
print("started", flush=True)
while True:
    for version in ("0.1.0", "0.2.0"):
        release(Path(sys.argv[1]) / version, Path(sys.argv[2]), "0.2.0")
"""


def test_a_release_killed_at_a_random_moment_is_the_old_one_or_the_new_one(tmp_path):
    write_tables(tmp_path / "0.1.0", ["digits-cnn"])
    write_tables(tmp_path / "0.2.0", ["digits-cnn", "digits-mlp"])
    out, moments = tmp_path / "out" / "data", random.Random(1)
    release(tmp_path / "0.1.0", out, "0.2.0")
    for _ in range(3):
        killed_after(start(tmp_path, RELEASE, tmp_path, out), moments.uniform(0.0, 0.6))
        # Between two renames the old folder stands beside, whole.
        folder = out if out.exists() else next(out.parent.glob(".data.*.old/data"))
        assert check.problems(folder) == []
        if folder != out:
            folder.rename(out)


# Fuzz: in a process of its own, where a crash of the reader would show.
FUZZ = """
import random, sys
from pathlib import Path
from spectra_db import store
from spectra_db.store import InvalidTable
path, table = Path(sys.argv[1]), sys.argv[2]
good = path.read_bytes()
generator = random.Random(0)
refused = 0
for _ in range(500):
    bad = bytearray(good)
    kind = generator.randrange(4)
    if kind == 0:  # some bytes
        for _ in range(generator.randrange(1, 20)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
    elif kind == 1:  # the footer, which says where everything is
        for _ in range(generator.randrange(1, 8)):
            bad[-generator.randrange(1, min(len(bad), 3000))] = generator.randrange(256)
    elif kind == 2:
        del bad[generator.randrange(len(bad)):]
    else:
        at = generator.randrange(len(bad))
        bad[at:at] = generator.randbytes(generator.randrange(1, 64))
    path.write_bytes(bad)
    try:
        store.read(path, table).to_pandas()
    except InvalidTable as error:
        assert str(error).startswith(str(path)), error
        assert len(str(error)) < 2000
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("table", ["gaps", "spectra"])
def test_a_damaged_file_is_refused_by_name_or_read_and_never_crashes_the_reader(tmp_path, table):
    row = gap_row("made-up")
    if table == "spectra":
        row = slq_row(np.arange(50.0), "a", 0, np.ones(50), 5)
    store.write(tmp_path, table, [row])
    path = store.path_of(tmp_path, table, "made-up")
    code, output, errors = start(tmp_path, FUZZ, path, table).communicate()
    assert code == 0, errors
    assert int(output) > 500 / 4


def test_a_flipped_bit_is_refused_by_name_or_changes_no_number(tmp_path):
    starts = np.random.default_rng(0).standard_normal((3, 50))
    store.write(
        tmp_path, "spectra", [slq_row(np.arange(50.0), "a", p, starts[p], 8) for p in range(3)]
    )
    path = store.path_of(tmp_path, "spectra", "made-up")
    good, right = path.read_bytes(), store.read(path, "spectra")
    end = len(good) - 8 - int.from_bytes(good[-8:-4], "little")  # of the pages; metadata follow
    moments, refused = random.Random(0), 0
    places = [moments.randrange(4, end) for _ in range(150)]
    places += [moments.randrange(end, len(good)) for _ in range(50)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << moments.randrange(8)
        path.write_bytes(bad)
        found, refusal = attempt(lambda: store.read(path, "spectra"), InvalidTable)
        assert (found is None and str(path) in refusal) or found.equals(right), place
        refused += found is None
    assert refused > 100


def test_a_damaged_page_is_found_in_columns_that_are_not_asked_for(tmp_path):
    store.write(tmp_path, "gaps", [gap_row("made-up")])
    path = store.path_of(tmp_path, "gaps", "made-up")
    column = pq.read_metadata(path).row_group(0).column(2)
    assert column.path_in_schema == "gap"
    bad = bytearray(path.read_bytes())
    bad[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(bad)
    for read in (
        lambda: store.read(path, "gaps", columns=["num_seeds"]),
        lambda: compare(tmp_path, tmp_path, "gaps"),
    ):
        with pytest.raises(InvalidTable, match=r"made-up\.parquet: .*; put a whole copy there"):
            read()


def test_text_that_is_none_is_refused_by_name(tmp_path):
    schema = TABLES["gaps"]
    row = gap_row("made-up", reason="xx")
    store.write(tmp_path, "gaps", [row])
    path = store.path_of(tmp_path, "gaps", "made-up")
    bad = pa.array([b"\xff\xfe"]).view(pa.string())
    write_parquet(path, schema, reason=bad)
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: not readable as Parquet: .*UTF"):
        store.read(path, "gaps")
    out = tmp_path / "release"
    release(write_tables(tmp_path / "tables", ["digits-cnn"]), out, "0.1.0")
    for name in (manifest.CARD, manifest.CHANGELOG):
        (out / name).write_bytes(b"\xff\xfe")
    assert any(manifest.CARD in problem for problem in check.problems(out))
    with pytest.raises(InvalidRelease, match=r"CHANGELOG\.md: damaged, no UTF-8"):
        release(tmp_path / "tables", out, "0.2.0")


def write_parquet(path, schema, **columns):
    """Write a file with the schema's columns, some of them replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    good = store.read(path, path.parent.name) if path.exists() else schema.empty_table()
    for name, values in columns.items():
        good = good.set_column(good.schema.get_field_index(name), name, values)
    pq.write_table(good, path)
    return path


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("nodes", pa.array([[[1.0]]]), "column nodes is list<.*list<.*; it must be list<.*double"),
        ("nodes", pa.array(["1, 2"]), "column nodes is string"),
        ("nodes", pa.array([[1.0] * 10**6]), "nodes and weights differ in length"),
        ("nodes", pa.array([[1.0, None, 3.0]]), "holds a null, an infinity or nan"),
        ("nodes", pa.array([[1.0, float("inf"), 3.0]]), "holds a null, an infinity or nan"),
        ("weights", pa.array([[0.5, 0.6, -0.1]]), "a weight is negative"),
        ("weights", pa.array([[0.5, 0.3, 0.1]]), "do not sum to 1"),
        ("model", pa.array(["../../etc/passwd"]), "is no slug"),
        ("model", pa.array(["Made-Up"]), "is no slug"),
        ("model", pa.array(["another"]), "holds rows of model 'another', not 'made-up'"),
        ("protocol_version", pa.array([99], pa.int32()), "protocol versions .99."),
        ("status", pa.array(["fine"]), "unknown status"),
        ("num_params", pa.array([-1]), "num_params must be at least 1"),
        ("block", pa.array([None], pa.string()), "column block is null"),
        ("seconds", pa.array([float("nan")]), "column seconds is an infinity or nan"),
        ("method", pa.array(["guessed"]), "method must be slq or exact"),
        ("block", pa.array([b"\xff\xfe"]), "column block is binary"),
    ],
)
def test_hostile_values_are_refused_with_file_and_reason(tmp_path, column, values, message):
    store.write(tmp_path, "spectra", [exact_row(np.array([1.0, 2.0, 3.0]), "a")])
    path = write_parquet(
        store.path_of(tmp_path, "spectra", "made-up"), TABLES["spectra"], **{column: values}
    )
    with pytest.raises(InvalidTable, match=message) as caught:
        store.read(path, "spectra")
    assert str(caught.value).startswith(str(path))


def test_a_bomb_of_repeated_values_is_refused_before_it_is_unpacked(tmp_path):
    """150 million equal numbers take little on disk and 1.2 GB unpacked."""
    count = 150_000_000
    path = tmp_path / "spectra" / "made-up.parquet"
    path.parent.mkdir()
    table = pa.table({"nodes": pa.array(np.zeros(count // 100))})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(100):
            writer.write_table(table)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InvalidTable, match="columns of table spectra are not those"):
        store.read(path, "spectra")
    path.rename(tmp_path / "gaps.parquet")
    with pytest.raises(InvalidTable, match=r"unpacks to \d+ bytes; at most"):
        store._check_size(pq.read_metadata(tmp_path / "gaps.parquet"), tmp_path / "gaps.parquet")


# Properties


def attempt(call, error_type):
    """Return what a call returns, or None and the text of its refusal."""
    try:
        return call(), ""
    except error_type as error:
        return None, str(error)


SLUGS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,30}", fullmatch=True)
PATHS = st.lists(
    st.one_of(SLUGS, st.sampled_from(["..", ".", "", "~", "spectra", "gaps", "\0", "C:"])),
    min_size=1,
    max_size=4,
).map("/".join)


@given(st.one_of(PATHS, st.text(max_size=40), SLUGS.map("spectra/{}.parquet".format)))
@settings(deadline=None, max_examples=300)
def test_a_path_that_belongs_to_a_release_stays_in_it(path):
    if manifest.belongs(path):
        root = Path("/release")
        assert (root / path).resolve().is_relative_to(root)
        assert os.path.normpath(path) == path
        assert path.count("/") <= 1
        assert not Path(path).name.startswith(".")


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=300)
def test_a_model_names_a_file_in_its_table_or_none(model):
    root = Path("/data")
    path, refusal = attempt(lambda: store.path_of(root, "spectra", model), InvalidTable)
    if path is None:
        assert repr(model) in refusal
    else:
        assert path.parent == root / "spectra"
        assert manifest.belongs(path.relative_to(root).as_posix())


@given(st.tuples(*[st.integers(0, 10**8)] * 3), st.tuples(*[st.integers(0, 10**8)] * 3))
def test_versions_are_ordered_by_their_numbers(a, b):
    texts = [".".join(map(str, v)) for v in (a, b)]
    assert [manifest.version_of(t) for t in texts] == [a, b]
    assert (manifest.version_of(texts[0]) < manifest.version_of(texts[1])) == (a < b)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
NEARLY = st.fixed_dictionaries(
    {
        "version": st.sampled_from(["0.1.0", "1", None]),
        "protocol_version": st.sampled_from([PROTOCOL_VERSION, 2, "1", None]),
        "files": st.dictionaries(
            st.sampled_from(["README.md", "gaps/a.parquet", "../x", "/x", "gaps/../a.parquet"]),
            st.fixed_dictionaries(
                {"sha256": st.sampled_from(["0" * 64, "x", 1]), "bytes": st.integers(-1, 9)},
                optional={"rows": st.sampled_from([None, 1, -1, 1.5, True]), "more": JSON},
            ),
        ),
    }
)


@given(st.one_of(JSON, NEARLY))
@settings(deadline=None, max_examples=300)
def test_a_manifest_is_read_as_it_is_written_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / manifest.NAME).write_text(json.dumps(content))
    known, refusal = attempt(lambda: manifest.read(folder), InvalidRelease)
    if known is None:
        assert refusal.startswith(str(folder / manifest.NAME))
        return
    manifest.write(folder, known)
    assert manifest.read(folder) == known
    assert all(manifest.belongs(path) for path in known.files)


LOSSES = st.floats(0, 1e3, allow_nan=False)
RUNS = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3)), LOSSES, min_size=1, max_size=6
)


def write_runs(root, runs):
    common = {"optimizer": "sgd", "lr": 0.1, "seed": 0, "split": "train", "metric": "loss"}
    common |= {"diverged": False, "protocol_version": 1}
    store.write(
        root,
        "training",
        [common | {"model": m, "step": s, "value": v} for (m, s), v in runs.items()],
    )
    return root


@given(RUNS, RUNS)
@settings(deadline=None, max_examples=20)
def test_a_comparison_names_each_row_that_two_versions_do_not_share(tmp_path_factory, old, new):
    folder = tmp_path_factory.mktemp("diff")
    a, b = write_runs(folder / "a", old), write_runs(folder / "b", new)
    found = compare(a, b, "training")
    by_change = {
        change: set(zip(rows["model"], rows["step"], strict=True))
        for change, rows in found.groupby("change")
    }
    assert by_change.get("added", set()) == set(new) - set(old)
    assert by_change.get("removed", set()) == set(old) - set(new)
    moved = {k for k in set(old) & set(new) if old[k] != new[k]}
    assert by_change.get("changed", set()) | by_change.get("within", set()) == moved
    for k in moved:
        beyond = abs(old[k] - new[k]) > 1e-5 * max(old[k], new[k])
        assert (k in by_change.get("changed", set())) == beyond
    lost = removed(a, b).get("training", pd.DataFrame(columns=KEYS["training"]))
    assert set(zip(lost["model"], lost["step"], strict=True)) == set(old) - set(new)
    assert compare(a, a, "training").empty
