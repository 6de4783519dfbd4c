"""Which copy goes next over a link: urgent ones first, in chunks; and a link in simulated time. Imports no torch.

An activation never waits behind more than one chunk of something less urgent. One queue is one direction of a link.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import count

from saih.errors import unknown

ORDERS = ("priority", "fifo")


class Urgency(IntEnum):
    """What a transfer is for; the smaller number goes first."""

    ACTIVATION = 0
    PREFETCH = 1
    OFFLOAD = 2


@dataclass(eq=False)
class Transfer:
    """Chunks that move one after the other."""

    urgency: Urgency
    chunk_bytes: Sequence[int]
    moved: int = 0
    """Chunks that have arrived."""
    not_before_s: float = 0.0
    """In simulated time: when what it overwrites has gone."""
    dropped: bool = False
    """Nobody wants the rest any more."""
    ended_s: float | None = None
    """When the last chunk arrived, on the clock of whoever moves it."""

    @property
    def done(self) -> bool:
        return self.dropped or self.moved == len(self.chunk_bytes)

    def ready(self, now_s: float) -> bool:
        """Whether it may begin."""
        return self.not_before_s <= now_s


class CopyQueue:
    """Whose chunk goes next. "priority": the most urgent transfer's; "fifo": the oldest's, whatever it is for."""

    def __init__(self, order: str = "priority") -> None:
        if order not in ORDERS:
            raise unknown("order of transfers", order, ORDERS)
        self.order = order
        self._tickets = count()
        self._heap: list[tuple[int, int, Transfer]] = []

    def add(self, transfer: Transfer) -> None:
        rank = transfer.urgency if self.order == "priority" else 0
        heapq.heappush(self._heap, (rank, next(self._tickets), transfer))

    def hurry(self, transfer: Transfer) -> None:
        """Somebody waits for this one now: it goes before all others. Under "fifo" it keeps its place."""
        if self.order == "priority":
            transfer.urgency = Urgency.ACTIVATION
            self.add(transfer)  # its old entry is skipped when it is reached, for the transfer is done by then

    def next(self, now_s: float = math.inf) -> Transfer | None:
        """The transfer whose chunk `moved` is to be moved now; None where there is none, or none that may begin."""
        while self._heap and self._heap[0][2].done:
            heapq.heappop(self._heap)
        if self._heap and self._heap[0][2].ready(now_s):
            return self._heap[0][2]
        return next((each for _, _, each in sorted(self._heap) if not each.done and each.ready(now_s)), None)

    def next_s(self) -> float:
        """In simulated time: when the first of them may begin; inf where there is none."""
        return min((each.not_before_s for _, _, each in self._heap if not each.done), default=math.inf)


class SimulatedLink:
    """One direction of a link in simulated time; a chunk that moves is not stopped."""

    def __init__(self, bytes_per_s: float, order: str = "priority") -> None:
        self.bytes_per_s, self.queue = bytes_per_s, CopyQueue(order)
        self.busy_s = 0.0
        self._free_s = 0.0

    def submit(self, transfer: Transfer, now_s: float) -> Transfer:
        self.advance(now_s)
        self._free_s = max(self._free_s, now_s)
        self.queue.add(transfer)
        return transfer

    def advance(self, now_s: float) -> None:
        """Moves all chunks that begin before `now_s`."""
        while self._free_s < now_s:
            if transfer := self.queue.next(self._free_s):
                self._move(transfer)
            else:
                self._free_s = min(now_s, self.queue.next_s())

    def finish(self, transfer: Transfer) -> float:
        """When this transfer will have arrived if nothing else is submitted before, and it is hurried."""
        self.queue.hurry(transfer)
        while not transfer.done:
            if first := self.queue.next(self._free_s):
                self._move(first)
            else:
                self._free_s = self.queue.next_s()
        return self._free_s if transfer.ended_s is None else transfer.ended_s

    def _move(self, transfer: Transfer) -> None:
        took_s = transfer.chunk_bytes[transfer.moved] / self.bytes_per_s
        self._free_s += took_s
        self.busy_s += took_s
        transfer.moved += 1
        if transfer.done:
            transfer.ended_s = self._free_s
