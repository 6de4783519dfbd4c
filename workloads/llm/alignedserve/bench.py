"""Decode a pool of requests really, or simulate it; first show that the tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from saih.core import Check, Clock, Context, Point, Value, Work
from saih.errors import SaihError
from workloads.llm import loader, metrics, peers, stepcost
from workloads.llm.alignedserve import calibrate, simulation, spec
from workloads.llm.alignedserve.predictor import Predictor
from workloads.llm.alignedserve.real import RealMover, label, place_of_stage
from workloads.llm.alignedserve.scheduler import Aligned, stage_blocks
from workloads.llm.alignedserve.state import DecodeState
from workloads.llm.alignedserve.traces import requests_of
from workloads.llm.allocator import BlockAllocator
from workloads.llm.check import check_tokens
from workloads.llm.config import ModelSpec, preset
from workloads.llm.copythread import CopyThread
from workloads.llm.costmodel import Fit
from workloads.llm.costs import CostModel
from workloads.llm.engine import Engine
from workloads.llm.model import Stage
from workloads.llm.pool import HostPool
from workloads.llm.prefill import prefill
from workloads.llm.prepack import prepack
from workloads.llm.request import Request
from workloads.llm.scheduler import refuse_what_cannot_run
from workloads.llm.serve import Iteration
from workloads.llm.worker import Worker

MOST_TOKENS = 4096
"""In a batch of transformers: the default of `generation`."""
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def setup(point: Point, context: Context) -> Decoding | Peer | Simulated:
    """A pool of prompts that are computed, or will be in each step; or nothing, for simulated time."""
    if point.params["time"] == "simulated":
        return Simulated(point)
    return (Peer if point.params["variant"] in spec.PEERS else Decoding)(point, context.device)


def backend(kernel: str, device: str) -> tuple[str, int | None]:
    """(attention backend, splits) of a kernel's name. Raises SaihError where the device has no such kernel."""
    if kernel == "padded":
        return "padded", None
    if device == "cpu":
        if kernel == "split-kv":
            raise SaihError("attention=split-kv needs a GPU, or time=simulated; on a CPU there is padded and ragged")
        return "loop", None
    return "triton", 1 if kernel == "ragged" else None


