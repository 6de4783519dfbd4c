"""Decode in turns on one stage of this machine, or simulate the whole; first show that the tokens are right."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch

from saih.core import Check, Clock, Context, Point, Value, Work
from saih.errors import SaihError
from workloads.llm import loader, stepcost, trace
from workloads.llm.allocator import BlockAllocator
from workloads.llm.calibrate import decode_samples
from workloads.llm.check import check_tokens
from workloads.llm.config import preset
from workloads.llm.copythread import CopyThread
from workloads.llm.costmodel import fit
from workloads.llm.kv import EmulatedLink, PagedKV
from workloads.llm.model import Stage
from workloads.llm.pipemax import predictor, simulation, spec
from workloads.llm.pipemax.expected import StageModel, expect
from workloads.llm.pipemax.real import (
    CHUNK_BYTES,
    RealDevice,
    copy_bytes_per_s,
    link_bytes_per_s,
    predicted_copy_bytes_per_s,
)
from workloads.llm.pipemax.rotation import Rotation, Turn
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.prefill import compute, prefill
from workloads.llm.prepack import prepack
from workloads.llm.request import Request
from workloads.llm.scheduler import refuse_what_cannot_run
from workloads.llm.trace_csv import TraceRow
from workloads.llm.transfer import Urgency
from workloads.llm.worker import Worker

TERMS = ("fixed_s", "per_decode_s", "per_context_token_s")
"""T = alpha b + beta L + delta."""
MANY_TIMES = 200
"""Over the cache: more than is copied while steps are calibrated."""
REPEATS = 7
"""Of each step that is calibrated."""
REPLAYED = 32
"""Batches of a run that the estimator is judged by."""
PIECES = {"copy_bytes_per_s": (16, 8, 128), "copy_2kb_bytes_per_s": (4, 4, 32)}
"""(tokens, heads, their size) of a layer's piece of a block: 64 KB, as of llama-70b on a GPU, and 2 KB."""
COPIED_LAYERS = 32
MEMORY_BYTES = 1 << 26
"""Of the copy that stands for the device's memory, and of each arena that layouts are compared in."""


def setup(point: Point, context: Context) -> Replay | Simulated:
    """A stage with its arenas and a pool of prompts that are computed; or nothing, for simulated time."""
    print("\n".join(predictor.table()), flush=True)
    if point.params["time"] == "simulated":
        return Simulated(point)
    return Replay(point, context.device)


