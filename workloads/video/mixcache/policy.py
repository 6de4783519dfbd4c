"""MixCache as a policy: when caching may start and must stop, and which granularity each cached step uses.

MixCache (Zhao et al. 2025, arXiv:2508.12691) is published without code. The parts are the paper's: caches of step, cfg
and block granularity, a context-aware trigger, an adaptive choice among them under their interference. The formulas
below are this project's own reading, and every constant is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from workloads.video.caches import BLOCK, CFG, FULL, STEP, FullStepCache, relative_change
from workloads.video.loop import COND, Policy, Request, Step


@dataclass
class Trigger:
    """When caching may be used: d_t = tanh(relative change of the conditional prediction), from full steps.

    It starts once d has stopped falling fast (0 < d' - d < `settled`), not before a share `earliest` of the steps and not
    after `latest`; it ends with the last share `tail` of the steps, or when d has risen to `risen` times its least.
    """

    earliest: float = 0.1
    latest: float = 0.3
    tail: float = 0.06
    settled: float = 0.01
    risen: float = math.inf
    changes: list[float] = field(default_factory=list)
    started: bool = False

    def reset(self) -> None:
        self.changes, self.started = [], False

    def observe(self, now: Tensor, before: Tensor, steps: int) -> None:
        """A full step, `steps` after the last one."""
        self.changes.append(math.tanh(relative_change(now, before) / steps))

    def allows(self, index: int, steps: int) -> bool:
        """Whether step `index` may be cached."""
        done = index / steps
        if done < self.earliest or index >= steps - max(1, round(self.tail * steps)):
            return False
        if not self.started:
            fallen = self.changes[-2] - self.changes[-1] if len(self.changes) > 1 else math.inf
            self.started = 0 < fallen < self.settled or done >= self.latest
        return self.started and self.changes[-1] <= self.risen * min(self.changes)


class Always(Trigger):
    """The ablation without a trigger: any step but the first two, which the estimates need."""

    def allows(self, index: int, steps: int) -> bool:
        return index >= 2


class MixCache(Policy):
    """The hybrid of step, cfg and block caches.

    At each full step the three caches are compared with what they would have been used for, which gives the error that
    one more step of age costs each of them, as a share of the prediction. A cached step picks the granularity with the
    least error for the work it saves; what was used last is made dearer, so that granularities take turns. When the
    error since the last full step would exceed `threshold`, or after `most` cached steps, a full step comes.

    Args:
        threshold: error that may add up between full steps, as a share of the prediction.
        trigger: when caching may be used.
        most: cached steps in a row.
        penalty: factor on the score of a granularity for each use in a row; 1 for none.
        kinds: granularities to choose from.
    """

    def __init__(
        self,
        threshold: float,
        trigger: Trigger | None = None,
        most: int = 6,
        penalty: float = 1.5,
        kinds: tuple[str, ...] = (STEP, CFG, BLOCK),
    ) -> None:
        self.threshold, self.trigger, self.most, self.penalty = threshold, trigger or Trigger(), most, penalty
        self.kinds = kinds
        self.cache = FullStepCache(kinds)

    def start(self, request: Request) -> None:
        self.cache.clear()
        self.trigger.reset()
        self.error_per_step: dict[str, float] = {}
        self.sensitivity = 0.0
        self.spent, self.repeated, self.last_kind = 0.0, 0, FULL
        self.usable = tuple(kind for kind in self.kinds if kind != CFG or len(request.branches) > 1)

    def velocity(self, step: Step) -> Tensor:
        kind = self._decide(step)
        self.repeated = self.repeated + 1 if kind == self.last_kind else 1
        self.last_kind = kind
        return self._full(step) if kind == FULL else self.cache.reuse(step, kind)

    def cache_bytes(self) -> int:
        return self.cache.cache_bytes()

    def _decide(self, step: Step) -> str:
        age = step.index - self.cache.index
        if not self.error_per_step or age > self.most or not self.trigger.allows(step.index, step.steps):
            return FULL
        scores = {kind: self._score(kind, age, step) for kind in self.usable}
        kind = min(scores, key=lambda each: scores[each])
        error = self.error_per_step[kind] * age
        step.signal = self.spent + error
        if step.signal > self.threshold:
            return FULL
        self.spent = step.signal
        return kind

    def _score(self, kind: str, age: int, step: Step) -> float:
        """Error for each forward saved, dearer the more often `kind` was used in a row."""
        repeats = self.repeated if kind == self.last_kind else 0
        return self.error_per_step[kind] * age / self.saving(kind, step.models[0].depth) * self.penalty**repeats

    def saving(self, kind: str, depth: int) -> float:
        """Share of a full step's work that a cached one leaves out."""
        return {STEP: 1.0, CFG: 0.5, BLOCK: 1 - (self.cache.first + self.cache.last) / depth}[kind]

    def _full(self, step: Step) -> Tensor:
        cache, before = self.cache, dict(self.cache.predicted)
        old_velocity, old_residuals, age = cache.velocity, dict(cache.residuals), step.index - cache.index
        old_difference = cache.difference if before and CFG in self.usable else None
        velocity = cache.full(step)
        self.spent = 0.0
        if old_velocity is None:
            return velocity
        self.trigger.observe(cache.predicted[COND], before[COND], age)
        size = velocity.abs().mean()
        error = {STEP: relative_change(old_velocity, velocity)}
        if old_difference is not None:
            error[CFG] = float((step.request.guidance - 1) * (cache.difference - old_difference).abs().mean() / size)
        if BLOCK in self.usable:
            error[BLOCK] = self._block_error(step, velocity, old_residuals)
        self.error_per_step = {kind: value / age for kind, value in error.items()}
        return velocity

    def _block_error(self, step: Step, velocity: Tensor, old: Mapping[str, tuple[Tensor, ...]]) -> float:
        """The change of R times how much of it reaches the prediction, which is measured once a request."""
        moved = relative_change(old[COND][0], self.cache.residuals[COND][0])
        if not self.sensitivity:
            stale = step.guide(step.predict(middle=self.cache.skip(step, old)))
            self.sensitivity = relative_change(stale, velocity) / moved
        return self.sensitivity * moved
