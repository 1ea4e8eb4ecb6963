"""Decoder-only Transformers: GPTs and LLaMAs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry, Recipe
from harness.registry.recipes import BOOKS, DEMO, LANGUAGE, OWN, SHAKESPEARE, SMALL, TRANSFORMERS

_GPT: dict[str, Any] = {
    "family": "gpt",
    "factory": "harness.registry.networks.transformer:GPT",
    "reference": "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    **OWN,
}
_SHAKESPEARE: dict[str, Any] = {**_GPT, **SMALL, **SHAKESPEARE}
_LLAMA = "Touvron et al. 2023, arXiv 2302.13971"
_LLAMA_LAYERS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LIBRARY: dict[str, Any] = {
    "family": "llama",
    "factory": "harness.registry.networks.libraries:llama",
    **TRANSFORMERS,
    **SMALL,
}
_NANO: dict[str, Any] = {
    "options": {"num_layers": 3, "num_heads": 4, "width": 96},
    "hessian_batch_size": 16,
    "recipe": replace(LANGUAGE, batch_size=8, eval_size=512),
    **_GPT,
    **SMALL,
}

ENTRIES = (
    ModelEntry(
        name="gpt-pydoc",
        options={"num_layers": 2, "num_heads": 4, "width": 32},
        task="pydoc",
        task_options={"context": 32},
        hessian_batch_size=64,
        recipe=Recipe(
            num_steps=300,
            batch_size=32,
            sgd_lrs=(3e-2, 3.0),
            adamw_lrs=(1e-3, 1e-1),
            adamw_betas=(0.9, 0.95),
            clip=1.0,
            warmup_steps=60,
            eval_size=256,
        ),
        description="Two layers of width 32 on the characters of Python's documentation",
        **_GPT,
        **DEMO,
    ),
    ModelEntry(
        name="gpt-2x64-shakespeare",
        options={"num_layers": 2, "num_heads": 4, "width": 64},
        description="Two layers of width 64, tied",
        **_SHAKESPEARE,
    ),
    ModelEntry(
        name="gpt-2x128-shakespeare",
        options={"num_layers": 2, "num_heads": 4, "width": 128},
        description="Two layers of width 128, tied",
        **_SHAKESPEARE,
    ),
    ModelEntry(
        name="gpt-6x48-untied-shakespeare",
        options={"num_layers": 6, "num_heads": 4, "width": 48, "tied": False},
        description="Six layers of width 48, embedding and head apart",
        **_SHAKESPEARE,
    ),
    ModelEntry(
        name="gpt-2x64-wikitext",
        options={"num_layers": 2, "num_heads": 4, "width": 64, "bias": True},
        task="wikitext",
        task_options={"context": 64, "tokenizer": "word", "vocab_size": 2048},
        hessian_batch_size=32,
        recipe=LANGUAGE,
        description="Two layers of width 64 with biases, tied, on 2,048 words",
        **_GPT,
        **SMALL,
    ),
    ModelEntry(
        name="gpt-nano-books",
        description="Three layers of width 96, tied; the pretraining of gpt-nano-sft",
        task="books",
        task_options={"context": 128},
        **_NANO,
    ),
    ModelEntry(
        name="gpt-nano-sft",
        task="sft",
        task_options={"corpus": "dolly", "tokenizer": "char", "context": 128},
        pretrained="gpt-nano-books",
        description="gpt-nano-books fine-tuned on instructions; stands in for gpt2-sft",
        **_NANO,
    ),
    ModelEntry(
        name="llama-2x64-shakespeare",
        options=_LLAMA_LAYERS,
        reference=_LLAMA,
        description="Two layers of width 64, embedding and head apart",
        **_LIBRARY,
        **SHAKESPEARE,
    ),
    ModelEntry(
        name="llama-gqa-4x64-books",
        options={
            **_LLAMA_LAYERS,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        reference=f"{_LLAMA}; grouped queries: Ainslie et al. 2023, arXiv 2305.13245",
        description="Four layers of width 64 with grouped queries, tied",
        **_LIBRARY,
        **BOOKS,
    ),
)
