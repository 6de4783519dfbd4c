"""SRDiffusion as a policy: one model sketches, another renders, and a rule says when to switch.

SRDiffusion (arXiv:2505.19151, 2025): the order, the shared latents, and a switch by the difference of predictions are
the paper's. The form of `SelfDifference` is that of a public port of it, with one change: the port compares outputs of
consecutive forwards, which alternate between the branches of guidance; here guided predictions of steps are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from workloads.video.caches import FULL, STEP, FullStepCache, relative_change
from workloads.video.loop import Policy, Request, Step

SKETCH, RENDER = "sketch", "render"


class Switch:
    """After a fixed number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def reset(self) -> None:
        """A new request begins."""
        self.taken = 0

    @property
    def due(self) -> bool:
        """Whether the next step is for the other model."""
        return self.taken >= self.step

    def observe(self, prediction: Tensor) -> float:
        """The guided prediction of a step before the switch; returns what the decision rests on, NaN for nothing."""
        self.taken += 1
        return math.nan


class SelfDifference(Switch):
    """Once predictions have settled: their change d = tanh(mean |v - v'| / mean |v'|) in a step hardly falls any more.

    v is the guided prediction, a dash marks the step before, and t is the steps taken: the switch comes with the first
    t >= `earliest` at which 0 < d' - d < `threshold`, or with t = `latest`. With `falls` above 1 the mean of that many
    falls of d stands for the last one: where d rises and falls by turns, a single one tells nothing.
    """

    def __init__(self, threshold: float = 0.01, earliest: int = 5, latest: int = 30, falls: int = 1) -> None:
        super().__init__(latest)
        self.threshold, self.earliest, self.falls = threshold, earliest, falls

    def reset(self) -> None:
        super().reset()
        self.last: Tensor | None = None
        self.changes: list[float] = []

    @property
    def due(self) -> bool:
        known = len(self.changes) > self.falls
        fall = (self.changes[-1 - self.falls] - self.changes[-1]) / self.falls if known else math.inf
        return super().due or (self.taken >= self.earliest and 0 < fall < self.threshold)

    def observe(self, prediction: Tensor) -> float:
        super().observe(prediction)
        if self.last is not None:
            self.changes.append(math.tanh(relative_change(prediction, self.last)))
        self.last = prediction
        return self.changes[-1] if self.changes else math.nan


class SketchRender(Policy):
    """One of the loop's models until the switch, another one from there to the end.

    Args:
        switch: when.
        models: places in the loop of the model before the switch and after it.
        render: how the second one takes its steps.
    """

    def __init__(self, switch: Switch, models: Sequence[int] = (0, 1), render: Policy | None = None) -> None:
        self.switch, self.models, self.render = switch, tuple(models), render or Policy()

    def start(self, request: Request) -> None:
        self.switch.reset()
        self.render.start(request)
        self.switched = self.switch.due

    def velocity(self, step: Step) -> Tensor:
        if self.switched:
            return self._render(step)
        step.action = SKETCH
        velocity = step.guide(step.predict(model=self.models[0]))
        step.signal = self.switch.observe(velocity)
        self.switched = self.switch.due
        return velocity

    def cache_bytes(self) -> int:
        return self.render.cache_bytes()

    def _render(self, step: Step) -> Tensor:
        seen = replace(step, models=[step.models[self.models[1]]])
        velocity = self.render.velocity(seen)
        step.action, step.signal = RENDER if seen.action == FULL else seen.action, seen.signal
        return velocity


class EveryOther(Policy):
    """A step cache in a fixed rhythm, wherever it starts: two full steps, then by turns a forecast and a full one.

    The last step, which moves the latents most, is full.
    """

    def start(self, request: Request) -> None:
        self.cache = FullStepCache((STEP,), forecast=True)
        self.full = 0

    def velocity(self, step: Step) -> Tensor:
        if self.full < 2 or step.index > self.cache.index + 1 or step.index == step.steps - 1:
            self.full += 1
            return self.cache.full(step)
        return self.cache.reuse(step, STEP)

    def cache_bytes(self) -> int:
        return self.cache.cache_bytes()
