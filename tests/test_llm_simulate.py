"""Simulated time: pipelines counted by hand, always the same, no gain from grouping without a term in the longest."""

import math

import numpy as np
import pytest

from workloads.llm import metrics, trace
from workloads.llm.allocator import BlockAllocator
from workloads.llm.costmodel import CostModel
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import BatchPlan, FirstComeFirstServed, ServerState
from workloads.llm.simulate import Simulation, simulate

MODEL = CostModel(5e-3, 2e-5, 1e-7, 3e-7, 1e-5)


def run(count: int, seed: int, stages: int = 1) -> Simulation:
    requests = trace.to_requests(trace.synthetic(count, 8.0, trace.LENGTHS["sharegpt"], seed))
    state = ServerState(BlockAllocator(1000, 16))
    scheduler = FirstComeFirstServed(max_tokens=1024, max_requests=64)
    return simulate(requests, scheduler, state, lambda plan: MODEL.step_s(plan.load()), stages)


def test_it_is_the_same_every_time_and_says_what_it_is() -> None:
    first, again = run(300, 3), run(300, 3)
    assert first.origin == "simulated"
    assert [request.token_s for request in first.requests] == [request.token_s for request in again.requests]
    assert metrics.summary(first.requests, first.iterations) == metrics.summary(again.requests, again.iterations)
    assert any(request.preemptions for request in first.requests), "the cache is small enough to matter"
    assert all(request.phase is Phase.FINISHED for request in first.requests)


def test_each_iteration_takes_what_the_model_says() -> None:
    simulation = run(100, 1)
    for iteration in simulation.iterations:
        assert iteration.end_s - iteration.start_s == pytest.approx(MODEL.step_s(iteration.load))
    busy = sum(end - start for start, end in simulation.stage_busy_s[0])
    assert busy == pytest.approx(sum(MODEL.step_s(each.load) for each in simulation.iterations))


def test_a_request_alone_by_hand() -> None:
    request = Request(0, range(8), 3, arrival_s=2.0)
    simulate(
        [request], FirstComeFirstServed(4, 1), ServerState(BlockAllocator(4, 4)), lambda plan: float(sum(plan.tokens))
    )
    assert request.token_s == [2 + 8, 2 + 9, 2 + 10], "two chunks of four, then one token at a time"


def test_two_stages_by_hand() -> None:
    """Two requests, one a batch: batch 1 is on stage 0 while batch 0 is on stage 1, and so on without a gap."""
    requests = [Request(0, range(1), 3), Request(1, range(1), 3)]
    scheduler = FirstComeFirstServed(1, 1)
    simulation = simulate(requests, scheduler, ServerState(BlockAllocator(9, 1)), lambda plan: 1.0, stages=2)
    assert requests[0].token_s == [2, 4, 6]
    assert requests[1].token_s == [3, 5, 7]
    assert metrics.bubble_s(requests, simulation.stage_busy_s[0]) == 1
    assert metrics.bubble_s(requests, simulation.stage_busy_s[1]) == 1
    alone = [Request(0, range(1), 3)]
    simulation = simulate(alone, scheduler, ServerState(BlockAllocator(9, 1)), lambda plan: 1.0, stages=2)
    assert alone[0].token_s == [2, 4, 6]
    assert metrics.bubble_s(alone, simulation.stage_busy_s[0]) == 3, "one request leaves every other turn empty"


