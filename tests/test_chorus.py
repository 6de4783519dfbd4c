"""Chorus: resumes that are exact where they must be, a store that keeps its bound, a check that catches mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saih import workload
from saih.core import Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.tiny_video import Tiny, cogvideox, wan
from workloads.video import checkpoint
from workloads.video.chorus import bench, server, spec, stages
from workloads.video.chorus.attention import CrossAttention
from workloads.video.chorus.reuse import Record, Resume, region
from workloads.video.chorus.server import EXACT, MISS, SEMANTIC, SharingServer, differing, embed, memoryless
from workloads.video.chorus.stages import Bounds, Reuse
from workloads.video.chorus.store import LCBFU, LRU, Entry, Key, Store
from workloads.video.chorus.trace import Asked, Traffic, matches, queue_latencies
from workloads.video.loop import Step

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
SMALL: dict[str, Value] = {"model": "toy-4step", "requests": 16, "topics": 2, "similar": 0.9, "frames": 4, "rows": 8}
KEY = Key("model", (3, 8, 8), "Euler", 4, 3.0)
EVERYTHING = Reuse(table=False, selective=True, threshold=0.75, region=0.25, amplification=4.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def params(**changes: Value) -> dict[str, Value]:
    return DEFAULTS | SMALL | {"columns": 8} | changes


def served_in_full(tiny: Tiny, attention: CrossAttention | None = None) -> tuple[Entry, Tensor]:
    """The tiny request computed and recorded, and its latents."""
    policy = Record(stages.latest(tiny.request.steps), attention)
    result = tiny.loop.generate(tiny.request, policy)
    entry = Entry(KEY, "a b c d e f", 0, torch.ones(1), result.latents, policy.latents)
    if attention is not None:
        entry.attention = attention.seen()
    return entry, result.latents


def resumed(tiny: Tiny, entry: Entry, policy: Resume) -> Tensor:
    start = policy.stages.resume
    noise = entry.before(start, KEY) if start else tiny.request.noise
    return tiny.loop.generate(dataclasses.replace(tiny.request, noise=noise), policy, start).latents


def test_recording_and_watching_change_nothing() -> None:
    tiny = wan()
    _, latents = served_in_full(tiny, CrossAttention(tiny.adapter))
    assert torch.equal(latents, tiny.loop.generate(tiny.request).latents)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_request_resumed_from_itself_is_itself(start: int) -> None:
    """With no step reused it is the uncached request."""
    tiny = wan()
    entry, latents = served_in_full(tiny)
    assert torch.equal(resumed(tiny, entry, Resume(entry, KEY, Bounds(start, start))), latents)


def test_regions_of_a_request_resumed_from_itself_but_for_the_attention_of_others() -> None:
    """Where the region is everything, or nothing, the video is the request's own."""
    tiny = wan()
    entry, latents = served_in_full(tiny)
    everything = torch.arange(3 * 4 * 4)
    for tokens in (everything, None):
        assert torch.equal(resumed(tiny, entry, Resume(entry, KEY, Bounds(1, 3), tokens)), latents)


def test_a_region_of_all_tokens_is_the_plain_loop_for_another_prompt() -> None:
    tiny = wan()
    entry, _ = served_in_full(tiny)
    other = {branch: {"encoder_hidden_states": torch.randn(1, 6, 16)} for branch in tiny.request.conditions}
    tiny = dataclasses.replace(tiny, request=dataclasses.replace(tiny.request, conditions=other))
    plain = resumed(tiny, entry, Resume(entry, KEY, Bounds(1, 1)))
    assert torch.equal(resumed(tiny, entry, Resume(entry, KEY, Bounds(1, 3), torch.arange(48))), plain)


def test_outside_the_region_the_trajectory_of_the_source_goes_on_and_inside_it_does_not() -> None:
    tiny = wan()
    entry, _ = served_in_full(tiny)
    other = {branch: {"encoder_hidden_states": torch.randn(1, 6, 16)} for branch in tiny.request.conditions}
    tiny = dataclasses.replace(tiny, request=dataclasses.replace(tiny.request, conditions=other))
    seen: list[Tensor] = []

    class Watched(Resume):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            seen.append(super().after(step, latents))
            return seen[-1]

    tokens = torch.tensor([0, 5, 17])  # places 0,0,0; 0,1,1; 1,0,1 of a grid of 3 x 4 x 4, two pixels wide each
    result = resumed(tiny, entry, Watched(entry, KEY, Bounds(1, 2), tokens))
    inside = torch.zeros(3, 8, 8, dtype=torch.bool)
    inside[0, :2, :2] = inside[0, 2:4, 2:4] = inside[1, :2, 2:4] = True
    source = entry.latents[2][0]
    assert torch.equal(seen[0][0][:, ~inside], source[:, ~inside])
    assert (seen[0][0][:, inside] != source[:, inside]).float().mean() > 0.9
    assert torch.isfinite(result).all()


