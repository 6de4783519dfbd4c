"""PipeMax: batches within their budget, nobody lost, the tokens of resident batches, and the predictor's bounds."""

from __future__ import annotations

import json
import random
import threading
from collections import deque
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saih import workload
from saih.core import Context, Place, Point
from saih.errors import SaihError
from tests import pipemax_ranks
from workloads.llm.allocator import BlockAllocator
from workloads.llm.copythread import CopyThread
from workloads.llm.costs import CostModel
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.machines import MACHINES, USABLE_MEMORY
from workloads.llm.pipemax import bench, simulation, spec
from workloads.llm.pipemax.arenas import Arenas
from workloads.llm.pipemax.compose import MOST_SKIPPED, Candidate, Held, compose
from workloads.llm.pipemax.expected import StageModel, expect
from workloads.llm.pipemax.orders import Kind, Order, from_words, to_words
from workloads.llm.pipemax.predictor import PARAMETERS, predict, predict_on, table
from workloads.llm.pipemax.real import RealDevice
from workloads.llm.pipemax.rotation import Beside, Rotation
from workloads.llm.pipemax.simulated import SimulatedDevice
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.prefill import prefilled_tokens
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import BatchPlan, Load
from workloads.llm.shard import Mesh
from workloads.llm.transfer import Urgency
from workloads.llm.worker import Step, Worker

MODEL = CostModel(fixed_s=10.0, per_decode_s=0.1, per_context_token_s=0.01)


