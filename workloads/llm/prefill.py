"""Prompts computed into a cache, and through it into a host pool: what a prefill instance leaves to decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.attention import AttnMeta
from workloads.llm.kv import PagedKV, copy_blocks
from workloads.llm.model import Stage
from workloads.llm.pool import HostPool
from workloads.llm.request import Request


@torch.inference_mode()
def compute(stage: Stage, request: Request, device: PagedKV, table: Sequence[int]) -> int:
    """Keys and values of all but the last token of the prompt, into these blocks; how many tokens that is."""
    count = len(request.prompt) - 1
    if count:
        ids = torch.tensor(request.prompt[:count], device=stage.device)
        size = device.block_size
        meta = AttnMeta.packed([count], block_tables=[table], block_size=size, device=stage.device)
        stage(ids, meta, device, torch.zeros(0, dtype=torch.int64, device=stage.device))
    return count


@torch.inference_mode()
def prefill(stage: Stage, requests: Sequence[Request], pool: HostPool, host: PagedKV, device: PagedKV) -> None:
    """Keys and values of all but the last token of each prompt, into the request's blocks of the pool."""
    scratch = BlockAllocator(device.blocks, device.block_size)
    for request in requests:
        pool.enter(request)
        scratch.grow(request.id, max(1, len(request.prompt) - 1))
        table = scratch.table(request.id)
        pairs = pool.store(request.id, compute(stage, request, device, table), table)
        copy_blocks(device, host, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if device.arena.is_cuda:
            torch.cuda.current_stream().synchronize()
        scratch.release(request.id)
