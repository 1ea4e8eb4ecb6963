from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from spectra_db import check, manifest, store, verified
from spectra_db.loading import BUNDLED
from spectra_db.manifest import InvalidRelease
from spectra_db.release import release
from spectra_db.schema import TABLES
from spectra_db.store import InvalidTable

from .synthetic import gap_row, model_row, write_tables


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = write_tables(tmp_path_factory.mktemp("tables"))
    (root / "checkpoints" / "digits-cnn").mkdir(parents=True)
    (root / "checkpoints" / "digits-cnn" / "final.safetensors").write_bytes(b"weights")
    return root


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "data"
    release(source, folder, "0.1.0", notes=["First."])
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "data"))


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def seal(folder):
    """Bring the manifest up to date with what was changed on purpose."""
    known = manifest.read(folder)
    files = {
        path: manifest.describe(folder / path, file.rows)
        for path, file in known.files.items()
        if (folder / path).exists()
    }
    manifest.write(folder, manifest.Manifest(known.version, 1, files))


def test_a_release_is_sound_and_holds_tables_card_changelog_and_manifest_alone(folder):
    assert check.problems(folder) == []
    names = {p.relative_to(folder).parts[0] for p in folder.rglob("*")}
    tables = set(TABLES) - {"leaderboard", "blocks", "trials", "speedups", "predictors"}
    assert names == tables | {"README.md", "CHANGELOG.md", "manifest.json"}
    assert not list(folder.rglob(".*"))


def test_the_same_tables_make_the_same_bytes(source, folder, tmp_path):
    release(source, tmp_path / "again", "0.1.0", notes=["First."])
    assert bytes_of(tmp_path / "again") == bytes_of(folder)


def test_a_release_of_itself_changes_nothing(folder):
    before = bytes_of(folder)
    release(folder, folder, "0.1.0")
    assert bytes_of(folder) == before


def test_rows_survive_a_release(source, folder):
    for path in source.glob("*/*.parquet"):
        table = path.parent.name
        ours = store.read(folder / table / path.name, table)
        assert ours.equals(store.read(path, table)), path


def test_floats_are_written_smaller_than_with_dictionaries(source, folder):
    path = folder / "spectra" / "digits-cnn.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column
    encodings = {column(i).path_in_schema: column(i).encodings for i in range(38)}
    assert "BYTE_STREAM_SPLIT" in encodings["nodes.list.element"]
    assert "RLE_DICTIONARY" in encodings["block"]
    pq.write_table(store.read(path, "spectra"), folder / "plain.parquet", compression="zstd")
    assert path.stat().st_size < (folder / "plain.parquet").stat().st_size


def test_models_that_are_not_asked_for_stay_out(source, tmp_path):
    made = release(source, tmp_path / "data", "0.1.0", models=["digits-cnn"])
    assert made.models() == ["digits-cnn"]
    assert not list((tmp_path / "data").rglob("digits-mlp*"))
    with pytest.raises(InvalidRelease, match="no model to release"):
        release(source, tmp_path / "none", "0.1.0", models=["vgg"])


def test_derived_tables_are_made_of_what_is_released(source, tmp_path):
    def derive(tables):
        [path] = (tables / "models").glob("*.parquet")
        keys = {"stage": "init", "metric": "js0", "scale": "own_rms", "sigma": 0.05}
        row = keys | {"statistic": "spearman", "protocol_version": 1, "value": 0.5}
        more = {name: "" for name in TABLES["leaderboard"].names if name == "left_out"}
        counts = {"num_models": 1, "num_families": 1}
        assert path.stem == "digits-cnn"
        store.write(tables, "leaderboard", [row | counts | more])

    folder = tmp_path / "data"
    made = release(source, folder, "0.1.0", models=["digits-cnn"], derive=derive)
    assert made.rows()["leaderboard"] == 1
    assert check.problems(folder) == []
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert [c["config_name"] for c in header["configs"] if c.get("default")] == ["leaderboard"]


def older(path: Path) -> None:
    """Take the columns away that came with 0.13.0."""
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["product", "product_error"]), path)


def test_files_of_a_table_have_the_same_columns_in_a_release_though_some_are_older(
    source, tmp_path
):
    copy = shutil.copytree(source, tmp_path / "copy")
    older(copy / "spectra" / "digits-cnn.parquet")
    release(copy, tmp_path / "data", "0.1.0", derive=lambda tables: None)
    one, other = (tmp_path / "data" / "spectra" / f"digits-{m}.parquet" for m in ("cnn", "mlp"))
    assert pq.read_schema(one).equals(pq.read_schema(other))
    assert pq.read_table(one)["product"].null_count == pq.read_metadata(one).num_rows
    assert check.problems(tmp_path / "data") == []

    older(copy / "spectra" / "digits-mlp.parquet")  # no file has them: none gets them
    release(copy, tmp_path / "again", "0.1.0", derive=lambda tables: None)
    path = tmp_path / "again" / "spectra" / "digits-mlp.parquet"
    assert "product" not in pq.read_schema(path).names

    older(other)
    seal(tmp_path / "data")
    assert "other columns than digits-cnn.parquet" in "".join(check.problems(tmp_path / "data"))


