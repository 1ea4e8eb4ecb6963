"""JS⁰ with its correction and intervals, on nets whose spectra are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import spectra_db
from harness import estimate_spectra, find_blocks
from spectra_db.heterogeneity import measure

from .models import cross_entropy

NUM_SEEDS = 20


def net(activation: type[nn.Module], width: int, depth: int) -> nn.Module:
    """Return an MLP of `depth` square layers between input and head, in float64."""
    layers: list[nn.Module] = [nn.Linear(16, width), activation()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 6)).double()
    generator = torch.Generator().manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "width", "depth", "square_alone", "is_small"),
    [(nn.Identity, 32, 3, True, True), (nn.Tanh, 40, 2, False, False)],
    ids=["alike: square layers of a linear net", "unlike: all layers of a tanh net"],
)
def test_correction_is_nearer_than_plug_in_and_intervals_cover_the_exact_value(
    activation, width, depth, square_alone, is_small
):
    model = net(activation, width, depth)
    blocks = [b for b in find_blocks(model) if not square_alone or b.num_params == width**2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    batch = (x, torch.randint(6, (64,), generator=generator))

    def spectrum(**options):
        return estimate_spectra(
            model, cross_entropy, [batch], blocks=blocks, dtype=torch.float64, **options
        )

    def js0(rows):
        return spectra_db.js0(rows, scale="lambda10")

    exact = spectrum(exact_size=10**6)
    sampled = [
        spectrum(exact_size=0, num_probes=3, num_steps=40, seed=seed) for seed in range(NUM_SEEDS)
    ]
    truth = js0(exact).value
    assert truth < 0.1 if is_small else truth > 0.3
    estimates = [js0(rows) for rows in sampled]
    plug_in = np.mean([e.value for e in estimates])
    corrected = np.mean([e.corrected for e in estimates])
    assert abs(corrected - truth) < abs(plug_in - truth)
    covered = [low <= truth <= high for low, high in (e.interval(0.9) for e in estimates)]
    # 20 intervals of 90 %: fewer than 15 cover in 1 % of draws, were the level true.
    assert sum(covered) >= 15
    # By their own rms the bulk of these blocks is narrow, and 40 steps leave some of it out: the
    # truncation error says so.
    truth, covered = spectra_db.js0(exact).value, 0
    for estimate, left_out in (measure(rows, "js0") for rows in sampled):
        low, high = estimate.interval(0.9)
        covered += low - left_out <= truth <= high + left_out
    assert covered >= 15
