"""What one full step leaves for later steps to reuse, at three granularities, and the plain policies that reuse it.

- step: the guided prediction V. Reusing it costs nothing.
- cfg: the difference D of the two branches. Reusing it costs one branch: uncond = cond - D.
- block: the residual R that the middle blocks add to each branch. Reusing it costs the first and the last blocks.

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


class FullStepCache:
    """V, D and R of the last full step.

    Attributes:
        first, last: blocks always computed at either end; R is over those in between.
        kinds: granularities that are kept; others cost no memory.
        index: step that was last computed in full; -1 before the first.
        velocity: V.
        predicted: the prediction of each branch at that step.
        residuals: branch -> R, one tensor for each stream.
    """

    def __init__(self, kinds: Sequence[str] = (STEP, CFG, BLOCK), first: int = 1, last: int = 1) -> None:
        self.kinds, self.first, self.last = tuple(kinds), first, last
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new request begins."""
        self.index = -1
        self.velocity: Tensor | None = None
        self.predicted: dict[str, Tensor] = {}
        self.residuals: dict[str, tuple[Tensor, ...]] = {}

    def full(self, step: Step) -> Tensor:
        """Compute all of a step and keep it."""
        self.predicted = step.predict(middle=self._keep(step) if BLOCK in self.kinds else None)
        self.velocity = step.guide(self.predicted)
        self.index = step.index
        step.action = FULL
        return self.velocity

    def reuse(self, step: Step, kind: str) -> Tensor:
        """A step at the cost of `kind`, one of ACTIONS; nothing is kept of it unless it is full."""
        if kind == FULL:
            return self.full(step)
        step.action = kind
        return {STEP: self.reuse_step, CFG: self.reuse_cfg, BLOCK: self.reuse_block}[kind](step)

    def reuse_step(self, step: Step) -> Tensor:
        """V again."""
        assert self.velocity is not None
        return self.velocity

    def reuse_cfg(self, step: Step) -> Tensor:
        """The conditional branch, and the other one at the old distance from it."""
        cond = step.predict((COND,))[COND]
        return step.guide({COND: cond, UNCOND: cond - self.difference})

    def reuse_block(self, step: Step) -> Tensor:
        """First and last blocks, with R in between."""
        return step.guide(step.predict(middle=self.skip(step)))

    @property
    def difference(self) -> Tensor:
        """D. Raises KeyError where there is one branch."""
        return self.predicted[COND] - self.predicted[UNCOND]

    def skip(self, step: Step, residuals: Mapping[str, tuple[Tensor, ...]] | None = None) -> Middle:
        """A `middle` for `Step.predict` that adds R, or `residuals`, in place of the blocks in between."""
        kept = residuals or self.residuals

        def middle(state: State, branches: tuple[str, ...]) -> State:
            depth = step.models[0].depth
            rows = [torch.cat(streams) for streams in zip(*(kept[branch] for branch in branches), strict=True)]
            return step.run(step.run(state, 0, self.first).plus(rows), depth - self.last, depth)

        return middle

    def cache_bytes(self) -> int:
        """Bytes held."""
        held = [] if self.velocity is None or STEP not in self.kinds else [self.velocity]
        held += list(self.predicted.values()) if CFG in self.kinds else []
        return tensor_bytes([*held, *(each for streams in self.residuals.values() for each in streams)])

    def _keep(self, step: Step) -> Middle:
        def middle(state: State, branches: tuple[str, ...]) -> State:
            depth = step.models[0].depth
            before = step.run(state, 0, self.first)
            after = step.run(before, self.first, depth - self.last)
            rows = [stream.chunk(len(branches)) for stream in after.minus(before)]
            self.residuals |= dict(zip(branches, zip(*rows, strict=True), strict=True))
            return step.run(after, depth - self.last, depth)

        return middle


class Cadence(Policy):
    """After `warmup` full steps a fixed pattern of actions, over and over; the last `tail` steps are full again.

    `("step",) * 2 + ("full",)`, say, computes every third step. With one granularity it is the uniform cache that papers
    compare with; with several it is a static mixture.
    """

    def __init__(self, pattern: Sequence[str], warmup: int, tail: int, first: int = 1, last: int = 1) -> None:
        self.pattern, self.warmup, self.tail = tuple(pattern), warmup, tail
        self.cache = FullStepCache(sorted({*pattern} - {FULL}), first, last)

    def start(self, request: Request) -> None:
        self.cache.clear()

    def velocity(self, step: Step) -> Tensor:
        free = self.warmup <= step.index < step.steps - self.tail
        place = (step.index - self.warmup) % len(self.pattern)
        return self.cache.reuse(step, self.pattern[place] if free else FULL)

    def cache_bytes(self) -> int:
        return self.cache.cache_bytes()
