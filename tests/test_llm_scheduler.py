"""First come, first served: nobody is lost, served twice, or overtaken, and the cache is never overfull."""

from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import BatchPlan, FirstComeFirstServed, Load, ServerState
from workloads.llm.serve import serve
from workloads.llm.simulate import SimulatedExecutor, simulate

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.floats(0, 20)), min_size=1, max_size=25)


def requests_of(lengths: Sequence[tuple[int, int, float]]) -> list[Request]:
    ordered = sorted(lengths, key=lambda each: each[2])
    return [Request(n, range(prompt), new, arrival) for n, (prompt, new, arrival) in enumerate(ordered)]


def one_second(plan: BatchPlan) -> float:
    return 1.0


class Audited(FirstComeFirstServed):
    """Holds every plan to the rules, with nothing but its own record of what ran."""

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        plan = super().next_batch(state)
        if plan is not None:
            self.audit(plan, state)
        return plan

    def audit(self, plan: BatchPlan, state: ServerState) -> None:
        assert 1 <= len(plan.requests) <= self.max_requests
        assert sum(plan.tokens) <= self.max_tokens
        assert len({request.id for request in plan.requests}) == len(plan.requests)
        for request, tokens in zip(plan.requests, plan.tokens, strict=True):
            assert request.phase is Phase.RUNNING
            assert not request.in_flight
            assert 1 <= tokens <= request.pending
            assert request.computed + tokens <= len(state.blocks.table(request.id)) * state.blocks.block_size
        held = [block for request in state.running.values() for block in state.blocks.table(request.id)]
        assert len(held) == len(set(held))
        assert len(held) + state.blocks.free_blocks == state.blocks.blocks, "only running requests hold blocks"
        if state.running and state.waiting:
            assert max(state.running) < min(request.id for request in state.waiting), "those running are the oldest"


@settings(max_examples=150)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 5), st.integers(1, 40), st.integers(1, 8), st.integers(1, 4))
def test_every_request_ends_in_order_whatever_the_sizes(
    lengths: list[tuple[int, int, float]], blocks: int, block_size: int, tokens: int, batch: int, stages: int
) -> None:
    requests = requests_of(lengths)
    state = ServerState(BlockAllocator(blocks, block_size))
    simulation = simulate(requests, Audited(tokens, batch), state, lambda plan: 0.1 + sum(plan.tokens) / 10, stages)

    fits = [each for each in requests if len(each.prompt) + each.max_new_tokens - 1 <= blocks * block_size]
    assert [each for each in requests if each.phase is Phase.FINISHED] == fits
    assert [each for each in requests if each.phase is Phase.REFUSED] == [each for each in requests if each not in fits]
    for request in fits:
        assert len(request.generated) == len(request.token_s) == request.max_new_tokens
        assert request.token_s == sorted(request.token_s)
        assert request.token_s[0] > request.arrival_s
        assert request.computed == len(request.prompt) + request.max_new_tokens - 1
    first_tokens = [request.token_s[0] for request in fits]
    if stages == 1:  # else a short prompt may pass a long one whose chunk is in flight
        assert first_tokens == sorted(first_tokens), "first come, first served"
    emitted = [request for iteration in simulation.iterations for request in iteration.emitted]
    assert len(emitted) == sum(request.max_new_tokens for request in fits)
    ran = sum(each.load.decodes + each.load.prefill_tokens for each in simulation.iterations)
    needed = sum(request.computed for request in fits)
    assert ran >= needed
    if not any(request.preemptions for request in requests):
        assert ran == needed, "nothing is computed twice without a preemption"
    assert state.blocks.free_blocks == blocks
    assert not state.busy