def test_work_is_counted_by_tokens() -> None:
    tiny = wan()
    entry, _ = served_in_full(tiny)
    policy = Resume(entry, KEY, Bounds(1, 2), torch.arange(12))
    begun = dataclasses.replace(tiny.request, noise=entry.before(1, KEY))
    assert tiny.loop.generate(begun, policy, 1).forwards[0] == pytest.approx(2 * (0.25 + 2))


def test_lambda_of_one_is_the_identity_and_others_are_the_formula() -> None:
    tiny = wan()
    attention, module = CrossAttention(tiny.adapter), tiny.adapter.blocks[0].attn2
    video, text = torch.randn(1, 10, 24), torch.randn(1, 6, 24)
    plain = module(video, text, None, None)
    with attention.amplified((1, 4), 1.0):
        assert torch.equal(module(video, text, None, None), plain)
    with attention.amplified((1, 4), 5.0):
        amplified = module(video, text, None, None)
    query = module.norm_q(module.to_q(video)).unflatten(2, (2, 12)).transpose(1, 2)
    key = module.norm_k(module.to_k(text)).unflatten(2, (2, 12)).transpose(1, 2)
    value = module.to_v(text).unflatten(2, (2, 12)).transpose(1, 2)
    weights = (query @ key.transpose(2, 3) / math.sqrt(12)).softmax(dim=-1)
    weights[..., [1, 4]] *= 5
    weights /= weights.sum(dim=-1, keepdim=True)
    expected = module.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(amplified, expected, atol=1e-5)
    assert not torch.allclose(amplified, plain, atol=1e-3)
    assert torch.equal(module(video, text, None, None), plain), "it is taken off again"


def test_amplification_falls_to_one_and_is_of_the_conditional_branch() -> None:
    tiny = wan()
    attention = CrossAttention(tiny.adapter)
    entry, _ = served_in_full(tiny, attention)
    asked: list[tuple[tuple[int, ...], float]] = []

    class Noted(CrossAttention):
        def amplified(self, columns, factor):  # type: ignore[no-untyped-def]
            asked.append((tuple(columns), factor))
            return super().amplified(columns, factor)

    policy = Resume(entry, KEY, Bounds(1, 3), torch.arange(8), (2,), 5.0, Noted(tiny.adapter))
    resumed(tiny, entry, policy)
    assert asked == [((2,), 5.0), ((2,), 3.0)]


def test_what_is_seen_is_the_mean_attention_of_the_block_in_the_middle() -> None:
    tiny = wan()
    attention = CrossAttention(tiny.adapter)
    module = tiny.adapter.blocks[2].attn2
    video, text = torch.randn(1, 10, 24), torch.randn(1, 6, 24)
    with attention.watched():
        module(video, text, None, None)
    assert attention.seen().shape == (6, 10)
    query = module.norm_q(module.to_q(video))[0].unflatten(1, (2, 12))
    key = module.norm_k(module.to_k(text))[0].unflatten(1, (2, 12))
    heads = [(query[:, head] @ key[:, head].T / math.sqrt(12)).softmax(dim=1) for head in (0, 1)]
    assert torch.allclose(attention.seen(), (sum(heads) / 2).T, atol=1e-6)


def test_models_without_cross_attention_are_refused() -> None:
    with pytest.raises(SaihError, match="CogVideoXTransformer3DModel has no cross attention"):
        CrossAttention(cogvideox().adapter)


def test_a_region_is_where_the_words_are_looked_at() -> None:
    attention = torch.tensor([[0.9, 0.1, 0.2, 0.8], [0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0]])
    assert region(attention, (0,), 0.5).tolist() == [0, 3]
    assert region(attention, (0, 2), 0.5).tolist() == [0, 1]
    assert region(attention, (0,), 0.01).tolist() == [0]
    assert region(attention, (), 0.5).tolist() == []


