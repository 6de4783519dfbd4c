"""A whole trace through the decode instance in simulated time, and what came of it, by name. Deterministic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saih.core import Params
from workloads.llm import metrics, stepcost
from workloads.llm.alignedserve import spec
from workloads.llm.alignedserve.predictor import Predictor
from workloads.llm.alignedserve.quadtree import QuadTree
from workloads.llm.alignedserve.scheduler import Aligned, Continuous, DecodeScheduler, stage_blocks
from workloads.llm.alignedserve.simulated import Prefill, SimulatedMover
from workloads.llm.alignedserve.state import DecodeState, Index, Line, Mover
from workloads.llm.alignedserve.traces import requests_of
from workloads.llm.allocator import BlockAllocator
from workloads.llm.config import preset
from workloads.llm.costs import CostModel
from workloads.llm.machines import HOST_BYTES, machine
from workloads.llm.pool import HostPool
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Load, ServerState
from workloads.llm.serve import Iteration, serve
from workloads.llm.simulate import SimulatedExecutor

PREFILL_EFFICIENCY = 0.5
"""Of the data sheet's FLOP/s that a prompt gets. Our choice."""


def scheduler_and_index(params: Params, blocks: BlockAllocator) -> tuple[DecodeScheduler, Index]:
    """What a variant is: the order of the pool, and who takes from it."""
    variant, prefetch = str(params["variant"]), params["variant"] != "aligned-noprefetch"
    if variant.startswith("aligned"):
        return Aligned(spec.MAX_REQUESTS, prefetch, float(params["starvation_s"])), QuadTree(blocks.blocks_for)
    if variant == "fcfs":
        return Continuous(spec.MAX_REQUESTS), Line(lambda request: request.id)
    return Continuous(spec.MAX_REQUESTS), Line(lambda request: len(request.prompt) + request.max_new_tokens)


def seen(load: Load, kernel: str) -> Load:
    """The load as a kernel sees it: the padded one attends to the longest length for everybody."""
    return load._replace(context_tokens=load.decodes * load.longest_tokens) if kernel == "padded" else load


@dataclass
class Timed:
    """A scheduler whose decisions over a full pool are timed on the host: the one thing here that is measured."""

    scheduler: DecodeScheduler
    decision_s: list[float]

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        assert isinstance(state, DecodeState)  # noqa: S101
        full = len(state.pooled) >= spec.POOLED
        begin_s = time.perf_counter()
        plan = self.scheduler.next_batch(state)
        if full:
            self.decision_s.append(time.perf_counter() - begin_s)
        return plan


class Instance:
    """A decode instance in simulated time, with its pool, stage and links."""

    def __init__(self, params: Params, model: CostModel, kernel: str) -> None:
        the, shape = machine(str(params["machine"])), preset(str(params["shape"]))
        self.kernel, self.model = kernel, model
        blocks = BlockAllocator(spec.kv_blocks(params), spec.BLOCK_TOKENS)
        self.scheduler, index = scheduler_and_index(params, blocks)
        self.executor = SimulatedExecutor(self._step_s)
        block_bytes = spec.BLOCK_TOKENS * stepcost.kv_bytes_per_token(shape, spec.WORD["simulated"])
        self.pool = HostPool(int(HOST_BYTES / block_bytes), spec.BLOCK_TOKENS)
        self.mover = SimulatedMover(
            self.pool,
            BlockAllocator(stage_blocks(blocks.blocks), spec.BLOCK_TOKENS),
            block_bytes,
            spec.EFFICIENCY * the.host_bytes_per_s,
            spec.EFFICIENCY * the.peer_bytes_per_s,
            self.executor.now_s,
        )
        mover: Mover = self.mover
        self.state = DecodeState(blocks, self.pool, index, mover, self.executor.now_s)

    def _step_s(self, plan: BatchPlan) -> float:
        return self.model.step_s(seen(plan.load(), self.kernel)) + self.mover.stall_s()


def run(params: Params, seed: int) -> dict[str, float]:
    """Figures of the trace; those of simulated time say so in their names. Times count from a request's arrival."""
    shape, the = preset(str(params["shape"])), machine(str(params["machine"]))
    kernel = str(params["attention"])
    instance = Instance(params, spec.kernel_model(shape, the, kernel), kernel)
    requests = requests_of(params, seed)
    arrival_s = [request.arrival_s for request in requests]
    rate = float(params["rate"])
    tokens_per_s = PREFILL_EFFICIENCY * the.flop_per_s / (2 * stepcost.parameters(shape)) if rate else 0.0
    Prefill(tokens_per_s).run(requests)
    timed = Timed(instance.scheduler, [])
    iterations = list(serve(requests, timed, instance.state, instance.executor))
    for request, came_s in zip(requests, arrival_s, strict=True):
        request.arrival_s = came_s
    figures = _figures(requests, iterations, instance, timed.decision_s)
    return figures if rate else figures | _predicted(str(params["variant"]), requests, instance)


def _predicted(variant: str, requests: Sequence[Request], instance: Instance) -> dict[str, float]:
    """The bounds on paper, where all requests are there at the start. Batches of the oracle are of like length too."""
    blocks, mover = instance.state.blocks, instance.mover
    predictor = Predictor(
        requests,
        instance.model,
        blocks.blocks * blocks.block_size,
        spec.MAX_REQUESTS,
        padded=instance.kernel == "padded",
    )
    rate = mover.stage_bytes_per_s if instance.scheduler.prefetch else mover.link.bytes_per_s
    copies_s = sum(blocks.blocks_for(len(each.prompt)) for each in requests) * mover.block_bytes / rate
    return {
        "predicted_simulated_tokens_per_s": predictor.tokens_per_s(variant != "fcfs", copies_s),
        "predicted_simulated_tpot_p99_s": predictor.tpot_p99_s(variant != "fcfs"),
    }


def _figures(
    requests: Sequence[Request], iterations: Sequence[Iteration], instance: Instance, decision_s: Sequence[float]
) -> dict[str, float]:
    figures = metrics.summary(requests, iterations)
    del figures["mixed_iteration_share"], figures["idle_s"]
    figures["ttft_mean_s"] = float(metrics.ttft_s(requests).mean())
    figures["ttft_max_s"] = float(metrics.ttft_s(requests).max())
    figures["iterations"] = float(len(iterations))
    figures["mean_batch"] = sum(each.load.decodes for each in iterations) / len(iterations)
    scheduler = instance.scheduler
    if isinstance(scheduler, Aligned):
        figures["mixed_iteration_share"] = scheduler.mixed_iterations / len(iterations)
        figures["switches"] = float(scheduler.switches)
    simulated = {f"simulated_{name}": value for name, value in figures.items() if np.isfinite(value)}
    return simulated | ({"host_decision_p95_s": float(np.percentile(decision_s, 95))} if decision_s else {})
