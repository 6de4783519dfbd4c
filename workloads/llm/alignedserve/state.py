"""What the decode instance knows: requests in the pool, indexed; chosen and on their way; running."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

from workloads.llm.allocator import BlockAllocator
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.request import Phase, Request


class Index(Protocol):
    """The pool in the order that a scheduler wants."""

    def insert(self, request: Request) -> None: ...

    def remove(self, request: Request) -> None: ...


class Line:
    """The pool in the order of a key, such as arrival; requests alike in it by their number."""

    def __init__(self, key: Callable[[Request], float]) -> None:
        self.key = key
        self._heap: list[tuple[float, int, Request]] = []
        self._here: set[int] = set()

    def insert(self, request: Request) -> None:
        self._here.add(request.id)
        heapq.heappush(self._heap, (self.key(request), request.id, request))

    def remove(self, request: Request) -> None:
        self._here.remove(request.id)

    def first(self) -> Request | None:
        while self._heap and self._heap[0][1] not in self._here:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class Mover(Protocol):
    """Moves keys and values between the pool, the stage and the device, in real or in simulated time.

    The stage is memory near the device that holds what will run next: another GPU's, or a second buffer.
    """

    def prefetch(self, request: Request) -> bool:
        """Starts copying from the pool to the stage; False, and nothing happens, where the stage is full."""

    def arrived(self, request: Request) -> bool:
        """Whether nothing has to be waited for: it is in the stage, or was never sent there."""

    def load(self, request: Request) -> None:
        """Into the request's device blocks, from the stage or else the pool, before the next batch runs."""

    def evict(self, request: Request) -> None:
        """From the request's device blocks to the pool, before these are overwritten."""

    def drop(self, request: Request) -> None:
        """The request has ended: nothing of it is needed in the stage."""


class DecodeState(PooledState):
    """A server of requests that are prefilled: all but the last token of the prompt is computed and in the pool.

    `chosen` left the pool's index for the stage. `since_s` says since when those that do not run have waited.
    """

    def __init__(
        self, blocks: BlockAllocator, pool: HostPool, index: Index, mover: Mover, now_s: Callable[[], float]
    ) -> None:
        super().__init__(blocks, pool)
        self.index, self.mover, self.now_s = index, mover, now_s
        self.chosen: dict[int, Request] = {}
        self.since_s: dict[int, float] = {}

    @property
    def busy(self) -> bool:
        return bool(self.chosen) or super().busy

    def put(self, request: Request) -> None:
        super().put(request)
        self.index.insert(request)
        self.since_s[request.id] = self.now_s()

    def take(self, request: Request) -> None:
        super().take(request)
        self.index.remove(request)

    def choose(self, request: Request) -> None:
        """From the pool to those that run next."""
        self.take(request)
        self.chosen[request.id] = request

    def start(self, request: Request) -> None:
        """Runs from the next batch on; its device blocks are allocated."""
        self.chosen.pop(request.id, None)
        self.since_s.pop(request.id, None)
        super().start(request)
        self.mover.load(request)

    def suspend(self, request: Request) -> None:
        self.mover.evict(request)
        super().suspend(request)

    def cancel(self, request: Request) -> None:
        if request.id in self.chosen:
            del self.chosen[request.id]
            self._leave(request, Phase.CANCELLED)
        else:
            super().cancel(request)

    def _leave(self, request: Request, phase: Phase) -> None:
        self.mover.drop(request)
        self.since_s.pop(request.id, None)
        super()._leave(request, phase)
