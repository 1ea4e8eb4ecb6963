from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import spectra_db
from harness import estimate_spectra, find_blocks
from harness.errors import UserError
from harness.estimator import adaptive
from harness.estimator.adaptive import estimate_to_tolerance, limits
from harness.estimator.batches import batch_hash
from harness.estimator.lanczos import Kept, advance, lanczos, start
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from spectra_db.heterogeneity import METRICS, measure, settled

from .models import cross_entropy, num_terms, problem

OPTIONS = {"dtype": torch.float64, "exact_size": 20, "batch_weights": num_terms}


def reach(name="mlp", *, metric="js0", tolerance, max_probes=None, max_steps=None, **options):
    model, batch = problem(name, num_samples=12)
    most = limits(metric, tolerance, max_probes, max_steps)
    settings = Settings("weights", *most, dtype="float64", exact_size=20)
    source = {"model": type(model).__name__, "stage": "current", "init_seed": 0, "train_run": ""}
    source |= {"batch_hash": batch_hash([batch]), "run_id": "", "step": 0, "progress": 0.0}
    objective = Objective(model, cross_entropy, [batch], num_terms)
    with opened(objective, find_blocks(model), settings) as hessian:
        return estimate_to_tolerance(
            hessian,
            settings,
            source | {"data_source": ""},
            metric=metric,
            tolerance=tolerance,
            **options,
        )


def truth_of(name, metric):
    model, batch = problem(name, num_samples=12)
    options = OPTIONS | {"exact_size": 10**6}
    rows = estimate_spectra(model, cross_entropy, [batch], **options)
    return measure(rows, metric)[0].value


def numbers(rows):
    return rows.drop(columns=["seconds", "peak_bytes", "tolerance"])


@pytest.mark.parametrize(("metric", "tolerance"), [("js0", 0.05), ("lambda_max_spread", 0.01)])
def test_both_errors_end_within_the_tolerance_and_the_truth_within_both(metric, tolerance):
    reached = reach(metric=metric, tolerance=tolerance)
    assert reached.is_within
    size = tolerance * reached.estimate.corrected
    assert 0 < reached.estimate.standard_error <= size
    assert reached.truncation_error <= size
    assert set(reached.rows["tolerance"]) == {tolerance}
    # Three of the errors stated, which are themselves estimates from few probes.
    allowed = 3 * (reached.estimate.standard_error + reached.truncation_error)
    assert abs(reached.estimate.corrected - truth_of("mlp", metric)) <= allowed


@pytest.fixture(scope="module")
def rounds():
    found = []
    reach(tolerance=0.02, on_round=found.append)
    return found


def test_rounds_end_with_the_rows_that_one_round_gives(rounds):
    model, batch = problem("mlp", num_samples=12)
    reached = rounds[-1]
    assert len({r.num_probes for r in rounds}) > 1
    at_once = estimate_spectra(
        model,
        cross_entropy,
        [batch],
        num_probes=reached.num_probes,
        num_steps=reached.num_steps,
        **OPTIONS,
    )
    assert len(reached.rows) == len(at_once)
    for mine, whole in zip(reached.rows.itertuples(), at_once.itertuples(), strict=True):
        assert (mine.block, mine.probe) == (whole.block, whole.probe)
        assert mine.alphas == whole.alphas[: len(mine.alphas)]
        assert mine.betas == whole.betas[: len(mine.betas)]


def test_blocks_that_are_settled_take_no_more_steps():
    found = []
    reach("gpt", tolerance=0.1, on_round=found.append)
    first, second = found
    assert first.needs_steps
    assert second.is_within
    done = settled(first.rows, "js0", first.allowed)
    steps = second.rows[second.rows["method"] == "slq"].groupby("block")["num_steps"].max()
    assert 0 < len(done) < first.rows["block"].nunique()
    assert steps.to_dict() == {name: 10 if name in done else 15 for name in steps.index}