class Decoding:
    """A step decodes all requests of the pool."""

    def __init__(self, point: Point, device: str) -> None:
        self.params, self.device = point.params, device
        shape, kind = preset(str(point.params["shape"])), device.partition(":")[0]
        attention, splits = backend(str(point.params["attention"]), kind)
        self.stage, self.plain = (
            Stage(shape, attention=kernel, splits=splits, device=device, dtype=DTYPE[kind])
            for kernel in (attention, "padded")
        )
        for each in (self.stage, self.plain):
            loader.random_init(each, point.seed)
        if kind == "cpu":
            prepack(self.stage)
        self.trace = requests_of(point.params, point.seed, shape.vocab)
        blocks, size = spec.kv_blocks(point.params), spec.BLOCK_TOKENS
        refuse_what_cannot_run(self.trace, blocks, size, shape.max_positions)
        self.host_blocks = sum(-(-each.longest_kv_tokens // size) for each in self.trace)
        self.kv = self.stage.new_kv(blocks, size, layout="block_first")
        place = place_of_stage(str(point.params["stage"]), self.stage.device)
        self.staged = self.stage.new_kv(stage_blocks(blocks), size, layout="block_first", device=place)
        self.host = self.stage.new_kv(self.host_blocks, size, layout="block_first", device="cpu", pinned=kind == "cuda")
        self.copies = CopyThread(device=place)
        self.timed_prompts = point.params["prompts"] == "timed"
        if not self.timed_prompts:
            prefill(self.stage, self.trace, self._pool(), self.host, self.kv)
        self.work = work(shape, self.trace, self.timed_prompts)
        self.mixed_share = 0.0

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self._decode()
        return self.work

    def check(self) -> Check:
        """The tokens, and what the kernel's fit and the run itself say."""
        linear, padded = calibrate.fit_kernel(Worker(self.stage, self.kv))
        requests, iterations = self._decode()
        check = check_tokens(
            self.plain,
            [(each.prompt, each.max_new_tokens) for each in self.trace],
            [each.generated for each in requests],
        )
        figures = {name: value for name, value in metrics.summary(requests, iterations).items() if value == value}
        figures["mixed_iteration_share"] = self.mixed_share
        figures["mean_batch"] = sum(each.load.decodes for each in iterations) / len(iterations)
        if not self.timed_prompts:
            figures["predicted_work_per_s"] = self._predict(linear, padded)
        prefetch = self.params["variant"] != "aligned-noprefetch"
        notes = (label(self.staged.arena.device, self.stage.device, prefetch=prefetch),)
        return Check(check.passed, {**check.numbers, **calibrate.numbers(linear), **figures}, check.why, notes)

    def _predict(self, linear: Fit, padded: Fit) -> float:
        """Decode tokens/s on paper, by the fit that suits the kernel."""
        fills_up = self.params["attention"] == "padded"
        predictor = Predictor(
            self.trace,
            (padded if fills_up else linear).model,
            self.kv.blocks * self.kv.block_size,
            spec.MAX_REQUESTS,
            padded=fills_up,
        )
        return predictor.tokens_per_s(self.params["variant"] != "fcfs")

    def close(self) -> None:
        self.copies.close()

    def _pool(self) -> HostPool:
        """All requests in it, always in the same blocks."""
        pool = HostPool(self.host_blocks, spec.BLOCK_TOKENS)
        for request in self.trace:
            pool.enter(request)
        return pool

    def _decode(self) -> tuple[list[Request], list[Iteration]]:
        requests = [
            Request(each.id, each.prompt, each.max_new_tokens, kind=each.kind, computed=len(each.prompt) - 1)
            for each in self.trace
        ]
        pool, blocks = self._pool(), BlockAllocator(self.kv.blocks, self.kv.block_size)
        if self.timed_prompts:
            prefill(self.stage, self.trace, pool, self.host, self.kv)
        for request in requests:
            pool.hold(request.id, request.computed)
        scheduler, index = simulation.scheduler_and_index(self.params, blocks)
        mover = RealMover(pool, self.host, self.staged, self.kv, blocks, self.copies)
        engine = Engine(Worker(self.stage, self.kv), scheduler)
        engine.state = DecodeState(blocks, pool, index, mover, engine.now_s)
        iterations = list(engine.serve(requests))
        if isinstance(scheduler, Aligned):
            self.mixed_share = scheduler.mixed_iterations / len(iterations)
        return requests, iterations


def work(shape: ModelSpec, trace: Sequence[Request], prompts: bool) -> Work:
    """Generated tokens, and the FLOP of decoding them, with those of the prompts or without."""
    contexts = [len(each.prompt) + place for each in trace for place in range(each.max_new_tokens)]
    flop = sum(stepcost.forward_flop(shape, stepcost.Batch.decode([context])) for context in contexts)
    if prompts:
        flop += sum(stepcost.forward_flop(shape, stepcost.Batch.prefill([len(each.prompt)])) for each in trace)
    return Work(float(len(contexts)), float(flop))


class Peer:
    """A step serves the whole trace by the continuous batching of transformers, on the same weights and cache."""

    def __init__(self, point: Point, device: str) -> None:
        shape, kind = preset(str(point.params["shape"])), device.partition(":")[0]
        self.plain = Stage(shape, device=device, dtype=DTYPE[kind])
        loader.random_init(self.plain, point.seed)
        self.trace = requests_of(point.params, point.seed, shape.vocab)
        blocks, size = spec.kv_blocks(point.params), spec.BLOCK_TOKENS
        refuse_what_cannot_run(self.trace, blocks, size, shape.max_positions)
        model = peers.hf_model(shape, loader.state_dict(self.plain), DTYPE[kind], device)
        self.generator = peers.ContinuousBatches(
            model, self.trace, spec.MAX_REQUESTS, MOST_TOKENS, cache_tokens=blocks * size, block_tokens=size
        )
        self.work = work(shape, self.trace, True)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self._generate()
        return self.work

    def check(self) -> Check:
        asked = [(each.prompt, each.max_new_tokens) for each in self.trace]
        return check_tokens(self.plain, asked, self._generate())

    def close(self) -> None:
        self.generator.close()

    def _generate(self) -> list[list[int]]:
        return self.generator.generate([Request(each.id, each.prompt, each.max_new_tokens) for each in self.trace])


@lru_cache(maxsize=256)
def _simulated(items: tuple[tuple[str, Value], ...], seed: int) -> dict[str, float]:
    """Repeats of a point are the same to the last bit: one of them is simulated."""
    return simulation.run(dict(items), seed)


class Simulated:
    """The check is the simulation of the trace. A step is one real decision over a pool with all its requests."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self._restart()

    def _restart(self) -> None:
        params = dict(self.point.params)
        self.instance = simulation.Instance(params, CostModel(), str(params["attention"]))
        self.requests: Sequence[Request] = requests_of(params, self.point.seed)
        for request in self.requests:
            request.computed = len(request.prompt) - 1
            self.instance.state.submit(request)
        self.instance.state.admit()

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        state = self.instance.state
        plan = self.instance.scheduler.next_batch(state)
        if plan is None:
            self._restart()
            return Work(0.0)
        state.launch(plan)
        state.complete(plan, [0] * len(plan.requests), 0.0)
        return Work(float(len(plan.requests)))

    def check(self) -> Check:
        found = _simulated(tuple(sorted(self.point.params.items())), self.point.seed)
        served = found["simulated_requests_served"] + found["simulated_requests_refused"]
        return Check(served == len(self.requests), found, f"{len(self.requests) - served:g} requests were lost")

    def close(self) -> None:
        """Nothing is held outside this object."""