@pytest.mark.parametrize("change", ["model", "grid", "schedule", "steps", "guidance"])
def test_entries_of_another_model_size_schedule_steps_or_guidance_are_refused(change: str) -> None:
    other = dataclasses.replace(
        KEY,
        **{change: {"model": "x", "grid": (1, 1, 1), "schedule": "x", "steps": 5, "guidance": 4.0}[change]},  # type: ignore[arg-type]
    )
    store, vector = Store(1e6), torch.tensor([1.0, 0.0])
    entry = Entry(KEY, "prompt", 0, vector, torch.zeros(4), {1: torch.zeros(4)})
    store.add(entry)
    assert store.nearest(KEY, vector) == (entry, 1.0)
    assert store.exact(KEY, "prompt", 0) is entry
    assert store.nearest(other, vector) is None
    assert store.exact(other, "prompt", 0) is None
    with pytest.raises(SaihError, match=f"of another {change} cannot be resumed"):
        entry.before(1, other)
    with pytest.raises(SaihError, match="step 2 is not cached; there are 1"):
        entry.before(2, KEY)


def make_entry(name: int, size: int, resumable: bool = True) -> Entry:
    latents = {1: torch.zeros(size)} if resumable else {}
    return Entry(KEY, f"prompt {name}", 0, torch.zeros(2), torch.zeros(size), latents)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([LRU, LCBFU]), st.integers(50, 3000))
def test_the_store_never_outgrows_its_bound_and_evicts_in_order(seed: int, eviction: str, capacity: int) -> None:
    """A thousand random requests in each of ten examples, against a list searched by brute force."""
    store, random = Store(capacity, eviction), Random(seed)  # noqa: S311
    kept: list[dict[str, float]] = []  # what the store should hold: name, bytes, time of last use, steps saved
    for time in range(1000):
        name = random.randrange(40)
        entry = store.exact(KEY, f"prompt {name}", 0)
        if entry is not None:
            saved = random.randrange(4)
            store.use(entry, saved)
            [mine] = [each for each in kept if each["name"] == name]
            mine |= {"used": time, "saved": mine["saved"] + saved}
        else:
            entry = make_entry(name, random.randrange(1, 120), random.random() < 0.7)
            store.add(entry)
            if entry.bytes <= capacity:
                while sum(each["bytes"] for each in kept) + entry.bytes > capacity:
                    order = (
                        (lambda each: (each["saved"], each["used"]))
                        if eviction == LCBFU
                        else (lambda each: each["used"])
                    )
                    kept.remove(min(kept, key=order))
                kept.append({"name": name, "bytes": entry.bytes, "used": time, "saved": 0})
        held = sum(each.bytes for each in store.entries.values())
        assert store.bytes == held <= capacity
        assert {each.prompt for each in store.entries.values()} == {f"prompt {each['name']}" for each in kept}


def test_the_nearest_is_that_of_brute_force_after_any_evictions() -> None:
    generator = torch.Generator().manual_seed(0)
    store = Store(2000)
    for name in range(200):
        entry = make_entry(name, 20 + name % 7, resumable=name % 5 > 0)
        entry.embedding = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
        store.add(entry)
        asked = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
        resumable = [each for each in store.entries.values() if each.latents]
        found = store.nearest(KEY, asked)
        if not resumable:
            assert found is None
            continue
        best = max(resumable, key=lambda each: float(each.embedding @ asked))
        assert found is not None
        assert found[0] is best
        assert found[1] == pytest.approx(float(best.embedding @ asked), abs=1e-6)
    assert store.evicted > 100


def test_bounds_rise_with_similarity_and_leave_a_plain_step() -> None:
    for steps in (4, 5, 8, 20, 50):
        found = [stages.bounds(0.75 + 0.01 * place, 0.75, steps) for place in range(26)]
        assert all(1 <= each.resume < each.regions <= steps - 1 for each in found)
        assert found == sorted(found, key=lambda each: (each.resume, each.regions))
        assert max(each.regions for each in found) == stages.latest(steps)
    assert stages.bounds(6 / 7, 0.75, 4) == Bounds(1, 2)
    assert stages.bounds(1.0, 0.75, 50) == Bounds(25, 40)


