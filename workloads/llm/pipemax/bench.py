"""Decode in turns on one stage of this machine, or simulate the whole; first show that the tokens are right."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from saih.core import Check, Clock, Context, Point, Value, Work
from saih.errors import SaihError
from workloads.llm import loader, stepcost, trace
from workloads.llm.allocator import BlockAllocator
from workloads.llm.check import check_tokens
from workloads.llm.config import preset
from workloads.llm.costmodel import fit
from workloads.llm.kv import EmulatedLink, PagedKV
from workloads.llm.model import Stage
from workloads.llm.pipemax import predictor, simulation, spec
from workloads.llm.pipemax.real import RealDevice, copy_bytes_per_s, link_bytes_per_s
from workloads.llm.pipemax.rotation import Rotation
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.prefill import prefill
from workloads.llm.prepack import prepack
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Load
from workloads.llm.trace_csv import TraceRow
from workloads.llm.worker import Step, Worker

TERMS = ("fixed_s", "per_decode_s", "per_context_token_s")
"""T = alpha b + beta L + delta."""
MEMORY_BYTES = 1 << 26
"""Of the copy that stands for the device's memory."""


def setup(point: Point, context: Context) -> Replay | Simulated:
    """A stage with its arenas and a pool of prompts that are computed; or nothing, for simulated time."""
    print("\n".join(predictor.table(preset("llama-70b"), "llama-70b")), flush=True)
    if point.params["time"] == "simulated":
        return Simulated(point)
    return Replay(point, context.device)


