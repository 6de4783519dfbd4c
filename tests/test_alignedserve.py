"""AlignedServe: sums of the tree, nobody lost or starved, the same tokens in any order, and no gain where g is 0."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih import workload
from saih.core import Context, Place, Point
from saih.errors import SaihError
from tests.conftest import package
from workloads.llm import stepcost
from workloads.llm.alignedserve import bench, quadtree, simulation, spec
from workloads.llm.alignedserve.predictor import Predictor
from workloads.llm.alignedserve.quadtree import DEPTH, ROOT, QuadTree, children, node_of, width
from workloads.llm.alignedserve.real import label, place_of_stage
from workloads.llm.alignedserve.scheduler import Aligned
from workloads.llm.config import preset
from workloads.llm.costmodel import fit
from workloads.llm.costs import CostModel
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import Load
from workloads.llm.serve import serve


def params(**settings: Any) -> dict[str, Any]:
    defaults = {name: each.default for name, each in workload.parameters(workload.spec("alignedserve")).items()}
    return defaults | settings


def simulated(**settings: Any) -> dict[str, Any]:
    return params(time="simulated", kv_tokens=4096, shape="gpt-6.7b", requests=60) | settings


LENGTHS = st.lists(st.integers(1, 70_000), min_size=1, max_size=40)


def tree_of(lengths: list[int]) -> tuple[QuadTree, list[Request]]:
    tree = QuadTree(lambda tokens: -(-tokens // 16))
    requests = [Request(number, range(length), 1) for number, length in enumerate(lengths)]
    for request in requests:
        tree.insert(request)
    return tree, requests


@given(LENGTHS, st.randoms())
def test_every_node_is_the_sum_of_its_quarters_and_of_its_requests(lengths: list[int], rng: random.Random) -> None:
    tree, requests = tree_of(lengths)
    for request in rng.sample(requests, len(requests) // 2):
        tree.remove(request)
        requests.remove(request)
    nodes = [ROOT]
    while nodes:
        node = nodes.pop()
        inside = [each for each in requests if node_of(len(each.prompt), node[0]) == node]
        assert tree.requests(node) == len(inside)
        assert tree.blocks(node) == sum(-(-len(each.prompt) // 16) for each in inside)
        if children(node) and inside:
            assert sum(map(tree.requests, children(node))) == len(inside)
            nodes += children(node)
    assert len(tree) == len(requests)


@given(LENGTHS, st.integers(1, 6000), st.integers(1, 50), st.booleans())
def test_a_batch_keeps_its_bounds(lengths: list[int], most: int, fewest: int, starving: bool) -> None:
    tree, requests = tree_of(lengths)
    first = requests[0] if starving else None
    batch, node = tree.batch(most, fewest, first)
    blocks = {each.id: -(-len(each.prompt) // 16) for each in requests}
    assert len({each.id for each in batch}) == len(batch) > 0
    assert sum(blocks[each.id] for each in batch) <= most or len(batch) == 1
    assert first is None or first in batch
    outside = [each for each in requests if each not in batch]
    room = most - sum(blocks[each.id] for each in batch)
    if len(batch) < fewest:
        assert all(blocks[each.id] > room for each in outside), "it would have had more if there was room"
    assert all(quadtree.node_of(len(each.prompt), node[0]) == node for each in batch) or len(batch) <= fewest


def test_widths_and_ends_of_the_range() -> None:
    assert (width(0), width(DEPTH)) == (65536, 16)
    assert node_of(16, DEPTH) == (DEPTH, 0)
    assert node_of(17, DEPTH) == (DEPTH, 1)
    assert node_of(10**6, 0) == ROOT
    assert node_of(10**6, DEPTH) == node_of(65536, DEPTH)


def test_density_goes_where_most_are() -> None:
    tree, _ = tree_of([20] * 5 + [3000] * 9 + [9000])
    assert tree.densest(2000) in {node_of(3000, level) for level in range(DEPTH + 1)}
    batch, _ = tree.batch(9 * 188, 1)
    assert [len(each.prompt) for each in batch] == [3000] * 9


@pytest.mark.parametrize("variant", spec.VARIANTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_lost_and_arenas_are_empty_at_the_end(variant: str, seed: int) -> None:
    """A soak in simulated time: a cache that is too small for comfort, and a tenth of the requests cancelled."""
    given_params = simulated(variant=variant, trace="short-80", requests=300, starvation_s=0.0)
    instance = simulation.Instance(given_params, CostModel(1e-3, 1e-5, 1e-7), "ragged")
    requests = simulation.requests_of(given_params, seed)
    for request in requests:
        request.max_new_tokens = min(request.max_new_tokens, 60)
        request.computed = len(request.prompt) - 1
    rng = random.Random(seed)  # noqa: S311
    unwanted = set(rng.sample(range(len(requests)), 30))
    by_id = {each.id: each for each in requests}
    for iteration in serve(requests, instance.scheduler, instance.state, instance.executor):
        assert iteration.load.decodes + iteration.load.prefill_tokens <= spec.MAX_REQUESTS
        if unwanted and rng.random() < 0.1:
            instance.state.cancel(by_id[unwanted.pop()])
    for request in requests:
        fits = request.longest_kv_tokens <= 4096
        if request.phase is Phase.FINISHED:
            assert len(request.generated) == request.max_new_tokens
        else:
            assert request.phase is (Phase.CANCELLED if fits else Phase.REFUSED) or request.phase is Phase.CANCELLED
    assert sum(each.phase is Phase.FINISHED for each in requests) >= 200
    assert instance.state.blocks.free_blocks == instance.state.blocks.blocks
    assert instance.pool.blocks.free_blocks == instance.pool.blocks.blocks
    assert instance.mover.stage.free_blocks == instance.mover.stage.blocks
    assert not instance.state.chosen


def grouping(variant: str, model: CostModel) -> float:
    """Seconds for 16 short requests of one block and 4 long ones of four in a cache of 8; copies take no time."""
    given_params = simulated(variant=variant, kv_tokens=128)
    instance = simulation.Instance(given_params, model, "split-kv")
    instance.mover.link.bytes_per_s = instance.mover.stage_bytes_per_s = float("inf")
    requests = [Request(n, range(50 if n % 5 == 0 else 5), 8) for n in range(20)]
    for request in requests:
        request.computed = len(request.prompt) - 1
    list(serve(requests, Whole(variant), instance.state, instance.executor))
    return instance.executor.now_s()


class Whole:
    """Batches that fill the cache, one after the other: of like length, or as they came."""

    def __init__(self, variant: str) -> None:
        self.aligned = variant == "aligned"

    def next_batch(self, state: Any) -> Any:
        state.admit()
        if not state.running:
            key = (lambda each: len(each.prompt)) if self.aligned else (lambda each: each.id)
            for request in sorted(state.pooled.values(), key=key):
                if not state.blocks.grow(request.id, request.longest_kv_tokens):
                    break
                state.start(request)
        running = list(state.running.values())
        return simulation.BatchPlan(running, [1] * len(running)) if running else None


def test_without_a_term_in_the_longest_alignment_gains_exactly_nothing() -> None:
    """T = a b + c sum + d at equal KV budgets: the derivation of the README, to the last bit (powers of two add up)."""
    linear = CostModel(fixed_s=2.0**-6, per_decode_s=2.0**-12, per_context_token_s=2.0**-18)
    assert grouping("aligned", linear) == grouping("fcfs", linear)
    longest = CostModel(2.0**-6, 2.0**-12, 2.0**-18, per_longest_token_s=2.0**-12)
    assert grouping("aligned", longest) < 0.9 * grouping("fcfs", longest)


def test_a_padded_kernel_gains_and_split_keys_do_not() -> None:
    for kernel, low, high in (("padded", 1.3, 9.0), ("split-kv", 0.85, 1.15)):
        speed = {
            variant: simulation.run(
                simulated(variant=variant, attention=kernel, trace="short-90", requests=400, kv_tokens=16384), 0
            )["simulated_tokens_per_s"]
            for variant in ("fcfs", "aligned")
        }
        assert low < speed["aligned"] / speed["fcfs"] < high, kernel


def test_a_simulation_is_the_same_every_time() -> None:
    first, again = (simulation.run(simulated(rate=5.0), 3) for _ in range(2))
    assert first == again
    assert first["simulated_requests_served"] + first["simulated_requests_refused"] == 60


def test_who_waits_too_long_goes_first() -> None:
    """Many short ones come all the time, and one long one among them. Density alone leaves it to the end."""

    def waited_s(bound_s: float) -> float:
        given_params = simulated(variant="aligned", starvation_s=bound_s, kv_tokens=2048)
        instance = simulation.Instance(given_params, CostModel(fixed_s=0.01), "split-kv")
        long = Request(0, range(1500), 2, arrival_s=0.1)
        short = [Request(n, range(40), 20, arrival_s=0.008 * n) for n in range(1, 1500)]
        for request in [long, *short]:
            request.computed = len(request.prompt) - 1
        list(serve([long, *short], instance.scheduler, instance.state, instance.executor))
        return long.token_s[0] - long.arrival_s

    bound_s = 0.5
    drain_s = 2 * 20 * 0.02  # the running batch, and the one chosen before the bound was reached
    assert waited_s(bound_s) < bound_s + drain_s < waited_s(0.0)


def test_an_idle_device_takes_spares_when_there_is_nothing_else() -> None:
    """All that run are cancelled while a spare is on its way: it is the last one, and no batch is chosen from it."""
    given_params = simulated(variant="aligned", kv_tokens=2048)
    instance = simulation.Instance(given_params, CostModel(fixed_s=1e-6), "split-kv")
    state, scheduler = instance.state, instance.scheduler
    requests = [Request(n, range(100), 50, computed=99) for n in range(20)]
    for request in requests:
        state.submit(request)
    for _ in range(100):
        scheduler.next_batch(state)
        if scheduler._spares:
            break
    spares = set(scheduler._spares)
    assert spares
    for request in requests:
        if request.id not in spares:
            state.cancel(request)
    plan = scheduler.next_batch(state)
    assert plan is not None
    assert {each.id for each in plan.requests} == spares


def ready(**settings: Any) -> Any:
    tiny = {"requests": 24, "kv_tokens": 640, "shrink": 32, "new_tokens": 6, "trace": "short-80"}
    point = Point("alignedserve", params(**(tiny | settings)), seed=4)
    return bench.setup(point, Context(Place(0, 0, 1), "cpu", "/nowhere"))


def test_tokens_are_those_of_fcfs_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.calibrate,
        "fit_kernel",
        lambda worker: (fit([Load(1, 1, 1, 0)] * 4, [1.0] * 4, bench.calibrate.DECODE_TERMS),) * 2,
    )
    found = {}
    for variant in spec.VARIANTS:
        for attention in ("padded", "ragged"):
            made = ready(variant=variant, attention=attention)
            check = made.check()
            assert check.passed, check.why
            requests, _ = made._decode()
            found[variant, attention] = [each.generated for each in requests]
            made.close()
    tokens = found["fcfs", "ragged"]
    assert len({token for each in tokens for token in each}) > 10, "tokens vary, so errors would show"
    assert all(each == tokens for each in found.values())


def test_a_copy_that_goes_wrong_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.calibrate,
        "fit_kernel",
        lambda worker: (fit([Load(1, 1, 1, 0)] * 4, [1.0] * 4, bench.calibrate.DECODE_TERMS),) * 2,
    )
    made = ready(variant="aligned")
    monkeypatch.setattr("workloads.llm.alignedserve.real.copy_blocks", lambda *words: None)
    assert not made.check().passed
    made.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 2}, "decodes on one rank"),
        ({"trace": "elsewhere"}, "choose sharegpt, longbench"),
        ({"variant": "fcfs", "starvation_s": 1.0}, "starvation_s is for variant=aligned"),
        ({"kv_tokens": 0}, "needs kv_tokens > 0"),
        ({"stage": "peer", "time": "simulated"}, "stage=peer is for time=real"),
        ({"stage": "peer", "variant": "aligned-noprefetch"}, "a variant that prefetches"),
        ({"shrink": 1, "shape": "gpt-tiny"}, "exceed gpt-tiny's 2048 positions"),
        ({"time": "simulated", "shape": "gpt-175b", "kv_tokens": 0}, "no room for a KV cache"),
    ],
)
def test_what_makes_no_sense_is_refused_in_planning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaihError, match=message):
        spec.cost(params(**settings))


@pytest.mark.parametrize(
    ("wanted", "device", "others", "place"),
    [
        ("auto", "cpu", 0, "cpu"),
        ("device", "cuda:0", 2, "cuda:0"),
        ("auto", "cuda:0", 1, "cuda:0"),
        ("auto", "cuda:0", 3, "cuda:2"),  # GPU 1 cannot be read by GPU 0
        ("peer", "cuda:2", 3, "cuda:0"),
    ],
)
def test_the_stage_is_on_a_second_gpu_where_there_is_one(
    wanted: str, device: str, others: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: others)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: {own, peer} != {0, 1})
    assert place_of_stage(wanted, torch.device(device)) == torch.device(place)


def test_a_stage_that_is_not_there_is_refused_and_its_place_is_told() -> None:
    with pytest.raises(SaihError, match="stage=peer: cpu reads no other GPU's memory here; choose stage=device"):
        ready(stage="peer")
    made = ready(attention="ragged", requests=4)
    assert made.check().notes == ("what runs next waits in a second buffer on cpu, filled from the host directly",)
    made.close()
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert label(second, first, prefetch=True).startswith("what runs next waits on cuda:1, a second GPU")
    assert label(first, first, prefetch=False) == "what runs next comes from the host directly, when it runs"


def test_split_keys_need_a_gpu() -> None:
    with pytest.raises(SaihError, match="attention=split-kv needs a GPU"):
        ready(attention="split-kv")


def test_mixed_iterations_are_those_of_two_batches() -> None:
    scheduler = Aligned(8)
    assert (scheduler.switches, scheduler.mixed_iterations) == (0, 0)
    figures = simulation.run(simulated(trace="short-80", requests=200), 1)
    assert 0 <= figures["simulated_mixed_iteration_share"] < 1


def predictor_of(lengths: list[tuple[int, int]], model: CostModel, room: int, *, padded: bool = False) -> Predictor:
    requests = [Request(number, range(prompt), new) for number, (prompt, new) in enumerate(lengths)]
    return Predictor(requests, model, room, 10**9, padded=padded)


TRACE = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 50)), min_size=1, max_size=30)


@given(TRACE, st.floats(0, 1e-3), st.floats(0, 1e-4), st.floats(1e-4, 1e-1))
def test_on_paper_too_nothing_is_gained_without_a_cost_of_the_longest(
    lengths: list[tuple[int, int]], a: float, c: float, d: float
) -> None:
    flat = predictor_of(lengths, CostModel(d, a, c), 10_000)
    assert flat.tokens_per_s(aligned=True) == pytest.approx(flat.tokens_per_s(aligned=False), rel=1e-9)
    steep = predictor_of(lengths, CostModel(d, a, c, 1e-4), 10_000)
    assert steep.tokens_per_s(aligned=True) <= flat.tokens_per_s(aligned=True)
    assert steep.tokens_per_s(aligned=False) <= flat.tokens_per_s(aligned=False)


def test_the_longest_of_a_batch_is_what_drawing_says() -> None:
    """P = 9/10 short of 100, 1/10 long of 1000 (weighted alike): the longest of b draws, by drawing."""
    lengths = [(95, 10)] * 9 + [(995, 10)]
    predictor = predictor_of(lengths, CostModel(1e-3), 1140)
    assert predictor.together == pytest.approx(1140 / 190)
    rng = random.Random(3)  # noqa: S311
    drawn = [max(rng.choice([100] * 9 + [1000]) for _ in range(6)) for _ in range(20_000)]
    assert predictor.longest == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


def test_a_padded_kernel_pays_the_longest_for_everybody() -> None:
    lengths = [(95, 10)] * 9 + [(995, 10)]
    model = CostModel(per_context_token_s=1e-6)
    plain, padded = (predictor_of(lengths, model, 1140, padded=each) for each in (False, True))
    assert plain.tokens_per_s(aligned=False) / padded.tokens_per_s(aligned=False) == pytest.approx(plain.longest / 190)
    assert padded.tokens_per_s(aligned=True) == plain.tokens_per_s(aligned=True)


@pytest.mark.parametrize("variant", ["fcfs", "aligned"])
def test_the_bound_on_paper_is_near_what_is_simulated(variant: str) -> None:
    figures = simulation.run(simulated(variant=variant, requests=600, kv_tokens=20_000, trace="azure-conv"), 3)
    told, bound = figures["simulated_tokens_per_s"], figures["predicted_simulated_tokens_per_s"]
    assert 0.75 * bound < told < 1.05 * bound


def test_a_trace_of_azure_is_served_from_end_to_end(tmp_path: Path) -> None:
    """Times with seven digits of a second, a mark before the first column, lines in the order of the file."""
    path = tmp_path / "azure.csv"
    lines = [f"2023-11-16 18:{15 + n // 60}:{n % 60:02}.6805900,{50 + 37 * n % 900},{1 + n % 20}" for n in range(120)]
    path.write_text("\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    for rate in (0.0, 1.0):
        figures = simulation.run(simulated(trace=str(path), requests=100, rate=rate), 1)
        assert figures["simulated_requests_served"] == 100
    asked = simulation.requests_of(simulated(trace=str(path), requests=100, rate=1.0), 1)
    assert [len(each.prompt) for each in asked[:3]] == [50, 87, 124]
    assert asked[90].arrival_s == pytest.approx(90.0)


def test_a_rate_stretches_the_gaps_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    path.write_text("arrival_s,prompt_tokens,new_tokens\n10,5,5\n11,5,5\n14,5,5\n")
    for rate, expected in ((2.0, [0.0, 0.25, 1.0]), (0.0, [0.0, 0.0, 0.0])):
        asked = simulation.requests_of(simulated(trace=str(path), requests=9, rate=rate), 1)
        assert [each.arrival_s for each in asked] == expected


def test_the_host_holds_what_its_memory_has_room_for() -> None:
    """800 GB of the paper's host; gpt-6.7b has 512 KiB of keys and values a token."""
    pool = simulation.Instance(simulated(), CostModel(), "ragged").pool
    assert pool.blocks.blocks == 800_000_000_000 // (16 * 512 * 1024)


