"""One stage's keys and values: an arena on the device, one on the host, and a thread for each direction between."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from workloads.llm.copythread import BlockTransfer, CopyThread
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.pipemax.orders import Kind, Order
from workloads.llm.transfer import Urgency

CHUNK_BYTES = 1 << 20


class Arenas:
    """Does what it is ordered, in this order. Leaving it ends the threads; what was not moved stays where it is.

    Without `link` blocks move as fast as they can: over PCIe from and to a GPU, else from memory to memory.
    """

    def __init__(self, device: PagedKV, host: PagedKV, link: EmulatedLink | None, order: str = "priority") -> None:
        """order: of transfers that wait, see `transfer.ORDERS`."""
        self.device, self.host = device, host
        self.inward, self.outward = (
            CopyThread(link, order=order, chunk_bytes=CHUNK_BYTES, device=device.arena.device) for _ in range(2)
        )
        self._coming: dict[int, BlockTransfer] = {}
        self._going: dict[int, list[BlockTransfer]] = {}

    def do(self, order: Order) -> None:
        """One order. Raises SaihError where a copy has failed."""
        owner, pairs = order.owner, order.pairs
        match order.kind:
            case Kind.PLACE:
                self._copy(self.host, self.device, pairs)
            case Kind.KEEP:
                self._copy(self.device, self.host, pairs)
            case Kind.FETCH:
                self._coming[owner] = self.inward.submit(Urgency.PREFETCH, self.host, self.device, pairs)
            case Kind.WAIT:
                if owner in self._coming:
                    self.inward.wait(self._coming.pop(owner))
            case Kind.OFFLOAD:
                going = self._going.setdefault(owner, [])
                going.append(self.outward.submit(Urgency.OFFLOAD, self.device, self.host, pairs))
            case Kind.SETTLE:
                self._no_longer_fetched(owner)
                for transfer in self._going.pop(owner, []):
                    self.outward.wait(transfer)
            case Kind.FORGET:
                self._no_longer_fetched(owner)
                for transfer in self._going.pop(owner, []):
                    self.outward.drop(transfer)

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
        self.inward.close()
        self.outward.close()
