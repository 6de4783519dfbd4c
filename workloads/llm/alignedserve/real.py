"""The decode instance in real time: copies by a thread, and between arenas before a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator
from workloads.llm.copythread import BlockTransfer, CopyThread
from workloads.llm.kv import PagedKV, copy_blocks
from workloads.llm.pool import HostPool
from workloads.llm.request import Request
from workloads.llm.transfer import Urgency


def place_of_stage(wanted: str, device: torch.device) -> torch.device:
    """A second GPU whose memory the device reads directly (GPU-prefetch-for-GPU), or the device itself.

    wanted: "peer", "device", or "auto", a peer where there is one. Raises SaihError for a peer where there is none.
    """
    if wanted == "device":
        return device
    own, count = device.index or 0, torch.cuda.device_count() if device.type == "cuda" else 0
    peers = [peer for peer in range(count) if peer != own and torch.cuda.can_device_access_peer(own, peer)]
    if peers:
        return torch.device("cuda", peers[0])
    if wanted == "peer":
        raise SaihError(f"stage=peer: {device} reads no other GPU's memory here; choose stage=device or stage=auto")
    return device


def label(stage: torch.device, device: torch.device, *, prefetch: bool) -> str:
    """What a result says of where its stage was."""
    if not prefetch:
        return "what runs next comes from the host directly, when it runs"
    if stage != device:
        return f"what runs next waits on {stage}, a second GPU with a host link of its own"
    return f"what runs next waits in a second buffer on {device}, filled from the host directly"


class RealMover:
    """Pool, stage and device as three arenas; `place_of_stage` says where the stage is."""

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
            # the host side may be written or read at once
            torch.cuda.current_stream(self.device.arena.device).synchronize()
