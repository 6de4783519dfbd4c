"""The loop and its adapters against the pipelines of diffusers: the same bits with nothing cached, and counted work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from saih.errors import SaihError
from tests.tiny_video import FAMILIES, STEPS, Tiny, wan, wan_model
from workloads.video.adapters import State, adapt
from workloads.video.loop import COND, UNCOND, Loop, Policy, Step


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.set_num_threads(1)
    return FAMILIES[request.param]()


def state_of(tiny: Tiny) -> State:
    """The state before the first block, in the middle of the schedule."""
    timesteps = tiny.adapter.set_timesteps(tiny.loop.scheduler, STEPS, "cpu")
    step = Step(1, timesteps[1], tiny.request.noise, tiny.request, tiny.loop.models)
    return step.embed(tiny.request.branches if tiny.adapter.joint else (COND,))


def test_without_a_policy_it_is_the_pipeline_bit_for_bit(tiny: Tiny) -> None:
    assert torch.equal(tiny.loop.generate(tiny.request).latents, tiny.pipeline())


def test_two_runs_are_alike(tiny: Tiny) -> None:
    first, second = (tiny.loop.generate(tiny.request) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert first.forwards == second.forwards


def test_work_counts_every_branch_of_every_step_once(tiny: Tiny) -> None:
    result = tiny.loop.generate(tiny.request)
    assert result.forwards == (pytest.approx(STEPS * len(tiny.request.branches)),)
    assert result.counts == {"full": STEPS}
    assert result.cache_bytes == 0


@torch.no_grad()
def test_blocks_can_be_run_in_any_ranges(tiny: Tiny) -> None:
    state = state_of(tiny)
    whole = tiny.adapter.run(state, 0, tiny.adapter.depth)
    parts = tiny.adapter.run(tiny.adapter.run(state, 0, 1), 1, tiny.adapter.depth)
    assert torch.equal(tiny.adapter.head(whole), tiny.adapter.head(parts))


@torch.no_grad()
def test_a_residual_stands_in_for_the_blocks_it_was_taken_over(tiny: Tiny) -> None:
    before = tiny.adapter.run(state_of(tiny), 0, 1)
    after = tiny.adapter.run(before, 1, 3)
    for restored, stream in zip(before.plus(after.minus(before)).streams, after.streams, strict=True):
        torch.testing.assert_close(restored, stream, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_tokens_selected_is_exact_and_counts_as_a_forward(tiny: Tiny) -> None:
    state, adapter = state_of(tiny), tiny.adapter
    tokens = torch.arange(state.streams[0].shape[1])
    assert torch.equal(
        adapter.head(adapter.merge(state, adapter.run(adapter.select(state, tokens), 0, adapter.depth), tokens)),
        adapter.head(adapter.run(state, 0, adapter.depth)),
    )


@torch.no_grad()
def test_tokens_keep_their_places_when_they_are_selected(tiny: Tiny) -> None:
    """Attention does not care for the order of its tokens, as long as each has its own rotary angles."""
    state, adapter = state_of(tiny), tiny.adapter
    tokens = torch.arange(state.streams[0].shape[1]).flip(0)
    turned = adapter.merge(state, adapter.run(adapter.select(state, tokens), 0, adapter.depth), tokens)
    torch.testing.assert_close(
        adapter.head(turned), adapter.head(adapter.run(state, 0, adapter.depth)), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_work_of_some_blocks_on_some_tokens(tiny: Tiny) -> None:
    state, adapter = state_of(tiny), tiny.adapter
    half = torch.arange(state.streams[0].shape[1] // 2)
    before = adapter.forwards
    adapter.run(adapter.select(state, half), 0, 3)
    assert adapter.forwards - before == pytest.approx(3 / 4 / 2 * state.rows)


class Halfway(Policy):
    """Keeps the latents before step 2."""

    def after(self, step: Step, latents: Tensor) -> Tensor:
        if step.index == 1:
            self.latents = latents
        return latents


def test_a_request_can_be_resumed_at_any_step(tiny: Tiny) -> None:
    policy = Halfway()
    whole = tiny.loop.generate(tiny.request, policy)
    rest = tiny.loop.generate(dataclasses.replace(tiny.request, noise=policy.latents), start=2)
    assert torch.equal(rest.latents, whole.latents)
    assert len(rest.actions) == STEPS - 2


def test_a_policy_may_call_any_model_and_the_work_of_each_is_counted() -> None:
    tiny, other = wan(), adapt(wan_model(seed=5, layers=2))

    class Other(Policy):
        def velocity(self, step: Step) -> Tensor:
            return step.guide(step.predict(model=int(step.index >= 1)))

    loop = Loop([tiny.adapter, other], tiny.loop.scheduler)
    assert loop.generate(tiny.request, Other()).forwards == (2.0, 2.0 * (STEPS - 1))


def test_one_branch_can_be_asked_for(tiny: Tiny) -> None:
    class Alone(Policy):
        def velocity(self, step: Step) -> Tensor:
            predicted = step.predict((COND,))
            assert UNCOND not in predicted
            return step.guide(predicted)

    assert tiny.loop.generate(tiny.request, Alone()).forwards == (pytest.approx(STEPS),)


def test_a_transformer_without_an_adapter_is_refused() -> None:
    with pytest.raises(SaihError, match="no adapter for Linear; there are adapters for WanTransformer3DModel"):
        adapt(nn.Linear(1, 1))


def test_a_step_says_how_far_its_prediction_moves_the_latents(tiny: Tiny) -> None:
    """Under Euler's schedulers that is all a step does; of others nothing is said."""
    seen: list[tuple[float | None, Tensor, Tensor]] = []

    class Watched(Policy):
        def velocity(self, step: Step) -> Tensor:
            self.prediction = super().velocity(step)
            return self.prediction

        def after(self, step: Step, latents: Tensor) -> Tensor:
            seen.append((step.move, self.prediction, latents - step.latents))
            return latents

    tiny.loop.generate(tiny.request, Watched())
    for move, prediction, went in seen:
        if tiny.adapter.joint:
            assert move is None
        else:
            assert move is not None
            torch.testing.assert_close(went, move * prediction)