def test_hits_begin_at_the_threshold() -> None:
    assert EVERYTHING.stages(0.749, 4) is None
    assert EVERYTHING.stages(0.75, 4) == Bounds(1, 2)
    assert EVERYTHING.work(0.75, 4) == 2.25
    assert dataclasses.replace(EVERYTHING, selective=False).stages(0.75, 4) == Bounds(1, 1)


def test_nirvana_resumes_by_its_table() -> None:
    table = dataclasses.replace(EVERYTHING, table=True)
    found = {similarity: table.stages(similarity, 50) for similarity in (0.65, 0.66, 0.76, 0.86, 0.91, 0.96)}
    assert [each.resume if each else 0 for each in found.values()] == [0, 5, 10, 15, 20, 25]
    assert table.stages(0.7, 4) is None, "a tenth of four steps is none"
    assert [table.stages(similarity, 4) for similarity in (0.8, 0.86, 0.91)] == [
        Bounds(1, 1),
        Bounds(1, 1),
        Bounds(2, 2),
    ]


def test_tokens_that_differ_in_either_prompt() -> None:
    assert differing(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == ((1,), (1,))
    assert differing(["a", "b", "c"], ["a", "b", "c"]) == ((), ())
    assert differing(["a", "b", "c", "d"], ["a", "c", "d", "e"]) == ((1, 3), (3,))
    assert differing(["a", "c"], ["a", "b", "c"]) == ((1,), (1,))


def test_prompts_are_embedded_without_their_padding() -> None:
    text = torch.randn(1, 3, 4)
    padded = torch.cat([text, torch.zeros(1, 5, 4)], dim=1)
    assert torch.allclose(embed(text), embed(padded))
    assert float(embed(text).norm()) == pytest.approx(1)
    assert torch.isfinite(embed(torch.zeros(1, 3, 4))).all()


def toy() -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.TOY / "student")


def sharing(reuse: Reuse = EVERYTHING, capacity: float = 1e8) -> SharingServer:
    return SharingServer(toy(), (4, 8, 8), 4, 1.0, Store(capacity), reuse, "toy")


def test_a_server_tells_misses_semantic_and_exact_hits_apart() -> None:
    one = sharing()
    words = one.checkpoint.words
    assert words is not None
    prompt = words.prompt(0)
    near = prompt.replace("young", "old") if "young" in prompt else prompt.replace("old", "young")
    kinds = [one.serve(Asked(*asked, 0.0), Unclocked()) for asked in ((prompt, 0), (near, 1), (near, 1), (prompt, 0))]
    assert [each.kind for each in kinds] == [MISS, SEMANTIC, EXACT, EXACT]
    assert [each.forwards for each in kinds] == [4.0, pytest.approx(2 + 2 / 8), 0.0, 0.0], (
        "two of eight tokens for a step"
    )
    assert torch.equal(kinds[1].latents, kinds[2].latents)
    assert torch.equal(kinds[0].latents, kinds[3].latents)


def test_a_server_of_another_kind_finds_nothing_in_the_same_store() -> None:
    one = sharing()
    assert one.checkpoint.words is not None
    asked = Asked(one.checkpoint.words.prompt(0), 0, 0.0)
    one.serve(asked, Unclocked())
    for told in (((4, 8, 8), 5, 1.0), ((4, 8, 8), 4, 2.0), ((2, 8, 8), 4, 1.0)):
        other = SharingServer(one.checkpoint, *told, one.store, EVERYTHING, "toy")
        assert other.serve(asked, Unclocked()).kind == MISS
    assert (
        SharingServer(one.checkpoint, (4, 8, 8), 4, 1.0, one.store, EVERYTHING, "x").serve(asked, Unclocked()).kind
        == MISS
    )


@pytest.mark.parametrize("family", ["cogvideox", "hunyuanvideo"])
def test_prompts_that_cannot_be_told_from_their_padding_are_not_compared(family: str) -> None:
    made = checkpoint.random(family, 3, 48)
    with pytest.raises(SaihError, match=r"cannot be told from their padding: .* for Wan only"):
        SharingServer(made, (4, 8, 8), 4, 1.0, Store(1e8), dataclasses.replace(EVERYTHING, selective=False), "x")


def test_a_server_with_no_room_computes_everything() -> None:
    one = sharing(capacity=10)
    assert one.checkpoint.words is not None
    asked = Asked(one.checkpoint.words.prompt(0), 0, 0.0)
    assert [one.serve(asked, Unclocked()).kind for _ in range(2)] == [MISS, MISS]


