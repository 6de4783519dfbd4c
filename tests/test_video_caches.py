"""Caches of three granularities: what each reuse equals, costs and must not write; and the peers, which must trigger."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tiny_video import FAMILIES, Tiny, wan
from workloads.video import peers
from workloads.video.caches import BLOCK, CFG, FULL, STEP, Cadence, FullStepCache, relative_change
from workloads.video.loop import Policy, Request, Step

STEPS = 8


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.set_num_threads(1)
    return longer(FAMILIES[request.param]())


def longer(tiny: Tiny) -> Tiny:
    return dataclasses.replace(tiny, request=dataclasses.replace(tiny.request, steps=STEPS))


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

    class Watched(Cadence):
        def velocity(self, step: Step) -> Tensor:
            velocity = super().velocity(step)
            held = [*self.cache.predicted.values(), *(r for rs in self.cache.residuals.values() for r in rs)]
            seen.append((self.cache.velocity, *(each.clone() for each in held)))  # type: ignore[arg-type]
            return velocity

    result = tiny.loop.generate(tiny.request, Watched([kind, kind, FULL], warmup=2, tail=0))
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
    result = tiny.loop.generate(tiny.request, Cadence([kind, FULL], warmup=2, tail=0))
    assert result.counts == {FULL: 5, kind: 3}
    assert result.forwards == (pytest.approx(branches * (5 + 3 * share)),)


def test_a_cadence_of_full_steps_is_the_plain_loop(tiny: Tiny) -> None:
    plain = tiny.loop.generate(tiny.request)
    assert torch.equal(tiny.loop.generate(tiny.request, Cadence([FULL], 0, 0)).latents, plain.latents)
    assert torch.equal(tiny.loop.generate(tiny.request, Cadence([STEP], STEPS, 0)).latents, plain.latents)


def test_reusing_a_step_is_one_larger_step_of_euler() -> None:
    """v over dt1, then v again over dt2: the latents of one step from the first sigma to the third."""
    tiny = longer(wan())
    kept: dict[int, Tensor] = {}

    class Kept(Cadence):
        def after(self, step: Step, latents: Tensor) -> Tensor:
            kept[step.index] = latents
            return latents

    tiny.loop.generate(tiny.request, Kept([STEP, FULL], warmup=3, tail=0))
    sigmas = tiny.loop.scheduler.sigmas
    velocity = (kept[2] - kept[1]) / (sigmas[3] - sigmas[2])
    torch.testing.assert_close(kept[3], kept[1] + (sigmas[4] - sigmas[2]) * velocity)


def test_memory_is_that_of_what_is_kept() -> None:
    tiny = longer(wan())
    latents = tiny.request.noise.numel() * 4
    tokens = 3 * 4 * 4 * 24 * 4
    for kind, expected in ((STEP, latents), (CFG, 2 * latents), (BLOCK, 2 * tokens)):
        assert tiny.loop.generate(tiny.request, Cadence([kind, FULL], 2, 0)).cache_bytes == expected


def test_relative_change() -> None:
    assert relative_change(torch.tensor([3.0, -1.0]), torch.tensor([2.0, -2.0])) == pytest.approx(0.5)


PEERS: dict[str, Callable[[Tiny], Policy]] = {
    "teacache": lambda tiny: peers.TeaCache(0.5),
    "easycache": lambda tiny: peers.EasyCache(0.2, warmup=2),
    "first-block-cache": lambda tiny: peers.first_block_cache(tiny.adapter, 0.5),
    "pab": lambda tiny: peers.pyramid_attention_broadcast(tiny.adapter, 2),
    "taylorseer": lambda tiny: peers.taylorseer(tiny.adapter, 2),
    "magcache": lambda tiny: peers.magcache(tiny.adapter, 0.5, [1.0] * STEPS),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_triggers_saves_work_and_leaves_the_model_as_it_was(name: str) -> None:
    tiny = longer(wan())
    plain = tiny.loop.generate(tiny.request)
    policy = PEERS[name](tiny)
    first = tiny.loop.generate(tiny.request, policy)
    second = tiny.loop.generate(tiny.request, policy)
    assert torch.equal(first.latents, second.latents), "nothing is left over from the request before"
    assert first.counts[peers.REUSE] > 0
    assert first.forwards[0] < plain.forwards[0]
    assert not torch.equal(first.latents, plain.latents)
    if isinstance(policy, peers.DiffusersCache):
        policy.close()
    assert torch.equal(tiny.loop.generate(tiny.request).latents, plain.latents)


@pytest.mark.parametrize("name", ["teacache", "easycache"])
def test_our_peers_with_a_threshold_of_zero_are_the_plain_loop(tiny: Tiny, name: str) -> None:
    policy = peers.TeaCache(0.0) if name == "teacache" else peers.EasyCache(0.0)
    result = tiny.loop.generate(tiny.request, policy)
    assert torch.equal(result.latents, tiny.loop.generate(tiny.request).latents)
    assert result.counts == {FULL: STEPS}


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
