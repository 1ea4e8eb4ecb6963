"""Language models without attention: LSTMs and Mamba."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry
from harness.registry.recipes import BOOKS, LANGUAGE, OWN, SHAKESPEARE, SMALL, TRANSFORMERS

# LSTMs are cheap here, slow to start, and clipped: more steps at larger rates than Transformers.
_LSTM: dict[str, Any] = {
    "family": "lstm",
    "factory": "harness.registry.networks.recurrent:LSTM",
    "recipe": replace(
        LANGUAGE, num_steps=500, batch_size=32, sgd_lrs=(1e-1, 10.0), adamw_lrs=(1e-3, 1e-1)
    ),
    "reference": "Hochreiter & Schmidhuber 1997, Neural Computation 9, 1735-1780",
    **OWN,
    **SMALL,
}
# Mamba without its fused kernel goes through the sequence step by step: short sequences.
_MAMBA: dict[str, Any] = {
    "family": "mamba",
    "factory": "harness.registry.networks.libraries:mamba",
    "task_options": {"context": 32},
    "hessian_batch_size": 64,
    "recipe": replace(LANGUAGE, num_steps=300, eval_size=2048),
    "reference": "Gu & Dao 2023, arXiv 2312.00752",
    **TRANSFORMERS,
    **SMALL,
}

ENTRIES = (
    ModelEntry(
        name="lstm-1x128-shakespeare",
        options={"width": 128, "num_layers": 1},
        description="One layer of width 128",
        **SHAKESPEARE | _LSTM,
    ),
    ModelEntry(
        name="lstm-2x64-books",
        options={"width": 64, "num_layers": 2},
        description="Two layers of width 64",
        **BOOKS | _LSTM,
    ),
    ModelEntry(
        name="mamba-2x48-shakespeare",
        options={"hidden_size": 48, "state_size": 8, "num_hidden_layers": 2},
        description="Two layers of width 48 with states of size 8",
        **SHAKESPEARE | _MAMBA,
    ),
    ModelEntry(
        name="mamba-3x32-books",
        options={"hidden_size": 32, "state_size": 8, "num_hidden_layers": 3},
        description="Three layers of width 32 with states of size 8",
        **BOOKS | _MAMBA,
    ),
)
