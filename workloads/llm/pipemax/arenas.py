"""One stage's keys and values: an arena on the device, one on the host, and a thread for each direction between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch

from workloads.llm.copythread import BlockTransfer, CopyThread
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.pipemax.orders import Kind, Order
from workloads.llm.transfer import Urgency

CHUNK_S = 1e-3
"""Of copying is a chunk, or one block: what an activation waits for at the most. Smaller ones cost a GPU its rate."""


class Arenas:
    """Does what it is ordered, in this order. Leaving it ends the threads; what was not moved stays where it is.

    Leaving raises SaihError where a copy has failed that nobody waited for.

    Nobody waits for what leaves the device but who writes to the same blocks: a fetch on the link, behind it; a step,
    by `before_step`. And a request is fetched behind what of it is still on its way to the host.

    Without `link` blocks move as fast as they can: over PCIe from and to a GPU, else from memory to memory.
    """

    def __init__(
        self,
        device: PagedKV,
        host: PagedKV,
        link: EmulatedLink | None,
        order: str = "priority",
        bytes_per_s: float = 1e9,
    ) -> None:
        """order: of transfers that wait, see `transfer.ORDERS`; bytes_per_s: of copies without `link`, about."""
        self.device, self.host = device, host
        chunk_bytes = int(CHUNK_S * (link.bytes_per_s if link else bytes_per_s))
        words: dict[str, Any] = {"order": order, "chunk_bytes": chunk_bytes, "device": device.arena.device}
        self.outward = CopyThread(link, **words)
        self.inward = CopyThread(link, **words, beside=self.outward)
        self._coming: dict[int, BlockTransfer] = {}
        self._going: dict[int, list[BlockTransfer]] = {}
        self._leaving: dict[int, list[BlockTransfer]] = {}
        """Device blocks that were given up, and the transfers that read them."""

    def do(self, order: Order) -> None:
        """One order. Raises SaihError where a copy has failed."""
        owner, pairs = order.owner, order.pairs
        match order.kind:
            case Kind.PLACE:
                self._wait_for(self._before_fetching(order))
                self._copy(self.host, self.device, pairs)
            case Kind.KEEP:
                self._copy(self.device, self.host, pairs)
            case Kind.FETCH:
                behind = self._before_fetching(order)
                self._coming[owner] = self.inward.submit(Urgency.PREFETCH, self.host, self.device, pairs, behind)
            case Kind.WAIT:
                if owner in self._coming:
                    transfer = self._coming.pop(owner)
                    self._wait_for(transfer.behind)
                    self.inward.wait(transfer)
            case Kind.OFFLOAD:
                transfer = self.outward.submit(Urgency.OFFLOAD, self.device, self.host, pairs)
                self._going[owner] = [*self._still_going(owner), transfer]
            case Kind.LEAVE:
                self._no_longer_fetched(owner)
                for transfer in self._still_going(owner):
                    for block in (block for chunk in transfer.chunks for block, _ in chunk):
                        self._leaving[block] = [*self._reading([block]), transfer]
            case Kind.FORGET:
                self._no_longer_fetched(owner)
                for transfer in self._going.pop(owner, []):
                    self.outward.drop(transfer)

    def before_step(self, blocks: Iterable[int]) -> float:
        """Returns when a step may write to these device blocks; seconds waited."""
        return self._wait_for(self._reading(blocks))

    def _before_fetching(self, order: Order) -> list[BlockTransfer]:
        """What has to be there first: all of the request on the host, and who had the blocks before it."""
        return [*self._still_going(order.owner), *self._reading(block for _, block in order.pairs)]

    def _still_going(self, owner: int) -> list[BlockTransfer]:
        return [each for each in self._going.get(owner, []) if not each.done]

    def _reading(self, blocks: Iterable[int]) -> list[BlockTransfer]:
        """The transfers that still read these blocks of others, each once."""
        found = [each for block in blocks for each in self._leaving.get(block, [])]
        return [each for each in dict.fromkeys(found) if not each.done]

    def _wait_for(self, leaving: Iterable[BlockTransfer]) -> float:
        """Seconds waited. One that was dropped never arrives, and is done."""
        return sum(self.outward.wait(transfer) for transfer in leaving if not transfer.done)

    def _no_longer_fetched(self, owner: int) -> None:
        if owner in self._coming:
            self.inward.drop(self._coming.pop(owner))

    def _copy(self, source: PagedKV, target: PagedKV, pairs: Sequence[tuple[int, int]]) -> None:
        copy_blocks(source, target, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if self.device.arena.is_cuda:
            torch.cuda.current_stream(self.device.arena.device).synchronize()

    def __enter__(self) -> Arenas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in (self.inward, self.outward):
            thread.close()
        if error is None:
            for thread in (self.inward, self.outward):
                thread.raise_error()
