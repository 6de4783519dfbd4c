"""Caches of three granularities: what each reuse equals, costs and must not write; and peers, which must trigger."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saih.errors import SaihError
from tests.tiny_video import FAMILIES, Tiny, hunyuan, wan
from workloads.video import peers
from workloads.video.adapters import Condition, State
from workloads.video.caches import BLOCK, CFG, FULL, STEP, Fixed, FullStepCache, Track, relative_change, spread
from workloads.video.loop import Policy, Request, Step

STEPS = 8


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.set_num_threads(1)
    return longer(FAMILIES[request.param]())


def longer(tiny: Tiny) -> Tiny:
    return dataclasses.replace(tiny, request=dataclasses.replace(tiny.request, steps=STEPS))


def every_other(kind: str) -> list[str]:
    return [FULL, FULL, kind, FULL, kind, FULL, kind, FULL]


class TwiceEachStep(Policy):
    """A full step, then the same step again from the cache: with nothing stale, every reuse is the step itself."""

    def __init__(self, kind: str) -> None:
        self.kind, self.cache, self.errors = kind, FullStepCache(), list[float]()

    def start(self, request: Request) -> None:
        self.cache.clear()

    def velocity(self, step: Step) -> Tensor:
        full = self.cache.full(step)
        self.errors.append(float((self.cache.reuse(step, self.kind) - full).abs().max()))
        return full


@pytest.mark.parametrize("kind", [STEP, CFG, BLOCK])
def test_reuse_of_what_is_fresh_is_the_full_step(tiny: Tiny, kind: str) -> None:
    if kind == CFG and len(tiny.request.branches) == 1:
        pytest.skip("there is one branch")
    policy = TwiceEachStep(kind)
    tiny.loop.generate(tiny.request, policy)
    assert max(policy.errors) < 1e-4


@pytest.mark.parametrize("kind", [STEP, CFG, BLOCK])
def test_only_full_steps_write_to_the_cache(tiny: Tiny, kind: str) -> None:
    """Interference: whatever an approximate step computes stays out of V, D and R."""
    if kind == CFG and len(tiny.request.branches) == 1:
        pytest.skip("there is one branch")
    seen: list[tuple[Tensor, ...]] = []

    class Watched(Fixed):
        def velocity(self, step: Step) -> Tensor:
            velocity = super().velocity(step)
            tracks = [self.cache.velocity, self.cache.difference, *self.cache.residuals.values()]
            held = [tensor for track in tracks for _, value in track.values for tensor in value]
            seen.append(tuple(each.clone() for each in held))
            return velocity

    result = tiny.loop.generate(tiny.request, Watched([FULL, FULL, kind, kind, FULL, kind, kind, FULL]))
    assert result.actions == (FULL, FULL, kind, kind, FULL, kind, kind, FULL)
    for place in (2, 3, 5, 6):
        assert all(torch.equal(now, before) for now, before in zip(seen[place], seen[place - 1], strict=True))
    assert not torch.equal(seen[4][0], seen[3][0])


@pytest.mark.parametrize(("kind", "share"), [(STEP, 0.0), (CFG, 0.5), (BLOCK, 0.5)])
def test_a_reused_step_costs_what_it_computes(tiny: Tiny, kind: str, share: float) -> None:
    """Of the tiny models' four blocks a block step runs two."""
    branches = len(tiny.request.branches)
    if kind == CFG and branches == 1:
        pytest.skip("there is one branch")
    result = tiny.loop.generate(tiny.request, Fixed(every_other(kind)))
    assert result.counts == {FULL: 5, kind: 3}
    assert result.forwards == (pytest.approx(branches * (5 + 3 * share)),)


def test_a_schedule_of_full_steps_is_the_plain_loop(tiny: Tiny) -> None:
    plain = tiny.loop.generate(tiny.request)
    assert torch.equal(tiny.loop.generate(tiny.request, Fixed([FULL] * STEPS)).latents, plain.latents)


def test_reusing_a_step_is_one_larger_step_of_euler() -> None:
    """v over dt1, then v again over dt2: the latents of one step from the first sigma to the third."""
    tiny = longer(wan())
    kept: dict[int, Tensor] = {}

    class Kept(Fixed):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            kept[step.index] = latents
            return latents

    tiny.loop.generate(tiny.request, Kept([FULL, FULL, FULL, STEP, FULL, FULL, FULL, FULL]))
    sigmas = tiny.loop.scheduler.sigmas
    velocity = (kept[2] - kept[1]) / (sigmas[3] - sigmas[2])
    torch.testing.assert_close(kept[3], kept[1] + (sigmas[4] - sigmas[2]) * velocity)


