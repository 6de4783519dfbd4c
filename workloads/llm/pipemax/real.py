"""The stage in real time: steps by the core's worker, copies by a thread for each direction of the link."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from workloads.llm.copythread import BlockTransfer, CopyThread
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.pool import PooledState
from workloads.llm.prefill import compute
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan
from workloads.llm.transfer import Urgency
from workloads.llm.worker import Step, Worker

CHUNK_BYTES = 1 << 20
EMPTY_COPIES = 2000


class RealDevice:
    """A worker and its arenas. On a CPU the device's arena is host memory too, and the link is emulated."""

    def __init__(
        self, state: PooledState, worker: Worker, host: PagedKV, link: EmulatedLink, rate: float, order: str
    ) -> None:
        """rate: bytes/s of the link as measured with copies like these, before (`link_bytes_per_s`)."""
        self.state, self.worker, self.kv, self.host = state, worker, worker.kv, host
        device = self.kv.arena.device
        self.inward, self.outward = (
            CopyThread(link, order=order, chunk_bytes=CHUNK_BYTES, device=device) for _ in range(2)
        )
        self.rate = rate
        self._began_s = time.perf_counter()
        self._fresh: set[int] = set()
        self._joining_s = 0.0
        self._coming: dict[int, BlockTransfer] = {}
        self._going: dict[int, list[BlockTransfer]] = {}

    def prefill(self, requests: Sequence[Request]) -> None:
        """The phase before decoding: prompts one after the other, each on its way to the host beside the next ones.

        Returns when the host has them all.
        """
        leaving: deque[int] = deque()
        for request in requests:
            while leaving and not self.state.blocks.grow(request.id, max(1, request.computed)):
                self._left(leaving.popleft())
            self.state.blocks.grow(request.id, max(1, request.computed))
            compute(self.worker.stage, request, self.kv, self.state.blocks.table(request.id))
            self.offload(request)
            leaving.append(request.id)
        while leaving:
            self._left(leaving.popleft())

    def _left(self, owner: int) -> None:
        self.settle([owner])
        self.state.blocks.release(owner)

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def wait_until(self, then_s: float) -> None:
        time.sleep(max(0.0, then_s - self.now_s()))

    def run(self, plan: BatchPlan) -> list[int]:
        begin_s = self.now_s()
        for request in plan.requests:
            if request.id in self._fresh:
                self._fresh.remove(request.id)
                compute(self.worker.stage, request, self.kv, self.state.blocks.table(request.id))
        self._joining_s = self.now_s() - begin_s
        tokens = self.worker.run(Step.of(plan, self.state.blocks))
        assert tokens is not None  # noqa: S101
        return [int(token) for token in tokens.tolist()]

    def stage_s(self, took_s: float, predicted_s: float) -> float:
        """As predicted, and its prompts: what disturbed this step disturbs none of the stages that are not there."""
        return predicted_s + self._joining_s

    def place(self, request: Request) -> None:
        """A prefill phase would have written here: the copy stands for its writing, and takes no part of the link."""
        if request.computed and not self.state.pool.stored_tokens(request.id):
            self._fresh.add(request.id)
            return
        pairs = self.state.pool.load(request.id, self.state.blocks.table(request.id))
        copy_blocks(self.host, self.kv, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def fetch(self, request: Request) -> None:
        pairs = self.state.pool.load(request.id, self.state.blocks.table(request.id))
        self._coming[request.id] = self.inward.submit(Urgency.PREFETCH, self.host, self.kv, pairs)

    def wait(self, request: Request) -> None:
        transfer = self._coming.pop(request.id, None)
        if transfer is not None:
            self.inward.wait(transfer)

    def offload(self, request: Request) -> None:
        table = self.state.blocks.table(request.id)
        pairs = self.state.pool.store(request.id, request.computed, table)
        if pairs:
            going = self._going.setdefault(request.id, [])
            going.append(self.outward.submit(Urgency.OFFLOAD, self.kv, self.host, pairs))

    def evict(self, request: Request) -> None:
        if request.id in self._fresh:  # nothing of it is here yet
            self._fresh.remove(request.id)
            return
        transfer = self._coming.pop(request.id, None)
        if transfer is not None:
            self.inward.drop(transfer)
        if request.computed > self.state.pool.stored_tokens(request.id):
            self.offload(request)
        self.settle([request.id])

    def settle(self, owners: Sequence[int]) -> None:
        """Until nothing of these requests is on its way to the host."""
        for owner in owners:
            for transfer in self._going.pop(owner, []):
                self.outward.wait(transfer)

    def fetch_bytes_per_s(self) -> float:
        return self.rate

    def close(self) -> None:
        self.inward.close()
        self.outward.close()


def link_bytes_per_s(kv: PagedKV, host: PagedKV, link: EmulatedLink) -> float:
    """What the link gives to blocks as requests have them: every other one, through the thread (BW_eff)."""
    copies = CopyThread(link, chunk_bytes=CHUNK_BYTES, device=kv.arena.device)
    blocks = list(range(0, min(kv.blocks, host.blocks), 2))
    for _ in range(3):
        copies.wait(copies.submit(Urgency.PREFETCH, host, kv, list(zip(blocks, blocks, strict=True))))
    copies.close()
    return copies.bytes_per_s(link.bytes_per_s)


@torch.inference_mode()
def copy_bytes_per_s(kv: PagedKV, host: PagedKV, repeats: int = 5) -> float:
    """Best of several copies of every other block from the host arena: runs of one block, as requests' blocks lie."""
    blocks = list(range(0, min(kv.blocks, host.blocks), 2))
    best_s = float("inf")
    for _ in range(repeats):
        begin_s = time.perf_counter()
        copy_blocks(host, kv, blocks, blocks)
        if kv.arena.is_cuda:
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin_s)
    return len(blocks) * kv.block_bytes / best_s


def predicted_copy_bytes_per_s(kv: PagedKV, host: PagedKV, memory_bytes_per_s: float) -> float:
    """On paper: a block takes its bytes at the rate of memory, and each of its pieces the time of an empty copy."""
    tiny = torch.zeros(1)
    begin_s = time.perf_counter()
    for _ in range(EMPTY_COPIES):
        kv.arena.view(-1)[:1].copy_(tiny)
    empty_s = (time.perf_counter() - begin_s) / EMPTY_COPIES
    pieces = 1 if host.layout == "block_first" else host.layers
    return kv.block_bytes / (kv.block_bytes / memory_bytes_per_s + pieces * empty_s)
