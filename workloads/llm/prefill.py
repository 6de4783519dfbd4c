"""Prompts computed into a cache, several at once, and through it into a host pool: what a prefill leaves to decode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.attention import AttnMeta
from workloads.llm.kv import PagedKV, copy_blocks
from workloads.llm.model import Stage
from workloads.llm.pool import HostPool
from workloads.llm.request import Request

MOST_TOKENS = 512
"""Of prompts that are computed at once: more rows make no matrix faster, on a core or on a GPU."""


def packs(requests: Iterable[Request], blocks: BlockAllocator) -> Iterator[list[Request]]:
    """Prompts to compute at once, in order: of at most MOST_TOKENS and a fourth of these blocks, or one longer one."""
    most = max(1, min(MOST_TOKENS // blocks.block_size, blocks.blocks // 4))
    pack: list[Request] = []
    taken = 0
    for request in requests:
        needed = blocks.blocks_for(prefilled_tokens(request))
        if pack and taken + needed > most:
            yield pack
            pack, taken = [], 0
        pack.append(request)
        taken += needed
    if pack:
        yield pack


def prefilled_tokens(request: Request) -> int:
    """All but the last token of its prompt: that one runs with the first decode step."""
    return len(request.prompt) - 1


@torch.inference_mode()
def compute(stage: Stage, requests: Sequence[Request], device: PagedKV, blocks: BlockAllocator) -> None:
    """Keys and values of these prompts, into their blocks."""
    prompts = [request for request in requests if prefilled_tokens(request)]
    if not prompts:
        return
    meta = AttnMeta.packed(
        [prefilled_tokens(each) for each in prompts],
        block_tables=[blocks.table(each.id) for each in prompts],
        block_size=device.block_size,
        device=stage.device,
    )
    ids = [token for each in prompts for token in each.prompt[:-1]]
    nobody = torch.zeros(0, dtype=torch.int64, device=stage.device)
    stage(torch.tensor(ids, device=stage.device), meta, device, nobody)


@torch.inference_mode()
def prefill(stage: Stage, requests: Sequence[Request], pool: HostPool, host: PagedKV, device: PagedKV) -> None:
    """Keys and values of each prompt, into the request's blocks of the pool."""
    scratch = BlockAllocator(device.blocks, device.block_size)
    for pack in packs(requests, scratch):
        for request in pack:
            pool.enter(request)
            scratch.grow(request.id, prefilled_tokens(request))
        compute(stage, pack, device, scratch)
        pairs = [pair for each in pack for pair in pool.store(each.id, prefilled_tokens(each), scratch.table(each.id))]
        copy_blocks(device, host, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if device.arena.is_cuda:
            torch.cuda.current_stream(device.arena.device).synchronize()
        for request in pack:
            scratch.release(request.id)
