from __future__ import annotations

import numpy as np
import pytest

from harness.paper.slq import dense_block, slq_error


def test_quadrature_is_exact_where_lanczos_reaches_every_eigenvalue():
    values = np.repeat(np.linspace(-1, 2, 30), 10)  # 30 distinct ones, fewer than the steps
    found = slq_error(np.diag(values))
    assert found["quadrature_raw"] < 1e-10
    assert found["quadrature_lambda10"] < 1e-10
    # Ten probes do not make the spectrum, however many the steps.
    assert 1e-3 < found["total_raw"] < 0.5
    assert found["largest"] < 1e-10


def test_a_hundred_steps_do_not_resolve_a_wide_spectrum():
    found = slq_error(np.diag(np.linspace(-1, 1, 600)))
    assert found["quadrature_raw"] > 0.1
    assert found["quadrature_lambda10"] < 1e-10


def test_a_dense_block_is_symmetric_and_of_the_models_size():
    H = dense_block("cnn-digits", "0.weight", num_samples=4)
    assert H.shape == (144, 144)
    np.testing.assert_array_equal(H, H.T)
    assert np.linalg.norm(H) == pytest.approx(np.sqrt((np.linalg.eigvalsh(H) ** 2).sum()))
