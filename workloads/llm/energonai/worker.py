"""One rank: takes commands as they come, executes them in ticket order, hands activations to the next stage."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Clock
from saih.errors import SaihError
from saih.timing import Unclocked
from workloads.llm.energonai.consistency import TICKETS, ConsistencyQueue
from workloads.llm.energonai.message import Kind, Message, receive, send
from workloads.llm.energonai.stages import Job
from workloads.llm.handoff import Outbox, ahead
from workloads.llm.shard import Mesh

ENGINE = 0
"""The rank that commands."""


class StageOfRank(Protocol):
    """What executes a job here: `stages.ComputedStage` or `stages.EmulatedStage`."""

    vocab: int
    """Ids are below it."""
    max_positions: int
    """Tokens of the longest sequence it takes."""
    device: torch.device
    dtype: torch.dtype
    hidden: int
    result_width: int

    def prepare(self, command: Message) -> Job: ...

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor: ...


class Worker:
    """A rank's stage and the threads that keep it busy.

    control    receives the engine's commands (not on the engine's own rank: it puts them in the inbox itself)
    picker     one for each stage and two more: takes any command, prepares it, enters it under its ticket
    executor   in ticket order: receive, compute, hand over
    receiver   with depth > 0 only: receives ahead of the executor, as shapes are known from the tickets
    sender     with depth > 0 only: sends behind the executor's back
    reporter   (not on the engine's own rank) sends results to the engine

    The clock's phases: `communication` is waiting for activations, bubbles of the pipeline included, and for the next
    stage to take them; `compute` is the layers, sums over tensor-parallel ranks included; `other` is waiting for
    commands and results.
    """

    def __init__(
        self, stage: StageOfRank, mesh: Mesh, control: dist.ProcessGroup | None, *, depth: int, tickets: int = TICKETS
    ) -> None:
        """`control`: a gloo group of all ranks, None if alone. `depth`: see `handoff`; the same on every rank."""
        self.stage, self.mesh, self.control = stage, mesh, control
        self.first, self.last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
        self.rank = mesh.pp_rank * mesh.tp + mesh.tp_rank
        self._idle = "other" if self.first else "communication"
        self._clock: Clock = Unclocked()
        self._phase = self._idle
        self._timing = threading.Lock()
        self.pickup_delay_s = 0.0
        """Pickers sleep up to this long, at random: a test of the ticket order."""
        self.silent = False
        """Activations are neither sent nor waited for: every stage takes zeros."""
        self.failure = ""
        self.tickets = tickets
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._reports: SimpleQueue[tuple[Message, Tensor | None]] = SimpleQueue()
        self._queue: ConsistencyQueue[Job | None] = ConsistencyQueue(tickets)
        self._depth = 0 if self.first else depth
        self._outbox = Outbox(mesh.pp_rank + 1, mesh.pp_group, 0 if self.last else depth)
        self._executed, self._awaited = 0, 0
        self._changed = threading.Condition()
        self._pickers = mesh.pp + 2
        self._threads: list[threading.Thread] = []

    def start(self, deliver: Callable[[int, Tensor], None], blame: Callable[[str], None]) -> None:
        """`deliver` gets every ticket's result on the last stage's first rank; `blame` gets what went wrong here."""
        self._deliver, self._blame = deliver, blame
        self._run_threads(executor=self._execute, **{f"picker{n}": self._pick for n in range(self._pickers)})

    def follow(self) -> None:
        """On every rank but the engine's: execute what the engine says until it closes.

        Raises SaihError if a rank failed.
        """
        self.start_following()
        self.join()
        if self.failure:
            raise SaihError(self.failure)

    def start_following(self) -> None:
        """As `follow`, and returns at once: the threads go on beside the caller, who may `wait_for` tickets."""
        self.start(
            lambda ticket, result: self._reports.put((Message(Kind.RESULT, ticket), result)),
            lambda why: self._reports.put((Message.text(Kind.FAILED, why), None)),
        )
        self._run_threads(control=self._listen, reporter=self._report)

    def use(self, clock: Clock) -> None:
        """From here on phases are told to this clock, beginning with the one that the executor is in.

        The clock before hears no more, whatever the executor is at.
        """
        with self._timing:
            self._clock = clock
            clock.enter(self._phase)

    def put(self, command: Message) -> None:
        """Take a RUN or STOP command in."""
        self._inbox.put(command)

    def wait_for(self, tickets: int) -> None:
        """Until so many more tickets are executed here. Raises SaihError if a rank failed."""
        self._awaited += tickets
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._executed >= self._awaited)
        if self.failure:
            raise SaihError(self.failure)

    def join(self, timeout_s: float | None = None) -> None:
        """Until the engine has closed and all threads have ended; at once if a rank failed."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            while thread.is_alive() and not self.failure and (end_s is None or time.monotonic() < end_s):
                thread.join(0.05)

    def fail(self, why: str) -> None:
        """Whoever waits here gets this error; the first one counts."""
        with self._changed:
            self.failure = self.failure or why
            self._changed.notify_all()

    # -- threads -------------------------------------------------------------------------------------------------------

    def _run_threads(self, **targets: Callable[[], None]) -> None:
        started = [threading.Thread(target=run, name=name, daemon=True) for name, run in targets.items()]
        self._threads += started
        for thread in started:
            thread.start()

    def _report(self) -> None:
        """Results go to the engine beside the work, whatever the hand-off."""
        with contextlib.suppress(RuntimeError):  # the engine is gone: the control thread knows
            while True:
                message, result = self._reports.get()
                send(message, [ENGINE], self.control)
                if result is None:
                    return
                dist.send(result, ENGINE, group=self.control)

    def _listen(self) -> None:
        """To the very END: what fails behind STOP, here or elsewhere, has to be heard of as well."""
        try:
            while (command := receive(ENGINE, self.control)).kind in (Kind.RUN, Kind.STOP):
                self.put(command)
        except RuntimeError:
            self.fail(f"rank {ENGINE}, the engine, is gone")
            return
        if command.kind == Kind.ABORT:
            self.fail(command.read_text())

    def _pick(self) -> None:
        try:
            while (command := self._inbox.get()) is not None:
                time.sleep(random.uniform(0.0, self.pickup_delay_s))  # noqa: S311
                stop = command.kind == Kind.STOP
                self._queue.put(command.ticket, None if stop else self.stage.prepare(command))
                if stop:
                    for _ in range(self._pickers):
                        self._inbox.put(None)
        except Exception as error:
            self._blame(describe(error))

    @torch.inference_mode()
    def _execute(self) -> None:
        try:
            if self.stage.device.type == "cuda":
                torch.cuda.set_device(self.stage.device)
            for job, x_TD in ahead(self._received(), self._depth):
                self._enter("compute")
                y = self.stage(job, x_TD)
                self._enter("communication")
                if not self.last and not self.silent:
                    self._outbox.send(y.contiguous())
                elif self.last and self.mesh.tp_rank == 0:
                    self._deliver(job.command.ticket, y.cpu())
                self._enter(self._idle)
                with self._changed:
                    self._executed += 1
                    self._changed.notify_all()
            self._outbox.close()
            if self.rank != ENGINE:
                self._reports.put((Message(Kind.STOPPED), None))
        except Exception as error:
            self._blame(describe(error))

    def _enter(self, phase: str) -> None:
        with self._timing:
            self._phase = phase
            self._clock.enter(phase)

    def _received(self) -> Iterator[tuple[Job, Tensor | None]]:
        """Jobs in ticket order, with the activations of the stage before."""
        while (job := self._queue.pop()) is not None:
            x_TD = None
            if not self.first:
                shape = (len(job.ids_T), self.stage.hidden)
                made = torch.zeros if self.silent else torch.empty
                x_TD = made(shape, dtype=self.stage.dtype, device=self.stage.device)
                if not self.silent:
                    dist.recv(x_TD, group=self.mesh.pp_group, group_src=self.mesh.pp_rank - 1)
            yield job, x_TD


def describe(error: Exception) -> str:
    """One line for whoever reads it on another rank."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
