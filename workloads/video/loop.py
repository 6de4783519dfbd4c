"""The denoise loop: noise in, video latents out, and a policy that says how each step's prediction comes about.

The base `Policy` computes every step in full and is the plain pipeline of diffusers, bit for bit. A system is a
subclass that computes less: it reuses predictions, runs one branch of guidance, some of the blocks, some of the tokens
or another model, through the methods of the `Step` it is handed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workloads.video.adapters import Adapter, Condition, State

COND, UNCOND = "cond", "uncond"
"""The branches of classifier-free guidance."""

Middle = Callable[[State, tuple[str, ...]], State]
"""Takes the state after the embedding and the branches in its rows to the state before the head."""


@dataclass(frozen=True)
class Request:
    """A video to be made.

    Attributes:
        noise: initial latents, float32, as the family of the model lays them out; its first axis counts videos.
        conditions: COND, and UNCOND where guidance is by a second branch -> what that branch is conditioned on.
        guidance: scale of classifier-free guidance; ignored where there is one branch.
        steps: denoise steps.
    """

    noise: Tensor
    conditions: Mapping[str, Condition]
    guidance: float
    steps: int

    @property
    def branches(self) -> tuple[str, ...]:
        """In the order the model's pipeline computes them."""
        return tuple(self.conditions)


@dataclass
class Step:
    """One denoise step, as a policy sees it.

    Attributes:
        index: 0 for the first, noisiest step of the schedule.
        timestep: as the scheduler counts it, a scalar tensor.
        latents: before this step.
        models: adapters that share latents, conditions and schedule; a policy may call any of them.
        action: what was done, in one word, for the records; policies set it.
        signal: what the decision was based on, for the records; NaN where there is none.
        move: how far a unit of the prediction moves the latents, where a step does nothing else (Euler's); else None.
    """

    index: int
    timestep: Tensor
    latents: Tensor
    request: Request
    models: Sequence[Adapter]
    action: str = "full"
    signal: float = float("nan")
    move: float | None = None
    _peeked: dict[tuple[str, ...], State] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps(self) -> int:
        return self.request.steps

    def predict(
        self, branches: tuple[str, ...] = (), model: int = 0, middle: Middle | None = None
    ) -> dict[str, Tensor]:
        """The prediction of each branch (all by default). `middle` stands in for running all blocks.

        Families that compute the branches as one batch get them as one batch, unconditional first.
        """
        adapter, asked = self.models[model], branches or self.request.branches
        groups = [asked] if adapter.joint else [(branch,) for branch in asked]
        predicted: dict[str, Tensor] = {}
        for group in groups:
            state = self.embed(group, model)
            state = middle(state, group) if middle else self.run(state, 0, adapter.depth, model)
            predicted |= zip(group, adapter.head(state).chunk(len(group)), strict=True)
        return predicted

    def embed(self, branches: tuple[str, ...], model: int = 0) -> State:
        """The state before the first block, these branches in its rows."""
        if model == 0 and branches in self._peeked:
            return self._peeked.pop(branches)
        adapter = self.models[model]
        latents = self.latents.to(adapter.dtype).repeat(len(branches), *[1] * (self.latents.ndim - 1))
        conditions = [self.request.conditions[branch] for branch in branches]
        condition = adapter.join(conditions) if len(conditions) > 1 else conditions[0]
        return adapter.embed(latents, self.timestep.expand(len(latents)), condition)

    def peek(self, branches: tuple[str, ...]) -> State:
        """What `embed` of the first model gives, which its next call for these branches is then spared."""
        self._peeked[branches] = state = self.embed(branches)
        return state

    def run(self, state: State, first: int, last: int, model: int = 0) -> State:
        """Blocks first .. last - 1 of a model."""
        return self.models[model].run(state, first, last, len(self.request.noise))

    def guide(self, predicted: Mapping[str, Tensor]) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022); the branch itself where it is alone."""
        if UNCOND not in predicted:
            return predicted[COND]
        return predicted[UNCOND] + self.request.guidance * (predicted[COND] - predicted[UNCOND])


class Policy:
    """Every step in full. Systems override what they do differently."""

    def start(self, request: Request) -> None:
        """A new request begins: forget the last one."""

    def velocity(self, step: Step) -> Tensor:
        """The guided prediction of this step, shaped like the latents."""
        return step.guide(step.predict())

    def after(self, step: Step, latents: Tensor) -> Tensor:
        """The latents to go on with, once the scheduler has taken the step."""
        return latents

    def cache_bytes(self) -> int:
        """What is kept for later steps."""
        return 0


@dataclass(frozen=True)
class Result:
    """What came of a request.

    Attributes:
        latents: the video, not decoded.
        actions: what was done at each step, in one word.
        signals: what each decision was based on.
        forwards: work of each model in forwards of that model over all tokens: blocks x tokens x branches.
        cache_bytes: the most that the policy kept at any time.
    """

    latents: Tensor
    actions: tuple[str, ...]
    signals: tuple[float, ...]
    forwards: tuple[float, ...]
    cache_bytes: int

    @property
    def counts(self) -> Counter[str]:
        """How often each action was taken."""
        return Counter(self.actions)


@dataclass
class Loop:
    """Models and a schedule, ready to make videos.

    Attributes:
        models: adapters of one family; the first one's pipeline decides how timesteps are set.
        scheduler: a diffusers scheduler whose `step(prediction, timestep, latents)` needs nothing else.
    """

    models: Sequence[Adapter]
    scheduler: Any
    device: str = "cpu"

    @torch.no_grad()
    def generate(self, request: Request, policy: Policy | None = None, start: int = 0) -> Result:
        """Denoise a request from step `start` on; `request.noise` are the latents before that step."""
        policy = policy or Policy()
        timesteps = self.models[0].set_timesteps(self.scheduler, request.steps, self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        before = [model.forwards for model in self.models]
        policy.start(request)
        moves = _moves(self.scheduler, len(timesteps))
        latents, taken, cache_bytes = request.noise, [], 0
        for index in range(start, len(timesteps)):
            step = Step(index, timesteps[index], latents, request, self.models, move=moves[index])
            prediction = policy.velocity(step)
            latents = self.scheduler.step(prediction, step.timestep, latents, return_dict=False)[0]
            latents = policy.after(step, latents)
            cache_bytes = max(cache_bytes, policy.cache_bytes())
            taken.append((step.action, step.signal))
        actions, signals = zip(*taken, strict=True) if taken else ((), ())
        forwards = tuple(model.forwards - earlier for model, earlier in zip(self.models, before, strict=True))
        return Result(latents, actions, signals, forwards, cache_bytes)


def _moves(scheduler: Any, steps: int) -> Sequence[float | None]:
    """`Step.move` of each step: differences of sigma under the flow-matching Euler scheduler of diffusers."""
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler" or scheduler.config.stochastic_sampling:
        return [None] * steps
    moves: list[float | None] = scheduler.sigmas.diff().tolist()
    return moves
