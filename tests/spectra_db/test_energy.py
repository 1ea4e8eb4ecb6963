from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy
from scipy.stats import norm

from spectra_db.energy import ENERGY_SIGMA, energy_js
from tests.spectra_db.synthetic import exact_row, slq_rows


def of(*spectra: np.ndarray) -> float:
    rows = [exact_row(np.sort(s), f"b{i}") for i, s in enumerate(spectra)]
    return energy_js(pd.DataFrame(rows)).value


def distance_of_gaussians(mean: float, sd: float, other_mean: float, other_sd: float) -> float:
    """Integrate JSD between two Gaussians, in closed form under the integral."""

    def integrand(x: float) -> float:
        p, q = norm.pdf(x, mean, sd), norm.pdf(x, other_mean, other_sd)
        m = (p + q) / 2
        return (scipy.special.xlogy(p, p) + scipy.special.xlogy(q, q)) / 2 - scipy.special.xlogy(
            m, m
        )

    ends = [mean - 9 * sd, mean + 9 * sd, other_mean - 9 * other_sd, other_mean + 9 * other_sd]
    jsd = scipy.integrate.quad(integrand, min(ends), max(ends), limit=500, points=[mean])[0]
    return float(np.sqrt(jsd / np.log(2)))


def log_normal(mean: float, sd: float, n: int) -> np.ndarray:
    """Return n eigenvalues whose energy is a Gaussian in log10: |λ| has it less 2 sd² ln 10."""
    x = norm.ppf((np.arange(n) + 0.5) / n) * sd + mean - 2 * sd**2 * np.log(10)
    return 10**x


@pytest.mark.parametrize("shift", [0.03, 0.1, 0.25, 1.5])
def test_two_eigenvalues_are_as_far_apart_as_two_gaussians_of_a_tenth_of_a_decade(shift):
    found = of(np.array([0.02]), np.array([0.02 * 10**shift]))
    assert found == pytest.approx(distance_of_gaussians(0, 0.1, shift, 0.1), abs=1e-4)


def test_energies_that_are_gaussian_in_log_space_have_the_distance_of_these():
    found = of(log_normal(-2, 0.15, 4000), log_normal(-1.8, 0.1, 4000))
    wide, narrow = np.hypot(0.15, ENERGY_SIGMA), np.hypot(0.1, ENERGY_SIGMA)
    assert found == pytest.approx(distance_of_gaussians(-2, wide, -1.8, narrow), abs=2e-3)


def test_the_size_of_a_block_does_not_enter():
    spectrum = np.array([-3.0, -0.5, 0.01, 1.0, 70.0])
    other = np.array([0.2, 0.3])
    assert of(spectrum, np.tile(spectrum, 40)) == pytest.approx(0, abs=1e-6)
    assert of(np.tile(spectrum, 7), other) == pytest.approx(of(spectrum, other), abs=1e-9)


@pytest.mark.parametrize("factor", [1e-9, 0.37, 1e200])
def test_a_factor_common_to_all_blocks_does_not_enter_and_one_between_them_does(factor):
    spectra = np.array([-3.0, 0.01, 1.0, 70.0]), np.array([0.2, 0.3]), np.array([-1.0, 2.0])
    assert of(*(factor * s for s in spectra)) == pytest.approx(of(*spectra), abs=1e-4)
    assert of(spectra[0], 1000 * spectra[0]) > 0.9


def test_signs_are_two_parts_of_one_distribution():
    assert of(np.array([5.0]), np.array([-5.0])) == pytest.approx(1, abs=1e-6)
    # Half of the mass is shared: JSD = (1 + 1/2) / 2 − ... of masses (1, 0) and (1/2, 1/2).
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    expected = scipy.spatial.distance.jensenshannon(p, q, base=2)
    assert of(np.array([5.0]), np.array([-5.0, 5.0])) == pytest.approx(expected, abs=1e-6)


def test_zeros_have_no_energy_and_zero_blocks_are_left_out():
    spectrum, other = np.array([-3.0, 1.0, 2.0]), np.array([0.1, 0.2])
    assert of(np.append(spectrum, np.zeros(500)), other) == pytest.approx(of(spectrum, other))
    rows = [exact_row(np.sort(s), f"b{i}") for i, s in enumerate((spectrum, other))]
    zero = exact_row(np.array([0.0]), "z") | {"status": "zero"}
    found = energy_js(pd.DataFrame([*rows, zero]))
    assert (found.value, found.num_zero_blocks) == (of(spectrum, other), 1)


def test_ten_steps_and_three_probes_resolve_it_and_the_interval_holds_the_truth():
    rng = np.random.default_rng(0)
    spectra = [
        np.concatenate([rng.normal(0, 0.01, 990), rng.uniform(1, 3, 10)]),
        np.concatenate([rng.normal(0, 0.02, 995), rng.uniform(-6, -4, 5)]),
        rng.exponential(0.1, 1000),
    ]
    truth = of(*spectra)
    found = energy_js(slq_rows(spectra, 3, 10, rng))
    assert found.corrected == pytest.approx(truth, abs=0.05)
    assert 0 < found.standard_error < 0.05
