"""The decode instance in real time: copies by a thread, and between arenas before a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.copythread import BlockTransfer, CopyThread
from workloads.llm.kv import PagedKV, copy_blocks
from workloads.llm.pool import HostPool
from workloads.llm.request import Request
from workloads.llm.transfer import Urgency


class RealMover:
    """Pool, stage and device as three arenas. The stage is a second buffer on the device itself."""

    def __init__(
        self,
        pool: HostPool,
        host: PagedKV,
        stage: PagedKV,
        device: PagedKV,
        device_blocks: BlockAllocator,
        copies: CopyThread,
    ) -> None:
        self.pool, self.host, self.stage, self.device = pool, host, stage, device
        self.device_blocks, self.copies = device_blocks, copies
        self.stage_blocks = BlockAllocator(stage.blocks, stage.block_size)
        self._flying: dict[int, BlockTransfer] = {}

    def prefetch(self, request: Request) -> bool:
        if not self.stage_blocks.grow(request.id, request.context_tokens):
            return False
        pairs = self.pool.load(request.id, self.stage_blocks.table(request.id))
        self._flying[request.id] = self.copies.submit(Urgency.PREFETCH, self.host, self.stage, pairs)
        return True

    def arrived(self, request: Request) -> bool:
        return request.id not in self._flying or self._flying[request.id].done

    def load(self, request: Request) -> None:
        table = self.device_blocks.table(request.id)
        transfer = self._flying.pop(request.id, None)
        if transfer is None:
            self._copy(self.host, self.device, self.pool.load(request.id, table))
            return
        self.copies.wait(transfer)
        held = self.pool.blocks.blocks_for(self.pool.stored_tokens(request.id))
        pairs = list(zip(self.stage_blocks.table(request.id)[:held], table[:held], strict=True))
        self._copy(self.stage, self.device, pairs)
        self.stage_blocks.release(request.id)

    def evict(self, request: Request) -> None:
        table = self.device_blocks.table(request.id)
        self._copy(self.device, self.host, self.pool.store(request.id, request.computed, table))

    def drop(self, request: Request) -> None:
        if request.id in self._flying:
            self.copies.drop(self._flying.pop(request.id))
            self.stage_blocks.release(request.id)

    def _copy(self, source: PagedKV, target: PagedKV, pairs: Sequence[tuple[int, int]]) -> None:
        copy_blocks(source, target, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if self.device.arena.is_cuda and not (source.arena.is_cuda and target.arena.is_cuda):
            torch.cuda.current_stream().synchronize()  # the host side may be written or read at once
