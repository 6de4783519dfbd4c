"""MixCache: its trigger and decision on given signals, its knob, its cost, and a check that catches wrong programs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saih import workload
from saih.core import Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.tiny_video import Tiny, hunyuan, wan
from workloads.video import checkpoint, denoising, peers, shapes
from workloads.video import kept as kept_module
from workloads.video.caches import BLOCK, CFG, FULL, STEP, Fixed
from workloads.video.loop import Policy, Request, Step
from workloads.video.mixcache import bench, spec, variants
from workloads.video.mixcache.policy import Always, MixCache, Repair, Repaired, Trigger
from workloads.video.probe import Probe
from workloads.video.toy import train

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
SMALL = {"model": "toy", "denoise_steps": 10, "videos": 1, "rows": 8, "columns": 8, "frames": 4}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def params(**changes: Value) -> dict[str, Value]:
    return DEFAULTS | changes


def triggered(changes: list[float], **settings: float) -> list[bool]:
    """Whether each of 20 steps may be cached, when full steps keep changing the prediction by these shares."""
    trigger = Trigger(**settings)
    allowed = []
    for index in range(20):
        allowed.append(trigger.allows(index, 20))
        change = changes[min(index, len(changes) - 1)]
        trigger.observe(torch.tensor([1 + math.atanh(change)]), torch.ones(1), 1)
    return allowed


def test_the_trigger_waits_until_the_prediction_has_settled() -> None:
    allowed = triggered([0.5, 0.4, 0.3, 0.295, 0.29], earliest=0.1, latest=0.5, tail=0.1, settled=0.01)
    assert allowed == [False] * 4 + [True] * 14 + [False] * 2


def test_a_rising_change_is_not_settled() -> None:
    allowed = triggered([0.3, 0.301, 0.302, 0.303, 0.304, 0.305, 0.306], earliest=0.1, latest=0.9, settled=0.01)
    assert allowed.index(True) == 18


def test_the_trigger_gives_in_at_the_latest_and_not_before_the_earliest() -> None:
    falling = [0.9 - 0.04 * step for step in range(20)]
    assert triggered(falling, latest=0.4, settled=0.01).index(True) == 8
    assert triggered([0.3 - 0.001 * step for step in range(20)], earliest=0.25, settled=0.01).index(True) == 5


def test_the_trigger_forgets_the_request_before() -> None:
    trigger = Trigger(earliest=0, settled=1.0)
    for value in (2.0, 1.5):
        trigger.observe(torch.tensor([value]), torch.ones(1), 1)
    assert trigger.allows(2, 20)
    trigger.reset()
    assert not trigger.allows(2, 20)


class AnyTime(Trigger):
    def allows(self, index: int, steps: int) -> bool:
        return True


class Priced(MixCache):
    """Errors of reuse are given, and weigh a tenth."""

    given: dict[str, float]

    def _full(self, step: Step) -> Tensor:
        velocity = self.cache.full(step)
        self.errors = dict(self.given)
        return velocity

    def _weight(self, latents: Tensor) -> float:
        return 0.1


def actions(tiny: Tiny, given: dict[str, float], threshold: float = 1.0, **settings: float) -> tuple[str, ...]:
    policy = Priced(threshold, AnyTime(), forecast=False, **settings)  # type: ignore[arg-type]
    policy.given = given
    request = dataclasses.replace(tiny.request, steps=8)
    return tiny.loop.generate(request, policy).actions


def test_each_step_does_what_costs_least() -> None:
    """Of the tiny model's four blocks a block step computes two: its work is a half, like that of a cfg step."""
    free, dear = 0.0, 100.0
    tiny = wan()
    everything = {STEP: dear, CFG: dear, BLOCK: dear}
    assert actions(tiny, everything, penalty=1.0) == (FULL,) * 8
    for kind in (STEP, CFG, BLOCK):
        assert actions(tiny, everything | {kind: free}, penalty=1.0) == (FULL, *[kind] * 7)
    assert actions(tiny, everything | {CFG: 1.0, BLOCK: 2.0}, penalty=1.0)[1] == CFG
    assert actions(tiny, {STEP: 7.0, CFG: 1.0, BLOCK: 2.0}, penalty=1.0)[1] == CFG, "0.5 + 0.1 is less than 0.7"
    assert actions(tiny, {STEP: 5.0, CFG: 1.0, BLOCK: 2.0}, penalty=1.0)[1] == STEP, "0.5 is less than 0.5 + 0.1"