def test_a_block_whose_probes_have_ended_keeps_no_other_waiting(monkeypatch):
    # The head has six parameters, and its rules end after as many steps.
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False)
    ).double()
    batch = torch.randn(50, 40).double(), torch.arange(50) % 2
    settings = Settings("weights", 5, 60, dtype="float64", exact_size=0)
    monkeypatch.setattr(adaptive, "settled", lambda rows, metric, allowed: {"0.weight"})
    found = []
    with opened(Objective(model, cross_entropy, [batch]), find_blocks(model), settings) as hessian:
        source = dict.fromkeys(("model", "stage", "train_run", "batch_hash", "run_id"), "")
        source |= {"init_seed": 0, "step": 0, "progress": 0.0, "data_source": ""}
        estimate_to_tolerance(hessian, settings, source, tolerance=1e-6, on_round=found.append)
    assert found[0].needs_steps
    assert found[0].rows.groupby("block")["breakdown"].all()["2.weight"]
    for before, after in pairwise(found):
        if before.needs_steps:
            assert after.rows["num_products"].sum() > before.rows["num_products"].sum()


@pytest.mark.parametrize(("budget", "products"), [(10**6, 8), (0, 12)])
def test_a_kept_recurrence_goes_on_where_its_vectors_fit_and_starts_again_where_not(
    budget, products
):
    A, v0 = torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64)), torch.ones(40).double()
    kept, taken = Kept(budget), 0
    for num_steps in (4, 8):
        state = kept.take("probe", num_steps) or start(v0)
        while not state.is_done(num_steps):
            advance([state], [A @ state.vector])
            taken += 1
        kept.put("probe", state)
    assert taken == products
    # Long enough, it is of use without its vectors.
    assert kept.take("probe", 8).alphas == lanczos(A.mv, v0, 8).alphas


def test_rows_that_are_there_are_kept_and_added_to():
    model, batch = problem("mlp", num_samples=12)
    known = estimate_spectra(model, cross_entropy, [batch], num_probes=3, num_steps=25, **OPTIONS)
    reached = reach(metric="lambda_rms_spread", tolerance=None, max_probes=5, known=known)
    assert (reached.num_probes, reached.num_steps) == (5, 25)
    before, after = (
        rows[(rows["method"] == "slq") & (rows["probe"] < 3)].reset_index(drop=True)
        for rows in (known, reached.rows)
    )
    assert numbers(before).equals(numbers(after))
    again = reach(metric="lambda_rms_spread", tolerance=None, known=reached.rows)
    assert (again.num_probes, again.num_steps) == (10, 25)


def test_moments_take_ten_products_a_block_and_lie_within_their_error():
    reached = reach(metric="lambda_rms_spread", tolerance=None)
    sampled = reached.rows[reached.rows["method"] == "slq"]
    assert set(sampled.groupby("block")["num_products"].sum()) == {10}
    assert reached.truncation_error == 0
    error = 3 * reached.estimate.standard_error
    assert abs(reached.estimate.corrected - truth_of("mlp", "lambda_rms_spread")) < error


def test_largest_eigenvalues_take_twelve_products_a_block():
    reached = reach(metric="lambda_max_spread", tolerance=None)
    sampled = reached.rows[reached.rows["method"] == "slq"]
    assert set(sampled.groupby("block")["num_products"].sum()) == {12}
    assert reached.estimate.corrected == pytest.approx(truth_of("mlp", "lambda_max_spread"), 0.1)


def test_what_can_not_be_reached_is_said():
    reached = reach(tolerance=1e-4, max_probes=4, max_steps=30)
    assert not reached.is_within
    assert reached.needs_probes or reached.needs_steps
    assert reached.num_probes <= 4
    assert reached.num_steps <= 30
    assert spectra_db.js0(reached.rows).standard_error == reached.estimate.standard_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "js1"}, ", ".join(list(METRICS)[:-1])),
        ({"tolerance": 2.0}, "between 0 and 1"),
        ({"tolerance": float("nan")}, "between 0 and 1"),
        ({"max_probes": 2}, "at least 3"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        reach(**({"tolerance": 0.1} | options))
