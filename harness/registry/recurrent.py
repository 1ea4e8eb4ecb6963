"""Language models without attention: LSTMs and Mamba."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry
from harness.registry.recipes import BOOKS, LANGUAGE, OWN, SHAKESPEARE, SMALL, TRANSFORMERS

_LSTM = "Hochreiter & Schmidhuber 1997, Neural Computation 9, 1735-1780"
_MAMBA = "Gu & Dao 2023, arXiv 2312.00752"
_NETWORK = "harness.registry.networks.recurrent:LSTM"
_LIBRARY = "harness.registry.networks.libraries:mamba"
# LSTMs are cheap here, slow to start, and clipped: more steps at larger rates than Transformers.
_LSTM_RECIPE: dict[str, Any] = {
    "recipe": replace(
        LANGUAGE, num_steps=500, batch_size=32, sgd_lrs=(1e-1, 10.0), adamw_lrs=(1e-3, 1e-1)
    )
}
# Mamba without its fused kernel goes through the sequence step by step: short sequences.
_SHORT: dict[str, Any] = {
    "task_options": {"context": 32},
    "hessian_batch_size": 64,
    "recipe": replace(LANGUAGE, num_steps=300, eval_size=2048),
}

ENTRIES = (
    ModelEntry(
        name="lstm-1x128-shakespeare",
        family="lstm",
        factory=_NETWORK,
        options={"width": 128, "num_layers": 1},
        reference=_LSTM,
        description="One layer of width 128",
        **OWN,
        **SMALL,
        **SHAKESPEARE | _LSTM_RECIPE,
    ),
    ModelEntry(
        name="lstm-2x64-books",
        family="lstm",
        factory=_NETWORK,
        options={"width": 64, "num_layers": 2},
        reference=_LSTM,
        description="Two layers of width 64",
        **OWN,
        **SMALL,
        **BOOKS | _LSTM_RECIPE,
    ),
    ModelEntry(
        name="mamba-2x48-shakespeare",
        family="mamba",
        factory=_LIBRARY,
        options={"hidden_size": 48, "state_size": 8, "num_hidden_layers": 2},
        reference=_MAMBA,
        description="Two layers of width 48 with states of size 8",
        **TRANSFORMERS,
        **SMALL,
        **SHAKESPEARE | _SHORT,
    ),
    ModelEntry(
        name="mamba-3x32-books",
        family="mamba",
        factory=_LIBRARY,
        options={"hidden_size": 32, "state_size": 8, "num_hidden_layers": 3},
        reference=_MAMBA,
        description="Three layers of width 32 with states of size 8",
        **TRANSFORMERS,
        **SMALL,
        **BOOKS | _SHORT,
    ),
)