def test_the_leaderboard_of_other_models_is_not_released(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "leaderboard").mkdir(exist_ok=True)
    (copy / "leaderboard" / "leaderboard.csv").write_text("of other models")
    made = release(copy, tmp_path / "data", "0.1.0", derive=lambda tables: None)
    assert not [path for path in made.files if path.startswith("leaderboard/")]
    assert check.problems(tmp_path / "data") == []


def test_an_invalid_table_stops_the_release_and_leaves_the_old_one(source, folder, tmp_path):
    before = bytes_of(folder)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "spectra" / "digits-mlp.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InvalidTable, match=r"digits-mlp\.parquet: not readable"):
        release(copy, folder, "0.2.0")
    assert bytes_of(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "data"]


def test_only_a_release_is_replaced(source, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InvalidRelease, match=r"holds chapter\.tex; name an empty folder"):
        release(source, tmp_path / "thesis", "0.1.0")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("version", ["1", "v0.1.0", "0.1", "0.01.0", "0.1.0-rc1", "1.0.0\n", ""])
def test_versions_have_three_numbers(source, tmp_path, version):
    with pytest.raises(InvalidRelease, match=r"is not like 1\.2\.3"):
        release(source, tmp_path / "data", version)


def test_versions_do_not_go_down(source, folder):
    release(source, folder, "0.10.0")
    with pytest.raises(InvalidRelease, match=r"is version 0\.10\.0; 0\.9\.0 is lower"):
        release(source, folder, "0.9.0")


def test_the_changelog_gets_a_section_per_version_the_newest_first(source, tmp_path):
    folder = tmp_path / "data"
    release(source, folder, "0.1.0", models=["digits-cnn"], notes=["First."])
    release(source, folder, "0.2.0", notes=["More."])
    for _ in range(2):
        release(source, folder, "0.2.0", notes=["And better."])
    text = (folder / "CHANGELOG.md").read_text()
    first, second = text.index("## 0.2.0 ("), text.index("## 0.1.0 (")
    assert first < text.index("- More.") < text.index("- New models: digits-mlp.")
    assert text.index("- And better.") < text.index("- Holds 2 models") < second
    assert second < text.index("- First.") < text.index("- Holds 1 models")
    assert text.count("## ") == 2
    assert text.count("And better.") == 1


def test_the_note_on_verified_models_is_bound_to_the_new_files(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    path = copy / "spectra" / "digits-cnn.parquet"
    pq.write_table(pq.read_table(path), path)  # other bytes, the same rows
    extent = verified.Extent(2, 12, 1, 1)
    verified.mark(copy, {"digits-cnn": extent, "digits-mlp": extent}, ())
    gap = store.read(copy / "gaps" / "digits-mlp.parquet", "gaps").to_pandas()
    store.write(copy, "gaps", gap.assign(gap=0.5))
    release(copy, tmp_path / "data", "0.1.0")
    assert verified.verified_models(tmp_path / "data") == {"digits-cnn": extent}
    assert str(extent) == "2 of 12 rows, 1 of 1 runs"


@pytest.mark.parametrize(
    "note", ["{", "[1]", '{"digits-cnn": 3}', '{"../x": {"tables_sha256": ""}}']
)
def test_a_damaged_note_counts_as_none(source, tmp_path, note):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "verified.json").write_text(note)
    release(copy, tmp_path / "data", "0.1.0")
    assert check.problems(tmp_path / "data") == []