def test_a_schedule_that_remembers_is_replaced() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    euler = memoryless(unipc)
    assert isinstance(euler, FlowMatchEulerDiscreteScheduler)
    assert euler.config.shift == 5.0
    assert memoryless(euler) is euler


ATTRIBUTES = tuple(tuple(f"{letter}{place}" for place in range(4)) for letter in "abcde")


def one_hot(prompt: str) -> Tensor:
    vector = torch.zeros(len(ATTRIBUTES), 4)
    for row, (word, words) in enumerate(zip(prompt.split(), ATTRIBUTES, strict=True)):
        vector[row, words.index(word)] = 1
    return vector.flatten() / math.sqrt(len(ATTRIBUTES))


def drawn(**changes: float) -> list[Asked]:
    told = {"requests": 120, "similar": 0.8, "topics": 6, "zipf": 1.0, "repeats": 0.0, "load": 0.5} | changes
    return Traffic(**told).draw(ATTRIBUTES, one_hot, seed=3)  # type: ignore[arg-type]


def test_no_prompt_is_asked_twice_and_similar_ones_are_a_word_away() -> None:
    asked = drawn()
    prompts = [each.prompt for each in asked]
    assert len(set(prompts)) == len(prompts) == 120
    assert len({each.seed for each in asked}) == 120
    near = sum(
        any(float(one_hot(prompt) @ one_hot(earlier)) > 0.75 for earlier in prompts[:place])
        for place, prompt in enumerate(prompts)
    )
    assert near >= 120 * 0.8 * 0.8
    assert drawn() == asked


def test_a_trace_without_similar_prompts_has_none_as_long_as_there_are_unlike_ones() -> None:
    prompts = [each.prompt for each in drawn(similar=0.0, requests=12)]
    likeness = [float(one_hot(a) @ one_hot(b)) for place, a in enumerate(prompts) for b in prompts[:place]]
    assert max(likeness) < 0.5


def test_repeats_are_of_earlier_requests_noise_and_all() -> None:
    asked = drawn(repeats=0.5)
    pairs = [(each.prompt, each.seed) for each in asked]
    assert 35 < len(pairs) - len(set(pairs)) < 85
    assert len({prompt for prompt, _ in pairs}) == len(set(pairs)), "a prompt always has the same noise"


def test_popularity_falls_with_the_rank() -> None:
    """With one word changed at a time, a topic is what its prompts began from: many requests, few topics."""
    flat, steep = (len({match.source for match in matches(drawn(zipf=zipf), one_hot, 0.7)}) for zipf in (0.0, 3.0))
    assert steep < flat


def test_arrivals_come_at_the_load() -> None:
    assert drawn(load=0.5)[-1].arrival == pytest.approx(120 / 0.5, rel=0.3)


def test_matches_are_those_of_a_store_that_never_forgets() -> None:
    asked = [
        Asked(prompt, 0, 0.0) for prompt in ("a0 b0 c0 d0 e0", "a1 b0 c0 d0 e0", "a1 b1 c0 d0 e0", "a3 b3 c3 d3 e3")
    ]
    found = matches(asked, one_hot, 0.75)
    assert [each.source for each in found] == [None, asked[0].prompt, asked[0].prompt, asked[0].prompt]
    assert [round(each.similarity, 2) for each in found] == [0.0, 0.8, 0.6, 0.0]


def test_latencies_of_a_queue() -> None:
    assert queue_latencies([0.0, 0.5, 3.0], [1.0, 1.0, 0.25]) == [1.0, 1.5, 0.25]


@pytest.mark.parametrize("variant", spec.VARIANTS)
def test_every_variant_serves_a_trace(variant: str, tmp_path: Path) -> None:
    point = Point("chorus", params(variant=variant))
    ready = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    check = ready.check()
    assert check.passed, check.why
    numbers = check.numbers
    work = ready.step(Unclocked())
    assert work.units == 16
    assert work.flop == pytest.approx(16 * numbers["forwards"] * spec.shape(point.params).forward_flop((4, 8, 8)))
    assert numbers["exact_hits"] + numbers["semantic_hits"] + numbers["misses"] == 16
    histogram = [value for name, value in numbers.items() if name.startswith("saved_")]
    assert sum(histogram) == 16
    if variant in ("none", "intra-request"):
        assert numbers["forwards"] == 4
        assert numbers["cache_bytes"] == numbers["hit_rate"] == 0
    else:
        assert numbers["forwards"] < 4
        assert numbers["semantic_hits"] > 4
        assert 0 < numbers["cache_bytes"] < 64e6
    again = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path))).check()
    assert again == check, "what was counted once is read, and the videos are the same"


