"""Language modelling on a stream of tokens: pydoc, tiny Shakespeare, books, WikiText, OpenWebText.

Each corpus can be read by characters, by words, by a byte-level BPE of its own or by that of GPT-2
(option `tokenizer`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import UserError
from harness.tasks import sources
from harness.tasks.base import Batch, Data, Task, check_sizes
from harness.tasks.tokenizers import BytePairs, make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Hold the raw text of a corpus.

    Attributes:
        train, test: the two splits.
        source, checksum: as in `Data`.
        vocabulary: the text that words or byte pairs are counted in; None means `train`.
    """

    train: str
    test: str
    source: str
    checksum: str
    vocabulary: str | None = None


@dataclass(frozen=True)
class TextTask(Task):
    """Predict the next token; a batch is (inputs, targets), both (B, context) int64.

    Attributes:
        context: tokens per sequence.
        tokenizer: "char" (the characters that the corpus has, or printable ASCII and one symbol
            for the rest), "word" (the `vocab_size` most frequent words), "bpe" (byte-level BPE of
            `vocab_size` ids trained on the corpus's own training text; `source` has its checksum)
            or "gpt2" (GPT-2's BPE).
        vocab_size: size of the vocabulary for "word" (None means 4,096) and "bpe" (2,048); fixed
            by the others.
    """

    context: int = 64
    tokenizer: str = "char"
    vocab_size: int | None = None

    metric: ClassVar[str] = "loss"
    causal: ClassVar[bool | None] = True
    alphabet: ClassVar[str] = "ascii"  # "own": the sorted characters of the corpus itself

    def __post_init__(self) -> None:
        check_sizes(self, context=1, vocab_size=1)

    @abstractmethod
    def corpus(self, root: Path | None) -> Corpus:
        """Read the text."""

    def read(self, root: Path | None) -> Data:
        """Tokenize the corpus into two streams (N,) of int64."""
        corpus = self.corpus(root)
        characters = "".join(sorted(set(corpus.train + corpus.test)))
        tokenizer = make_tokenizer(
            self.tokenizer,
            corpus.train if corpus.vocabulary is None else corpus.vocabulary,
            vocab_size=self.vocab_size,
            alphabet=characters if self.alphabet == "own" else None,
            root=root,
            task=self.name,
        )
        streams = [torch.from_numpy(tokenizer.encode(text)) for text in (corpus.train, corpus.test)]
        options = {"vocab_size": tokenizer.vocab_size, "context": self.context}
        source = corpus.source
        if isinstance(tokenizer, BytePairs):
            source += f", BPE of {tokenizer.vocab_size}, sha256 {tokenizer.checksum}"
        return Data((streams[0],), (streams[1],), source, corpus.checksum, options)

    def size(self, data: Data, split: str) -> int:
        """Count the windows of `context` tokens that do not overlap."""
        return max(0, (len(data.part(split)[0]) - 1) // self.context)

    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather non-overlapping windows by their number."""
        return self._windows(data, split, indices * self.context)

    def sample(self, data: Data, split: str, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` windows at uniformly random offsets, as nanoGPT does."""
        self._checked_size(data, split, size)
        last = len(data.part(split)[0]) - self.context
        return self._windows(data, split, torch.randint(last, (size,), generator=generator))

    def batches(self, data: Data, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield training batches at random offsets for ever."""
        while True:
            yield self.sample(data, "train", size, generator)

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Average the cross entropy over all tokens."""
        return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def num_terms(self, batch: Batch) -> int:
        """Count the tokens."""
        return batch[1].numel()

    def _windows(self, data: Data, split: str, starts: Tensor) -> Batch:
        tokens = data.part(split)[0][starts[:, None] + torch.arange(self.context + 1)]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Pydoc(TextTask):
    """Read the Python documentation that ships with CPython (`pydoc_data.topics`), real prose.

    Topics in alphabetical order; the first 90 % of the characters are the training split. The
    text differs between versions of Python (the checksum tells); the vocabulary does not.
    """

    name: ClassVar[str] = "pydoc"
    extent: ClassVar[str] = "about 0.5 MB of text, embedded"

    def corpus(self, root: Path | None) -> Corpus:
        """Join the topics of the running interpreter; no root is needed."""
        import platform
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
        source = f"CPython {platform.python_version()} pydoc_data.topics"
        return Corpus(*_cut(text), source, sources.sha256([text.encode()]))


@dataclass(frozen=True)
class TinyShakespeare(TextTask):
    """Read tiny Shakespeare with its own 65 characters; split 90 : 10 as in nanoGPT."""

    name: ClassVar[str] = "tiny-shakespeare"
    extent: ClassVar[str] = "1.1 MB of text"
    alphabet: ClassVar[str] = "own"

    def corpus(self, root: Path | None) -> Corpus:
        """Read `tinyshakespeare/input.txt`."""
        paths = ["tinyshakespeare/input.txt"]
        files = sources.find(root, *paths)
        if files is None:
            hint = "it is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn"
            raise sources.missing(self.name, root, paths, hint)
        return Corpus(*_cut(files[0].read_text("utf-8")), *sources.file_source(files))


BOOKS = ("kjv_bible", "war_and_peace", "pride_and_prejudice")


@dataclass(frozen=True)
class Books(TextTask):
    """Read three public-domain books (8.1 MB): the first 90 % of each for training.

    With fewer `titles` the vocabulary of words or byte pairs is still that of the training text of
    all three, so that a model pretrained on some can be fine-tuned on the others: a token means
    the same in both.

    Attributes:
        titles: which of the books to read: King James Bible, War and Peace, Pride and Prejudice.
    """

    titles: tuple[str, ...] = BOOKS

    name: ClassVar[str] = "books"
    extent: ClassVar[str] = "8.1 MB of text"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.titles if isinstance(self.titles, tuple) else ()
        if not given or not all(given.count(t) == 1 and t in BOOKS for t in given):
            raise UserError(
                f"task {self.name!r}: titles is {self.titles!r}; it must be a tuple of one or more "
                f"of {', '.join(BOOKS)}, each once"
            )

    def corpus(self, root: Path | None) -> Corpus:
        """Read the books that are asked for, and the others for the vocabulary."""
        paths = [f"books/{title}.txt" for title in BOOKS]
        files = sources.find(root, *paths)
        if files is None:
            raise sources.missing(self.name, root, paths, "any UTF-8 texts of these names will do")
        parts = {file.stem: _cut(file.read_text("utf-8")) for file in files}
        train, test = zip(*(parts[title] for title in self.titles), strict=True)
        used = [files[BOOKS.index(title)] for title in self.titles]
        note = "" if self.titles == BOOKS else "vocabulary of all three books"
        vocabulary = "\n".join(part[0] for part in parts.values())
        return Corpus(
            "\n".join(train), "\n".join(test), *sources.file_source(used, note), vocabulary
        )


@dataclass(frozen=True)
class WikiText(TextTask):
    """Read WikiText-2; the data pack lacks its train split, so `valid` trains there and says so."""

    tokenizer: str = "gpt2"

    name: ClassVar[str] = "wikitext"
    extent: ClassVar[str] = "2.4 MB of text, or the Hub's 13 MB"

    def corpus(self, root: Path | None) -> Corpus:
        """Read `wikitext2/`, or the real splits from the Hub."""
        if files := sources.find(root, "wikitext2/train.txt", "wikitext2/test.txt"):
            note = ""
        elif files := sources.find(root, "wikitext2/valid.txt", "wikitext2/test.txt"):
            note = "trained on the validation split"
        else:
            repo, paths = "Salesforce/wikitext", ["wikitext2/train.txt", "wikitext2/test.txt"]

            def read(load: Callable[..., Any]) -> list[str]:
                splits = ("train", "test")
                return ["".join(load("wikitext-2-v1", split=split)["text"]) for split in splits]

            (train, test), source = sources.from_hub(self.name, root, paths, repo, read)
            return Corpus(train, test, source, sources.sha256([train.encode(), test.encode()]))
        train, test = (file.read_text("utf-8") for file in files)
        return Corpus(train, test, *sources.file_source(files, note))


@dataclass(frozen=True)
class OpenWebText(TextTask):
    """Read OpenWebText: `openwebtext/train.txt`, or the first `documents` of the Hub's.

    Attributes:
        documents: how many documents to read of the Hub (8 million of them are too many here).
    """

    tokenizer: str = "gpt2"
    context: int = 1_024
    documents: int = 2_000

    name: ClassVar[str] = "openwebtext"
    extent: ClassVar[str] = "2,000 documents of the Hub"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, documents=1)

    def corpus(self, root: Path | None) -> Corpus:
        """Read the text; the first 90 % train."""
        paths, repo = ["openwebtext/train.txt"], "Skylion007/openwebtext"
        if files := sources.find(root, *paths):
            return Corpus(*_cut(files[0].read_text("utf-8")), *sources.file_source(files))

        def read(load: Callable[..., Any]) -> str:
            rows = load(split="train", streaming=True).take(self.documents)
            return "\n".join(row["text"] for row in rows)

        text, source = sources.from_hub(self.name, root, paths, repo, read)
        source += f", first {self.documents} documents"
        return Corpus(*_cut(text), source, sources.sha256([text.encode()]))


def _cut(text: str) -> tuple[str, str]:
    """Split a text into its first 90 % and its last 10 % of characters."""
    return text[: (at := int(0.9 * len(text)))], text[at:]