def test_a_model_without_its_row_is_refused(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    path = copy / "models" / "digits-cnn.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InvalidTable, match="one per model"):
        release(copy, tmp_path / "data", "0.1.0")


def test_a_release_can_be_made_in_the_working_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release(source, Path("data"), "0.1.0")
    monkeypatch.chdir(tmp_path / "data")
    release(Path(), Path(), "0.2.0")
    assert check.problems(tmp_path / "data") == []


def change_row(path, table, **changes):
    rows = store.read(path, table).to_pandas().assign(**changes)
    schema = TABLES[table]
    pq.write_table(store.pa.Table.from_pandas(rows, schema, preserve_index=False), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "gaps/digits-cnn.parquet").write_bytes(b"x"), "not the file that the mani"),
        (lambda f: (f / "gaps/digits-cnn.parquet").unlink(), "lists it, it is not there"),
        (lambda f: (f / "gaps/extra.parquet").write_bytes(b"x"), "the manifest does not list it"),
        (lambda f: (f / "secret.txt").write_text("x"), "secret.txt: the manifest does not list it"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json, so it is no release"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: Expecting"),
        (lambda f: (f / "spectra/a.parquet").symlink_to("/etc/passwd"), "a link; a release holds"),
    ],
)
def test_what_is_spoilt_is_named(folder, spoil, message):
    spoil(folder)
    assert message in "\n".join(check.problems(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "runs"), "rows that table runs does not have"),
        (lambda f: shutil.rmtree(f / "stages"), "rows that table stages does not have"),
        (lambda f: shutil.rmtree(f / "spectra"), "rows that table spectra does not have"),
        (lambda f: (f / "README.md").write_text("# Mine"), "not the card of these tables"),
        (lambda f: shutil.rmtree(f / "models"), "no table models"),
        (lambda f: (f / "models/digits-cnn.parquet").unlink(), "has no model digits-cnn"),
        (lambda f: (f / "CHANGELOG.md").unlink(), "CHANGELOG.md: a release has one"),
    ],
)
def test_what_does_not_fit_together_is_named_though_the_manifest_agrees(folder, spoil, message):
    spoil(folder)
    seal(folder)
    assert message in "\n".join(check.problems(folder))


def test_rows_are_checked_even_where_the_manifest_agrees(folder):
    path = folder / "training" / "digits-cnn.parquet"
    change_row(path, "training", step=0)
    seal(folder)
    [problem] = check.problems(folder)
    assert "training/digits-cnn.parquet: the key of row 1 repeats an earlier one" in problem


def test_other_protocols_are_refused(folder):
    change_row(folder / "gaps" / "digits-cnn.parquet", "gaps", protocol_version=2)
    seal(folder)
    assert "protocol versions [2]" in "\n".join(check.problems(folder))
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {"protocol_version": 2}))
    [problem] = check.problems(folder)
    assert "manifest.json: protocol 2; this code reads 1 alone" in problem


@pytest.mark.parametrize(
    "path",
    ["../../x", "/etc/passwd", "spectra/../../x.parquet", "spectra/.hidden.parquet", "spectra/x",
     "tables/x.parquet", "spectra/a/b.parquet", "spectra\\x.parquet", "spectra/X.parquet", ""],
)  # fmt: skip
def test_a_manifest_names_files_of_a_release_alone(folder, path):
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][path] = {"sha256": "0" * 64, "bytes": 1, "rows": 1}
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InvalidRelease, match="is no file of a release"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "entry",
    [{}, {"sha256": "0" * 63, "bytes": 1}, {"sha256": "0" * 64, "bytes": -1}, {"sha256": 0},
     {"sha256": "0" * 64, "bytes": True}, {"sha256": "0" * 64, "bytes": 1, "rows": 0.5},
     {"sha256": "0" * 64, "bytes": 1, "more": 1}, None, 3, []],
)  # fmt: skip
def test_an_entry_of_a_manifest_is_well_formed(folder, entry):
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["README.md"] = entry
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InvalidRelease, match=r"manifest\.json: README\.md: "):
        manifest.read(folder)


def later(folder, tmp_path, version, **changes):
    """Make the next version, with changed tables."""
    new = tmp_path / "new"
    shutil.copytree(folder, new)
    for table, rows in changes.items():
        store.write(new, table, rows)
    release(new, new, version)
    return new


def test_a_version_follows_another_by_what_changed(folder, tmp_path):
    more = {"models": [model_row("digits-vit")], "gaps": [gap_row("digits-vit")]}
    new = later(folder, tmp_path, "0.1.1", **more)
    assert "has new models (digits-vit); that takes a MINOR version" in "\n".join(
        check.problems(new, folder)
    )
    release(new, new, "0.2.0")
    assert check.problems(new, folder) == []


def test_no_row_is_lost_but_by_a_major_version(source, folder, tmp_path):
    new = tmp_path / "new"
    release(source, new, "0.2.0", models=["digits-cnn"])
    found = "\n".join(check.problems(new, folder))
    assert "spectra: 12 rows of 0.1.0 are lost" in found
    assert "'model': 'digits-mlp'" in found
    release(new, new, "1.0.0")
    assert check.problems(new, folder) == []


def test_a_changed_release_needs_another_version(folder, tmp_path):
    new = later(folder, tmp_path, "0.1.0", gaps=[gap_row("digits-cnn", gap=0.9)])
    assert "version 0.1.0 does not follow 0.1.0" in "\n".join(check.problems(new, folder))


