"""The decode instance in simulated time: kernels as cost models, prefill as a queue, links as rates. No measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workloads.llm.allocator import BlockAllocator
from workloads.llm.pool import HostPool
from workloads.llm.request import Request
from workloads.llm.transfer import SimulatedLink, Transfer, Urgency

CHUNK_BYTES = 32 << 20


class SimulatedMover:
    """Copies that take the time of their bytes: pool to stage beside the computation, the rest before a batch runs."""

    def __init__(
        self,
        pool: HostPool,
        stage: BlockAllocator,
        block_bytes: int,
        host_bytes_per_s: float,
        stage_bytes_per_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self.pool, self.stage, self.block_bytes, self.now_s = pool, stage, block_bytes, now_s
        self.link = SimulatedLink(host_bytes_per_s)
        self.stage_bytes_per_s = stage_bytes_per_s
        self._flying: dict[int, Transfer] = {}
        self._ready_s = 0.0
        self._critical_s = 0.0

    def prefetch(self, request: Request) -> bool:
        tokens = request.context_tokens
        if not self.stage.grow(request.id, tokens):
            return False
        self._flying[request.id] = self._send(Urgency.PREFETCH, request)
        return True

    def arrived(self, request: Request) -> bool:
        self.link.advance(self.now_s())
        return request.id not in self._flying or self._flying[request.id].done

    def load(self, request: Request) -> None:
        transfer = self._flying.pop(request.id, None)
        if transfer is None:
            transfer = self._send(Urgency.ACTIVATION, request)
        else:
            self._critical_s += self._bytes(request) / self.stage_bytes_per_s
            self.stage.release(request.id)
        if not transfer.done or (transfer.ended_s or 0.0) > self.now_s():
            self._ready_s = max(self._ready_s, self.link.finish(transfer))

    def evict(self, request: Request) -> None:
        self.pool.hold(request.id, request.computed)
        self._critical_s += self._bytes(request) / self.stage_bytes_per_s

    def drop(self, request: Request) -> None:
        if request.id in self._flying:
            self._flying.pop(request.id).dropped = True
            self.stage.release(request.id)

    def stall_s(self) -> float:
        """What the next batch waits for before it runs; asked once a batch."""
        waited_s = max(0.0, self._ready_s - self.now_s()) + self._critical_s
        self._critical_s = 0.0
        return waited_s

    def _send(self, urgency: Urgency, request: Request) -> Transfer:
        whole, rest = divmod(self._bytes(request), CHUNK_BYTES)
        return self.link.submit(Transfer(urgency, [CHUNK_BYTES] * whole + [rest] * bool(rest)), self.now_s())

    def _bytes(self, request: Request) -> int:
        return self.stage.blocks_for(request.computed) * self.block_bytes


@dataclass(frozen=True)
class Prefill:
    """A prefill instance takes the next prompt as soon as it is free; a prompt takes its tokens' time."""

    tokens_per_s: float

    def run(self, requests: Sequence[Request]) -> None:
        """Sets `computed` to all but the last token of each prompt, and `arrival_s` to when that is in the pool."""
        free_s = 0.0
        for request in sorted(requests, key=lambda each: each.arrival_s):
            request.computed = len(request.prompt) - 1
            if self.tokens_per_s:
                free_s = max(request.arrival_s, free_s) + len(request.prompt) / self.tokens_per_s
                request.arrival_s = free_s