@pytest.fixture(autouse=True)
def _known_well_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is calibrated once: nothing here depends on how well."""
    monkeypatch.setattr(bench, "REPEATS", 1)


def params(**settings: Any) -> dict[str, Any]:
    defaults = {name: each.default for name, each in workload.parameters(workload.spec("pipemax")).items()}
    return defaults | settings


CANDIDATES = st.lists(st.tuples(st.integers(1, 400), st.integers(0, MOST_SKIPPED + 1)), max_size=20).map(
    lambda drawn: [Candidate(n, tokens, -(-tokens // 16), skipped) for n, (tokens, skipped) in enumerate(drawn)]
)


@given(CANDIDATES, st.integers(0, 120), st.floats(0, 30))
def test_a_batch_is_within_its_budget_and_has_nobody_twice(
    candidates: list[Candidate], blocks: int, target_s: float
) -> None:
    chosen = compose(Held(2, 300), candidates, blocks, MODEL, target_s)
    assert sum(each.blocks for each in chosen) <= blocks
    assert len({each.id for each in chosen}) == len(chosen)
    assert set(chosen) <= set(candidates)
    late = [each for each in candidates if each.skipped >= MOST_SKIPPED]
    if sum(each.blocks for each in late) <= blocks:
        assert set(late) <= set(chosen), "who was skipped too often goes first"
    if not target_s and not late:
        most = 0
        for each in sorted(each.blocks for each in candidates):
            if each > blocks:
                break
            blocks, most = blocks - each, most + 1
        assert len(chosen) == most, "warming up: as many as can be"


def test_a_steady_batch_ends_at_its_target_and_swaps_to_fill_its_budget() -> None:
    short, long = Candidate(0, 16, 1), Candidate(1, 160, 10)
    assert compose(Held(5, 100), [short], 99, MODEL, 11.4) == [], "the batch takes as long as the others already"
    assert compose(Held(5, 100), [short, long], 10, MODEL, 14.0) == [long], "10 blocks are used, not 1"
    assert compose(Held(5, 100), [short, long], 10, MODEL, 11.6) == [short], "the long one would take too long"


@pytest.mark.parametrize(
    ("machine", "model", "cap", "moved", "gain"),
    [
        ("rtx5090", "llama-70b", 0.0, 0.36, 1.33),
        ("l20", "llama-70b", 0.0, 0.20, 1.14),
        ("h200", "llama-70b", 0.0, 0.03, 1.01),
        ("h200", "llama-70b", 32e9, 0.16, 1.12),
    ],
)
def test_the_predictor_gives_the_derived_table(machine: str, model: str, cap: float, moved: float, gain: float) -> None:
    found = predict_on(MACHINES[machine], PARAMETERS[model], cap)
    assert found.moved_share == pytest.approx(moved, abs=0.02)
    assert found.gain == pytest.approx(gain, abs=0.02)
    line = next(line for line in table() if line.split()[:2] == [machine, model] and ("32 GB" in line) == bool(cap))
    assert line.endswith(f"{found.gain:.2f}x")


@pytest.mark.parametrize(
    ("machine", "model", "moved", "gain"), [("h100", "qwen3-235b-a22b", 0.37, 1.37), ("h200", "llama-405b", 0.26, 1.23)]
)
def test_large_models_gain_as_derived_with_97_percent_of_the_memory(
    machine: str, model: str, moved: float, gain: float
) -> None:
    the = MACHINES[machine]
    found = predict_on(the, PARAMETERS[model], the.memory_bytes * 0.967 / USABLE_MEMORY)
    assert found.moved_share == pytest.approx(moved, abs=0.01)
    assert found.gain == pytest.approx(gain, abs=0.01)


@given(st.floats(1e6, 1e12), st.floats(0, 1e12), st.integers(2, 16), st.floats(0, 1))
def test_a_prediction_keeps_to_its_own_equations(kv: float, weights: float, stages: int, link: float) -> None:
    found = predict(kv, weights, stages, link)
    held = found.batch * kv / stages
    assert 0 <= found.moved_share <= 1
    assert held * (stages * (1 - found.moved_share) + 2 * found.moved_share) == pytest.approx(kv)
    assert found.moved_share <= link * (weights / held + 1) * 1.001 + 1e-9
    assert 1 - 1e-9 <= found.gain <= found.batch * (1 + 1e-9)
    assert found.batch <= stages / 2 + 1e-9
    with pytest.raises(SaihError, match="no room"):
        predict(0.0, weights, stages, link)


def rotation_of(
    variant: str, blocks: int, link: float, stages: int = 4, order: str = "priority", **device_words: Any
) -> tuple[Rotation, SimulatedDevice]:
    pool = HostPool(20_000, 16)
    state = PooledState(BlockAllocator(blocks, 16), pool)
    model = CostModel(1e-2, 1e-5, 1e-7)
    policy = simulation.policy(variant, stages)
    words = {"phases": policy.phases, "offload": policy.offload} | device_words
    device = SimulatedDevice(state, model, 1000, link, 0.0, order, **words)
    return Rotation(state, policy, device, model, 1000), device


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(spec.VARIANTS),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=40),
    st.sampled_from([1e5, 1e6, 1e9]),
)
def test_everybody_is_served_and_arenas_are_empty_at_the_end(
    variant: str, lengths: list[tuple[int, int]], link: float
) -> None:
    rotation, _ = rotation_of(variant, 100, link)
    requests = [Request(n, range(prompt), new) for n, (prompt, new) in enumerate(lengths)]
    simulation.prefilled(requests)
    rotation.serve(requests)
    assert all(len(each.generated) == each.max_new_tokens for each in requests)
    assert rotation.state.blocks.free_blocks == 100
    assert rotation.state.pool.blocks.free_blocks == 20_000
    assert sum(turn.requests for turn in rotation.turns) == sum(new for _, new in lengths)
    for request in requests:
        assert request.token_s == sorted(request.token_s)


@pytest.mark.parametrize("variant", ["td-pipe", "pipemax"])
def test_a_soak_with_cancellations_loses_nobody(variant: str) -> None:
    rotation, _ = rotation_of(variant, 400, 1e6, stages=8)
    rng = random.Random(5)  # noqa: S311
    requests = [Request(n, range(rng.randint(1, 200)), rng.randint(1, 12)) for n in range(5000)]
    simulation.prefilled(requests)
    complete, unwanted = rotation.state.complete, rng.sample(requests, 500)

    def complete_and_cancel(*words: Any) -> Any:
        if unwanted and rng.random() < 0.2:
            request = unwanted.pop()
            if request.phase in (Phase.WAITING, Phase.RUNNING):
                rotation.state.cancel(request)
        return complete(*words)

    rotation.state.complete = complete_and_cancel  # type: ignore[method-assign]
    rotation.serve(requests)
    ended = {phase: sum(each.phase is phase for each in requests) for phase in Phase}
    assert ended[Phase.FINISHED] + ended[Phase.CANCELLED] == 5000
    assert ended[Phase.CANCELLED] > 100
    assert rotation.state.blocks.free_blocks == 400
    assert rotation.state.pool.blocks.free_blocks == 20_000


def test_offloading_makes_batches_larger_where_the_link_is_fast_enough() -> None:
    batch = {}
    for variant in ("td-pipe", "pipemax"):
        rotation, _ = rotation_of(variant, 400, 1e7, stages=8)
        requests = [Request(n, range(100), 40) for n in range(600)]
        simulation.prefilled(requests)
        rotation.serve(requests)
        batch[variant] = simulation.figures(rotation)["mean_batch"]
    assert batch["pipemax"] > 1.3 * batch["td-pipe"]


def test_unequal_batches_wait_for_each_other() -> None:
    """A batch is back after S of its own steps: one long and one short one leave the stage idle."""
    rotation, device = rotation_of("pp-resident", 4000, 1e9, stages=2)
    requests = [Request(n, range(n % 2 * 5000 + 10), 5) for n in range(2)]
    simulation.prefilled(requests)
    rotation.serve(requests)
    busy_s = sum(turn.end_s - turn.begin_s for turn in rotation.turns)
    long_s = max(turn.end_s - turn.begin_s for turn in rotation.turns)
    assert sum(turn.bubble_s for turn in rotation.turns) > 0
    assert device.now_s() == pytest.approx(9 * long_s, rel=0.05), "four turns there and back, and one there"
    assert busy_s < device.now_s()


def test_only_the_turn_that_a_prompt_joins_takes_longer_for_it() -> None:
    """Prompts of the batch that follows are taken in while this one is about to run."""
    rotation, _ = rotation_of("pp-resident", 60, 1e9, prefill_s_per_token=1e-3)
    requests = [Request(n, range(20 + 7 * n), 3 + n % 4) for n in range(16)]
    simulation.prefilled(requests)
    rotation.serve(requests)
    joined = 0
    for turn in rotation.turns:
        prompts = [len(each.prompt) for each in requests if each.token_s[0] == turn.end_s]
        decoding_s = rotation.model.step_s(Load(turn.requests, sum(turn.lengths), max(turn.lengths), 0))
        assert turn.end_s - turn.begin_s == pytest.approx(decoding_s + 1e-3 * sum(prompts))
        joined += len(prompts)
    assert joined == 16


def test_what_is_fetched_waits_for_all_that_leaves_and_the_stage_does_not() -> None:
    rotation, device = rotation_of("pipemax", 100, 1e3)
    state, request = rotation.state, Request(0, range(161), 400)
    simulation.prefilled([request])
    state.submit(request)
    state.admit()
    state.pool.hold(0, request.computed)
    state.blocks.grow(0, 600)
    state.start(request)
    for computed in (320, 321):  # ten blocks, then one more: the second is behind the first on the link
        request.computed = computed
        device.offload(request)
    device._prefilled.add(0)
    device.fetch(request)
    coming = device._coming[0]
    device.evict(request)
    assert coming.dropped
    assert device.now_s() == 0.0, "the stage goes on meanwhile"
    device.fetch(request)
    device.wait(request)
    away_s, back_s = 11.0, 21.0
    assert device.now_s() == pytest.approx(away_s + back_s), "blocks of 1000 bytes at 1000 bytes/s, there and back"


def test_room_comes_from_all_waiting_batches_and_the_furthest_turn_first() -> None:
    rotation, device = rotation_of("pipemax", 400, 1e7, stages=4)
    state = rotation.state
    requests = [Request(n, range(100), 9) for n in range(8)]
    simulation.prefilled(requests)
    for request in requests:  # two in each of four batches
        state.submit(request)
    state.admit()
    for request in requests:
        rotation._enter(request, request.id // 2)
    evicted: list[int] = []
    device.evict = lambda request: evicted.append(request.id)  # type: ignore[method-assign]
    assert not rotation._evict(rotation._leaving(1, 2), 400)
    assert evicted == [0, 1, 6, 7], "batch 1 runs and batch 2 is next: 0 ran last, and 3 has its turn after the next"


def test_a_long_one_is_not_overtaken_for_ever() -> None:
    rotation, _ = rotation_of("pipemax", 60, 1e6)
    requests = [Request(n, range(16), 30) for n in range(300)]
    requests[60] = long = Request(60, range(120), 30)
    simulation.prefilled(requests)
    rotation.serve(requests)
    overtook = sum(each.token_s[0] < long.token_s[0] for each in requests[61:])
    assert overtook < 100, f"{overtook} of 239 younger ones had their first token before it"


@pytest.mark.parametrize("order", ["priority", "fifo"])
def test_an_activation_waits_for_a_chunk_or_in_fifo_for_all_that_is_fetched(order: str) -> None:
    rotation, _ = rotation_of("pipemax", 400, 1e7, stages=8, order=order, row_bytes=8.0)
    requests = [Request(n, range(100), 40) for n in range(300)]
    simulation.prefilled(requests)
    rotation.serve(requests)
    figures = simulation.figures(rotation)
    chunk_s = 16 * 1000 / 1e7
    assert (figures["activation_p95_s"] <= chunk_s + 1e-4) == (order == "priority")
    assert all(turn.computed_s == pytest.approx(turn.predicted_s) for turn in rotation.turns), "waits are apart from it"


def test_prompts_go_to_the_host_over_the_link() -> None:
    """A phase lasts until they are there; a resident variant's prompts stay where they are."""
    took_s = {}
    for variant in ("td-pipe", "pipemax"):
        rotation, device = rotation_of(variant, 400, 1e3, prefill_s_per_token=1e-6)
        requests = [Request(n, range(33), 1) for n in range(4)]
        simulation.prefilled(requests)
        rotation.serve(requests)
        took_s[variant] = device.prefill_s
    assert took_s["td-pipe"] == pytest.approx(4 * 33e-6)
    assert took_s["pipemax"] == pytest.approx(4 * 2.0), "two blocks each at one block a second"


