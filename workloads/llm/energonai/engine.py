"""The hierarchy controller: code that looks serial commands all ranks; activations never pass through it."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from concurrent.futures import Future, wait
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.energonai.consistency import after
from workloads.llm.energonai.message import Kind, Message, receive, send
from workloads.llm.energonai.worker import ENGINE, Worker, describe

GRACE_S = 2.0
"""A rank that loses its neighbour reports at once; so long the engine waits for the one that died to be noticed."""
ABORT_TIMEOUT = datetime.timedelta(seconds=10)
"""A rank that takes no commands any more is left to itself."""


class Batch(NamedTuple):
    """What a user asks for: sequences, and how long an emulated stage takes for them."""

    lens: tuple[int, ...]
    ids_T: Tensor
    """int64: tokens of all sequences, one after the other."""
    emulated_us: int = 0


class Engine:
    """Lives on rank 0 beside its worker; every other rank follows (`Worker.follow`).

    `run` gives each batch the next ticket, sends the same command to every rank and returns at once. The future gets
    the result of the last stage for its own ticket.
    """

    def __init__(self, worker: Worker, *, padded: bool = False, blocking: bool = False) -> None:
        """padded: rows are filled up to the longest sequence. blocking: `run` returns when the batch is through."""
        self.worker, self.padded, self.blocking = worker, padded, blocking
        self._control, mesh = worker.control, worker.mesh
        self._others = [rank for rank in range(mesh.tp * mesh.pp) if rank != ENGINE]
        self._next = 0
        self._waiting: dict[int, tuple[Message, Future[Tensor]]] = {}
        self._sending, self._changing = threading.Lock(), threading.Lock()
        self._closed, self._told = False, threading.Event()
        self._listeners = [threading.Thread(target=self._listen, args=(rank,), daemon=True) for rank in self._others]
        worker.start(self._resolve, lambda why: self._fail_later(ENGINE, why))
        for thread in self._listeners:
            thread.start()

    def run(self, batch: Batch, *, padded: bool | None = None, every_row: bool = False) -> Future[Tensor]:
        """Logits [B, V] behind the last token of each sequence, or with `every_row` [T, V] behind every token.

        The future cannot be cancelled: all ranks have the command.
        Raises SaihError for a batch that the model cannot take, if a rank has failed, and if the engine is closed.
        """
        self._look_at(batch)
        form = self.padded if padded is None else padded
        with self._sending:
            future = self._submit(Message(Kind.RUN, 0, batch.lens, batch.ids_T, form, every_row, batch.emulated_us))
        if self.blocking:
            future.exception()
        return future

    def close(self) -> None:
        """Wait for what was submitted, then end all ranks.

        Returns as well if a rank fails or dies meanwhile: futures without a result say what it was, so does
        `worker.failure`, and the ranks that are left have been told.
        """
        with self._changing:
            if self._closed:
                return
            self._closed = True
            waiting = [future for _, future in self._waiting.values()]
        wait(waiting)
        with self._sending:
            if not self.worker.failure:
                self._send(Message(Kind.STOP, self._next))
        self.worker.join()
        for thread in self._listeners:
            while thread.is_alive() and not self.worker.failure:
                thread.join(0.05)
        if self.worker.failure:
            self._told.wait()
        else:
            self._tell(Message(Kind.END))

    def _look_at(self, batch: Batch) -> None:
        """What one rank refused would end all of them, and of an id that no rank has they would make zeros."""
        stage, ids_T = self.worker.stage, batch.ids_T
        if not batch.lens or min(batch.lens) < 1:
            raise SaihError("an empty batch, or an empty sequence in it: every sequence needs at least one token")
        if ids_T.dtype != torch.int64 or ids_T.dim() != 1:
            raise SaihError(f"ids of type {ids_T.dtype} and shape {tuple(ids_T.shape)}; they must be int64 [T]")
        if sum(batch.lens) != len(ids_T):
            raise SaihError(f"a batch of {len(ids_T)} ids whose lengths add up to {sum(batch.lens)}")
        if max(batch.lens) > stage.max_positions:
            raise SaihError(f"a sequence of {max(batch.lens)} tokens; the model has {stage.max_positions} positions")
        if (wrong := ids_T[(ids_T < 0) | (ids_T >= stage.vocab)]).numel():
            raise SaihError(f"id {int(wrong[0])} is outside the vocabulary: 0 to {stage.vocab - 1}")

    def _submit(self, command: Message) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        future.set_running_or_notify_cancel()
        with self._changing:
            if self._closed or self.worker.failure:
                raise SaihError(self.worker.failure or "the engine is closed")
            if len(self._waiting) >= self.worker.tickets - 1:
                raise SaihError(
                    f"{len(self._waiting)} batches are under way and there are {self.worker.tickets} tickets"
                )
            ticket, self._next = self._next, after(self._next, self.worker.tickets)
            command = command.with_ticket(ticket)
            self._waiting[ticket] = command, future
        self._send(command)
        return future

    def _send(self, command: Message) -> None:
        """The engine's own rank last: the others have further to go."""
        try:
            send(command, self._others, self._control)
        except RuntimeError:
            return  # a listener knows who it was
        self.worker.put(command)

    def _listen(self, rank: int) -> None:
        """Reports of one rank. A rank that dies closes its connection, which ends the waiting."""
        try:
            while (report := receive(rank, self._control)).kind == Kind.RESULT:
                self._resolve(report.ticket, self._receive_result(rank, report.ticket))
        except RuntimeError:
            self._fail(f"rank {rank} died: its connection was closed")
            return
        except Exception as error:
            self._fail(f"rank {ENGINE} failed: {describe(error)}")
            return
        if report.kind == Kind.FAILED:
            self._fail_later(rank, report.read_text())

    def _receive_result(self, rank: int, ticket: int) -> Tensor:
        command, _ = self._waiting[ticket]
        rows = len(command.words) if command.every_row else len(command.lens)
        result = torch.empty(rows, self.worker.stage.result_width, dtype=self.worker.stage.dtype)
        dist.recv(result, rank, group=self._control)
        return result

    def _resolve(self, ticket: int, result: Tensor) -> None:
        with self._changing:
            _, future = self._waiting.pop(ticket)
        future.set_result(result)

    def _fail_later(self, rank: int, why: str) -> None:
        time.sleep(GRACE_S)
        self._fail(f"rank {rank} failed: {why}")

    def _fail(self, why: str) -> None:
        """The first failure ends everything: this rank, the futures, all others."""
        with self._changing:
            if self.worker.failure:
                return
            self.worker.fail(why)
            waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            future.set_exception(SaihError(why))
        with self._sending:
            self._tell(Message.text(Kind.ABORT, why))
        self._told.set()

    def _tell(self, last: Message) -> None:
        """The last words to all ranks, one by one, for some may be dead."""
        for rank in self._others:
            with contextlib.suppress(RuntimeError):
                send(last, [rank], self._control, ABORT_TIMEOUT)