class Replay:
    """A step serves all requests, prompts too. This rank is one of S alike stages, with all layers, so that tokens come
    out."""

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
        simulation.prefilled(self.trace)
        layout = str(params["layout"])
        self.host_blocks = sum(-(-each.longest_kv_tokens // size) for each in self.trace)
        self.kv = self.stage.new_kv(int(params["kv_tokens"]) // size, size, layout=layout)
        self.host = self.stage.new_kv(self.host_blocks, size, layout=layout)
        refuse_what_cannot_run(self.trace, self.kv.blocks, size, shape.max_positions)
        self.worker = Worker(self.stage, self.kv)
        self.policy = simulation.policy(str(params["variant"]), int(params["stages"]))
        self.memory_bytes_per_s = _memory_bytes_per_s()
        self.link = EmulatedLink(float(params["emulated_link"]) * self.memory_bytes_per_s)
        self.rate = link_bytes_per_s(self.kv, self.host, self.link)
        with self._copies_beside():
            loads, step_s = decode_samples(self.worker, SWEEP, REPEATS)
        fitted = fit(loads, step_s, TERMS)
        self.model, self.fit_errors = fitted.model, (fitted.median_error, fitted.worst_error)
        self.prefill_s_per_token = _prefill_s_per_token(self.stage, self.trace, self.kv)
        contexts = [len(each.prompt) + place for each in self.trace for place in range(each.max_new_tokens)]
        flop = sum(stepcost.forward_flop(shape, stepcost.Batch.decode([context])) for context in contexts)
        self.work = Work(float(len(contexts)), float(flop))

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self._decode()
        return self.work

    def check(self) -> Check:
        """The tokens, by the full forward pass; and what the turns, the estimator and the layout say."""
        per_token = self.kv.block_bytes / self.kv.block_size
        room = float(self.kv.blocks * self.kv.block_size)
        on_paper = StageModel(room, self.model, self.prefill_s_per_token, self.rate / per_token)
        expected = expect(self.trace, on_paper, self.policy)
        print(
            f"{self.params['variant']}, predicted here: moved {expected.moved_share:.2f}, "
            f"batch {expected.batch:.2f} requests, {expected.tokens_per_s:.0f} tokens/s"
        )
        rotation, requests = self._decode()
        errors = self._estimator_errors(rotation.turns)
        check = check_tokens(
            self.plain,
            [(each.prompt, each.max_new_tokens) for each in self.trace],
            [each.generated for each in requests],
        )
        numbers = simulation.figures(rotation) | {
            "preemptions": float(sum(each.preemptions for each in requests)),
            "fit_median_error": self.fit_errors[0],
            "fit_worst_error": self.fit_errors[1],
            "estimator_median_error": errors[len(errors) // 2],
            "estimator_worst_error": errors[-1],
            "emulated_link_bytes_per_s": self.link.bytes_per_s,
            "emulated_link_bytes_per_s_measured": self.rate,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "predicted_moved_share": expected.moved_share,
            "predicted_work_per_s": expected.tokens_per_s,
            "predicted_mean_batch": expected.batch,
        }
        return Check(check.passed, {**check.numbers, **numbers, **self._layout_copies()}, check.why)

    def close(self) -> None:
        """Threads end with each step."""

    def _copies_beside(self) -> AbstractContextManager[None]:
        """What runs beside the steps of a trace; the device's arena is lost."""
        return _links_busy(self.kv, self.host, self.link) if self.policy.offload else nullcontext()

    def _estimator_errors(self, turns: Sequence[Turn]) -> list[float]:
        """|predicted / measured - 1| of batches the run had, in order; each again, and the median of its times counts.

        A single turn is late for whatever else the machine does, which no estimator of b and L can know.
        """
        decoding = [turn.lengths for turn in turns if min(turn.lengths) > 1]
        some = decoding[:: -(-len(decoding) // REPLAYED)]
        with self._copies_beside():
            loads, step_s = decode_samples(self.worker, some, REPEATS)
        return sorted(abs(self.model.step_s(load) / took_s - 1) for load, took_s in zip(loads, step_s, strict=True))

    def _layout_copies(self) -> dict[str, float]:
        """Copies of scattered blocks of a model of 32 layers, measured and on paper; arenas are out of the caches."""
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
                    layout=str(self.params["layout"]),
                    dtype=torch.float16,
                )
                for _ in range(2)
            )
            found[name] = copy_bytes_per_s(target, source)
            found[f"predicted_{name}"] = predicted_copy_bytes_per_s(target, source, self.memory_bytes_per_s)
        return found

    def _pool(self) -> HostPool:
        """All requests in it, always in the same blocks."""
        pool = HostPool(self.host_blocks, spec.BLOCK_TOKENS)
        for request in self.trace:
            pool.enter(request)
        return pool

    def _decode(self) -> tuple[Rotation, list[Request]]:
        requests = [
            Request(each.id, each.prompt, each.max_new_tokens, kind=each.kind, computed=each.computed)
            for each in self.trace
        ]
        pool = self._pool()
        state = PooledState(BlockAllocator(self.kv.blocks, self.kv.block_size), pool)
        device = RealDevice(state, self.worker, self.host, self.link, self.rate, str(self.params["order"]))
        rotation = Rotation(state, self.policy, device, self.model, self.kv.block_bytes)
        try:
            if self.policy.offload:
                device.prefill(requests)
            elif self.policy.phases:
                prefill(self.stage, requests, pool, self.host, self.kv)
            rotation.serve(requests)
        finally:
            device.close()
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


@contextmanager
def _links_busy(kv: PagedKV, host: PagedKV, link: EmulatedLink) -> Iterator[None]:
    """Copies both ways meanwhile, as they run beside the steps of a trace; what the arenas held is lost."""
    blocks = range(min(kv.blocks, host.blocks))
    pairs = [(block, block) for block in blocks] * MANY_TIMES
    inward, outward = (CopyThread(link, chunk_bytes=CHUNK_BYTES) for _ in range(2))
    coming = inward.submit(Urgency.PREFETCH, host, kv, pairs)
    going = outward.submit(Urgency.OFFLOAD, kv, host, pairs)
    try:
        yield
    finally:
        inward.drop(coming)
        outward.drop(going)
        inward.close()
        outward.close()


SWEEP = [
    *([length] * count for count in (1, 2, 3, 4, 6, 8, 12) for length in (16, 48, 96, 160, 256)),
    *([16, 160] * pairs for pairs in (1, 2, 3, 4)),
    *([32, 64, 256] * triples for triples in (1, 2)),
]
"""Lengths of the requests of each batch that the estimator is fitted to: few and many, alike and mixed."""


def _prefill_s_per_token(stage: Stage, requests: Sequence[Request], kv: PagedKV, prompts: int = 8) -> float:
    """Of the first prompts of the trace, one at a time; the faster of two times each."""
    tokens, took_s = 0, 0.0
    for request in requests[:prompts]:
        blocks = BlockAllocator(kv.blocks, kv.block_size)
        blocks.grow(request.id, len(request.prompt))
        times_s = []
        for _ in range(2):
            begin_s = time.perf_counter()
            tokens += compute(stage, request, kv, blocks.table(request.id))
            times_s.append(time.perf_counter() - begin_s)
        took_s += 2 * min(times_s)
    return took_s / max(1, tokens)


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
        simulation.predicted_gain(self.point.params)
        return Work(1.0)

    def check(self) -> Check:
        return Check(True, _simulated(tuple(sorted(self.point.params.items())), self.point.seed))

    def close(self) -> None:
        """Nothing is held outside this object."""
