"""From text to token ids: characters, words, a byte-level BPE of one's own or GPT-2's."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness.errors import UserError
from harness.tasks import sources

# A newline, then the 95 printable characters of ASCII; whatever else maps to one more symbol.
ASCII = "\n" + "".join(map(chr, range(32, 127)))
# The words of a lower-cased text, apostrophes inside, single digits, marks of punctuation.
_WORD = re.compile(r"<unk>|[^\W\d_]+(?:'[^\W\d_]+)*|\d|\n|[^\w\s]")
# Where GPT-2's rule for words cuts whatever stands around: before one space, after one newline.
_CUT = re.compile(r"(?<=[!-~])(?= [!-~])|(?<=[!-~]\n)(?=[!-~])")


class Tokenizer(Protocol):
    """Map a text to ids below `vocab_size`; `end` is the id that ends a text."""

    vocab_size: int
    end: int

    def encode(self, text: str) -> np.ndarray:
        """Return ids (N,) int64."""


class Characters:
    r"""Map each character of an alphabet to its position.

    Args:
        alphabet: every character of the text; None means newline, printable ASCII and one symbol
            for whatever else (97 ids in all), the table that lets a model trained on one corpus be
            fine-tuned on another.

    >>> Characters("abc").encode("cab")
    array([2, 0, 1])
    >>> Characters().encode("\né")
    array([ 0, 96])
    """

    def __init__(self, alphabet: str | None = None) -> None:
        codes = np.frombuffer((alphabet or ASCII).encode("utf-32-le"), dtype=np.uint32)
        # An alphabet of the corpus itself leaves nothing unknown, so it needs no extra symbol.
        self.vocab_size = len(codes) + (alphabet is None)
        self.end = (alphabet or ASCII).find("\n")
        self._table = np.full(0x110000, len(codes), dtype=np.int64)
        self._table[codes] = np.arange(len(codes))

    def encode(self, text: str) -> np.ndarray:
        """Look every code point up in one indexing operation."""
        return self._table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


class Words:
    """Map words (lower-cased) to ids by their rank; 0 is unknown, 1 the mask, 2 the separator.

    Args:
        text: the training text.
        vocab_size: most ids to use, the three special ones included.

    >>> Words("to be or not to be", vocab_size=5).encode("be to whom")
    array([3, 4, 0])
    """

    unknown, mask, end = 0, 1, 2
    num_special = 3

    def __init__(self, text: str, *, vocab_size: int) -> None:
        if vocab_size <= self.num_special:
            raise UserError(f"vocab_size is {vocab_size}; words need at least 4 ids")
        counts = Counter(_WORD.findall(text.lower()))
        del counts["\n"], counts["<unk>"]
        # Ties by the alphabet, so that the vocabulary does not depend on the order of the text.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        ranked = ranked[: vocab_size - self.num_special]
        self._ids = {word: rank for rank, word in enumerate(ranked, self.num_special)}
        self._ids["\n"] = self.end
        self.vocab_size = len(ranked) + self.num_special

    def encode(self, text: str) -> np.ndarray:
        """Split into words and look them up; a newline becomes the separator."""
        words = _WORD.findall(text.lower())
        get = self._ids.get
        return np.fromiter((get(word, self.unknown) for word in words), np.int64, len(words))


class _ByteLevel:
    """Encode by a byte-level BPE of the library."""

    _bpe: Any

    def encode(self, text: str) -> np.ndarray:
        """Encode a text, each distinct word once, which takes a sixth of the time."""
        words = _CUT.split(text)
        distinct = list(dict.fromkeys(words))
        codes = (encoding.ids for encoding in self._bpe.encode_batch(distinct))
        ids = dict(zip(distinct, codes, strict=True))
        return np.fromiter(chain.from_iterable(map(ids.__getitem__, words)), dtype=np.int64)


class Gpt2(_ByteLevel):
    """Encode by GPT-2's byte-level BPE (50,257 ids), read from `gpt2_bpe/` or the Hub."""

    vocab_size = 50_257
    end = 50_256  # <|endoftext|>

    def __init__(self, root: Path | None, task: str) -> None:
        from tokenizers import ByteLevelBPETokenizer

        vocab, merges = (file.read_text("utf-8") for file in _gpt2_files(root, task))
        pairs = [tuple(line.split(" ", 1)) for line in merges.splitlines()[1:] if " " in line]
        self._bpe = ByteLevelBPETokenizer(json.loads(vocab), pairs)


class BytePairs(_ByteLevel):
    """Encode by a byte-level BPE that is trained on the text itself.

    The 256 bytes come first, then the pairs that the training text merges most often (Sennrich et
    al. 2016, arXiv 1508.07909; on bytes and within GPT-2's words as in Radford et al. 2019). Ties
    go to the smaller ids, so the same text gives the same merges.

    Args:
        text: the training text.
        vocab_size: most ids to use, the 256 bytes and the two special ones (end, mask) included.

    Attributes:
        checksum: sha256 of the vocabulary in the order of its ids and of the merges in theirs.
    """

    end, mask = 0, 1
    special = ("<|endoftext|>", "<|mask|>")

    def __init__(self, text: str, *, vocab_size: int) -> None:
        from tokenizers import ByteLevelBPETokenizer

        if vocab_size < (least := 256 + len(self.special)):
            raise UserError(f"vocab_size is {vocab_size}; a BPE of bytes needs at least {least}")
        self._bpe = ByteLevelBPETokenizer()
        self._bpe.train_from_iterator(
            _CUT.split(text),
            vocab_size=vocab_size,
            special_tokens=list(self.special),
            show_progress=False,
        )
        self.vocab_size: int = self._bpe.get_vocab_size()
        model = json.loads(self._bpe.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        self.checksum = sources.sha256([json.dumps([tokens, model["merges"]]).encode()])


def _gpt2_files(root: Path | None, task: str) -> list[Path]:
    paths, repo = ["gpt2_bpe/encoder.json", "gpt2_bpe/vocab.bpe"], "openai-community/gpt2"
    if files := sources.find(root, *paths):
        return files
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(repo, file)) for file in ("vocab.json", "merges.txt")]
    # What the network stack raises differs between versions of the Hub's client.
    except Exception as error:
        hint = f"the Hub model {repo} was tried and failed ({type(error).__name__})"
        raise sources.missing(task, root, paths, hint) from error


def make_tokenizer(
    kind: str,
    text: str,
    *,
    vocab_size: int | None = None,
    alphabet: str | None = None,
    root: Path | None,
    task: str,
) -> Tokenizer:
    """Build the tokenizer "char", "word", "bpe" or "gpt2" for a training text."""
    if kind == "word":
        return Words(text, vocab_size=vocab_size or 4_096)
    if kind == "bpe":
        return BytePairs(text, vocab_size=vocab_size or 2_048)
    if vocab_size is not None:
        raise UserError(
            f"vocab_size is an option of tokenizers 'word' and 'bpe'; {kind!r} fixes its own"
        )
    if kind == "char":
        return Characters(alphabet)
    if kind == "gpt2":
        return Gpt2(root, task)
    raise UserError(f"unknown tokenizer {kind!r}; choose char, word, bpe or gpt2")