@given(LENGTHS, st.data())
def test_cancelled_requests_leave_and_others_do_not_notice(
    lengths: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    """A victim may run, wait, or not have come yet."""
    requests = requests_of(lengths)
    stages = data.draw(st.integers(1, 3))
    state = ServerState(BlockAllocator(14, 3))
    executor = SimulatedExecutor(lambda plan: 1.0, stages)
    cancelled = set()
    for _ in serve(requests, Audited(16, 4), state, executor, stages):
        victim = data.draw(st.none() | st.sampled_from(requests))
        if victim and victim.phase in (Phase.WAITING, Phase.RUNNING):
            state.cancel(victim)
            cancelled.add(victim)
    for request in requests:
        assert request.phase is (Phase.CANCELLED if request in cancelled else Phase.FINISHED)
        assert request in cancelled or len(request.generated) == request.max_new_tokens
    assert state.blocks.free_blocks == 14


def test_two_requests_of_one_id_are_never_served_together() -> None:
    first, second, third = Request(7, range(3), 2), Request(7, range(2), 2), Request(7, range(4), 1, arrival_s=99.0)
    state = ServerState(BlockAllocator(8, 4))
    simulate([first, second, third], FirstComeFirstServed(8, 4), state, lambda plan: 1.0)
    assert [len(each.generated) for each in (first, second, third)] == [2, 0, 1]
    assert second.phase is Phase.REFUSED
    assert second.refusal == "request 7: another request with this id is waiting or running"
    assert state.blocks.free_blocks == 8


def test_a_request_is_served_once() -> None:
    state, scheduler = ServerState(BlockAllocator(8, 4)), FirstComeFirstServed(8, 4)
    request = Request(3, range(3), 2)
    with pytest.raises(SaihError, match="request 3 is listed twice"):
        simulate([request, request], scheduler, state, lambda plan: 1.0)
    simulate([request], scheduler, state, lambda plan: 1.0)
    with pytest.raises(SaihError, match="request 3 is finished: make a new one to serve it again"):
        simulate([request], scheduler, state, lambda plan: 1.0)
    with pytest.raises(SaihError, match="request 3 is finished: only one that was never served can be submitted"):
        state.submit(request)
    assert request.phase is Phase.FINISHED


def test_one_cancelled_before_it_comes_is_passed_over() -> None:
    early, late = Request(0, range(2), 3), Request(0, range(2), 3, arrival_s=2.5)
    state = ServerState(BlockAllocator(8, 4))
    for number, _ in enumerate(serve([early, late], FirstComeFirstServed(8, 4), state, SimulatedExecutor(one_second))):
        if number == 0:
            state.cancel(late)
    assert (early.phase, len(early.generated)) == (Phase.FINISHED, 3), "the blocks of its id stay with who runs"
    assert (late.phase, late.generated) == (Phase.CANCELLED, [])


@pytest.mark.parametrize("stages", [1, 3])
def test_leaving_early_waits_for_what_is_in_flight(stages: int) -> None:
    state, executor = ServerState(BlockAllocator(40, 4)), SimulatedExecutor(one_second, stages)
    requests = [Request(number, range(5), 6) for number in range(6)]
    with closing(serve(requests, FirstComeFirstServed(8, 2), state, executor, stages)) as iterations:
        for _ in zip(range(4), iterations, strict=False):
            pass
    assert not any(request.in_flight for request in requests)
    later = [Request(number, range(5), 6) for number in range(10, 13)]
    list(serve(later, FirstComeFirstServed(8, 2), state, executor, stages))
    assert all(len(request.generated) == 6 for request in [*requests, *later]), "those left go on with the new ones"
    assert state.blocks.free_blocks == 40


def test_the_newest_gives_way_and_is_recomputed() -> None:
    old, new = Request(0, range(4), 4), Request(1, range(3), 2)
    state = ServerState(BlockAllocator(8, 1))
    state.submit(old)
    state.submit(new)
    scheduler = FirstComeFirstServed(max_tokens=100, max_requests=10)

    def step() -> tuple[list[int], list[int], list[int]]:
        plan = scheduler.next_batch(state)
        assert plan is not None
        state.complete(plan, [7] * len(plan.sampled()), 0.0)
        return [each.id for each in plan.requests], plan.tokens, [each.id for each in plan.evicted]

    assert step() == ([0, 1], [4, 3], [])
    assert step() == ([0], [1], [1]), "one block is free and two are needed"
    assert new.computed == 0
    assert new.preemptions == 1
    assert step() == ([0], [1], [])
    assert step() == ([0], [1], []), "four blocks do not fit beside seven"
    assert step() == ([1], [4], []), "its prompt and the token it had"
    assert new.phase is Phase.FINISHED
    assert new.generated == [7, 7]


def test_a_long_prompt_runs_in_chunks_beside_decodes() -> None:
    state = ServerState(BlockAllocator(100, 4))
    state.submit(Request(0, range(3), 9))
    state.submit(Request(1, range(20), 2))
    loads = []
    scheduler = FirstComeFirstServed(max_tokens=8, max_requests=4)
    while (plan := scheduler.next_batch(state)) and len(loads) < 4:
        loads.append(plan.load())
        state.complete(plan, [0] * len(plan.sampled()), 0.0)
    assert loads == [Load(0, 0, 0, 8), Load(1, 4, 4, 7), Load(1, 5, 5, 7), Load(2, 26, 20, 0)]


def test_a_prompt_of_one_token_is_no_decode() -> None:
    plan = BatchPlan([Request(0, range(1), 3), Request(1, range(1), 3, generated=[0], computed=1)], [1, 1])
    assert plan.load() == Load(1, 2, 2, 1)


def test_requests_are_served_as_they_arrive_not_as_they_are_listed() -> None:
    requests = [Request(0, range(1), 1, arrival_s=5.0), Request(1, range(1), 1, arrival_s=1.0)]
    simulate(requests, FirstComeFirstServed(1, 1), ServerState(BlockAllocator(1, 1)), lambda plan: 1.0)
    assert [request.token_s for request in requests] == [[6.0], [2.0]]


def test_a_stop_token_ends_a_request() -> None:
    request = Request(0, range(2), 10, stop_token=5)
    assert [request.emit(4, 0.0), request.emit(5, 1.0)] == [False, True]


def test_tokens_span_prompt_and_generated() -> None:
    request = Request(0, [10, 11, 12], 5, generated=[20, 21])
    context = [10, 11, 12, 20, 21]
    for first in range(5):
        for count in range(1, 6 - first):
            assert request.tokens(first, count) == context[first : first + count]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request(3, range(30), 4), "request 3: 30 prompt and 4 new tokens exceed the KV cache, which holds 32 tokens"),
        (Request(4, range(20), 2), "request 4: 20 prompt and 2 new tokens exceed the model's 20 positions"),
        (Request(5, [], 4), "request 5: a request needs a prompt"),
        (Request(7, [3, 40], 1), "request 7: its prompt has tokens outside the vocabulary of 40"),
        (Request(8, [-1], 1), "request 8: its prompt has tokens outside the vocabulary of 40"),
        (Request(6, range(3), 0), "request 6: a request needs a prompt and at least one new token"),
    ],
)
def test_what_could_never_finish_is_refused(request_: Request, why: str) -> None:
    with pytest.raises(SaihError, match=why):
        ServerState(BlockAllocator(8, 4), 20, vocabulary=40).submit(request_)
    ServerState(BlockAllocator(8, 4), 20, vocabulary=20).submit(Request(0, range(20), 1))


def test_a_scheduler_that_runs_nothing_is_told() -> None:
    class Lazy:
        def next_batch(self, state: ServerState) -> BatchPlan | None:
            return None

    with pytest.raises(SaihError, match="Lazy runs nothing while 1 requests wait"):
        simulate([Request(0, range(2), 2)], Lazy(), ServerState(BlockAllocator(8, 4)), lambda plan: 1.0)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 1), (1, 0)])
def test_empty_batches_are_refused(tokens: int, batch: int) -> None:
    with pytest.raises(SaihError, match="at least one token and one request"):
        FirstComeFirstServed(tokens, batch)