def test_a_large_release_is_refused(folder, monkeypatch):
    monkeypatch.setattr(check, "MAX_BYTES", 1000)
    assert "a release has at most" in "\n".join(check.problems(folder))


def scaled(column, factor, **only):
    def change(rows):
        mine = np.logical_and.reduce([rows[name] == value for name, value in only.items()])
        rows[column] = [x * factor if m else x for x, m in zip(rows[column], mine, strict=True)]
        return rows

    return change


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("heterogeneity", scaled("value", 1.5, metric="js0"), "10 rows are not what other tables"),
        ("heterogeneity", scaled("standard_error", 0.5, metric="w1"), "standard_error"),
        ("heterogeneity", lambda rows: rows.assign(batch_size=4096), "batch_size"),
        ("spectra", scaled("nodes", 1.1, stage="init"), "6 rules are not those of their alphas"),
        ("stages", scaled("loss", 0.5, stage="final"), "loss 0.2, made anew 0.4"),
    ],
)
def test_what_other_tables_do_not_give_is_found_though_all_hashes_are_right(
    tmp_path, table, change, message
):
    source, out = write_tables(tmp_path / "tables", ["digits-cnn"]), tmp_path / "data"
    path = source / table / "digits-cnn.parquet"
    rows = store.read(path, table).to_pandas()
    path.unlink()
    store.write(source, table, change(rows))
    release(source, out, "0.1.0")
    found = "\n".join(check.problems(out))
    assert f"{table}/digits-cnn.parquet: " in found
    assert message in found


def test_a_table_whose_rows_are_not_counted_is_refused(tmp_path):
    out = tmp_path / "data"
    release(write_tables(tmp_path / "tables", ["digits-cnn"]), out, "0.1.0")
    path = out / manifest.NAME
    content = json.loads(path.read_text())
    content["files"]["spectra/digits-cnn.parquet"]["rows"] = None
    path.write_text(json.dumps(content))
    [problem] = check.problems(out)
    assert "spectra/digits-cnn.parquet: a table's file has a count of rows" in problem


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
def test_the_bundled_release_is_sound():
    # What follows from other tables, which takes longer: tests/harness/cli/test_dataset.py.
    assert check.problems(BUNDLED, derived={}) == []


def test_the_card_lists_every_column_with_type_unit_and_meaning(folder):
    card = (folder / "README.md").read_text()
    sections = {part.split("\n", 1)[0]: part for part in card.split("### Table ")[1:]}
    for table, section in sections.items():
        lines = [line for line in section.splitlines() if line.startswith("| `")]
        assert len(lines) == len(TABLES[table])
        for field, line in zip(TABLES[table], lines, strict=True):
            name, kind, unit, meaning = (cell.strip() for cell in line.split(" | "))
            assert name == f"| `{field.name}`"
            assert ("may be null" in kind) == field.nullable
            assert unit == field.metadata.get(b"unit", b"").decode()
            assert meaning.removesuffix(" |").replace(r"\|", "|") == (
                field.metadata[b"description"].decode()
            )


def test_text_of_others_is_no_markdown_and_no_header_of_the_card(source, tmp_path):
    hostile = "gone\n---\nlicense: mit\n# Mine\n| a | ![x](http://t/x.png) <script>1</script> `"
    tables = Path(shutil.copytree(source, tmp_path / "tables"))
    store.write(tables, "models", [model_row("hostile", status="failed", reason=hostile)])
    release(tables, tmp_path / "data", "0.1.0")
    card = (tmp_path / "data" / "README.md").read_text()
    [line] = [line for line in card.splitlines() if "`hostile`" in line]
    assert line == (
        r"- `hostile`: gone --- license: mit \# Mine \| a \| !\[x\](http://t/x.png) "
        r"\<script\>1\</script\> \`"
    )
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-4.0"


def test_the_card_tells_the_hub_one_config_per_table(folder):
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    configs = {c["config_name"]: c for c in header["configs"]}
    assert set(configs) == {p.name for p in folder.iterdir() if p.is_dir()}
    for name, config in configs.items():
        assert config["data_files"] == [{"split": "train", "path": f"{name}/*.parquet"}]


def test_the_card_names_the_terms_of_the_data(folder):
    assert "| digits | Optical recognition" in (folder / "README.md").read_text()
    assert "CC BY 4.0" in (folder / "README.md").read_text()


def test_pandas_reads_what_was_released(folder):
    rows = pd.read_parquet(folder / "gaps" / "digits-cnn.parquet")
    assert rows["gap"].tolist() == [0.2]