def test_an_eviction_costs_the_same_with_and_without_prefetch() -> None:
    seconds = []
    for variant in ("aligned", "aligned-noprefetch"):
        mover = simulation.Instance(simulated(variant=variant), CostModel(), "ragged").mover
        request = Request(0, range(1000), 5, computed=999)
        mover.pool.enter(request)
        mover.evict(request)
        seconds.append(mover.stall_s())
    assert seconds[0] == seconds[1] > 0


def test_decisions_are_timed_over_a_full_pool_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "host_decision_p95_s" not in simulation.run(simulated(), 3)
    monkeypatch.setattr(spec, "POOLED", 30)
    assert simulation.run(simulated(), 3)["host_decision_p95_s"] > 0


def test_a_model_of_few_positions_is_calibrated_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = ready(shape="gpt-tiny", kv_tokens=12288, requests=2, attention="ragged"), []

    def sampled(worker: Any, shapes: list[list[int]], repeats: int) -> Any:
        asked.extend(shapes)
        return [Load(1, 1, 1, 0)] * 4, [1.0] * 4

    monkeypatch.setattr(bench.calibrate, "decode_samples", sampled)
    bench.calibrate.fit_kernel(bench.Worker(made.stage, made.kv))
    assert max(map(max, asked)) == 1024, "not 4096, of 2048 positions"
    made.close()