def test_memory_is_that_of_what_is_kept() -> None:
    """The conditional prediction of the last full step is kept beside every cache."""
    tiny = longer(wan())
    latents = tiny.request.noise.numel() * 4
    tokens = 3 * 4 * 4 * 24 * 4
    for kind, expected in ((STEP, 2 * latents), (CFG, 2 * latents), (BLOCK, latents + 2 * tokens)):
        assert tiny.loop.generate(tiny.request, Fixed(every_other(kind))).cache_bytes == expected


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(2, 999), st.integers(1, 998))
def test_a_forecast_follows_the_line_through_the_last_two_full_steps(
    slope: float, offset: float, now: int, later: int
) -> None:
    """Exact for what is linear in the scheduler's time, however its steps are spaced; plain reuse holds the value."""
    forecast, plain = Track(forecast=True), Track(forecast=False)
    for track in (forecast, plain):
        for time in (1000.0, float(now)):
            track.add(time, (torch.tensor([slope * time + offset]),))
    assert float(forecast.at(float(later))[0]) == pytest.approx(
        slope * later + offset, abs=2e-2 * (1000 / (1000 - now))
    )
    assert float(plain.at(float(later))[0]) == pytest.approx(slope * now + offset, rel=1e-5, abs=1e-4)


def test_a_forecast_needs_two_full_steps_and_holds_the_value_before() -> None:
    track = Track(forecast=True)
    track.add(900.0, (torch.ones(2),))
    assert torch.equal(track.at(800.0)[0], torch.ones(2))


def test_relative_change() -> None:
    assert relative_change(torch.tensor([3.0, -1.0]), torch.tensor([2.0, -2.0])) == pytest.approx(0.5)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 6), st.data())
def test_cached_steps_are_spread_evenly_between_warmup_and_tail(
    free: int, warmup: int, tail: int, data: st.DataObject
) -> None:
    steps = warmup + free + tail
    cached = data.draw(st.integers(0, free - 1))
    actions = spread([STEP, CFG], cached, steps, warmup, tail)
    assert len(actions) == steps
    assert sum(action != FULL for action in actions) == cached
    assert set(actions[:warmup] + actions[steps - tail :]) <= {FULL}
    runs = [len(run) for run in "".join("c" if action != FULL else " " for action in actions).split()]
    assert max(runs, default=0) - min(runs, default=0) <= 1 or len(runs) == 1
    assert all(after == STEP for before, after in itertools.pairwise(actions) if before == FULL and after != FULL)


def test_what_cannot_be_spread_is_refused() -> None:
    for cached, warmup in ((6, 2), (1, 0), (-1, 2)):
        with pytest.raises(ValueError, match="cannot be cached"):
            spread([STEP], cached, 8, warmup, 0)


