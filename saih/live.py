"""Live progress of a running sweep or of a data set in the making; plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from saih.dataset import DataSet
from saih.drive import Progress as Seen
from saih.plan import Plan

PLAIN_EVERY_S = 10.0


class Filling:
    """Watches a data set being made: bytes of it that are there, and how fast they come."""

    def __init__(self, data: DataSet, console: Console) -> None:
        self._data, self._console = data, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(data.path.name, total=data.whole_bytes)
        self._looked = -math.inf

    def __enter__(self) -> Filling:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Seen) -> None:
        every_s = 1.0 if self._console.is_terminal else PLAIN_EVERY_S
        if time.monotonic() - self._looked < every_s:
            return
        self._looked, there = time.monotonic(), self._data.there_bytes()
        self._bar.update(self._task, completed=there)
        if not self._console.is_terminal:
            share = 100 * there / self._data.whole_bytes
            self._console.print(f"{there / 1e6:.4g} MB of {self._data.whole_bytes / 1e6:.4g} MB, {share:.0f} %")


class Live:
    """Watches `drive.run`: call it with the progress. The finishing time is the plan's, corrected by what was seen."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._predicted = {item.point.id: item.point_s for item in plan.kept}
        self._console = console
        self._plan = plan
        self._began = time.monotonic()
        self._last_line = self._began
        self._spent_before: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[finish]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=len(plan.kept), finish="")

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Seen) -> None:
        done = progress.measured | progress.failed
        name = " ".join(f"{k}={v}" for k, v in progress.running.labels.items()) if progress.running else ""
        repeat = f" repeat {progress.running.repeat + 1}" if progress.running else ""
        finish = self._finish(done)
        self._bar.update(self._task, completed=len(done), description=(name + repeat) or "starting", finish=finish)
        if not self._console.is_terminal and time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            failed = f", {len(progress.failed)} failed" if progress.failed else ""
            self._console.print(
                f"{len(done)}/{len(self._predicted)} points{failed}; {name}{repeat}; {finish}", highlight=False
            )

    def _finish(self, done: set[str]) -> str:
        """Wall-clock time of the end: predicted seconds left, scaled by how the predictions did so far."""
        finished = sum(self._predicted[name] for name in done if name in self._predicted)
        if self._spent_before is None:
            self._spent_before = finished  # measured by an earlier run
        elapsed, seen = time.monotonic() - self._began, finished - self._spent_before
        left = sum(self._predicted.values()) - finished
        scale = elapsed / seen if seen > 0 else 1.0
        return "done about " + time.strftime("%H:%M:%S", time.localtime(time.time() + left * scale))