def test_error_grows_with_age_until_a_full_step_is_cheaper() -> None:
    """An error of 0.3 a step of age: 0.3, 0.6, 0.9, and 1.2 is more than a full step."""
    dear = {CFG: 100.0, BLOCK: 100.0}
    assert actions(wan(), {STEP: 3.0, **dear}, penalty=1.0) == (FULL, STEP, STEP, STEP, FULL, STEP, STEP, STEP)
    assert actions(wan(), {STEP: 3.0, **dear}, penalty=1.5)[:4] == (FULL, STEP, STEP, FULL), "0.3, 0.9, 2.0"
    assert actions(wan(), {STEP: 3.0, **dear}, penalty=1.0, threshold=10.0, most=2)[:4] == (FULL, STEP, STEP, FULL)


def test_the_ablation_without_a_trigger_caches_as_soon_as_errors_are_known() -> None:
    result = wan().loop.generate(dataclasses.replace(wan().request, steps=10), MixCache(1e9, Always()))
    assert result.actions[:3] == (FULL,) * 3
    assert FULL not in result.actions[3:]


def test_without_a_second_branch_there_is_no_cfg_cache() -> None:
    given = {STEP: 100.0, CFG: 0.0, BLOCK: 1.0}
    assert set(actions(hunyuan(), given, penalty=1.0)) == {FULL, BLOCK}


def test_errors_are_those_that_reuse_makes() -> None:
    """What MixCache expects a step cache to get wrong at age one is what it does get wrong."""
    tiny = wan()
    request = dataclasses.replace(tiny.request, steps=6)
    velocities: list[Tensor] = []

    class Watched(MixCache):
        def velocity(self, step: Step) -> Tensor:
            velocities.append(super().velocity(step))
            return velocities[-1]

    policy = Watched(1e-9, Always(), forecast=False)
    tiny.loop.generate(request, policy)
    now, before = velocities[-1], velocities[-2]
    assert policy.errors[STEP] == pytest.approx(float((now - before).abs().mean() / now.abs().mean()), rel=1e-5)
    assert policy.errors[CFG] > 0
    assert policy.errors[BLOCK] > 0


TIMES, MOVES = (1000.0, 900.0, 700.0, 650.0), (-0.1, -0.2, -0.05, -0.15)


def stepped(index: int, move: float | None) -> Step:
    tiny = wan()
    return Step(index, torch.tensor(TIMES[index]), tiny.request.noise, tiny.request, tiny.loop.models, move=move)


def test_a_full_step_makes_good_what_the_step_cache_got_wrong() -> None:
    """Predictions on a line in time: whatever was used in between, the latents end where uncached steps lead."""
    slope, start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    truth = [start + slope * time / 1000 for time in TIMES]
    used, repair = [torch.zeros(3), torch.ones(3)], Repair()
    went = MOVES[0] * repair.full(stepped(0, MOVES[0]), truth[0])
    for index, velocity in zip((1, 2), used, strict=True):
        repair.cached(stepped(index, MOVES[index]), velocity)
        went = went + MOVES[index] * velocity
    assert repair.cache_bytes() == 12
    went = went + MOVES[3] * repair.full(stepped(3, MOVES[3]), truth[3])
    torch.testing.assert_close(went, sum(move * velocity for move, velocity in zip(MOVES, truth, strict=True)))
    assert repair.cache_bytes() == 0
    assert torch.equal(repair.full(stepped(3, MOVES[3]), truth[0]), truth[0]), "nothing was cached in between"