class Replay:
    """A step decodes all requests. This rank is one of S alike stages, with all layers, so that tokens come out."""

    def __init__(self, point: Point, device: str) -> None:
        if device != "cpu":
            raise SaihError("time=emulated runs on a CPU; on a GPU the link is real, which is not built yet")
        self.params = params = point.params
        shape, size = preset(str(params["shape"])), spec.BLOCK_TOKENS
        self.stage, self.plain = Stage(shape, device=device), Stage(shape, device=device)
        for each in (self.stage, self.plain):
            loader.random_init(each, point.seed)
        prepack(self.stage)
        shrink = int(params["shrink"])
        rows = [
            TraceRow(0.0, max(2, row.prompt_tokens // shrink), max(1, row.new_tokens // shrink))
            for row in simulation.rows(params, point.seed)
        ]
        self.trace = trace.to_requests(rows, shape.vocab, point.seed)
        layout = str(params["layout"])
        self.host_blocks = sum(-(-each.longest_kv_tokens // size) for each in self.trace)
        self.kv = self.stage.new_kv(int(params["kv_tokens"]) // size, size, layout=layout)
        self.host = self.stage.new_kv(self.host_blocks, size, layout=layout)
        self.worker = Worker(self.stage, self.kv)
        prefill(self.stage, self.trace, self._pool(), self.host, self.kv)
        self.memory_bytes_per_s = _memory_bytes_per_s()
        self.link = EmulatedLink(float(params["emulated_link"]) * self.memory_bytes_per_s)
        self.rate = link_bytes_per_s(self.kv, self.host, self.link)
        fitted = fit(*_samples(self.worker), TERMS)
        self.model, self.fit_errors = fitted.model, (fitted.median_error, fitted.worst_error)
        contexts = [len(each.prompt) + place for each in self.trace for place in range(each.max_new_tokens)]
        flop = sum(stepcost.forward_flop(shape, stepcost.Batch.decode([context])) for context in contexts)
        self.work = Work(float(len(contexts)), float(flop))

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self._decode()
        return self.work

    def check(self) -> Check:
        """The tokens, by the full forward pass; and what the turns, the estimator and the layout say."""
        foreseen = self._predict()
        print(
            f"predicted here: moved {foreseen.moved_share:.2f}, batch {foreseen.batch:.2f}x, gain {foreseen.gain:.2f}x"
        )
        rotation, requests = self._decode()
        check = check_tokens(
            self.plain,
            [(each.prompt, each.max_new_tokens) for each in self.trace],
            [each.generated for each in requests],
        )
        numbers = simulation.figures(rotation) | {
            "preemptions": float(sum(each.preemptions for each in requests)),
            "fit_median_error": self.fit_errors[0],
            "fit_worst_error": self.fit_errors[1],
            "emulated_link_bytes_per_s": self.link.bytes_per_s,
            "emulated_link_bytes_per_s_measured": self.rate,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "predicted_gain": foreseen.gain,
            "predicted_batch": foreseen.batch,
            "copy_bytes_per_s": copy_bytes_per_s(*self._layout_arenas()),
        }
        return Check(check.passed, {**check.numbers, **numbers}, check.why)

    def close(self) -> None:
        """Threads end with each step."""

    def _predict(self) -> predictor.Prediction:
        """Bytes of weights as good as the fixed time of a step: on a CPU that is more than reading them."""
        rate = self.kv.block_bytes / self.kv.block_size / max(self.model.per_context_token_s, 1e-12)
        weights = self.model.fixed_s * rate
        return predictor.predict(
            float(self.kv.arena.nbytes), weights, int(self.params["stages"]), self.link.bytes_per_s / rate
        )

    def _layout_arenas(self) -> tuple[PagedKV, PagedKV]:
        """Of a model whose layers are many and whose blocks are small, as on GPUs; out of the caches."""
        made = [
            PagedKV(32, 2, 32, blocks=256, block_size=4, layout=str(self.params["layout"]), dtype=torch.float32)
            for _ in range(2)
        ]
        return made[0], made[1]

    def _pool(self) -> HostPool:
        """All requests in it, always in the same blocks."""
        pool = HostPool(self.host_blocks, spec.BLOCK_TOKENS)
        for request in self.trace:
            pool.enter(request)
        return pool

    def _decode(self) -> tuple[Rotation, list[Request]]:
        requests = [Request(each.id, each.prompt, each.max_new_tokens, kind=each.kind) for each in self.trace]
        pool = self._pool()
        simulation.prefilled(requests, pool)
        state = PooledState(BlockAllocator(self.kv.blocks, self.kv.block_size), pool)
        device = RealDevice(state, self.worker, self.host, self.link, self.rate, str(self.params["order"]))
        policy = simulation.policy(str(self.params["variant"]), int(self.params["stages"]))
        rotation = Rotation(state, policy, device, self.model, self.kv.block_bytes)
        try:
            rotation.serve(requests)
        finally:
            device.close()
        refused = next((request.refusal for request in requests if request.refusal), "")
        if refused:
            raise SaihError(refused)
        return rotation, requests


def _memory_bytes_per_s() -> float:
    """Best of several copies of MEMORY_BYTES; bytes copied, not read and written."""
    source, target = torch.zeros(MEMORY_BYTES, dtype=torch.uint8), torch.empty(MEMORY_BYTES, dtype=torch.uint8)
    best_s = float("inf")
    for _ in range(5):
        begin_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return MEMORY_BYTES / best_s


def _samples(worker: Worker, repeats: int = 3) -> tuple[list[Load], list[float]]:
    """Decode steps of many sizes, and the fastest of each: the offline sweep of the paper."""
    loads, step_s = [], []
    room = worker.kv.blocks * worker.kv.block_size
    for count in (1, 2, 4, 6, 8, 12, 16):
        for length in (16, 64, 128, 256):
            if count * (length + worker.kv.block_size) > room:
                continue
            blocks = BlockAllocator(worker.kv.blocks, worker.kv.block_size)
            requests = [Request(number, [1] * length, 1, computed=length - 1) for number in range(count)]
            for request in requests:
                blocks.grow(request.id, length)
            plan = BatchPlan(requests, [1] * count)
            step = Step.of(plan, blocks)
            times_s = []
            for _ in range(repeats):
                begin_s = time.perf_counter()
                worker.run(step)
                times_s.append(time.perf_counter() - begin_s)
            loads.append(plan.load())
            step_s.append(min(times_s))
    return loads, step_s


@lru_cache(maxsize=256)
def _simulated(items: tuple[tuple[str, Value], ...], seed: int) -> dict[str, float]:
    """Repeats of a point are the same to the last bit: one of them is simulated."""
    return simulation.run(dict(items), seed)


class Simulated:
    """The check is the simulation of the trace. A step is the prediction on paper."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        stage = spec.stage(self.point.params)
        predictor.predict(stage.kv_blocks * spec.BLOCK_TOKENS * stage.kv_bytes_per_token, stage.weight_bytes, 8, 0.03)
        return Work(1.0)

    def check(self) -> Check:
        return Check(True, _simulated(tuple(sorted(self.point.params.items())), self.point.seed))

    def close(self) -> None:
        """Nothing is held outside this object."""
