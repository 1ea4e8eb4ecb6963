"""The entries that the stages take, and the data that they need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from harness import tasks
from harness.errors import UserError
from harness.registry import ModelEntry, entries, get
from harness.tasks.sources import ENVIRONMENT, resolve_root
from harness.training import Problem, load_problem

REHEARSAL = Path(__file__).parent / "rehearsal"  # a registry of one tiny entry
TINY = "tiny-gpt"
# Samples of the paper's batches, all that the sample of ImageNet has; in this order they gain most
# over the batches of the dataset.
PAPER = {
    "vit-base-imagenet": 1000,
    "gpt2-books": 480,
    "resnet18-imagenet": 1000,
    "gpt2-nano-shakespeare": 640,
    "bert-cornell": 327,
}
# What is read of the data sets, below their root; of Parquet files of images the first ones.
_TEXTS = (
    "books/kjv_bible.txt",
    "books/pride_and_prejudice.txt",
    "books/war_and_peace.txt",
    "tinyshakespeare/input.txt",
    "gpt2_bpe/encoder.json",
    "gpt2_bpe/vocab.bpe",
)
_IMAGES = {"mnist": "mnist", "cifar10": "cifar10", "imagenet": "imagenet1k_sample"}


def find(name: str, *, rehearse: bool) -> ModelEntry:
    """Return an entry of the registry, or of the rehearsal's."""
    return get(name, registry_dir=REHEARSAL if rehearse else None)


def load(name: str, *, batch_size: int | None = None, rehearse: bool) -> Problem:
    """Return an entry's problem at initialisation.

    Raises:
        UserError: Its data are not here.
    """
    return load_problem(find(name, rehearse=rehearse), batch_size=batch_size)


def split(problem: Problem, size: int) -> Problem:
    """Return a problem in microbatches of at most so many samples."""
    return problem.on(tasks.split(problem.whole, size))


def gather(folder: Path) -> None:
    """Copy what the stages read of the data sets, as few images as the entries take.

    BERT's dialogue is left out: 30 MB for one entry.

    Raises:
        UserError: There is no root of data sets, or a file is not in it.
    """
    root = resolve_root(None)
    if root is None:
        raise UserError(f"set {ENVIRONMENT} to the folder of the data sets")
    for name in _TEXTS:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
    for task, place in _IMAGES.items():
        for source in sorted((root / place).glob("*.parquet")):
            target = folder / place / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            table = pq.read_table(source)
            named = (e.task_options.get(f"{source.stem}_size") for e in entries() if e.task == task)
            most = max(filter(None, named), default=table.num_rows)
            pq.write_table(table.slice(0, most), target, compression="zstd")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {folder}")