def test_a_request_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("arrival_s,prompt_tokens,new_tokens\n0,2100,4\n")
    with pytest.raises(SaihError, match="exceed the model's 2048 positions"):
        ready(shape="gpt-tiny", trace=str(path), shrink=1, requests=1, kv_tokens=4096)


def test_a_trace_of_azure_is_decoded_really(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lines of a file in the published layout: lengths are the file's, shorter by `shrink`; tokens right."""
    monkeypatch.setattr(
        bench.calibrate,
        "fit_kernel",
        lambda worker: (fit([Load(1, 1, 1, 0)] * 4, [1.0] * 4, bench.calibrate.DECODE_TERMS),) * 2,
    )
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:51.2224670,879,55\n"
        "2023-11-16 18:15:51.3910170,91,16\n"
    )
    made = ready(trace=str(path), requests=4, shrink=8, attention="ragged")
    check = made.check()
    assert check.passed, check.why
    assert check.numbers["requests_served"] == 4
    assert [len(each.prompt) for each in made.trace] == [46, 49, 109, 11]
    made.close()


def test_prompts_can_be_part_of_a_step_and_transformers_serves_the_same_tokens() -> None:
    package("transformers")
    made = {
        variant: ready(variant=variant, attention="ragged", prompts="timed") for variant in ("aligned", "hf-continuous")
    }
    ours, theirs = made["aligned"], made["hf-continuous"]
    assert theirs.check().passed
    assert ours.work == theirs.work, "the same work is timed"
    assert ours.work.flop > ready(variant="aligned", attention="ragged").work.flop
    assert [each.generated for each in ours._decode()[0]] == theirs._generate()
    cache = theirs.generator.manager.continuous_batching_config
    assert (cache.block_size, cache.num_blocks) == (16, 640 // 16 + 1), "as many as ours, and one to write what is void"
    ours.close()
    theirs.close()


@pytest.mark.parametrize("variant", ["fcfs", "aligned"])
def test_a_long_soak_with_little_room_anywhere(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5000 requests of random lengths; device, stage and host pool run out all the time, a tenth is cancelled."""
    monkeypatch.setattr(simulation, "HOST_BYTES", 600 * 16 * stepcost.kv_bytes_per_token(preset("gpt-6.7b"), 2))
    instance = simulation.Instance(simulated(variant=variant), CostModel(1e-3, 1e-5, 1e-7), "ragged")
    rng = random.Random(11)  # noqa: S311
    requests = [Request(n, range(rng.randint(1, 600)), rng.randint(1, 12)) for n in range(5000)]
    for request in requests:
        request.computed = len(request.prompt) - 1
    unwanted = rng.sample(requests, 500)
    full = 0
    for _ in serve(requests, instance.scheduler, instance.state, instance.executor):
        full += bool(instance.state.waiting)
        if unwanted and rng.random() < 0.5:
            instance.state.cancel(unwanted.pop())
    ended = {phase: sum(each.phase is phase for each in requests) for phase in Phase}
    assert ended[Phase.FINISHED] + ended[Phase.CANCELLED] == 5000
    assert ended[Phase.CANCELLED] > 100
    assert full > 100, "the pool was full for long"
    assert all(len(each.generated) == each.max_new_tokens for each in requests if each.phase is Phase.FINISHED)
    assert instance.state.blocks.free_blocks == instance.state.blocks.blocks
    assert instance.pool.blocks.free_blocks == 600
    assert instance.mover.stage.free_blocks == instance.mover.stage.blocks