def test_a_cache_inside_the_request_skips_one_step_of_four_at_the_studys_threshold(tmp_path: Path) -> None:
    told = params(variant="intra-request", teacache=float(spec.SKIPS_ONE_OF_FOUR), requests=3)
    check = bench.setup(Point("chorus", told), Context(Place(0, 0, 1), "cpu", str(tmp_path))).check()
    assert check.passed, check.why
    assert check.numbers["forwards"] == 3


def test_replays_are_counted_as_exact_hits(tmp_path: Path) -> None:
    ready = bench.setup(Point("chorus", params(repeats=0.5)), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert ready.check().numbers["exact_hits"] >= 3


def test_the_probe_reads_bands_and_changed_words(tmp_path: Path) -> None:
    point = Point("chorus", params(frames=8, rows=24, columns=24, requests=12))
    numbers = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path))).check().numbers
    bands = {name: value for name, value in numbers.items() if name.startswith("requests_")}
    assert sum(bands.values()) == 12
    weighted = sum(numbers[name.replace("requests", "alignment")] * count for name, count in bands.items() if count)
    assert weighted / 12 == pytest.approx(numbers["alignment"])
    assert 0 <= numbers["leakage"] + numbers["changed_alignment"] <= 1


def test_the_check_fails_when_serving_is_not_deterministic(tmp_path: Path) -> None:
    ready = bench.setup(Point("chorus", params()), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert ready.check().passed
    known = json.loads(ready.kept.read_text())
    known["digests"][3] = "another"
    ready.kept.write_text(json.dumps(known))
    assert "serving the trace again gave other videos" in ready.check().why


def test_the_check_fails_when_what_is_stored_is_not_the_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(Record):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            return super().after(step, latents) * 1.001

    monkeypatch.setattr(server, "Record", Off)
    ready = bench.setup(Point("chorus", params()), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert "the first request differs from the plain loop" in ready.check().why


def test_the_check_fails_when_latents_are_stored_a_step_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Record):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            self.latents[step.index] = latents
            return latents

    monkeypatch.setattr(server, "Record", Late)
    ready = bench.setup(Point("chorus", params(variant="chorus-stage1")), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert "asked again, was not found" in ready.check().why


def test_random_weights_are_served_for_speed_alone(tmp_path: Path) -> None:
    small: dict[str, Value] = {"model": "random", "layers": 3, "width": 24, "frames": 1, "rows": 4, "columns": 4}
    ready = bench.setup(Point("chorus", params(**small)), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    check = ready.check()
    assert check.passed, check.why
    assert "alignment" not in check.numbers
    assert check.numbers["semantic_hits"] > 0


def test_cost_is_what_hits_a_word_away_would_take() -> None:
    plain = spec.cost(DEFAULTS | {"variant": "none"})
    hits = 0.9 - 24 / 200
    assert spec.cost(DEFAULTS).flop / plain.flop == pytest.approx(hits * 2.25 / 4 + 1 - hits)
    assert plain.work == 200
    with pytest.raises(SaihError, match="similar is a share: at most 1"):
        spec.cost(DEFAULTS | {"similar": 1.5})
    with pytest.raises(SaihError, match="toy-4step has 8 layers of width 96"):
        spec.cost(DEFAULTS | {"width": 192})


def test_prompts_of_a_file_are_asked_in_turn(tmp_path: Path) -> None:
    traffic = Traffic(requests=3, similar=0, topics=1, zipf=1, repeats=0, load=1.0)
    asked = traffic.of_file(["one", "two", "one", "three", "four"], 7)
    assert [each.prompt for each in asked] == ["one", "two", "three"], "no prompt twice"
    assert [each.seed for each in asked] == [7, 8, 9]
    with pytest.raises(SaihError, match=r"2 different ones for 3 requests; .* a replay: give more, or requests=2"):
        traffic.of_file(["one", "two", "one"], 7)