def test_mixcache_counts_all_that_it_keeps() -> None:
    """V and the conditional prediction of full steps, the latents before the step, and where the step cache went."""
    tiny = wan()
    request = dataclasses.replace(tiny.request, steps=6)
    policy = MixCache(1e9, Always(), (STEP,), forecast=False)
    result = tiny.loop.generate(request, policy)
    assert result.counts[STEP] == 3
    assert result.cache_bytes == 4 * request.noise.numel() * 4


def test_nothing_is_repaired_where_the_scheduler_does_more_than_euler() -> None:
    repair, velocity = Repair(), torch.ones(3)
    repair.full(stepped(0, None), velocity)
    repair.cached(stepped(1, None), 5 * velocity)
    assert torch.equal(repair.full(stepped(2, None), velocity), velocity)


def test_repair_leaves_an_uncached_run_alone() -> None:
    """And changes one that has steps from the step cache."""
    tiny = wan()
    request = dataclasses.replace(tiny.request, steps=8)
    plain = tiny.loop.generate(request).latents
    runs = [
        tiny.loop.generate(request, MixCache(threshold, Always(), (STEP,), most=2, repair=repair)).latents
        for threshold in (1e-9, 1e9)
        for repair in (True, False)
    ]
    assert torch.equal(runs[0], plain)
    assert torch.equal(runs[1], plain)
    assert not torch.equal(runs[2], runs[3])


def test_a_fixed_rhythm_is_repaired_as_mixcache_is() -> None:
    """MixCache that may take steps from the step cache only, two after each full one, is that rhythm."""
    request = dataclasses.replace(wan().request, steps=9)
    mixed = wan().loop.generate(request, MixCache(1e9, Always(), (STEP,), most=2))
    assert mixed.actions == (FULL, FULL, FULL, STEP, STEP, FULL, STEP, STEP, FULL)
    rhythm = wan().loop.generate(request, Repaired(mixed.actions, forecast=True))
    assert torch.equal(rhythm.latents, mixed.latents)
    assert not torch.equal(wan().loop.generate(request, Fixed(mixed.actions, forecast=True)).latents, mixed.latents)


