"""A server of one model: look the prompt up, denoise what is left to do, keep what may be of use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn

from saih.core import Clock
from saih.errors import SaihError
from workloads.video.adapters import WanAdapter
from workloads.video.checkpoint import Checkpoint
from workloads.video.chorus.attention import CrossAttention
from workloads.video.chorus.reuse import Record, Resume, region
from workloads.video.chorus.stages import Bounds, Reuse, latest
from workloads.video.chorus.store import Entry, Key, Store
from workloads.video.chorus.trace import Asked
from workloads.video.loop import COND, Loop, Policy, Request, Result

MISS, EXACT, SEMANTIC = "miss", "exact", "semantic"


@dataclass(frozen=True)
class Served:
    """An answer.

    Attributes:
        latents: the video, not decoded.
        forwards: work it took.
        kind: MISS, EXACT or SEMANTIC.
        similarity: to the most similar entry; 0 where none was looked for.
    """

    latents: Tensor
    forwards: float
    kind: str
    similarity: float = 0.0


class Server:
    """Serves one request after the other, each from its noise.

    Args:
        checkpoint: the model. A schedule with a memory of earlier predictions is replaced by Euler steps.
        grid: latent frames, rows and columns of videos.
        steps, guidance: of all requests.
        policy: how each is denoised.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        grid: tuple[int, int, int],
        steps: int,
        guidance: float,
        policy: Policy | None = None,
    ) -> None:
        self.checkpoint, self.grid, self.steps, self.guidance = checkpoint, grid, steps, guidance
        self.loop = Loop([checkpoint.adapter], memoryless(checkpoint.scheduler), checkpoint.device)
        self.policy = policy

    def serve(self, asked: Asked, clock: Clock) -> Served:
        """Answer a request. Time counts as `input` for encoding it, `other` for the store, `compute` for denoising."""
        request = self.request(asked, clock)
        clock.enter("compute")
        result = self.loop.generate(request, self.policy)
        return Served(result.latents, result.forwards[0], MISS)

    def request(self, asked: Asked, clock: Clock) -> Request:
        """A request as the loop takes it."""
        clock.enter("input")
        return self.checkpoint.request(asked.prompt, self.grid, self.steps, self.guidance, asked.seed)


class SharingServer(Server):
    """Begins requests from what a store kept of similar ones.

    Args:
        store: of earlier requests; other servers may use it too.
        reuse: how.
        identity: what the weights and their precision are known by.

    Raises:
        SaihError: the model is no Wan: other text encoders fill padding with numbers, which would make prompts alike.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        grid: tuple[int, int, int],
        steps: int,
        guidance: float,
        store: Store,
        reuse: Reuse,
        identity: str,
    ) -> None:
        if not isinstance(checkpoint.adapter, WanAdapter):
            raise SaihError(
                f"prompts of a {type(checkpoint.adapter.module).__name__} cannot be told from their padding: "
                "latents are shared between requests for Wan only"
            )
        super().__init__(checkpoint, grid, steps, guidance)
        self.store, self.reuse = store, reuse
        scheduler = self.loop.scheduler
        settings = json.dumps(dict(scheduler.config), sort_keys=True, default=str)
        schedule = f"{type(scheduler).__name__} {hashlib.sha256(settings.encode()).hexdigest()[:16]}"
        self.key = Key(identity, grid, schedule, steps, guidance)
        self.attention = CrossAttention(checkpoint.adapter) if reuse.selective else None

    def serve(self, asked: Asked, clock: Clock) -> Served:
        request = self.request(asked, clock)
        clock.enter("other")
        known = self.store.exact(self.key, asked.prompt, asked.seed)
        if known is not None:
            self.store.use(known, self.steps)
            return Served(known.final, 0.0, EXACT)
        embedding = embed(request.conditions[COND]["encoder_hidden_states"])
        entry, similarity = self.store.nearest(self.key, embedding) or (None, 0.0)
        stages = self.reuse.stages(similarity, self.steps)
        kept = Entry(self.key, asked.prompt, asked.seed, embedding)
        if entry is None or stages is None:
            result, kind = self._record(request, kept, clock), MISS
        else:
            result, kind = self._resume(request, entry, stages, asked.prompt, clock), SEMANTIC
        kept.final = result.latents
        self.store.add(kept)
        return Served(result.latents, result.forwards[0], kind, similarity)

    def _record(self, request: Request, kept: Entry, clock: Clock) -> Result:
        """All of the steps, into an entry that others can resume from."""
        policy = Record(latest(self.steps), self.attention)
        clock.enter("compute")
        result = self.loop.generate(request, policy)
        clock.enter("other")
        kept.latents = policy.latents
        if self.attention is not None:
            kept.attention = self.attention.seen()
        return result

    def _resume(self, request: Request, entry: Entry, stages: Bounds, prompt: str, clock: Clock) -> Result:
        """What an entry leaves to do."""
        if self.attention is None:
            policy = Resume(entry, self.key, stages)
        else:
            before, now = differing(tokens(self.checkpoint, entry.prompt), tokens(self.checkpoint, prompt))
            chosen = region(entry.attention, before, self.reuse.region)
            policy = Resume(entry, self.key, stages, chosen, now, self.reuse.amplification, self.attention)
        begun = replace(request, noise=entry.before(stages.resume, self.key))
        clock.enter("compute")
        result = self.loop.generate(begun, policy, stages.resume)
        clock.enter("other")
        self.store.use(entry, self.steps - result.forwards[0] / len(request.branches))
        return result


def embed(text: Tensor) -> Tensor:
    """An encoded prompt [1, L, D] as one unit vector [D] on the CPU: the mean of its tokens that are no padding."""
    tokens_LD = text[0].float().cpu()
    used = tokens_LD[tokens_LD.abs().sum(dim=1) > 0]
    return nn.functional.normalize((used if len(used) else tokens_LD).mean(dim=0), dim=0)


def tokens(checkpoint: Checkpoint, prompt: str) -> Sequence[str | int]:
    """A prompt as its text encoder takes it apart: one for each column of cross attention."""
    if checkpoint.pipeline is None:
        return prompt.split()
    told: Sequence[int] = checkpoint.pipeline.tokenizer(prompt).input_ids
    return told


def differing(before: Sequence[str | int], now: Sequence[str | int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the tokens that differ, in either prompt. Where some were only added, the one they stand at counts."""
    columns: tuple[set[int], set[int]] = (set(), set())
    for kind, first, last, begin, end in SequenceMatcher(a=before, b=now, autojunk=False).get_opcodes():
        if kind != "equal":
            columns[0].update(range(min(first, len(before) - 1), max(last, min(first, len(before) - 1) + 1)))
            columns[1].update(range(begin, end))
    return tuple(sorted(columns[0])), tuple(sorted(columns[1]))


def memoryless(scheduler: Any) -> Any:
    """A schedule that can be entered anywhere: Euler's of the same shift for one that remembers predictions."""
    if getattr(scheduler.config, "solver_order", 1) == 1:
        return scheduler
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
