"""How activations go from stage to stage: waiting for the neighbour (depth 0), or with threads of their own (NBPP)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


class Outbox:
    """Sends tensors, in order, to one rank of a group.

    With depth 0, `send` waits until the neighbour takes the tensor: gloo's send begins when the other end receives.
    Otherwise a thread sends, and `send` waits only while more than `depth` tensors have not been taken.
    """

    def __init__(
        self, to: int, group: dist.ProcessGroup | None, depth: int, pace: Callable[[int], None] | None = None
    ) -> None:
        """`pace` is called with a tensor's bytes before it goes, where an emulated link holds it back."""
        self._to, self._group, self._pace = to, group, pace
        self._waiting: SimpleQueue[Tensor | None] = SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def send(self, x: Tensor) -> None:
        """Raises what sending raised, at the latest with a later tensor."""
        if self._thread is None:
            self._send(x)
            return
        self._waiting.put(x)
        self._free.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Until everything was taken. Raises what sending raised, if no `send` has."""
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _send(self, x: Tensor) -> None:
        if self._pace is not None:
            self._pace(x.nbytes)
        dist.send(x, group=self._group, group_dst=self._to)

    def _work(self) -> None:
        try:
            while (x := self._waiting.get()) is not None:
                self._send(x)
                self._free.release()
        except Exception as error:
            self._error = error
            self._free.release()


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, taken by a thread of their own while at most `depth` wait here. With depth 0, on demand.

    An item counts from before it is taken until the consumer has it.
    """
    if depth == 0:
        yield from items
        return
    free = threading.Semaphore(depth)
    ready: SimpleQueue[Item | Exception | None] = SimpleQueue()

    def take() -> None:
        try:
            while free.acquire():
                item = next(items, None)
                ready.put(item)
                if item is None:
                    return
        except Exception as error:
            ready.put(error)

    threading.Thread(target=take, name="receiver", daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, Exception):
            raise item
        free.release()
        yield item
