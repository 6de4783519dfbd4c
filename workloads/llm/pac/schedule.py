"""In which order a pipeline stage works on the micro-batches of a mini-batch. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from saih.errors import unknown

SCHEDULES = ("1f1b", "gpipe")


def in_flight(schedule: str, behind: int, micro_batches: int) -> int:
    """Micro-batches that a stage with so many stages behind it keeps between forward and backward, at most.

    GPipe (Huang et al., 2019) keeps all. 1F1B (PipeDream-Flush, Narayanan et al., 2021) keeps one for each stage from
    here to the end; here a link counts as a stage as well, since a LAN takes its time: no stage then waits for a link
    that is no slower, both ways together, than the slowest stage.
    """
    if schedule not in SCHEDULES:
        raise unknown("pipeline schedule", schedule, SCHEDULES)
    return micro_batches if schedule == "gpipe" else min(micro_batches, 2 * behind + 1)


def operations(schedule: str, stage: int, stages: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """("forward" or "backward", micro-batch) in the order in which stage `stage` of `stages` executes them."""
    ahead = in_flight(schedule, stages - 1 - stage, micro_batches)
    yield from (("forward", number) for number in range(ahead))
    for number in range(micro_batches):
        yield "backward", number
        if number + ahead < micro_batches:
            yield "forward", number + ahead
