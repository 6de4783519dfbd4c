"""What memory, link and layouts give on this machine, measured before and beside the turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.calibrate import Runs
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.pipemax.arenas import Arenas
from workloads.llm.pipemax.orders import Kind, Order
from workloads.llm.pipemax.real import prompt_step
from workloads.llm.prefill import packs, prefilled_tokens
from workloads.llm.request import Request

MEMORY_BYTES = 1 << 26
"""Of the copy that stands for the device's memory, and of each arena that layouts are compared in."""
BUSY_S = 60.0
"""Of copies that are asked for: more than is copied while steps are calibrated."""
MOST_PAIRS = 200_000
"""Of blocks that are asked for: of tiny ones the copies end before."""
EMPTY_COPIES = 2000
PIECES = {"copy_bytes_per_s": (16, 8, 128), "copy_2kb_bytes_per_s": (4, 4, 32)}
"""(tokens, heads, their size) of a layer's piece of a block: 64 KB, as of llama-70b on a GPU, and 2 KB."""
COPIED_LAYERS = 32


def memory_bytes_per_s(device: str, other: str) -> float:
    """Best of several copies of MEMORY_BYTES from `other` to `device`; bytes copied, not read and written."""
    pinned = device != other
    source = torch.zeros(MEMORY_BYTES, dtype=torch.uint8, device=other, pin_memory=pinned)
    target = torch.empty(MEMORY_BYTES, dtype=torch.uint8, device=device)
    best_s = float("inf")
    for _ in range(5):
        begin_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(target)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return MEMORY_BYTES / best_s


def link_bytes_per_s(device: PagedKV, host: PagedKV, link: EmulatedLink | None, raw_bytes_per_s: float) -> float:
    """What the link gives to blocks as requests have them: every other one, through the thread (BW_eff).

    raw_bytes_per_s: of one large copy without `link`.
    """
    blocks = range(0, min(device.blocks, host.blocks), 2)
    pairs = list(zip(blocks, blocks, strict=True))
    with Arenas(device, host, link, bytes_per_s=raw_bytes_per_s) as arenas:
        for _ in range(3):
            arenas.do(Order(Kind.FETCH, 0, pairs))
            arenas.do(Order(Kind.WAIT, 0))
        return arenas.inward.bytes_per_s(raw_bytes_per_s)


@contextmanager
def links_busy(device: PagedKV, host: PagedKV, link: EmulatedLink | None, raw_bytes_per_s: float) -> Iterator[None]:
    """Copies both ways meanwhile, as they run beside the steps of a trace; what the arenas held is lost."""
    blocks = range(min(device.blocks, host.blocks))
    rate = link.bytes_per_s if link else raw_bytes_per_s
    wanted = min(BUSY_S * rate / device.block_bytes, MOST_PAIRS)
    pairs = [(block, block) for block in blocks] * (1 + int(wanted / len(blocks)))
    with Arenas(device, host, link, bytes_per_s=raw_bytes_per_s) as arenas:
        arenas.do(Order(Kind.FETCH, 0, pairs))
        arenas.do(Order(Kind.OFFLOAD, 0, pairs))
        try:
            yield
        finally:
            arenas.do(Order(Kind.FORGET, 0))


def prefill_s_per_token(stages: Runs, requests: Sequence[Request], prompts: int = 32) -> float:
    """Of the first prompts of the trace through all stages, as many at once as a run takes; the faster of two times."""
    tokens, took_s = 0, 0.0
    blocks = BlockAllocator(stages.kv.blocks, stages.kv.block_size)
    for pack in packs((each for each in requests[:prompts] if prefilled_tokens(each)), blocks):
        for request in pack:
            blocks.grow(request.id, prefilled_tokens(request))
        step, times_s = prompt_step(pack, blocks), []
        for _ in range(2):
            begin_s = time.perf_counter()
            stages.run(step)
            _synchronize(stages.kv.arena)
            times_s.append(time.perf_counter() - begin_s)
        for request in pack:
            blocks.release(request.id)
        tokens += len(step.ids_T)
        took_s += min(times_s)
    return took_s / max(1, tokens)


def layout_copies(layout: str, device: str, memory_bytes_per_s: float) -> dict[str, float]:
    """Copies of scattered blocks of a model of 32 layers, measured and on paper; arenas are out of the caches.

    memory_bytes_per_s: of one large copy between the same memories.
    """
    found = {}
    for name, (tokens, heads, size) in PIECES.items():
        blocks = MEMORY_BYTES // (COPIED_LAYERS * 2 * tokens * heads * size * torch.float16.itemsize)
        source, target = (
            PagedKV(
                COPIED_LAYERS,
                heads,
                size,
                blocks=blocks,
                block_size=tokens,
                layout=layout,
                device=place,
                dtype=torch.float16,
                pinned=place != device,
            )
            for place in ("cpu", device)
        )
        found[name] = _copy_bytes_per_s(target, source)
        found[f"predicted_{name}"] = _predicted_copy_bytes_per_s(target, source, memory_bytes_per_s)
    return found


@torch.inference_mode()
def _copy_bytes_per_s(device: PagedKV, host: PagedKV, repeats: int = 5) -> float:
    """Best of several copies of every other block from the host arena: runs of one block, as requests' blocks lie."""
    blocks = list(range(0, min(device.blocks, host.blocks), 2))
    best_s = float("inf")
    for _ in range(repeats):
        begin_s = time.perf_counter()
        copy_blocks(host, device, blocks, blocks)
        _synchronize(device.arena)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return len(blocks) * device.block_bytes / best_s


def _predicted_copy_bytes_per_s(device: PagedKV, host: PagedKV, memory_bytes_per_s: float) -> float:
    """On paper: a block takes its bytes at the rate of memory, and each of its pieces the time of an empty copy."""
    tiny = torch.zeros(1, dtype=device.arena.dtype, pin_memory=device.arena.is_cuda)
    begin_s = time.perf_counter()
    for _ in range(EMPTY_COPIES):
        device.arena.view(-1)[:1].copy_(tiny, non_blocking=True)
    _synchronize(device.arena)
    empty_s = (time.perf_counter() - begin_s) / EMPTY_COPIES
    pieces = 1 if host.layout == "block_first" else host.layers
    return device.block_bytes / (device.block_bytes / memory_bytes_per_s + pieces * empty_s)


def _synchronize(on: torch.Tensor) -> None:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