def ready(**settings: Any) -> Any:
    tiny = {"shape": "llama-tiny", "requests": 40, "shrink": 16, "kv_tokens": 384, "stages": 4}
    point = Point("pipemax", params(**(tiny | settings)), seed=4)
    return bench.setup(point, Context(Place(0, 0, 1), "cpu", "/nowhere"))


def test_tokens_are_those_of_resident_batches() -> None:
    found = {}
    cases = [("td-pipe", "block_first", "priority"), ("pp-resident", "block_first", "priority")]
    cases += [("pipemax", layout, order) for layout in ("block_first", "layer_first") for order in ("priority", "fifo")]
    cases += [("pipemax-static", "block_first", "priority")]
    moved = 0.0
    for variant, layout, order in cases:
        made = ready(variant=variant, layout=layout, order=order)
        check = made.check()
        assert check.passed, check.why
        moved += check.numbers["fetched_blocks_per_turn"] if variant == "pipemax" else 0.0
        found[variant, layout, order] = [each.generated for each in made._serve()[1]]
    assert moved > 0, "blocks went to the host and came back"
    resident = found["td-pipe", "block_first", "priority"]
    assert len({token for each in resident for token in each}) > 10, "tokens vary, so errors would show"
    assert all(each == resident for each in found.values())


def test_a_fetch_that_goes_wrong_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workloads.llm.copythread.copy_blocks", lambda *words: None)
    assert not ready().check().passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 2}, "stages=8 need 8 ranks, or 1 that stands for all; there are 2"),
        ({"variant": "tp"}, "simulated only"),
        ({"emulated_link": 0.0}, "emulated_link must be above 0"),
        ({"time": "simulated", "shape": "gpt-175b"}, "have no room for gpt-175b"),
    ],
)
def test_what_makes_no_sense_is_refused_in_planning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaihError, match=message):
        spec.cost(params(**settings))


