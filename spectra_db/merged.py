"""Tables of a release merged for the Hub: one file per table, and an overview of the models."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from spectra_db import store
from spectra_db.derived import standard
from spectra_db.files import whole
from spectra_db.heterogeneity import is_leading
from spectra_db.schema import TABLES

FOLDER, OVERVIEW = "merged", "overview"
PICTURE = "merged/spectra.png"
_GAPS = {
    "sgd_loss": "sgd_loss",
    "adam_loss": "adam_loss",
    "gap_from_reference": "gap",
    "gap_from_reference_error": "gap_error",
    "trained": "trained",
    "adam_needed_now": "adam_needed",
}
_SPEEDUPS = {"log2_speedup": "log2_speedup", "standard_error": "log2_speedup_error"}


def names(folder: Path) -> list[str]:
    """Return the tables that a folder holds merged, the overview first; none where it has none."""
    return [name for name in (OVERVIEW, *TABLES) if path_of(folder, name).exists()]


def path_of(folder: Path, name: str) -> Path:
    """Return the path of a merged table."""
    return folder / FOLDER / f"{name}.parquet"


def write(folder: Path) -> None:
    """Write the merged tables of a folder of tables, and the picture of its card, beside them.

    A model is a row group, so that a filter by model reads little of a remote file.
    """
    (folder / FOLDER).mkdir()
    for name, content in make(folder).items():
        with whole(path_of(folder, name)) as part:
            _write_groups(part, content, by_model=name not in (OVERVIEW, "leaderboard"))
    _draw(folder)


def _write_groups(path: Path, content: pa.Table, *, by_model: bool) -> None:
    """Write a table, of which each model's rows are a group; or all are one."""
    models = content["model"].to_pandas() if by_model else None
    sizes = [len(content)] if models is None else models.groupby(models).size()
    with pq.ParquetWriter(path, content.schema, **store.encoding(content.schema)) as writer:
        start = 0
        for size in sizes:
            writer.write_table(content.slice(start, size))
            start += size


def make(folder: Path) -> dict[str, pa.Table]:
    """Return the merged tables of a folder of tables by name, sorted by model."""
    found = {OVERVIEW: pa.Table.from_pandas(overview(folder), preserve_index=False)}
    for table in TABLES:
        paths = sorted((folder / table).glob("*.parquet"))
        if paths:
            found[table] = pa.concat_tables([store.read(path, table) for path in paths])
    return found


def overview(folder: Path) -> pd.DataFrame:
    """Return a row per model: what it is, its measures at initialisation, what Adam gained.

    Measures are at the scale that they lead with, and of partition `weights`, or of `paper` where
    that alone is there: column `partition` says which, and they don't compare. Null is what is not
    known.
    """
    models = _rows(folder, "models")
    shown = models[["model", "family", "tier", "task", "num_params", "num_blocks", "status"]]
    measures = _rows(folder, "heterogeneity")
    measures = measures[(measures["stage"] == "init") & is_leading(measures)]
    measures = measures.sort_values(["model", "partition"], ascending=[True, False])
    first = measures.drop_duplicates("model").set_index("model")["partition"]
    measures = measures[measures["partition"] == measures["model"].map(first)]
    value = measures["corrected"].fillna(measures["value"])
    wide = measures.assign(value=value).pivot_table(
        index="model", columns="metric", values="value", aggfunc="first"
    )
    js0 = measures[measures["metric"] == "js0"].drop_duplicates("model").set_index("model")
    wide.insert(0, "partition", first)
    wide["js0_error"] = js0["standard_error"]
    for table, columns in (("gaps", _GAPS), ("speedups", _SPEEDUPS)):
        rows = _rows(folder, table)
        rows = rows[rows["status"] == "ok"].set_index("model")[[*columns]].rename(columns=columns)
        wide = wide.join(rows, how="outer")
    return shown.join(wide, on="model").sort_values("model", ignore_index=True)


def _rows(folder: Path, table: str) -> pd.DataFrame:
    parts = [store.read(path, table) for path in sorted((folder / table).glob("*.parquet"))]
    return pa.concat_tables(parts or [TABLES[table].empty_table()]).to_pandas()


def example(folder: Path) -> str:
    """Return the model that card and picture show: the first with a spectrum at initialisation."""
    for path in sorted((folder / "spectra").glob("*.parquet")):
        rows = store.read(path, "spectra", columns=["stage", "status"]).to_pandas()
        if (rows["stage"].eq("init") & rows["status"].eq("ok")).any():
            return path.stem
    return ""


def _draw(folder: Path) -> None:
    """Draw the spectra of a few blocks of the example."""
    from spectra_db import plot

    if model := example(folder):
        rows = store.read(store.path_of(folder, "spectra", model), "spectra").to_pandas()
        rows = rows[(rows["stage"] == "init") & rows["status"].eq("ok")]
        rows = standard(rows[rows["partition"] == rows["partition"].max()])
        blocks = rows["block"].unique()[:8]
        plot.spectra(rows[rows["block"].isin(blocks)]).savefig(folder / PICTURE)