PEERS: dict[str, Callable[[Tiny], Policy]] = {
    "teacache": lambda tiny: peers.TeaCache(0.5),
    "easycache": lambda tiny: peers.EasyCache(0.2, warmup=2),
    "first-block-cache": lambda tiny: peers.first_block_cache(tiny.adapter, 0.5),
    "pab": lambda tiny: peers.pyramid_attention_broadcast(tiny.adapter, 2),
    "taylorseer": lambda tiny: peers.taylorseer(tiny.adapter, 2),
    "magcache": lambda tiny: peers.magcache(tiny.adapter, 0.5, [1.0] * STEPS),
    "cache-dit": lambda tiny: peers.CacheDit(tiny.adapter, 0.5),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_triggers_saves_work_and_leaves_the_model_as_it_was(name: str) -> None:
    if name == "cache-dit":
        pytest.importorskip("cache_dit", reason="the peer is compared with where it is installed: saih[caches]")
    tiny = longer(wan())
    plain = tiny.loop.generate(tiny.request)
    policy = PEERS[name](tiny)
    first = tiny.loop.generate(tiny.request, policy)
    second = tiny.loop.generate(tiny.request, policy)
    assert torch.equal(first.latents, second.latents), "nothing is left over from the request before"
    assert first.counts[peers.REUSE] > 0
    assert first.forwards[0] < plain.forwards[0]
    assert not torch.equal(first.latents, plain.latents)
    if isinstance(policy, peers.HookedCache):
        policy.close()
    assert torch.equal(tiny.loop.generate(tiny.request).latents, plain.latents)


@pytest.mark.parametrize("name", ["pab", "taylorseer", "first-block-cache"])
def test_work_inside_of_blocks_is_what_torch_counts_there(name: str) -> None:
    """Attention too, which is all that PAB saves."""
    tiny = longer(wan())
    policy, run = PEERS[name](tiny), tiny.adapter.run
    counted = [0]

    def watched(*given: Any) -> State:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            after = run(*given)
        counted[-1] += counter.get_total_flops()
        return after

    class Watched(Policy):
        start = policy.start

        def velocity(self, step: Step) -> Tensor:
            counted.append(0)
            return policy.velocity(step)

    tiny.adapter.run = watched  # type: ignore[method-assign]
    result = tiny.loop.generate(tiny.request, Watched())
    assert isinstance(policy, peers.HookedCache)
    policy.close()
    assert min(counted[1:]) < counted[1]
    assert result.forwards[0] / 2 == pytest.approx(sum(counted) / counted[1], rel=1e-6)


@pytest.mark.parametrize("cached", [1, 5, 17, 23, 25, 33])
def test_taylorseer_leaves_out_as_many_steps_as_it_is_told_in_its_shortest_interval(cached: int) -> None:
    tiny = wan()
    interval, before = peers.taylorseer_rhythm(cached, 50)
    assert (interval == 2) == (cached <= 23)
    policy = peers.taylorseer(tiny.adapter, interval, before)
    result = tiny.loop.generate(dataclasses.replace(tiny.request, steps=50), policy)
    policy.close()
    assert result.counts == {FULL: 50 - cached, peers.REUSE: cached}
    with pytest.raises(ValueError, match="40 of 50 steps cannot be cached"):
        peers.taylorseer_rhythm(40, 50)


def test_the_polynomial_of_teacache_is_that_of_the_output_over_the_modulation(tiny: Tiny) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(peers.OutputChanges):
        def velocity(self, step: Step) -> Tensor:
            fixed, told = step.embed(step.request.branches).fixed, step.predict()
            seen.append((fixed.get("projection", fixed["time"])[:1], told["cond"]))
            return super().velocity(step)

    watch = Watched()
    plain = tiny.loop.generate(tiny.request).latents
    assert torch.equal(tiny.loop.generate(tiny.request, watch).latents, plain)
    expected = [tuple(map(relative_change, now, before)) for before, now in itertools.pairwise(seen)]
    assert np.array(watch.changes) == pytest.approx(np.array(expected), rel=1e-4)
    watch.changes = [(0.1 * place, 3 * (0.1 * place) ** 4 - 0.1 * place + 0.5) for place in range(9)]
    assert watch.coefficients() == pytest.approx((3, 0, 0, -1, 0.5), abs=1e-6)
    assert peers.TeaCache(1.0, watch.coefficients())._rescaled(0.5) == pytest.approx(3 * 0.5**4)


def test_one_cache_of_diffusers_after_another_on_the_same_model() -> None:
    """Its registry of hooks remembers the modules it found at first: the second cache's would get no context."""
    tiny = longer(wan())
    for make in (PEERS["first-block-cache"], PEERS["taylorseer"], PEERS["magcache"]):
        policy = make(tiny)
        assert isinstance(policy, peers.DiffusersCache)
        assert tiny.loop.generate(tiny.request, policy).counts[peers.REUSE] > 0
        policy.close()


def test_a_peer_that_is_not_there_or_not_for_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(SaihError, match=r"needs the cache-dit package .*: pip install 'saih\[caches\]'"):
        peers.CacheDit(wan().adapter, 0.5)
    monkeypatch.setitem(sys.modules, "cache_dit", types.ModuleType("cache_dit"))
    with pytest.raises(SaihError, match="cache-dit is for Wan here, not for HunyuanVideo"):
        peers.CacheDit(hunyuan().adapter, 0.5)


@pytest.mark.parametrize("name", ["teacache", "easycache"])
def test_our_peers_with_a_threshold_of_zero_are_the_plain_loop(tiny: Tiny, name: str) -> None:
    policy = peers.TeaCache(0.0) if name == "teacache" else peers.EasyCache(0.0)
    result = tiny.loop.generate(tiny.request, policy)
    assert torch.equal(result.latents, tiny.loop.generate(tiny.request).latents)
    assert result.counts == {FULL: STEPS}


def test_teacache_embeds_each_branch_once_a_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = 1 if tiny.adapter.joint else len(tiny.request.branches)
    embed, calls = tiny.adapter.embed, list[int]()

    def counted(latents: Tensor, timestep: Tensor, condition: Condition) -> State:
        calls.append(1)
        return embed(latents, timestep, condition)

    monkeypatch.setattr(tiny.adapter, "embed", counted)
    assert tiny.loop.generate(tiny.request, peers.TeaCache(0.5)).counts[peers.REUSE] > 0
    assert len(calls) == STEPS * groups


def test_a_peer_that_never_triggers_is_seen_to() -> None:
    tiny = longer(wan())
    policy = peers.first_block_cache(tiny.adapter, 1e-9)
    result = tiny.loop.generate(tiny.request, policy)
    policy.close()
    assert result.counts == {FULL: STEPS}
    assert result.forwards == tiny.loop.generate(tiny.request).forwards


def test_magnitude_ratios_are_those_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import MagCacheConfig

    tiny = longer(wan())
    ours = peers.MagnitudeRatios()
    tiny.loop.generate(tiny.request, ours)
    theirs = peers.DiffusersCache(
        tiny.adapter, lambda timestep: MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    )
    tiny.loop.generate(tiny.request, theirs)
    theirs.close()
    numbers = re.findall(r"\[([0-9., e-]+)\]", capsys.readouterr().out)[0]
    assert ours.ratios == pytest.approx([float(word) for word in numbers.split(",")], rel=1e-4)
