"""The dataset card: the README of a release, written from its tables and their schemas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from spectra_db import merged, project, store
from spectra_db.heterogeneity import METRICS
from spectra_db.schema import KEYS, PROTOCOL_VERSION, TABLES

if TYPE_CHECKING:
    from jinja2 import Environment

# The order of the card and of the Hub's menu, the default first.
_TABLES = {
    "leaderboard": "What predicts the SGD-Adam gap: statistics over models, derived from the rest",
    "heterogeneity": "How much the spectra of a model's blocks differ, in several measures",
    "spectra": "A probe's quadrature rule of a block, an exact spectrum, or why there is none",
    "blocks": "Sizes, moments and extreme eigenvalues of the blocks",
    "gaps": "How far SGD falls behind AdamW after few steps: protocol 1, not ranked",
    "speedups": "How many times as many steps SGD needs for AdamW's loss: protocol 2",
    "trials": "The training runs of protocol 2",
    "predictors": "What is measured at initialisation to predict the speed-up of AdamW over SGD",
    "training": "Losses and scores of the training runs",
    "stages": "The checkpoints that spectra were taken at",
    "models": "The models",
    "runs": "The runs that made the spectra",
}
_BOOKS = (
    "King James Bible; War and Peace; Pride and Prejudice",
    "public domain in the United States",
)
# Data and terms by task; terms as their distributors or papers state them.
TASKS = {
    "digits": ("Optical recognition of handwritten digits, from scikit-learn", "CC BY 4.0 (UCI)"),
    "pydoc": ("Python's documentation, from CPython", "PSF licence"),
    "mnist": ("MNIST (LeCun, Cortes, Burges)", "often given as CC BY-SA 3.0"),
    "mnist-barcodes": (
        "MNIST (LeCun, Cortes, Burges), with barcodes as in Kunstner et al. 2024",
        "often given as CC BY-SA 3.0",
    ),
    "cifar10": (
        "CIFAR-10 (Krizhevsky 2009), recompressed as JPEG",
        "no formal licence; cite the report",
    ),
    "imagenet": ("ImageNet, ILSVRC-2012", "non-commercial research and education"),
    "gaussian-classes": ("Gaussian inputs drawn by the harness", "none needed"),
    "tiny-shakespeare": ("Tiny Shakespeare (Karpathy)", "text in the public domain"),
    "books": _BOOKS,
    "masked-books": _BOOKS,
    "cornell": (
        "Cornell Movie-Dialogs Corpus (Danescu-Niculescu-Mizil, Lee 2011)",
        "free for research; cite it",
    ),
    "wikitext": ("WikiText-2", "CC BY-SA 3.0"),
    "openwebtext": ("OpenWebText", "CC0; the texts are their authors'"),
    "sft": ("Dolly, Alpaca, AlpacaEval", "CC BY-SA 3.0; CC BY-NC 4.0; CC BY-NC 4.0"),
}
_UNKNOWN = ("see the entry", "not recorded here")


def render(folder: Path, version: str) -> str:
    """Return the card of the tables in a folder; merged ones make it the Hub's page."""
    paths = {table: sorted((folder / table).glob("*.parquet")) for table in _TABLES}
    models = pd.concat(
        [store.read(path, "models").to_pandas() for path in paths["models"]], ignore_index=True
    )
    rows = {
        table: sum(pq.read_metadata(path).num_rows for path in some)
        for table, some in paths.items()
        if some
    }
    computed = models[models["status"] == "ok"]
    with_spectra = [path.stem for path in paths["spectra"]]
    of_hub = merged.names(folder)
    configs = {name: f"{name}/*.parquet" for name in rows}
    if of_hub:
        configs = {name: f"{merged.FOLDER}/{name}.parquet" for name in of_hub}
    template = _environment().get_template("hub.md.jinja" if of_hub else "card.md.jinja")
    return template.render(
        version=version,
        protocol_version=PROTOCOL_VERSION,
        num_models=len(computed),
        example=min(with_spectra, default="MODEL"),
        configs=configs,
        picture=merged.PICTURE,
        project=project,
        metrics=METRICS,
        size_category=_size_category(sum(rows.values())),
        tables=[_table(table, rows[table]) for table in rows],
        families=_families(computed),
        pending=models[models["status"] != "ok"].to_dict("records"),
        tasks=[(task, *TASKS.get(task, _UNKNOWN)) for task in sorted(computed["task"].unique())],
    )


def bibtex(version: str | None) -> str:
    """Return how to cite the dataset, of a version where it is known, and the paper."""
    template = _environment().get_template("cite.bib.jinja")
    return template.render(version=version, project=project)


def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["plain"] = plain
    return environment


def plain(text: str) -> str:
    r"""Return text that Markdown shows as it is: in one line, its marks escaped.

    By backslashes, as CommonMark 0.31, section 2.4. Text of entries and of tables is anybody's.

    >>> plain("<b>see\n[this](http://x)")
    '\\<b\\>see \\[this\\](http://x)'
    """
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _table(name: str, rows: int) -> dict[str, Any]:
    return {
        "name": name,
        "rows": rows,
        "description": _TABLES[name],
        "key": ", ".join(f"`{key}`" for key in KEYS[name]),
        "columns": [
            {
                "name": field.name,
                "type": _type(field.type),
                "nullable": field.nullable,
                "unit": field.metadata.get(b"unit", b"").decode(),
                "description": field.metadata[b"description"].decode().replace("|", r"\|"),
            }
            for field in TABLES[name]
        ],
    }


def _type(kind: pa.DataType) -> str:
    """Name a type as polars, DuckDB and `datasets` do."""
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    if pa.types.is_timestamp(kind):
        return "timestamp, UTC"
    return {"double": "float64"}.get(str(kind), str(kind))


def _families(models: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for (family, task), some in models.groupby(["family", "task"]):
        low, high = some["num_params"].min(), some["num_params"].max()
        params = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append({"family": family, "task": task, "models": len(some), "params": params})
    return rows


def _size_category(rows: int) -> str:
    """Return the Hub's word for a number of rows."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    return next((word for bound, word in bounds if rows < bound), "1M<n<10M")
