"""What one token of the longest request costs all others: decode steps of many shapes, timed, and a model fitted."""

from __future__ import annotations

import time

import torch

from workloads.llm.allocator import BlockAllocator
from workloads.llm.costmodel import TERMS, Fit, fit
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Load
from workloads.llm.worker import Step, Worker

DECODE_TERMS = tuple(term for term in TERMS if term != "per_prefill_token_s")
PADDED_TERMS = tuple(term for term in DECODE_TERMS if term != "per_longest_token_s")
REPEATS = 3


def samples(worker: Worker) -> tuple[list[Load], list[float]]:
    """Decode steps over this worker's cache, whatever lies in it; the fastest of REPEATS of each shape counts."""
    loads, step_s = [], []
    for lengths in _shapes(worker.kv.blocks * worker.kv.block_size):
        plan, step = _step(lengths, worker)
        loads.append(plan.load())
        step_s.append(min(_seconds(worker, step) for _ in range(REPEATS)))
    return loads, step_s


def fit_kernel(worker: Worker) -> tuple[Fit, Fit]:
    """T = a b + c sum + g max + d, and T = a b + c b max + d, which is what a padded kernel does."""
    loads, step_s = samples(worker)
    padded = [load._replace(context_tokens=load.decodes * load.longest_tokens) for load in loads]
    return fit(loads, step_s, DECODE_TERMS), fit(padded, step_s, PADDED_TERMS)


def _shapes(room: int) -> list[list[int]]:
    """Requests' lengths: few and many, alike and with one or four long ones among them, within the cache."""
    found = []
    for short in (32, 128, 512):
        for long in (short, 256, 1024, 4096):
            found += [[long] * longs + [short] * (count - longs) for count in (4, 8, 16, 32, 64) for longs in (1, 4)]
    return [lengths for lengths in found if sum(lengths) + 32 * len(lengths) <= room]


def _step(lengths: list[int], worker: Worker) -> tuple[BatchPlan, Step]:
    blocks = BlockAllocator(worker.kv.blocks, worker.kv.block_size)
    requests = [Request(number, [1] * length, 1, computed=length - 1) for number, length in enumerate(lengths)]
    for request in requests:
        blocks.grow(request.id, request.context_tokens)
    plan = BatchPlan(requests, [1] * len(requests))
    return plan, Step.of(plan, blocks)


def _seconds(worker: Worker, step: Step) -> float:
    begin_s = time.perf_counter()
    worker.run(step)
    if worker.kv.arena.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def numbers(fitted: Fit) -> dict[str, float]:
    """The model as numbers of a check, microseconds each, and how far it is off."""
    model: dict[str, float] = {
        "fit_fixed_us": fitted.model.fixed_s,
        "fit_a_us_per_request": fitted.model.per_decode_s,
        "fit_c_us_per_token": fitted.model.per_context_token_s,
        "fit_g_us_per_longest_token": fitted.model.per_longest_token_s,
    }
    return {name: 1e6 * seconds for name, seconds in model.items()} | {
        "fit_median_error": fitted.median_error,
        "fit_worst_error": fitted.worst_error,
    }
