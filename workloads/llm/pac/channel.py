"""Rows between the ranks of neighbouring stages, their bytes counted, over a link that may be an emulated one."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist
from torch import Tensor

from workloads.llm.handoff import Outbox
from workloads.llm.pac.planner import all_reduce_s


class EmulatedPort:
    """A device's link to a LAN, held to a rate in each direction, whatever the real one does: a token bucket each.

    Sent bytes leave at the rate. A message that arrives has crossed at the rate already, so it waits only while others
    still do that came at the same time: the bucket of what arrives holds as much as one message.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.emulated_bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._left_s = self._arrived_s = 0.0

    def leave(self, nbytes: int) -> None:
        """Until so many bytes have left."""
        with self._lock:
            self._left_s = end_s = max(self._left_s, time.perf_counter()) + nbytes / self.emulated_bytes_per_s
        sleep_until(end_s)

    def arrive(self, nbytes: int) -> None:
        """Until so many bytes, which are here, have arrived."""
        took_s = nbytes / self.emulated_bytes_per_s
        with self._lock:
            self._arrived_s = end_s = max(self._arrived_s, time.perf_counter() - took_s) + took_s
        sleep_until(end_s)

    def all_reduce(self, nbytes: int, devices: int, began_s: float) -> None:
        """Until a ring all-reduce of so many bytes that began then has ended."""
        sleep_until(began_s + all_reduce_s(nbytes, devices, self.emulated_bytes_per_s))


class Channel:
    """One direction between stages. Messages to one rank keep their order; sending waits for nobody."""

    def __init__(self, group: dist.ProcessGroup, depth: int, port: EmulatedPort | None = None) -> None:
        """`group`: of all ranks, for this direction alone. `depth`: messages that a rank may have not taken yet."""
        self.sent_bytes = 0
        self._group, self._depth, self._port = group, depth, port
        self._outboxes: dict[int, Outbox] = {}

    def send(self, to: int, x: Tensor) -> None:
        """Raises RuntimeError, at the latest with a later message, if that rank is gone."""
        if to not in self._outboxes:
            self._outboxes[to] = Outbox(to, self._group, self._depth, self._port.leave if self._port else None)
        self.sent_bytes += x.nbytes
        self._outboxes[to].send(x)

    def receive(self, source: int, into: Tensor) -> None:
        """Raises RuntimeError if that rank is gone."""
        dist.recv(into, group=self._group, group_src=source)
        if self._port is not None:
            self._port.arrive(into.nbytes)

    def close(self) -> None:
        """Until everything was taken."""
        for outbox in self._outboxes.values():
            outbox.close()
        dist.destroy_process_group(self._group)


def sleep_until(end_s: float) -> None:
    """`end_s` on the clock of time.perf_counter."""
    time.sleep(max(0.0, end_s - time.perf_counter()))
