"""How long a pipeline takes when the time of every batch is known: one exact recurrence a hand-off. Imports no torch.

Batch i takes d[i] on each of S stages, and x from a stage to the next. Nothing else takes time.
"""

from __future__ import annotations

from collections.abc import Sequence

HANDOFFS = ("blocking", "rendezvous", "nbpp")


def window_s(handoff: str, durations_s: Sequence[float], stages: int, transfer_s: float, buffer: int) -> float:
    """Seconds until the last stage is through with the last batch."""
    if handoff == "blocking":
        return blocking_s(durations_s, stages, transfer_s)
    if handoff == "rendezvous":
        return rendezvous_s(durations_s, stages, transfer_s)
    return nbpp_s(durations_s, stages, transfer_s, buffer)


def blocking_s(durations_s: Sequence[float], stages: int, transfer_s: float) -> float:
    """One batch in the pipeline at a time."""
    return sum(stages * duration + (stages - 1) * transfer_s for duration in durations_s)


def rendezvous_s(durations_s: Sequence[float], stages: int, transfer_s: float) -> float:
    """A stage hands over when the next one is free to take, and does nothing else until that is done."""
    free = [0.0] * stages
    for duration in durations_s:
        start = free[0]
        for stage in range(stages):
            end = start + duration
            if stage + 1 < stages:
                end = start = max(end, free[stage + 1]) + transfer_s
            free[stage] = end
    return free[-1]


def nbpp_s(durations_s: Sequence[float], stages: int, transfer_s: float, buffer: int) -> float:
    """A stage goes on while `buffer` of its results are not taken yet; the next takes up to `buffer` ahead.

    A link carries one batch at a time, beside both stages' work.
    """
    started: list[list[float]] = [[] for _ in range(stages)]
    taken: list[list[float]] = [[] for _ in range(stages)]
    free = [0.0] * stages
    for batch, duration in enumerate(durations_s):
        ready = 0.0
        for stage in range(stages):
            start = max(free[stage], ready)
            started[stage].append(start)
            free[stage] = end = start + duration
            if stage + 1 < stages:
                arrived, begun = taken[stage + 1], started[stage + 1]
                link_free = arrived[-1] if arrived else 0.0
                slot_free = begun[batch - buffer] if batch >= buffer else 0.0
                ready = max(end, link_free, slot_free) + transfer_s
                arrived.append(ready)
                free[stage] = max(end, arrived[batch - buffer]) if batch >= buffer else end
    return free[-1]
