"""Masked language modelling: on film dialogue by words, on books by byte pairs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import UserError
from harness.tasks import sources
from harness.tasks.base import IGNORED, Batch, Data, check_sizes
from harness.tasks.text import BOOKS, Books
from harness.tasks.tokenizers import BytePairs, Words
from harness.tasks.tokens import SomeTokens

# BERT's: of the chosen words 80 % become the mask, 10 % a random word, 10 % stay (Devlin et al.).
MASKED, REPLACED = 0.8, 0.1
FIRST_TEST_MOVIE = 555  # movies m0 to m554 train, m555 to m616 test: by movie, not by line


@dataclass(frozen=True)
class MaskedTask(SomeTokens):
    """Guess the masked tokens of sequences; a batch is (inputs, targets), both (B, context) int64.

    Targets are -100 where no token was chosen. In each sequence round(mask_fraction * context) of
    the tokens are chosen, at least one; special ones never are. A split is sequences (N, context).

    Attributes:
        context: tokens per sequence.
        mask_fraction: the fraction of tokens to guess.
    """

    context: int = 64
    mask_fraction: float = 0.15

    causal: ClassVar[bool | None] = False

    def __post_init__(self) -> None:
        check_sizes(self, context=1)
        if not 0 < self.mask_fraction <= 1:
            raise UserError(
                f"task {self.name!r}: mask_fraction is {self.mask_fraction}; it must be above 0 "
                "and at most 1"
            )

    @abstractmethod
    def ordinary(self, data: Data) -> tuple[int, int, int]:
        """Return the first ordinary id, the one after the last, and that of the mask."""

    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather sequences and mask them with the generator."""
        tokens = data.part(split)[0][indices]
        first, end, mask = self.ordinary(data)
        eligible = (tokens >= first) & (tokens < end)
        draws = torch.rand(tokens.shape, generator=generator).masked_fill(~eligible, -1.0)
        count = max(1, round(self.mask_fraction * self.context))
        chosen = torch.zeros_like(eligible).scatter_(1, draws.topk(count).indices, True) & eligible
        fate = torch.rand(tokens.shape, generator=generator)
        words = torch.randint(first, end, tokens.shape, generator=generator)
        inputs = torch.where(chosen & (fate < MASKED), mask, tokens)
        inputs = torch.where(chosen & (fate >= 1 - REPLACED), words, inputs)
        return inputs, torch.where(chosen, tokens, IGNORED)

    def pack(self, ids: Tensor) -> Tensor:
        """Cut a stream of ids (N,) into sequences, its rest dropped."""
        return ids[: len(ids) // self.context * self.context].view(-1, self.context)


@dataclass(frozen=True)
class Cornell(MaskedTask):
    """Guess the masked words of the Cornell Movie-Dialogs Corpus.

    Unknown words and separators are never chosen. Lines of one film follow one another, a separator
    after each, packed into full sequences, so that no attention mask is needed. Words stand in for
    the paper's WordPiece: the vocabulary is the `vocab_size` most frequent words of the training
    films.

    Attributes:
        vocab_size: size of the vocabulary, the unknown word, the mask and the separator included.
        train_lines: keep the first so many training lines; None keeps all.
    """

    vocab_size: int = 8_192
    train_lines: int | None = None

    name: ClassVar[str] = "cornell"
    extent: ClassVar[str] = "234,628 lines of dialogue"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, vocab_size=1, train_lines=1)

    def read(self, root: Path | None) -> Data:
        """Read `cornell_movie_dialogs/movie_lines.txt` into sequences (N, context)."""
        paths = ["cornell_movie_dialogs/movie_lines.txt"]
        files = sources.find(root, *paths)
        if files is None:
            hint = (
                "get it from cs.cornell.edu/~cristian/Cornell_Movie-Dialogs_Corpus.html "
                "and convert it to UTF-8"
            )
            raise sources.missing(self.name, root, paths, hint)
        train: list[str] = []
        test: list[str] = []
        # Not splitlines(), which also cuts at characters that occur inside a line of dialogue.
        for line in files[0].read_text("utf-8").split("\n"):
            fields = line.split(" +++$+++ ")
            if len(fields) == 5:
                movie = int(fields[2].removeprefix("m"))
                (train if movie < FIRST_TEST_MOVIE else test).append(fields[4])
        text = "\n".join(train[: self.train_lines])
        words = Words(text, vocab_size=self.vocab_size)
        parts = [self.pack(torch.from_numpy(words.encode(t))) for t in (text, "\n".join(test))]
        options = {"vocab_size": words.vocab_size, "context": self.context}
        return Data((parts[0],), (parts[1],), *sources.file_source(files), options)

    def ordinary(self, data: Data) -> tuple[int, int, int]:
        """Return the range of the words, and the mask."""
        return Words.num_special, data.model_options["vocab_size"], Words.mask


@dataclass(frozen=True)
class MaskedBooks(MaskedTask):
    """Guess the masked byte pairs of the books.

    Attributes:
        vocab_size: of the byte pairs, as of task `books` with the tokenizer "bpe".
        titles: which of the books to read.
    """

    vocab_size: int = 2_048
    titles: tuple[str, ...] = BOOKS

    name: ClassVar[str] = "masked-books"
    extent: ClassVar[str] = "8.1 MB of text"

    def read(self, root: Path | None) -> Data:
        """Read the books' tokens into sequences (N, context)."""
        books = Books(
            context=self.context, tokenizer="bpe", vocab_size=self.vocab_size, titles=self.titles
        ).read(root)
        train, test = self.pack(books.train[0]), self.pack(books.test[0])
        return replace(books, train=(train,), test=(test,))

    def ordinary(self, data: Data) -> tuple[int, int, int]:
        """Return the range of the byte pairs, and the mask."""
        return len(BytePairs.special), data.model_options["vocab_size"], BytePairs.mask
