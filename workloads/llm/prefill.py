"""Prompts computed into a host pool: what a prefill instance leaves to those that decode."""

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
def prefill(stage: Stage, requests: Sequence[Request], pool: HostPool, host: PagedKV, device: PagedKV) -> None:
    """Keys and values of all but the last token of each prompt, into the request's blocks of the pool."""
    scratch = BlockAllocator(device.blocks, device.block_size)
    none = torch.zeros(0, dtype=torch.int64, device=stage.device)
    for request in requests:
        count = len(request.prompt) - 1
        pool.enter(request)
        if count:
            scratch.grow(request.id, count)
            table = scratch.table(request.id)
            ids = torch.tensor(request.prompt[:count], device=stage.device)
            meta = AttnMeta.packed([count], block_tables=[table], block_size=device.block_size, device=stage.device)
            stage(ids, meta, device, none)
            pairs = pool.store(request.id, count, table)
            copy_blocks(device, host, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            if device.arena.is_cuda:
                torch.cuda.current_stream().synchronize()
            scratch.release(request.id)
