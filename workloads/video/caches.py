"""What one full step leaves for later steps to reuse, at three granularities, and the plain policies that reuse it.

- step: the guided prediction V. Reusing it costs nothing.
- cfg: the difference D of the two branches. Reusing it costs one branch: uncond = cond - D.
- block: the residual R that the middle blocks add to each branch. Reusing it costs the first and the last blocks.

Reuse is of the last value, or of the forecast that the last two full steps make.

They interfere, so only full steps write: what an approximate step computes is no fresh feature, and a cache that fed on
it would drift. A step that reuses V has no D or R at all; one that reuses D has no R of the missing branch; one that
reuses R would store the R it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workloads.video.adapters import State
from workloads.video.loop import COND, UNCOND, Middle, Policy, Request, Step

FULL, STEP, CFG, BLOCK = "full", "step", "cfg", "block"
ACTIONS = (FULL, STEP, CFG, BLOCK)


def relative_change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|: the signal of redundancy that caches of this field share."""
    return float((now - before).abs().mean() / before.abs().mean().clamp_min(1e-12))


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Track:
    """Something at the last full steps, and what it is expected to be at a later one.

    With `forecast` the line through the last two values is followed, in the scheduler's own time; else the last value
    is used as it is. Values are tuples of tensors.
    """

    def __init__(self, forecast: bool) -> None:
        self.kept = 2 if forecast else 1
        self.values: list[tuple[float, tuple[Tensor, ...]]] = []

    def add(self, timestep: float, value: tuple[Tensor, ...]) -> None:
        """The value at a full step."""
        self.values = [*self.values, (timestep, value)][-self.kept :]

    def at(self, timestep: float) -> tuple[Tensor, ...]:
        """The value expected at a later step."""
        (now, latest), (before, earlier) = self.values[-1], self.values[0]
        if now == before:
            return latest
        share = (timestep - now) / (now - before)
        return tuple(torch.lerp(last, first, -share) for first, last in zip(earlier, latest, strict=True))


class FullStepCache:
    """V, D and R of the last full steps.

    Args:
        kinds: granularities that are kept; others cost no memory.
        forecast: whether reuse follows the line through the last two full steps. Plain reuse holds the last value.
        first, last: blocks always computed at either end; R is over those in between.

    Attributes:
        index: step that was last computed in full; -1 before the first.
        predicted: of the conditional branch at that step; empty before the first.
    """

    def __init__(
        self, kinds: Sequence[str] = (STEP, CFG, BLOCK), forecast: bool = False, first: int = 1, last: int = 1
    ) -> None:
        self.kinds, self.forecast, self.first, self.last = tuple(kinds), forecast, first, last
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new request begins."""
        self.index = -1
        self.predicted = torch.empty(0)
        self.velocity, self.difference = Track(self.forecast), Track(self.forecast)
        self.residuals: dict[str, Track] = {}

    def full(self, step: Step) -> Tensor:
        """Compute all of a step and keep it."""
        time = float(step.timestep)
        predicted = step.predict(middle=self._keep(step) if BLOCK in self.kinds else None)
        velocity = step.guide(predicted)
        if STEP in self.kinds:
            self.velocity.add(time, (velocity,))
        if CFG in self.kinds and UNCOND in predicted:
            self.difference.add(time, (predicted[COND] - predicted[UNCOND],))
        self.index, self.predicted, step.action = step.index, predicted[COND], FULL
        return velocity

    def reuse(self, step: Step, kind: str) -> Tensor:
        """A step at the cost of `kind`, one of ACTIONS; nothing is kept of it unless it is full."""
        if kind == FULL:
            return self.full(step)
        step.action = kind
        return {STEP: self.reuse_step, CFG: self.reuse_cfg, BLOCK: self.reuse_block}[kind](step)

    def reuse_step(self, step: Step) -> Tensor:
        """V again, or where it is heading."""
        return self.velocity.at(float(step.timestep))[0]

    def reuse_cfg(self, step: Step) -> Tensor:
        """The conditional branch, and the other one at the distance D from it."""
        cond = step.predict((COND,))[COND]
        return step.guide({COND: cond, UNCOND: cond - self.difference.at(float(step.timestep))[0]})

    def reuse_block(self, step: Step) -> Tensor:
        """First and last blocks, with R in between."""
        time = float(step.timestep)
        return self.with_residuals(step, {branch: track.at(time) for branch, track in self.residuals.items()})

    def with_residuals(self, step: Step, residuals: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        """A step whose blocks in between are these residuals."""
        depth = step.models[0].depth

        def middle(state: State, branches: tuple[str, ...]) -> State:
            rows = [torch.cat(streams) for streams in zip(*(residuals[branch] for branch in branches), strict=True)]
            return step.run(step.run(state, 0, self.first).plus(rows), depth - self.last, depth)

        return step.guide(step.predict(middle=middle))

    def track(self, kind: str) -> Track:
        """V, D, or R of the conditional branch."""
        return {STEP: self.velocity, CFG: self.difference}.get(kind) or self.residuals[COND]

    def cache_bytes(self) -> int:
        """Bytes held; V is the prediction itself where there is one branch."""
        tracks = [self.velocity, self.difference, *self.residuals.values()]
        held = [self.predicted, *(tensor for track in tracks for _, value in track.values for tensor in value)]
        return tensor_bytes(list({id(tensor): tensor for tensor in held}.values()))

    def _keep(self, step: Step) -> Middle:
        depth, time = step.models[0].depth, float(step.timestep)

        def middle(state: State, branches: tuple[str, ...]) -> State:
            before = step.run(state, 0, self.first)
            after = step.run(before, self.first, depth - self.last)
            rows = [stream.chunk(len(branches)) for stream in after.minus(before)]
            for branch, residual in zip(branches, zip(*rows, strict=True), strict=True):
                self.residuals.setdefault(branch, Track(self.forecast)).add(time, residual)
            return step.run(after, depth - self.last, depth)

        return middle


class Fixed(Policy):
    """An action for each step, laid down beforehand: the uniform caches and static mixtures papers compare with."""

    def __init__(self, actions: Sequence[str], forecast: bool = False) -> None:
        self.actions = tuple(actions)
        self.cache = FullStepCache(sorted({*actions} - {FULL}), forecast)

    def start(self, request: Request) -> None:
        self.cache.clear()

    def velocity(self, step: Step) -> Tensor:
        return self.cache.reuse(step, self.actions[step.index])

    def cache_bytes(self) -> int:
        return self.cache.cache_bytes()


def spread(kinds: Sequence[str], cached: int, steps: int, warmup: int, tail: int) -> tuple[str, ...]:
    """Actions of `steps` steps: full for `warmup` and `tail`, and `cached` of those between, as evenly as it goes.

    Cached steps take the kinds in turn, from the first one after each full step. Raises ValueError if they do not fit.
    """
    free = steps - warmup - tail
    if not 0 <= cached < max(free, 1) or (cached and not warmup):
        raise ValueError(f"{cached} of {steps} steps cannot be cached with {warmup} + {tail} full ones")
    actions, turn = [FULL] * steps, 0
    for place in range(free):
        reused = (place + 1) * cached // free > place * cached // free
        actions[warmup + place] = kinds[turn % len(kinds)] if reused else FULL
        turn = turn + 1 if reused else 0
    return tuple(actions)
