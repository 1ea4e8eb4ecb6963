"""Masked language models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry
from harness.registry.recipes import LANGUAGE, SMALL, TRANSFORMERS

# Few words are guessed, so that a step takes more sequences to leave the words' frequencies behind.
# Of 32 words 5 are guessed: the Hessian's 64 sequences, 2,048 words, make 320 terms.
_CORNELL: dict[str, Any] = {
    "family": "bert",
    "factory": "harness.registry.networks.libraries:bert",
    "task": "cornell",
    "task_options": {"context": 32, "vocab_size": 1024, "train_lines": 50_000},
    "hessian_batch_size": 64,
    "recipe": replace(LANGUAGE, num_steps=500, batch_size=64),
    "reference": "Devlin et al. 2019, arXiv 1810.04805",
    **TRANSFORMERS,
    **SMALL,
}

ENTRIES = (
    ModelEntry(
        name="bert-2x64-cornell",
        options={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        description="Two layers of width 64 on 1,024 words",
        **_CORNELL,
    ),
    ModelEntry(
        name="bert-4x48-cornell",
        options={
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 192,
        },
        description="Four layers of width 48 on 1,024 words",
        **_CORNELL,
    ),
)