@pytest.mark.parametrize("variant", ["td-pipe", "pipemax"])
def test_prompts_take_their_part_of_the_emulated_link(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent = ready(variant=variant, requests=12), []
    submit = CopyThread.submit

    def counted(self: CopyThread, urgency: Urgency, source: Any, target: Any, pairs: Any, *words: Any) -> Any:
        sent.append(len(pairs) if urgency is Urgency.OFFLOAD else 0)
        return submit(self, urgency, source, target, pairs, *words)

    monkeypatch.setattr(CopyThread, "submit", counted)
    made._serve()
    prompts = sum(-(-(len(each.prompt) - 1) // 16) for each in made.trace)
    assert sum(sent) >= prompts if variant == "pipemax" else sum(sent) < prompts


def test_a_request_beyond_the_cache_is_refused_before_anything_runs() -> None:
    with pytest.raises(SaihError, match="exceed the KV cache, which holds 64 tokens"):
        ready(kv_tokens=64, shrink=1)


def trace_of(count: int, prompt: int, new: int) -> list[Request]:
    return [Request(number, range(prompt), new) for number in range(count)]


PLENTY = trace_of(10_000, 90, 20)


@given(st.integers(3, 16), st.floats(1e-3, 0.3), st.floats(1e-4, 1e-1))
def test_without_a_cost_of_requests_the_gain_on_paper_is_the_predictors(
    stages: int, link: float, fixed_s: float
) -> None:
    """A fixed time of W tokens' reading, and prompts only on their way: (x / (W + x)) / (x0 / (W + x0))."""
    per_token_s = 1e-6
    stage = StageModel(1e5, CostModel(fixed_s, 0.0, per_token_s), 0.0, link / per_token_s)
    plenty = PLENTY
    resident, moving = (expect(plenty, stage, simulation.policy(name, stages)) for name in ("td-pipe", "pipemax"))
    told = predict(1e5, fixed_s / per_token_s, stages, link)
    decoding_s = 200_000 / moving.tokens_per_s - 10_000 * 90 * per_token_s / link
    assert 200_000 / resident.tokens_per_s / decoding_s == pytest.approx(told.gain, rel=1e-6)
    assert moving.batch / resident.batch == pytest.approx(told.batch, rel=1e-6)


def test_a_fixed_budget_moves_its_share_of_the_cache_each_step() -> None:
    stage = StageModel(1e5, CostModel(1e-2, 0.0, 1e-6), 0.0, 1e9)
    found = expect(trace_of(10_000, 90, 20), stage, simulation.policy("pipemax-static", 8))
    assert found.moved_share * found.batch * 100 == pytest.approx(spec.STATIC_SHARE * 1e5)


def test_prompts_take_their_time_on_paper() -> None:
    stage = StageModel(1e4, CostModel(1e-2), 1e-4, 0.0)
    found = expect(trace_of(1000, 50, 10), stage, simulation.policy("tp", 8))
    batch = 1e4 / 55
    assert found.batch == pytest.approx(batch)
    assert found.tokens_per_s == pytest.approx(10_000 / (10_000 * 1e-2 / batch + 1000 * 50 * 1e-4))


def test_on_paper_a_batch_without_phases_is_late_for_its_prompts() -> None:
    """Batches of 10 and one token each: ten prompts join a turn on average, and more the one of 8 that most join.

    A rotation is never faster than by the mean, and never slower than by the latest batch.
    """
    stage = StageModel(8 * 10 * 50.5, CostModel(1e-2), 1e-3, 0.0)
    found = expect(trace_of(1000, 50, 1), stage, simulation.policy("pp-resident", 8))
    rng = random.Random(3)  # noqa: S311
    draws = [sum(rng.random() < 0.01 for _ in range(1000)) for _ in range(800)]
    latest = sum(max(draws[first : first + 8]) for first in range(0, 800, 8)) / 100
    assert found.batch == pytest.approx(10)
    assert 10 / (1e-2 + latest * 50 * 1e-3) < found.tokens_per_s < 0.9 * 10 / (1e-2 + 10 * 50 * 1e-3)


def test_who_has_no_phases_computes_prompts_in_the_step_that_they_join() -> None:
    made = ready(variant="pp-resident", requests=12)
    rotation, requests = made._serve()
    assert sum(each.preemptions for each in requests) == 0, "else some come from the pool"
    assert all(rotation.state.pool.blocks.table(each.id) == [] for each in requests)
    assert rotation.turns[0].beside.prompts_s > 0
    joined = sum(turn.beside.prompts_s > 1e-4 for turn in rotation.turns)
    assert 1 <= joined <= 12


def test_what_disturbs_a_single_step_disturbs_no_other_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gated(monkeypatch) as gated:
        state = PooledState(BlockAllocator(8, 1), HostPool(8, 1))
        device = RealDevice(state, cast(Worker, Echo(gated.device)), gated.arenas, 1.0)
        for took_s in (0.2, 0.2, 0.2, 9.2, 0.2):
            assert device.stage_s(took_s, 0.1) == pytest.approx(0.2), "twice as slow as predicted lately"


def test_prompts_leave_beside_the_computation_of_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen packs of a fourth of the cache each: three are computed before one of them has left."""
    computed: list[list[int]] = []
    with Gated(monkeypatch) as gated:
        state = PooledState(BlockAllocator(8, 1), HostPool(64, 1))
        requests = [Request(n, range(3), 1) for n in range(16)]
        for request in requests:
            request.computed = prefilled_tokens(request)
            state.pool.enter(request)
        echo = Echo(gated.device)
        device = RealDevice(state, cast(Worker, echo), gated.arenas, 1.0)

        def compute(step: Step) -> torch.Tensor:
            computed.append(step.blocks.tolist())
            if len(computed) == 4:
                gated.gate.set()
            return torch.zeros(0)

        monkeypatch.setattr(echo, "run", compute)
        device.prefill(requests, over_link=True)
        assert len({block for blocks in computed[:4] for block in blocks}) == 8
        assert all(each.done for going in gated.arenas._going.values() for each in going), "all are on the host"


# -- Blocks on their way -----------------------------------------------------------------------------------------------


class Gated:
    """Arenas of blocks of one token each, eight on the device; what leaves the device does so once `gate` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.host = (PagedKV(1, 1, 1, blocks=n, block_size=1, layout="block_first") for n in (8, 64))
        self.gate = threading.Event()
        monkeypatch.setattr("workloads.llm.copythread.copy_blocks", self._copy)
        self.arenas = Arenas(self.device, self.host, None)

    def _copy(self, source: PagedKV, target: PagedKV, *words: Any) -> Any:
        if source is self.device:
            assert self.gate.wait(30)
        return copy_blocks(source, target, *words)

    def do(self, kind: Kind, owner: int, *pairs: tuple[int, int]) -> None:
        self.arenas.do(Order(kind, owner, pairs))

    def __enter__(self) -> Gated:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.gate.set()
        self.arenas.__exit__(kind, error, trace)


def test_a_fetch_waits_for_who_leaves_its_blocks_and_for_its_own_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gated(monkeypatch) as gated:
        gated.device.arena[0], gated.host.arena[5] = 1.0, 2.0
        gated.do(Kind.OFFLOAD, 1, (0, 4))
        gated.do(Kind.LEAVE, 1)
        gated.do(Kind.FETCH, 2, (5, 0))
        gated.do(Kind.FETCH, 1, (4, 3))
        gated.do(Kind.FETCH, 3, (6, 7))
        gated.do(Kind.WAIT, 3)
        assert not any(each.done for each in gated.arenas._coming.values()), "they wait, and another one does not"
        gated.gate.set()
        for owner in (1, 2):
            gated.do(Kind.WAIT, owner)
        assert gated.host.arena[4].flatten().tolist() == [1.0, 1.0]
        assert gated.device.arena[3].flatten().tolist() == [1.0, 1.0]
        assert gated.device.arena[0].flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("writer", ["step", "place"])
def test_who_writes_to_blocks_waits_for_all_that_leaves_them(writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gated(monkeypatch) as gated:
        for _ in range(2):  # the block was not full the first time
            gated.do(Kind.OFFLOAD, 1, (2, 7))
        gated.do(Kind.LEAVE, 1)
        going = list(gated.arenas._going[1])
        threading.Timer(0.2, gated.gate.set).start()
        assert not any(each.done for each in going)
        if writer == "step":
            assert gated.arenas.before_step([0, 2]) > 0
        else:
            gated.do(Kind.PLACE, 9, (6, 2))
        assert all(each.done for each in going)
        assert gated.arenas.before_step(range(8)) == 0


def test_what_goes_is_dropped_when_its_request_ends_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with Gated(monkeypatch) as gated:
        gated.do(Kind.OFFLOAD, 0, (1, 1))  # moves until the gate opens
        gated.do(Kind.OFFLOAD, 1, (0, 4))
        gated.do(Kind.LEAVE, 1)
        gated.do(Kind.FETCH, 2, (5, 0))
        gated.do(Kind.FETCH, 3, (6, 7))
        gated.do(Kind.WAIT, 3)  # the thread has seen that 2 may not begin
        gated.do(Kind.FORGET, 1)
        gated.do(Kind.WAIT, 2)
        assert gated.arenas.before_step([0]) == 0
        assert not gated.arenas._going[0][0].done


def test_a_copy_that_fails_is_never_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: PagedKV, target: PagedKV, *words: Any) -> Any:
        raise OSError("no such memory")

    monkeypatch.setattr("workloads.llm.copythread.copy_blocks", fail)
    device, host = (PagedKV(1, 1, 1, blocks=8, block_size=1) for _ in range(2))
    arenas = Arenas(device, host, None)
    for order in (Order(Kind.OFFLOAD, 1, [(0, 4)]), Order(Kind.LEAVE, 1), Order(Kind.FETCH, 2, [(5, 0)])):
        arenas.do(order)
    with pytest.raises(SaihError, match="a copy of blocks failed: no such memory"):
        arenas.do(Order(Kind.WAIT, 2))
    with pytest.raises(SaihError, match="a copy of blocks failed"):  # nobody may have waited
        arenas.__exit__(None, None, None)


class Echo:
    """In place of a model: the token at place p of request n is 100 n + p, and so is what the cache holds of it."""

    def __init__(self, kv: PagedKV) -> None:
        self.kv, self.mesh, self.steps = kv, Mesh(), 0

    def run(self, step: Step) -> torch.Tensor:
        keys, values = (x.flatten(1) for x in self.kv.layer(0))
        tables = step.blocks.long().split(step.table_lengths_B.tolist())
        rows = zip(step.ids_T.split(step.counts_B.tolist()), step.starts_B.tolist(), tables, strict=True)
        last = []
        for ids, start, blocks in rows:
            first = int(ids[0]) - start
            for held in (keys[blocks].flatten(), values[blocks].flatten()):
                assert held[:start].tolist() == list(range(first, first + start)), "what was stored has come back"
            for place, token in enumerate(ids.tolist(), start):
                keys[blocks[place // 4], place % 4] = values[blocks[place // 4], place % 4] = token
            last.append(int(ids[-1]))
        self.steps += 1
        return torch.tensor(last)[step.sampled_R.long()] + 1


@pytest.mark.parametrize("variant", ["td-pipe", "pipemax", "pipemax-static"])
def test_a_soak_with_threads_and_cancellations_mixes_nothing_up(variant: str) -> None:
    """5,000 requests over real copies; every step reads all that its requests have in the cache."""
    rng = random.Random(7)  # noqa: S311
    requests = []
    for n in range(5000):
        prompt = rng.randint(1, 40)
        requests.append(Request(n, range(100 * n, 100 * n + prompt), rng.randint(1, 8)))
    simulation.prefilled(requests)
    device, host = (PagedKV(1, 1, 1, blocks=blocks, block_size=4, layout="block_first") for blocks in (64, 60_000))
    pool, policy, echo = HostPool(60_000, 4), simulation.policy(variant, 4), Echo(device)
    for request in requests:
        pool.enter(request)
    state = PooledState(BlockAllocator(64, 4), pool)
    complete, unwanted = state.complete, rng.sample(requests, 500)

    def complete_and_cancel(*words: Any) -> Any:
        if unwanted and rng.random() < 0.3:
            request = unwanted.pop()
            if request.phase in (Phase.WAITING, Phase.RUNNING):
                state.cancel(request)
        return complete(*words)

    state.complete = complete_and_cancel  # type: ignore[method-assign]
    with Arenas(device, host, EmulatedLink(2e6)) as arenas:
        stage = RealDevice(state, cast(Worker, echo), arenas, 2e6)
        stage.prefill(requests, over_link=policy.offload)
        Rotation(state, policy, stage, CostModel(2e-4, 1e-5, 0.0), device.block_bytes).serve(requests)
    ended = {phase: [each for each in requests if each.phase is phase] for phase in Phase}
    assert len(ended[Phase.FINISHED]) + len(ended[Phase.CANCELLED]) == 5000
    assert len(ended[Phase.CANCELLED]) > 100
    for request in ended[Phase.FINISHED]:
        first, count = request.prompt[-1] + 1, request.max_new_tokens
        assert request.generated == list(range(first, first + count))
    assert state.blocks.free_blocks == 64
    assert pool.blocks.free_blocks == 60_000


# -- Several stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stages")
    torch.multiprocessing.spawn(pipemax_ranks.pipeline, (str(folder), params()), nprocs=pipemax_ranks.STAGES)
    found: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def of_one_rank() -> list[list[int]]:
    return [each.generated for each in pipemax_ranks.made(params(variant="td-pipe"), 0, 1)._serve()[1]]


@pytest.mark.parametrize("case", pipemax_ranks.CASES, ids=pipemax_ranks.name)
def test_a_pipeline_of_ranks_gives_the_tokens_of_one(
    case: dict[str, Any], three_ranks: dict[str, dict[str, Any]], of_one_rank: list[list[int]]
) -> None:
    found = three_ranks[pipemax_ranks.name(case)]
    assert found["passed"], found["why"]
    assert found["tokens"] == of_one_rank
    assert len({token for each in of_one_rank for token in each}) > 10, "tokens vary, so errors would show"
    assert found["numbers"]["stages_here"] == 3
    assert found["notes"][0].startswith("a pipeline of 3 stages, each with ")
    assert found["numbers"]["link_emulated"] == (case.get("time") != "real")
    if case["variant"] in ("pipemax", "pipemax-static"):
        assert found["numbers"]["fetched_blocks_per_turn"] > 0, "blocks went to the host of every stage and came back"


class Pipeline(SimulatedDevice):
    """So many stages in simulated time, of which each batch takes its step on one after the other."""

    def __init__(self, depth: int, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self.depth = depth  # type: ignore[misc]
        self.flying: deque[tuple[float, BatchPlan]] = deque()

    def launch(self, plan: BatchPlan) -> Beside:
        flying = {each.id for _, other in self.flying for each in other.requests}
        assert not flying & {each.id for each in plan.requests}, "nobody is in two batches at a time"
        assert len(self.flying) < self.depth
        begin_s = self.now_s()
        beside = super().launch(plan)
        self.flying.append((begin_s + self.depth * (self.now_s() - begin_s), plan))
        return beside

    def collect(self) -> list[int]:
        back_s, plan = self.flying.popleft()
        self.wait_until(back_s)
        return [0] * len(plan.requests)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(spec.PIPELINED),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=40),
    st.sampled_from([1e4, 1e6, 1e9]),
    st.integers(2, 5),
)
def test_with_a_batch_on_every_stage_everybody_is_served(
    variant: str, lengths: list[tuple[int, int]], link: float, stages: int
) -> None:
    pool = HostPool(20_000, 16)
    state, policy = PooledState(BlockAllocator(100, 16), pool), simulation.policy(variant, stages)
    words = {"phases": policy.phases, "offload": policy.offload}
    device = Pipeline(stages, state, CostModel(1e-2, 1e-5, 1e-7), 1000, link, 0.0, "priority", **words)
    rotation = Rotation(state, policy, device, device.model, 1000)
    requests = [Request(n, range(prompt), new) for n, (prompt, new) in enumerate(lengths)]
    simulation.prefilled(requests)
    rotation.serve(requests)
    assert all(len(each.generated) == each.max_new_tokens for each in requests)
    assert not device.flying
    assert state.blocks.free_blocks == 100
    assert pool.blocks.free_blocks == 20_000
    for request in requests:
        assert request.token_s == sorted(request.token_s)
        assert request.computed == request.longest_kv_tokens


ORDERS = st.lists(
    st.builds(
        Order,
        st.sampled_from(Kind),
        st.integers(0, 2**31 - 1),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=4),
    ),
    max_size=6,
)


@given(ORDERS)
def test_orders_are_read_as_they_were_written(orders: list[Order]) -> None:
    assert list(from_words(to_words(orders))) == orders


def test_the_real_link_is_a_replay_of_one_stage_and_says_so() -> None:
    made = ready(time="real", layers=2)
    check = made.check()
    assert check.passed, check.why
    assert check.notes == ("a replay of one of 4 alike stages over copies in memory",)
    assert check.numbers["link_emulated"] == 0
    assert check.numbers["link_bytes_per_s"] == made.raw_bytes_per_s
    assert len(made.stage.range) == 2


def test_the_estimator_is_judged_by_what_it_was_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that follow the sweep's model have no error; those of the run's batches that do not have theirs."""
    made = ready(requests=12)
    turns = made._serve()[0].turns
    true = CostModel(2e-3, 1e-4, 1e-6)

    def samples(shapes: list[list[int]]) -> tuple[list[Load], list[float]]:
        loads = [Load(len(each), sum(each), max(each), 0) for each in shapes]
        swept = len(bench.SWEEP)
        return loads, [true.step_s(load) * (1.0 if n < swept else 1.25) for n, load in enumerate(loads)]

    monkeypatch.setattr(made, "_stage_samples", samples)
    found = made._estimator(turns)
    assert found["estimator_median_error"] == pytest.approx(0.2)
    assert found["estimator_worst_error"] == pytest.approx(0.2)
    assert found["stale_estimator_median_error"] != pytest.approx(0.2)
