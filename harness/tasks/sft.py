"""Supervised fine-tuning: predict the response to an instruction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import UserError
from harness.tasks import sources
from harness.tasks.base import IGNORED, Batch, Data, check_sizes
from harness.tasks.tokenizers import Tokenizer, make_tokenizer
from harness.tasks.tokens import SomeTokens

# Files of the data root (the second, where there is one, is the test split) and the Hub's id.
_CORPORA: dict[str, tuple[tuple[str, ...], str]] = {
    "alpaca": (
        ("sft/alpaca_2000.jsonl", "sft/alpaca_eval_805_text_davinci_003.jsonl"),
        "tatsu-lab/alpaca",
    ),
    "dolly": (("sft/dolly_first6400.jsonl",), "databricks/databricks-dolly-15k"),
}


@dataclass(frozen=True)
class Instructions(SomeTokens):
    """Predict responses; a batch is (inputs, targets), both (B, context) int64.

    Targets are -100 outside the response, so the loss is over response tokens alone, the one that
    ends it included. A sequence is "### Instruction: ... ### Response: ..." (Alpaca's format
    without its preamble), padded at its end, which a causal model never looks at. Instructions that
    leave no room for a response are dropped, responses are cut at the context.

    Attributes:
        corpus: "alpaca" (tested on AlpacaEval) or "dolly" (shorter; its last tenth is the test).
        context: tokens per sequence.
        tokenizer: "gpt2", or "char" with the vocabulary of the task `books`, for a model
            pretrained there.
    """

    corpus: str = "alpaca"
    context: int = 256
    tokenizer: str = "gpt2"

    name: ClassVar[str] = "sft"
    extent: ClassVar[str] = "2,000 or 6,400 instructions"
    causal: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        check_sizes(self, context=1)

    def read(self, root: Path | None) -> Data:
        """Read and tokenize the pairs into inputs and targets (N, context)."""
        if self.corpus not in _CORPORA:
            raise UserError(f"unknown corpus {self.corpus!r}; choose {' or '.join(_CORPORA)}")
        if self.tokenizer not in ("char", "gpt2"):
            raise UserError(f"unknown tokenizer {self.tokenizer!r}; choose char or gpt2")
        paths, repo = _CORPORA[self.corpus]
        if files := sources.find(root, *paths):
            source, checksum = sources.file_source(files)
            parts = [_read_jsonl(file) for file in files]
        else:
            rows, source = sources.from_hub(
                self.name, root, paths, repo, lambda load: list(load(split="train"))
            )
            checksum = sources.sha256([json.dumps(rows, sort_keys=True).encode()])
            parts = [rows]
        if len(parts) == 1:
            cut = int(0.9 * len(parts[0]))
            parts = [parts[0][:cut], parts[0][cut:]]
        tokenizer = make_tokenizer(self.tokenizer, "", root=root, task=self.name)
        train, test = (self._encode(rows, tokenizer) for rows in parts)
        options = {"vocab_size": tokenizer.vocab_size, "context": self.context}
        return Data(train, test, source, checksum, options)

    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather sequences; nothing here is random."""
        inputs, targets = data.part(split)
        return inputs[indices], targets[indices]

    def _encode(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        sequences, marks = [], []
        for row in rows:
            prompt, response = _pair(row)
            start = tokenizer.encode(prompt)
            if not response or len(start) > self.context:
                continue
            end = [*tokenizer.encode(response), tokenizer.end]
            ids = [*start, *end][: self.context + 1]
            sequences.append(ids + [tokenizer.end] * (self.context + 1 - len(ids)))
            marks.append((len(start), len(ids)))
        tokens = torch.tensor(sequences, dtype=torch.int64).view(-1, self.context + 1)
        first, last = torch.tensor(marks, dtype=torch.int64).view(-1, 2, 1).unbind(1)
        at = torch.arange(1, self.context + 1)
        inside = (at >= first) & (at < last)
        return tokens[:, :-1].contiguous(), torch.where(inside, tokens[:, 1:], IGNORED)


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    """Return the prompt and the response of a row of Alpaca, AlpacaEval or Dolly."""
    given = row.get("input") or row.get("context") or ""
    given = f"### Input:\n{given}\n\n" if given else ""
    prompt = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    return prompt, row.get("output") or row.get("response") or ""


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    # Not splitlines(), which also cuts at characters that JSON leaves unescaped.
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
