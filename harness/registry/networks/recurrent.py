"""Recurrent language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """A language model on stacked LSTM layers (Hochreiter & Schmidhuber 1997).

    Args:
        vocab_size: Size of the vocabulary.
        width: Width of embedding and hidden state.
        num_layers: Number of LSTM layers.
    """

    def __init__(self, vocab_size: int, *, width: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, num_layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        # cuDNN's fused LSTM has no second derivative; torch's own cells have one.
        with torch.backends.cudnn.flags(enabled=False):
            hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(hidden)
