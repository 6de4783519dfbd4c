"""The clock: steps and their phases, timed on the host or by device events. Samples only; no statistics here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saih.core import PHASES, Bench, Work


class StepClock:
    """Times one step as a row of phases: each `enter` ends the phase before it, so the phases add up to the step.

    On a GPU a mark is an event in the current stream, which costs no synchronisation; the step ends with one.
    """

    def __init__(self, device: str) -> None:
        self.kind = "cuda" if device.startswith("cuda") else "cpu"
        self._cuda = self.kind == "cuda"
        self._marks: list[tuple[int, Any]] = []

    def enter(self, phase: str) -> None:
        """From here on time counts as `phase`. Raises ValueError for a name that is not in PHASES."""
        self._marks.append((PHASES.index(phase), self._now()))

    def start(self) -> None:
        """Begin a step, in phase `other`."""
        self._marks = []
        if self._cuda:
            torch.cuda.synchronize()
        self.enter("other")

    def stop(self) -> list[float]:
        """End the step; seconds spent in each of PHASES."""
        self.enter("other")
        if self._cuda:
            torch.cuda.synchronize()
        seconds = [0.0] * len(PHASES)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1e3 if self._cuda else (end - begin) / 1e9
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Unclocked:
    """The clock of steps that nobody times, such as those of a check."""

    def enter(self, phase: str) -> None:
        """Not counted."""


@dataclass(frozen=True)
class Samples:
    """Raw samples of consecutive steps on one rank, one entry a step."""

    phase_s: list[list[float]]
    """[steps, PHASES]"""
    work: list[Work]


def run_steps(bench: Bench, clock: StepClock, steps: int, line_up: Callable[[], None] = lambda: None) -> Samples:
    """Time `steps` steps, one after the other; `line_up` waits for the other ranks before each, off the clock."""
    phase_s, work = [], []
    for _ in range(steps):
        line_up()
        clock.start()
        done = bench.step(clock)
        phase_s.append(clock.stop())
        work.append(done)
    return Samples(phase_s, work)