@pytest.mark.parametrize(("stages", "requests"), [(1, 8), (2, 8), (4, 8), (3, 8), (4, 3)])
def test_every_stage_has_a_batch_though_one_could_take_all_requests(stages: int, requests: int) -> None:
    """A batch takes a second a request on each stage: shared out, all stages work all the time but at the ends."""
    asked = [Request(n, range(1), 50) for n in range(requests)]
    state = ServerState(BlockAllocator(1000, 64))
    found = simulate(asked, FirstComeFirstServed(10**6, 16), state, lambda p: float(len(p.requests)), stages)
    most = max(len(each.emitted) for each in found.iterations)
    assert most == -(-requests // stages)
    work_s = 50.0 * requests
    uneven = stages * most / requests if requests >= stages else stages / requests
    assert work_s <= found.iterations[-1].end_s <= work_s * uneven + 2 * stages * most


def test_requests_that_run_together_are_shared_out_again() -> None:
    """As after one batch that took them all: the next one leaves some for the other stage."""
    state = ServerState(BlockAllocator(100, 4))
    scheduler = FirstComeFirstServed(10**6, 16)
    for number in range(5):
        state.submit(Request(number, range(3), 9))
    whole = scheduler.next_batch(state)
    assert whole is not None
    state.complete(whole, [7] * 5, 0.0)
    state.depth = 2
    taken = []
    while plan := scheduler.next_batch(state):
        state.launch(plan)
        taken.append([request.id for request in plan.requests])
    assert taken == [[0, 1, 2], [3, 4]]


class ByLength(FirstComeFirstServed):
    """Takes only requests of the length of the oldest one: the extreme of grouping."""

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        if not state.running and state.waiting:
            length = len(state.waiting[0].prompt)
            state.waiting = type(state.waiting)(sorted(state.waiting, key=lambda each: len(each.prompt) != length))
        if state.waiting and state.running:
            length = len(next(iter(state.running.values())).prompt)
            if len(state.waiting[0].prompt) != length:
                waiting, state.waiting = state.waiting, type(state.waiting)()
                plan = super().next_batch(state)
                state.waiting = waiting
                return plan
        return super().next_batch(state)


@pytest.mark.parametrize(("per_longest_token_s", "faster"), [(0.0, False), (1e-4, True)])
def test_grouping_by_length_pays_only_through_the_longest(per_longest_token_s: float, faster: bool) -> None:
    """Equal work in whole batches of one size: a linear model without a term in the longest gives the same total."""

    def total_s(scheduler: FirstComeFirstServed) -> float:
        requests = [Request(n, range(100 if n % 2 else 1000), 10) for n in range(40)]
        model = CostModel(1e-3, 1e-5, 1e-7, per_longest_token_s, 1e-6)
        state = ServerState(BlockAllocator(10**6, 1))
        return simulate(requests, scheduler, state, lambda p: model.step_s(p.load())).iterations[-1].end_s

    mixed, grouped = total_s(FirstComeFirstServed(10**6, 10)), total_s(ByLength(10**6, 10))
    if faster:
        assert grouped < 0.8 * mixed
    else:
        assert grouped == pytest.approx(mixed, rel=1e-9)


def test_an_idle_server_jumps_to_the_next_arrival() -> None:
    requests = [Request(0, range(1), 1), Request(1, range(1), 1, arrival_s=100.0)]
    simulation = simulate(requests, FirstComeFirstServed(1, 1), ServerState(BlockAllocator(1, 1)), lambda plan: 1.0)
    assert [request.token_s for request in requests] == [[1.0], [101.0]]
    assert metrics.bubble_s(requests, simulation.stage_busy_s[0]) == 0, "nobody was there to wait"


def test_metrics_against_their_definitions() -> None:
    simulation = run(200, 5)
    requests = simulation.requests
    figures = metrics.summary(requests, simulation.iterations)
    gaps = [np.diff(each.token_s).mean() for each in requests if each.max_new_tokens > 1]
    first = [each.token_s[0] - each.arrival_s for each in requests]
    assert figures["tpot_p50_s"] == pytest.approx(np.percentile(gaps, 50))
    assert figures["tpot_p99_s"] == pytest.approx(np.percentile(gaps, 99))
    assert figures["ttft_p99_s"] == pytest.approx(np.percentile(first, 99))
    long = [request for request in requests if len(request.prompt) >= 1000]
    assert figures["long_ttft_p50_s"] == pytest.approx(np.median([each.token_s[0] - each.arrival_s for each in long]))
    tokens = sum(each.max_new_tokens for each in requests)
    span_s = max(each.token_s[-1] for each in requests) - requests[0].arrival_s
    assert figures["tokens_per_s"] == pytest.approx(tokens / span_s)
    assert 0 < figures["mixed_iteration_share"] < 1


def test_metrics_of_nothing_are_missing_not_zero() -> None:
    figures = metrics.summary([Request(0, range(9), 3, phase=Phase.REFUSED, refusal="too long")], [])
    assert figures["requests_refused"] == 1
    assert figures["requests_served"] == 0
    for name in ("tokens_per_s", "ttft_p50_s", "tpot_p99_s", "mixed_iteration_share"):
        assert math.isnan(figures[name])


def test_bubbles_by_hand() -> None:
    first, second = Request(0, range(1), 1, token_s=[5.0]), Request(1, range(1), 1, arrival_s=20.0, token_s=[30.0])
    busy = [(1.0, 2.0), (1.5, 4.0), (8.0, 9.0), (21.0, 40.0)]
    assert metrics.bubble_s([first, second], busy) == (1 + 1) + 1
