"""Decode steps of chosen shapes, timed on this machine: what cost models are fitted to and judged by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.kv import PagedKV
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Load
from workloads.llm.worker import Step


class Runs(Protocol):
    """What takes steps: a worker, or all stages one after the other."""

    @property
    def kv(self) -> PagedKV: ...

    def run(self, step: Step) -> object:
        """Returns when the step has run; on a GPU, when it is on its way."""


def decode_samples(worker: Runs, shapes: Sequence[Sequence[int]], repeats: int) -> tuple[list[Load], list[float]]:
    """Decode steps of requests that attend to these lengths, where the cache holds them, and the median time of each.

    Whatever lies in the cache is used and overwritten. The sweeps over all shapes are one after the other, so that what
    disturbs for a while disturbs one of each; a first one is not counted. Each has an order of its own, drawn: behind a
    like one a step is faster by some per cent than behind an unlike one, and those of a trace are unlike.
    """
    steps = [_step(lengths, worker) for lengths in shapes if _blocks(lengths, worker) <= worker.kv.blocks]
    rng, times_s = np.random.default_rng(0), np.zeros((repeats + 1, len(steps)))
    for sweep_s in times_s:
        for place in rng.permutation(len(steps)):
            sweep_s[place] = _seconds(worker, steps[place][1])
    return [load for load, _ in steps], np.median(times_s[1:], axis=0).tolist()


def _blocks(lengths: Sequence[int], worker: Runs) -> int:
    return sum(-(-length // worker.kv.block_size) for length in lengths)


def _step(lengths: Sequence[int], worker: Runs) -> tuple[Load, Step]:
    blocks = BlockAllocator(worker.kv.blocks, worker.kv.block_size)
    requests = [Request(number, [1] * length, 1, computed=length - 1) for number, length in enumerate(lengths)]
    for request in requests:
        blocks.grow(request.id, request.context_tokens)
    plan = BatchPlan(requests, [1] * len(requests))
    return plan.load(), Step.of(plan, blocks)


def _seconds(worker: Runs, step: Step) -> float:
    begin_s = time.perf_counter()
    worker.run(step)
    if worker.kv.arena.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s
