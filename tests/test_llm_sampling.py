"""Tokens are drawn from the right set with the right chances, and never depend on the batch around a request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from saih.errors import SaihError
from tests.conftest import package
from workloads.llm.request import Request, Sampling
from workloads.llm.sampling import choose, draw


def sample(logits_BV: torch.Tensor, requests: list[Request]) -> list[int]:
    return choose(logits_BV, torch.tensor([draw(request) for request in requests])).tolist()


def requests_with(sampling: Sampling, count: int) -> list[Request]:
    return [Request(number, range(1), 9, sampling=sampling) for number in range(count)]


def test_greedy_is_the_most_likely() -> None:
    logits_BV = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert sample(logits_BV, requests_with(Sampling(), 5)) == logits_BV.argmax(-1).tolist()


@settings(max_examples=30)
@given(st.floats(0.05, 1.0), st.floats(0.2, 3.0), st.integers(0, 1000))
def test_only_the_top_p_set_is_drawn(top_p: float, temperature: float, seed: int) -> None:
    """The set is that of transformers' own warpers."""
    logits = package("transformers.generation.logits_process")
    row_V = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    warped_1V = logits.TopPLogitsWarper(top_p)(None, row_V[None] / temperature)
    allowed = set(torch.isfinite(warped_1V[0]).nonzero()[:, 0].tolist())
    drawn = sample(row_V.expand(200, -1), requests_with(Sampling(temperature, top_p, seed), 200))
    assert set(drawn) <= allowed


def test_chances_are_those_of_the_softmax() -> None:
    chance_V = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    count = 20_000
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.8, [0, 2, 3])):
        drawn = sample(chance_V.log().expand(count, -1), requests_with(Sampling(1.0, top_p), count))
        seen = torch.bincount(torch.tensor(drawn), minlength=5)
        expected = chance_V[kept] / chance_V[kept].sum() * count
        assert int(seen[kept].sum()) == count
        assert chisquare(seen[kept].double(), expected.double() * (count / expected.double().sum())).pvalue > 1e-3


def test_temperature_sharpens() -> None:
    logits_BV = torch.tensor([1.0, 0.0]).expand(4000, -1)
    share = [sample(logits_BV, requests_with(Sampling(heat), 4000)).count(0) / 4000 for heat in (0.5, 1.0, 2.0)]
    expected = [float(torch.tensor([1.0, 0.0]).div(heat).softmax(-1)[0]) for heat in (0.5, 1.0, 2.0)]
    assert share == pytest.approx(expected, abs=0.03)


def test_the_batch_around_a_request_changes_nothing() -> None:
    """Greedy and drawn rows, in any order, alone or together."""
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    styles = [Sampling(), Sampling(1.0, 0.9, 1), Sampling(0.7), Sampling(1.0, 0.5, 2), Sampling(), Sampling(2.0)]
    requests = [Request(n, range(1), 9, sampling=style, generated=[0] * n) for n, style in enumerate(styles)]
    together = sample(logits_BV, requests)
    assert together == [sample(logits_BV[[n]], [requests[n]])[0] for n in range(6)]
    order = [4, 1, 5, 0, 3, 2]
    assert sample(logits_BV[order], [requests[n] for n in order]) == [together[n] for n in order]


def test_seed_request_and_position_each_matter() -> None:
    logits_BV = torch.zeros(1, 1000)
    seen = {
        sample(logits_BV, [Request(number, range(1), 9, sampling=Sampling(1.0, 1.0, seed), generated=[0] * done)])[0]
        for number in (0, 1)
        for seed in (0, 1)
        for done in (0, 1)
    }
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("temperature", "top_p", "why"),
    [(-1.0, 1.0, "at least 0, got -1.0"), (float("nan"), 1.0, "got nan"), (1.0, 0.0, "above 0"), (1.0, 1.5, "got 1.5")],
)
def test_sampling_that_means_nothing_is_refused(temperature: float, top_p: float, why: str) -> None:
    with pytest.raises(SaihError, match=why):
        Sampling(temperature, top_p)


def test_numbers_next_to_one_stay_inside_the_set() -> None:
    """In float32 a number below 1 may round to 1, behind the last token."""
    chance_1V = torch.tensor([[0.5, 0.3, 0.2]])
    assert choose(chance_1V.log(), torch.tensor([[1.0, 0.7, 1.0]])).tolist() == [1]
    assert choose(chance_1V.log(), torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [2]
    assert choose(chance_1V.log(), torch.tensor([[1.0, 0.7, 0.0]])).tolist() == [0]
