"""The cost model finds what made the samples, never with a negative term."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from saih.errors import SaihError
from workloads.llm.costmodel import TERMS, CostModel, fit
from workloads.llm.scheduler import Load


def loads_of(count: int, seed: int) -> list[Load]:
    rng = np.random.default_rng(seed)
    return [Load(*map(int, rng.integers((1, 100, 10, 0), (64, 200_000, 8000, 2048)))) for _ in range(count)]


def test_exact_samples_give_back_the_model() -> None:
    model = CostModel(5e-3, 2e-5, 1e-7, 3e-7, 1e-5)
    loads = loads_of(30, 0)
    found = fit(loads, [model.step_s(load) for load in loads])
    for term in TERMS:
        assert getattr(found.model, term) == pytest.approx(getattr(model, term), rel=1e-6)
    assert found.worst_error < 1e-9


def test_each_term_stands_by_its_own_quantity() -> None:
    assert CostModel(1, 10, 100, 1000, 10000).step_s(Load(2, 3, 4, 5)) == 1 + 20 + 300 + 4000 + 50000


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 2.0))
def test_the_fit_is_the_best_without_negative_terms(seed: int, noise: float) -> None:
    """scipy's active-set solver is the outside oracle; heavy noise makes some terms want to be negative."""
    loads = loads_of(12, seed)
    rng = np.random.default_rng(seed)
    step_s = np.array([CostModel(5e-3, 2e-5, 1e-7, 0, 1e-5).step_s(load) for load in loads])
    step_s *= rng.lognormal(0, noise, len(loads))
    design = np.column_stack([np.ones(len(loads)), np.array(loads, dtype=float)]) / step_s[:, None]
    scale = np.linalg.norm(design, axis=0)
    _, least = nnls(design / scale, np.ones(len(loads)))
    found = fit(loads, step_s.tolist())
    ours = np.array([getattr(found.model, term) for term in TERMS])
    assert (ours >= 0).all()
    errors = np.abs(design @ ours - 1)
    assert np.linalg.norm(errors) == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert (found.median_error, found.worst_error) == pytest.approx((np.median(errors), errors.max()))


def test_terms_can_be_left_out() -> None:
    loads = loads_of(10, 1)
    found = fit(loads, [0.01 + 1e-6 * load.longest_tokens for load in loads], ("fixed_s", "per_decode_s")).model
    assert found.per_longest_token_s == 0
    assert found.fixed_s > 0


def test_quantities_that_never_vary_do_no_harm() -> None:
    loads = [Load(4, tokens, 0, 0) for tokens in (100, 200, 300, 400, 500)]
    found = fit(loads, [1e-3 + 1e-6 * load.context_tokens for load in loads])
    assert found.worst_error < 1e-9
    assert found.model.per_prefill_token_s == 0


def test_too_few_or_impossible_samples() -> None:
    with pytest.raises(SaihError, match="5 terms need as many samples: got 4 loads, 4 times"):
        fit(loads_of(4, 0), [1.0] * 4)
    with pytest.raises(SaihError, match="got 6 loads, 5 times"):
        fit(loads_of(6, 0), [1.0] * 5)
    with pytest.raises(SaihError, match="positive"):
        fit(loads_of(6, 0), [1.0] * 5 + [0.0])