@pytest.mark.parametrize(
    "policy",
    [
        MixCache(0.1, Always()),
        Repaired((FULL, FULL, *[STEP] * 6), forecast=True),
        Fixed((FULL, FULL, *[STEP] * 6), forecast=True),
        peers.TeaCache(0.5),
        peers.EasyCache(0.5, warmup=1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_what_one_request_left_is_not_used_by_the_next(policy: Policy) -> None:
    """Of another size, guidance and step count: the second request gives the bits that a first one would."""
    tiny = wan()
    wide = dataclasses.replace(tiny.request, noise=torch.randn(1, 4, 2, 4, 4), steps=8, guidance=2.0)
    small = dataclasses.replace(tiny.request, steps=6)
    first = tiny.loop.generate(small, policy)
    assert first.counts[FULL] < 6
    tiny.loop.generate(wide, policy)
    again = tiny.loop.generate(small, policy)
    assert torch.equal(again.latents, first.latents)
    assert again.forwards == first.forwards


def test_no_step_is_cached_before_the_errors_of_one_that_might_be_are_known() -> None:
    """The first step the trigger allows is full all the same, and what the blocks' residual is worth is seen there."""
    request = dataclasses.replace(wan().request, steps=10)
    result = wan().loop.generate(request, MixCache(1e9, Trigger(earliest=0.4, settled=10.0), most=2))
    assert result.actions[:5] == (FULL,) * 5
    assert FULL not in result.actions[5:7]


def test_a_threshold_near_zero_is_the_plain_loop_but_for_one_look_at_the_blocks() -> None:
    tiny = wan()
    result = tiny.loop.generate(tiny.request, MixCache(1e-12))
    assert torch.equal(result.latents, tiny.loop.generate(tiny.request).latents)
    assert result.forwards == (2 * tiny.request.steps + 2 * 0.5,)


def test_the_toys_are_what_planning_takes_them_for() -> None:
    for name, size in (("toy", "large"), ("toy-small", "small")):
        model, planned = train.make_model(size), shapes.TOYS[name]
        assert sum(each.numel() for each in model.parameters()) == planned.parameters
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(torch.zeros(1, 1, 8, 24, 24), torch.ones(1), torch.zeros(1, 7, train.TEXT_DIM))
        assert counter.get_total_flops() == pytest.approx(planned.forward_flop((8, 24, 24)), rel=0.01)


def test_wan_sizes_are_the_published_ones() -> None:
    assert shapes.random("wan", 30, 1536).parameters == pytest.approx(1.42e9, rel=0.01)
    assert shapes.random("wan", 40, 5120).parameters == pytest.approx(14.3e9, rel=0.01)
    assert shapes.random("cogvideox", 30, 1920).parameters == pytest.approx(1.69e9, rel=0.01)
    assert shapes.random("cogvideox", 42, 3072).parameters == pytest.approx(5.57e9, rel=0.01)
    assert shapes.random("hunyuanvideo", 60, 3072).parameters == pytest.approx(12.8e9, rel=0.01)


@pytest.mark.parametrize(
    ("family", "layers", "width", "near"),
    [("wan", 4, 48, 0.001), ("wan", 3, 192, 0.001), ("cogvideox", 5, 48, 0.01), ("hunyuanvideo", 6, 48, 0.1)],
)
def test_planning_knows_what_random_weights_are_made_of(family: str, layers: int, width: int, near: float) -> None:
    """Parameters exactly; FLOP as torch counts them, but for the way of the text, long in a model this small."""
    ready, planned = checkpoint.random(family, layers, width), shapes.random(family, layers, width)
    model, grid = ready.adapter.module, (4, 16, 16)
    assert sum(each.numel() for each in model.parameters()) == planned.parameters
    assert shapes.of_config({**model.config, "_class_name": type(model).__name__}) == planned
    assert ready.adapter.depth == layers
    request = ready.request("any", grid, 2, 5.0, seed=1)
    assert len(request.branches) == planned.branches
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(request.noise, timestep=torch.ones(1), **request.conditions["cond"])
    assert counter.get_total_flops() == pytest.approx(planned.forward_flop(grid), rel=near)


def test_cost_follows_the_speedup_and_says_what_a_cache_cannot_reach() -> None:
    plain = spec.cost(params(variant="none"))
    assert plain.flop == pytest.approx(100 * shapes.TOYS["toy"].forward_flop((8, 24, 24)))
    assert spec.cost(params(speedup=2.5)).flop == pytest.approx(plain.flop / 2.5)
    with pytest.raises(SaihError, match=r"the cfg cache alone reaches 1\.58x here, not 2\.0x"):
        spec.cost(params(variant="cfg"))
    with pytest.raises(SaihError, match="the toy has 8 layers of width 96"):
        spec.cost(params(width=192))
    with pytest.raises(SaihError, match="width 40: a cogvideox with random weights takes multiples of 16"):
        spec.cost(params(model="random", family="cogvideox", width=40))
    for alone in ({"guidance": 1.0}, {"model": "random", "family": "hunyuanvideo", "width": 48}):
        assert spec.cost(params(**alone)).work == 50, "one branch"
        for cfg in ({"variant": "cfg"}, {"granularity": "cfg"}):
            with pytest.raises(SaihError, match="the cfg cache needs a second branch: guidance above 1"):
                spec.cost(params(**alone, **cfg, threshold=9.0))
    with pytest.raises(SaihError, match="model nowhere: neither toy"):
        spec.cost(params(model="nowhere"))
    with pytest.raises(SaihError, match="not a whole number of patches"):
        spec.cost(params(rows=26))


@pytest.mark.parametrize("variant", [each for each in spec.VARIANTS if each != "none"])
def test_every_variant_saves_work_is_deterministic_and_is_told_its_worth(
    variant: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if variant == "cache-dit":
        pytest.importorskip("cache_dit", reason="the peer is compared with where it is installed: saih[caches]")
    folder = tmp_path_factory.getbasetemp() / "mixcache-data"
    point = Point("mixcache", params(**SMALL, variant=variant, speedup=1.3))
    ready = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(folder)))
    try:
        check = ready.check()
        assert check.passed, check.why
        numbers = check.numbers
        work = ready.step(Unclocked())
    finally:
        ready.close()
    assert numbers["forwards"] < 20
    assert numbers["reused_steps"] > 0 or variant == "fewer-steps"
    assert 0 < numbers["ssim"] < 1
    assert work.units == numbers["iso_forwards"]
    assert work.flop == pytest.approx(numbers["forwards"] * shapes.TOYS["toy"].forward_flop((4, 8, 8)))
    if variant == "fewer-steps":
        assert numbers["iso_gain"] == 1


def test_the_uncached_variant_is_its_own_reference(tmp_path: Path) -> None:
    point = Point("mixcache", params(**SMALL, variant="none"))
    ready = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    check = ready.check()
    assert check.passed, check.why
    assert check.numbers["ssim"] == check.numbers["iso_gain"] == check.numbers["work_gain"] == 1
    assert "psnr_db" not in check.numbers, "infinite"
    assert "alignment" not in check.numbers, "the probe cannot read so small a video"


def test_alignment_is_the_share_of_words_that_the_probe_reads(tmp_path: Path) -> None:
    told = params(**SMALL | {"frames": 8, "rows": 24, "columns": 24, "videos": 3}, variant="none")
    ready = bench.setup(Point("mixcache", told, seed=7), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    toy, probe = ready.checkpoint, Probe.load()
    read = []
    for place in range(3):
        prompt = toy.words.prompt(7 + place)
        request = toy.request(prompt, (8, 24, 24), 10, float(told["guidance"]), 7 + place)
        video = toy.pixels(toy.loop().generate(request).latents)
        read.append(probe.alignment(probe.read(video[:, 0][None])[0], prompt))
    assert ready.check().numbers["alignment"] == pytest.approx(np.mean(read))


def test_the_check_fails_when_two_runs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dice(Policy):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            return latents + 1e-6 * torch.randn(latents.shape)

    monkeypatch.setattr(variants, "policy", lambda *given: Dice())
    ready = bench.setup(Point("mixcache", params(**SMALL)), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert "two runs of one request differ" in ready.check().why


def test_the_check_fails_when_the_parts_are_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point("mixcache", params(**SMALL, variant="fewer-steps"))
    ready = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    ready.checkpoint.adapter.blocks.reverse()
    assert "differ from the transformer's own forward" in ready.check().why


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_random_weights_have_no_quality(family: str, tmp_path: Path) -> None:
    small = {
        "model": "random",
        "family": family,
        "layers": 3,
        "width": 48,
        "frames": 1,
        "rows": 4,
        "columns": 4,
        "denoise_steps": 10,
    }
    point = Point("mixcache", params(**small, variant="step", speedup=1.2))
    ready = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    check = ready.check()
    assert check.passed, check.why
    assert not {"ssim", "psnr_db", "iso_gain", "iso_forwards"} & check.numbers.keys()
    assert ready.step(Unclocked()).units == check.numbers["forwards"]


def test_a_static_mixture_for_one_branch_is_without_cfg(tmp_path: Path) -> None:
    told = params(**SMALL, variant="static-mix", guidance=1.0, speedup=1.3)
    ready = bench.setup(Point("mixcache", told), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    numbers = ready.check().numbers
    assert numbers["cfg_steps"] == 0
    assert numbers["step_steps"] + numbers["block_steps"] > 0
    assert spec.cost(told | {"variant": "none"}).flop == pytest.approx(10 * shapes.TOYS["toy"].forward_flop((4, 8, 8)))


def test_what_is_kept_is_of_these_prompts_packages_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, path = checkpoint.load(checkpoint.TOY / "large").words, tmp_path / "prompts.txt"
    assert words is not None
    told = params(**SMALL, prompts=str(path), threshold=3, variant="step")

    def kept(seed: int) -> Path:
        path.write_text(words.prompt(seed))
        return bench.setup(Point("mixcache", told), Context(Place(0, 0, 1), "cpu", str(tmp_path))).kept

    first = kept(0)
    assert kept(0) == first != kept(1)
    monkeypatch.setattr(kept_module, "version", lambda package: "another")
    assert kept(0) != first
    monkeypatch.undo()
    monkeypatch.setattr(kept_module, "_processor", lambda: "another")
    assert kept(0) != first


def test_a_gain_in_quality_by_seconds_is_claimed_of_the_toy_alone() -> None:
    """Random weights have none, and their work is counted in forwards: the study's part has to name its model."""
    seconds = yaml.safe_load((Path(__file__).parents[1] / "jobs/studies/mixcache.yaml").read_text())["parts"]["seconds"]
    claims = [claim for claim in spec.CLAIMS if claim.metric == "work_per_s"]
    assert claims
    for claim in claims:
        assert claim.where["model"] == "toy"
        assert "toy" in seconds["axes"]["model"]


class Linear(Policy):
    """Work falls with the knob: caches a share of the steps."""

    def __init__(self, value: float) -> None:
        self.value = value

    def velocity(self, step: Step) -> Tensor:
        if step.index and step.index % 10 < self.value:
            return step.latents
        return super().velocity(step)


def test_the_search_finds_the_knob_for_a_speedup() -> None:
    tiny = wan()
    request = dataclasses.replace(tiny.request, steps=10)
    found = variants.search(variants.Knob(Linear, 0, 9, whole=True), tiny.loop, [request], speedup=2.0)
    work = tiny.loop.generate(request, Linear(found)).forwards[0]
    assert work == 10
    assert variants.search(variants.Knob(Linear, 1e-3, 8.9), tiny.loop, [request] * 2, speedup=2.0) == pytest.approx(
        5.5, abs=0.6
    )


def test_a_knob_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, kept = wan(), tmp_path / "knob.json"
    asked = params(variant="teacache", denoise_steps=tiny.request.steps, speedup=1.3)
    first = variants.policy(asked, tiny.loop, [tiny.request], kept)
    monkeypatch.setattr(variants, "search", lambda *given: pytest.fail("searched again"))
    second = variants.policy(asked, tiny.loop, [tiny.request], kept)
    assert isinstance(first, peers.TeaCache)
    assert isinstance(second, peers.TeaCache)
    assert first.threshold == second.threshold == json.loads(kept.read_text())


def test_prompts_come_from_the_toys_words_or_a_file(tmp_path: Path) -> None:
    toy = checkpoint.load(checkpoint.TOY / "small")
    drawn = denoising.prompts(toy, params(videos=3), seed=5)
    assert len(set(drawn)) == 3
    assert drawn == denoising.prompts(toy, params(videos=3), seed=5) != denoising.prompts(toy, params(videos=3), seed=9)
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert denoising.prompts(toy, params(videos=3, prompts=str(path)), 0) == ("one", "two", "one")
    path.write_text("one\ntwo\nthree\nfour\n")
    told = params(videos=2, prompts=str(path))
    assert denoising.videos(toy, told, 0).prompts == ("one", "two")
    assert denoising.calibration(toy, told, 2).prompts == ("three", "four"), "others than those measured"
    other = dataclasses.replace(toy, words=None)
    with pytest.raises(SaihError, match="prompts: name a text file"):
        denoising.prompts(other, params(), 0)


def test_a_request_of_the_toy_is_guided_by_two_branches() -> None:
    toy = checkpoint.load(checkpoint.TOY / "large")
    assert toy.words is not None
    request: Request = toy.request(toy.words.prompt(0), (8, 24, 24), 50, 5.0, seed=1)
    assert request.branches == ("cond", "uncond")
    assert request.noise.shape == (1, 1, 8, 24, 24)


def test_numbers_are_counted_once_and_a_repeat_must_make_the_same_video(tmp_path: Path) -> None:
    point, context = Point("mixcache", params(**SMALL, variant="step")), Context(Place(0, 0, 1), "cpu", str(tmp_path))
    counted = bench.setup(point, context).check()
    again = bench.setup(point, context)
    again._make_all = lambda: pytest.fail("counted again")  # type: ignore[method-assign]
    assert again.check() == counted
    known = json.loads(again.kept.read_text())
    again.kept.write_text(json.dumps(known | {"digest": "another"}))
    assert "two runs of one request differ" in again.check().why
