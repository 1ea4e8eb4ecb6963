"""Probes: the random start vectors, the same on every device, order and worker count."""

from __future__ import annotations

import hashlib

import torch


def probe_seed(seed: int, model: str, stage: str, block: str, probe: int) -> int:
    """Return the seed of one probe, a hash of what names it: the same on every machine."""
    text = "\x1f".join(map(str, (seed, model, stage, block, probe)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1  # fits int64


def draw_probe(num_params: int, seed: int, distribution: str) -> torch.Tensor:
    """Draw a unit vector of shape (num_params,) on the CPU in float32."""
    generator = torch.Generator().manual_seed(seed)
    if distribution == "gaussian":
        v = torch.randn(num_params, generator=generator)
    else:
        v = torch.randint(0, 2, (num_params,), generator=generator).float() * 2 - 1
    return v / torch.linalg.vector_norm(v, dtype=torch.float64).float()
