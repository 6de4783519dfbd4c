"""The three stages of Chorus as a policy: resume, denoise some regions only, then denoise plainly.

Chorus (arXiv:2604.04451, 2026) is published without code and its text was not at hand. The paper's: full reuse of the
latents of the most similar request, then selective regions with attention amplified, then no caching. This project's
own: which tokens are a region, that they see no others, and the form of the amplification.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from workloads.video.adapters import State
from workloads.video.chorus.attention import CrossAttention
from workloads.video.chorus.stages import Bounds
from workloads.video.chorus.store import Entry, Key
from workloads.video.loop import COND, Policy, Request, Step


def region(attention: Tensor, columns: Sequence[int], share: float) -> Tensor:
    """The `share` of the video tokens that look most at these text tokens: indices, int64, rising.

    attention [L, S]. Without columns there is no region.
    """
    if not columns:
        return torch.empty(0, dtype=torch.int64)
    mass = attention[list(columns)].sum(dim=0)
    count = max(1, round(share * len(mass)))
    return mass.topk(count).indices.sort().values


class Record(Policy):
    """The plain loop, keeping the latents before each step up to `until` and what the last step but one looks at."""

    def __init__(self, until: int, attention: CrossAttention | None = None) -> None:
        self.until, self.attention = until, attention

    def start(self, request: Request) -> None:
        self.latents: dict[int, Tensor] = {}

    def velocity(self, step: Step) -> Tensor:
        if self.attention is None or step.index != max(0, step.steps - 2):
            return super().velocity(step)

        def middle(state: State, branches: tuple[str, ...]) -> State:
            with self.attention.watched() if COND in branches else nullcontext():  # type: ignore[union-attr]
                return step.run(state, 0, step.models[0].depth)

        return step.guide(step.predict(middle=middle))

    def after(self, step: Step, latents: Tensor) -> Tensor:
        if step.index + 1 <= self.until:
            self.latents[step.index + 1] = latents
        return latents


class Resume(Policy):
    """Stages 2 and 3, for a loop that starts at step `resume` from the entry's latents.

    In stage 2 the blocks run on the tokens of a region only, which see no others; all else follows the entry's own
    trajectory. The words that differ are amplified there by lambda, which falls to 1 at the end of the stage.

    Args:
        entry: what the request resumes from.
        key: of the request.
        stages: where they end.
        tokens: of the region; none: stage 2 has nothing to compute.
        columns: text tokens that differ from the entry's prompt.
        amplification: lambda at the first step of stage 2; 1 for none.
        attention: of the model; may be left out where there is no stage 2.
    """

    def __init__(
        self,
        entry: Entry,
        key: Key,
        stages: Bounds,
        tokens: Tensor | None = None,
        columns: Sequence[int] = (),
        amplification: float = 1.0,
        attention: CrossAttention | None = None,
    ) -> None:
        self.entry, self.key, self.stages = entry, key, stages
        self.tokens = torch.empty(0, dtype=torch.int64) if tokens is None else tokens
        self.columns, self.amplification, self.attention = tuple(columns), amplification, attention

    def velocity(self, step: Step) -> Tensor:
        if step.index >= self.stages.regions:
            return super().velocity(step)
        step.action = "region"
        if not len(self.tokens):
            return torch.zeros_like(step.latents)

        def middle(state: State, branches: tuple[str, ...]) -> State:
            self.grid = state.grid
            part = step.models[0].select(state, self.tokens)
            with self._amplified(step.index) if COND in branches else nullcontext():
                part = step.run(part, 0, step.models[0].depth)
            return step.models[0].merge(state, part, self.tokens)

        return step.guide(step.predict(middle=middle))

    def after(self, step: Step, latents: Tensor) -> Tensor:
        """Outside the region the prediction means nothing: there the entry's trajectory goes on."""
        if step.index >= self.stages.regions:
            return latents
        followed = self.entry.before(step.index + 1, self.key)
        if not len(self.tokens):
            return followed
        return torch.where(self._mask(latents, step.models[0].frames_first), latents, followed)

    def _amplified(self, index: int) -> AbstractContextManager[None]:
        if self.attention is None:
            return nullcontext()
        left = (self.stages.regions - index) / (self.stages.regions - self.stages.resume)
        return self.attention.amplified(self.columns, 1 + (self.amplification - 1) * left)

    def _mask(self, latents: Tensor, frames_first: bool) -> Tensor:
        """True in the region, of a shape that broadcasts to the latents."""
        chosen = torch.zeros(self.grid, dtype=torch.bool, device=latents.device)
        chosen.view(-1)[self.tokens] = True
        axes = (1, 3, 4) if frames_first else (2, 3, 4)
        for axis, place in enumerate(axes):
            chosen = chosen.repeat_interleave(latents.shape[place] // self.grid[axis], dim=axis)
        return chosen.unsqueeze(1).unsqueeze(0) if frames_first else chosen[None, None]
