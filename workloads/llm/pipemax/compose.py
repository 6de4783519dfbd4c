"""Who joins the next batch, within what can be fetched meanwhile: greedy in two stages (arXiv 2605.02189)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from workloads.llm.costs import CostModel

MOST_SWAPS = 8


@dataclass(frozen=True)
class Candidate:
    """A request of which nothing is on the device."""

    id: int
    tokens: int
    blocks: int
    skipped: int = 0
    """Turns of its batch that passed without it."""


@dataclass(frozen=True)
class Held:
    """What the next batch has on the device already."""

    requests: int
    tokens: int


MOST_SKIPPED = 3
"""After so many turns without it a candidate goes first: the shortest do not push it aside for ever."""


def compose(
    held: Held, candidates: Sequence[Candidate], blocks: int, model: CostModel, target_s: float
) -> list[Candidate]:
    """A subset of the candidates of at most `blocks` blocks; `target_s`: what the other batches take, 0 = warming up.

    First those that were skipped too often. Then, warming up, the shortest first: a larger batch takes longer, and so
    more can be fetched for the next. Later in their order, until the batch is predicted to take `target_s`. At last
    chosen and left out ones change places while that fills more of `blocks` without going beyond `target_s`.
    """
    late = [each for each in candidates if each.skipped >= MOST_SKIPPED]
    others = [each for each in candidates if each.skipped < MOST_SKIPPED]
    if not target_s:
        others.sort(key=lambda each: (each.blocks, each.id))
    chosen: list[Candidate] = []
    room, requests, tokens = blocks, held.requests, held.tokens
    for each in [*late, *others]:
        full = bool(target_s) and requests > 0 and _step_s(model, requests, tokens) >= target_s
        if full and each.skipped < MOST_SKIPPED:
            break
        if each.blocks <= room:
            chosen.append(each)
            room, requests, tokens = room - each.blocks, requests + 1, tokens + each.tokens
    return _refine(chosen, candidates, room, requests, tokens, model, target_s)


def _refine(
    chosen: list[Candidate],
    candidates: Sequence[Candidate],
    room: int,
    requests: int,
    tokens: int,
    model: CostModel,
    target_s: float,
) -> list[Candidate]:
    """Swaps a chosen one for a larger one that was left out, the largest first; nobody who was skipped too often."""
    if not target_s:
        return chosen
    taken = {each.id for each in chosen}
    out = sorted((each for each in candidates if each.id not in taken), key=_blocks, reverse=True)
    stay = [each for each in chosen if each.skipped >= MOST_SKIPPED]
    movable = sorted((each for each in chosen if each.skipped < MOST_SKIPPED), key=_blocks)
    swaps = 0
    for large in out:
        if not room or swaps == MOST_SWAPS:
            break
        first, end = (bisect_left(movable, each, key=_blocks) for each in (large.blocks - room, large.blocks))
        for place in range(first, end):
            small = movable[place]
            if _step_s(model, requests, tokens + large.tokens - small.tokens) <= target_s:
                room -= large.blocks - small.blocks
                tokens += large.tokens - small.tokens
                del movable[place]
                insort(movable, large, key=_blocks)
                swaps += 1
                break
    return [*stay, *movable]


def _blocks(candidate: Candidate) -> int:
    return candidate.blocks


def _step_s(model: CostModel, requests: int, tokens: int) -> float:
    return model.fixed_s + model.per_decode_s * requests + model.per_context_token_s * tokens
