"""MixCache as a policy: when caching may start and must stop, and which granularity each cached step uses.

MixCache (arXiv:2508.12691, 2025) is published without code. The parts are the paper's: caches of step, cfg
and block granularity, a context-aware trigger, an adaptive choice among them under their interference. The formulas
below are this project's own reading, and every constant is a parameter. The forecast in place of plain reuse and the
repair of cached steps are not in the published description; `forecast=False` and `repair=False` go without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workloads.video.caches import BLOCK, CFG, FULL, STEP, Fixed, FullStepCache, relative_change, tensor_bytes
from workloads.video.loop import UNCOND, Policy, Request, Step
from workloads.video.mixcache.spec import TAIL, WARMUP


class Trigger:
    """When caching may be used: d = tanh(relative change of the conditional prediction a step), at full steps.

    Caching starts once d has stopped falling fast (0 < d' - d < `settled`), not before a share `earliest` of the steps
    and not after `latest`, and ends with the last share `tail`, at least one step.
    """

    def __init__(
        self, earliest: float = WARMUP, latest: float = 0.3, tail: float = TAIL, settled: float = 0.02
    ) -> None:
        self.earliest, self.latest, self.tail, self.settled = earliest, latest, tail, settled
        self.reset()

    def reset(self) -> None:
        """A new request begins."""
        self.changes: list[float] = []
        self.started = False

    def observe(self, now: Tensor, before: Tensor, steps: int) -> None:
        """The conditional prediction of a full step and of the one `steps` earlier."""
        self.changes.append(math.tanh(relative_change(now, before) / steps))

    def allows(self, index: int, steps: int) -> bool:
        """Whether step `index` may be cached."""
        if index < self.earliest * steps or index >= steps - max(1, round(self.tail * steps)):
            return False
        if not self.started:
            fall = self.changes[-2] - self.changes[-1] if len(self.changes) > 1 else math.inf
            self.started = 0 < fall < self.settled or index >= self.latest * steps
        return self.started


class Always(Trigger):
    """The ablation without a trigger: all steps but the first two, before which there is nothing to compare."""

    def allows(self, index: int, steps: int) -> bool:
        return index > 1


class Repair:
    """Makes good, in a full step, what the step cache got wrong since the last one. It costs no forward.

    Between two full steps the line from one prediction to the other is a better guess than any forecast from before.
    How much further that would have brought the latents is added to the full step's own move: a corrector, as in
    predictor-corrector methods for differential equations. Schedulers that do more than Euler's are left alone.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new request begins."""
        self.before: tuple[float, Tensor] | None = None
        self.went: Tensor | None = None
        self._settle()

    def cached(self, step: Step, velocity: Tensor) -> None:
        """A step was taken with a prediction from the step cache."""
        if self.before is not None and step.move is not None:
            self.moved += step.move
            self.weighted += step.move * (float(step.timestep) - self.before[0])
            went = step.move * velocity
            self.went = went if self.went is None else self.went + went

    def full(self, step: Step, velocity: Tensor) -> Tensor:
        """The prediction to take this full step with, in place of the model's own."""
        now, taken = float(step.timestep), velocity
        if self.before is not None and self.went is not None and step.move:
            then, earlier = self.before
            better = self.moved * earlier + self.weighted / (now - then) * (velocity - earlier)
            taken = velocity + (better - self.went) / step.move
        self.before = (now, velocity)
        self._settle()
        return taken

    def cache_bytes(self) -> int:
        """Bytes held beside the caches, which have the prediction of the last full step already."""
        return tensor_bytes([] if self.went is None else [self.went])

    def _settle(self) -> None:
        """Nothing is owed: no move, none of them weighted by time, nowhere gone."""
        self.moved = self.weighted = 0.0
        self.went = None


class Repaired(Fixed):
    """A fixed rhythm whose full steps make good what the step cache got wrong before them."""

    def start(self, request: Request) -> None:
        super().start(request)
        self.repair = Repair()

    def velocity(self, step: Step) -> Tensor:
        return _repaired(self.repair, step, super().velocity(step))

    def cache_bytes(self) -> int:
        return super().cache_bytes() + self.repair.cache_bytes()


class MixCache(Policy):
    """The hybrid of step, cfg and block caches.

    A full step shows what each cache would have got wrong had it been used there. From that and the age of the cache
    follows the error each would make now: error of the prediction times the square root of how far a step moves the
    latents. The move itself would be the error of this step; but early steps, which move little, are amplified by all
    that follow. A step does what costs least, work and error together; error gets dearer the more steps in a row were
    cached.

    Args:
        threshold: error that costs as much as a full step. Larger is faster.
        trigger: when caching may be used.
        kinds: granularities to choose from.
        forecast: see `FullStepCache`.
        penalty: factor on the error for each step that was cached since the last full one; 1 for none.
        most: cached steps in a row.
        repair: whether a full step makes good what the step cache got wrong before it.
    """

    def __init__(
        self,
        threshold: float,
        trigger: Trigger | None = None,
        kinds: Sequence[str] = (STEP, CFG, BLOCK),
        forecast: bool = True,
        penalty: float = 1.4,
        most: int = 8,
        repair: bool = True,
    ) -> None:
        self.threshold, self.trigger, self.penalty, self.most = threshold, trigger or Trigger(), penalty, most
        self.repair = Repair() if repair else None
        self.kinds = tuple(kinds)
        self.cache = FullStepCache(kinds, forecast)
        self.growth = 2 if forecast else 1
        """Power of the age that an error grows with: what a forecast misses is the curvature."""

    def start(self, request: Request) -> None:
        self.cache.clear()
        self.trigger.reset()
        if self.repair:
            self.repair.reset()
        self.errors: dict[str, float] = {}
        self.sensitivity = 0.0
        self.latents: Tensor | None = None
        self.usable = tuple(kind for kind in self.kinds if kind != CFG or UNCOND in request.conditions)

    def velocity(self, step: Step) -> Tensor:
        kind = self._decide(step)
        self.latents = step.latents
        velocity = self._full(step) if kind == FULL else self.cache.reuse(step, kind)
        return _repaired(self.repair, step, velocity) if self.repair else velocity

    def cache_bytes(self) -> int:
        before = tensor_bytes([] if self.latents is None else [self.latents])
        return self.cache.cache_bytes() + before + (self.repair.cache_bytes() if self.repair else 0)

    def work(self, kind: str, depth: int) -> float:
        """Of a step, as a share of a full one."""
        return {FULL: 1.0, STEP: 0.0, CFG: 0.5, BLOCK: (self.cache.first + self.cache.last) / depth}[kind]

    def _decide(self, step: Step) -> str:
        age = step.index - self.cache.index
        if not self.errors or age > self.most or not self.trigger.allows(step.index, step.steps):
            return FULL
        price = {kind: self.work(kind, step.models[0].depth) for kind in (FULL, *self.usable)}
        for kind in self.usable:
            error = self.errors[kind] * age**self.growth * self._weight(step.latents)
            price[kind] += error / self.threshold * self.penalty ** (age - 1)
        cheapest = min(price, key=lambda kind: price[kind])
        step.signal = price[cheapest]
        return cheapest

    def _weight(self, latents: Tensor) -> float:
        """Root of how far the last step moved the latents, as a share of them; the next one is taken to do the same."""
        return 0.0 if self.latents is None else math.sqrt(relative_change(latents, self.latents))

    def _full(self, step: Step) -> Tensor:
        """Compute all of a step; where caching is allowed, note what reuse would have got wrong, a step of age."""
        cache, before = self.cache, self.cache.predicted
        if cache.index < 0:
            return cache.full(step)
        age, time = step.index - cache.index, float(step.timestep)
        allowed = self.trigger.allows(step.index, step.steps)
        tracks = {kind: cache.track(kind) for kind in self.usable}
        expected = {kind: track.at(time) for kind, track in tracks.items()}
        stale = {branch: track.at(time) for branch, track in cache.residuals.items()}
        velocity = cache.full(step)
        self.trigger.observe(cache.predicted, before, age)
        if not allowed:
            return velocity
        missed = {kind: _distance(expected[kind], track.values[-1][1]) for kind, track in tracks.items()}
        size = float(velocity.abs().mean())
        if CFG in missed:
            missed[CFG] *= abs(step.request.guidance - 1)
        if BLOCK in missed:
            if not self.sensitivity and missed[BLOCK]:
                self.sensitivity = _distance((cache.with_residuals(step, stale),), (velocity,)) / missed[BLOCK]
            missed[BLOCK] *= self.sensitivity
        self.errors = {kind: error / size / age**self.growth for kind, error in missed.items()}
        return velocity


def _repaired(repair: Repair, step: Step, velocity: Tensor) -> Tensor:
    """The prediction to take a step with that was full or cached."""
    if step.action == FULL:
        return repair.full(step, velocity)
    if step.action == STEP:  # the others have seen something fresh
        repair.cached(step, velocity)
    return velocity


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean absolute difference of the first of some tensors each: of video tokens, where there is text as well."""
    return float(torch.mean((one[0] - other[0]).abs()))
