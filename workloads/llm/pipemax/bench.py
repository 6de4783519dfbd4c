"""Decode in turns on the stages of this machine, or simulate the whole; first show that the tokens are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as dist

from saih.core import Check, Clock, Context, Params, Point, Value, Work
from workloads.llm import loader, prefill, stepcost, trace
from workloads.llm.allocator import BlockAllocator
from workloads.llm.calibrate import decode_samples
from workloads.llm.check import check_tokens
from workloads.llm.costmodel import Fit, fit
from workloads.llm.costs import CostModel
from workloads.llm.kv import EmulatedLink
from workloads.llm.model import Stage
from workloads.llm.pipemax import measure, predictor, simulation, spec
from workloads.llm.pipemax.activations import Activations
from workloads.llm.pipemax.arenas import Arenas
from workloads.llm.pipemax.expected import Expected, StageModel, expect
from workloads.llm.pipemax.real import OneByOne, RealDevice, follow, send
from workloads.llm.pipemax.rotation import Rotation, Turn
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.prepack import prepack
from workloads.llm.request import Request
from workloads.llm.scheduler import Load, refuse_what_cannot_run
from workloads.llm.shard import Mesh
from workloads.llm.trace_csv import TraceRow
from workloads.llm.worker import STOP, Worker

T = TypeVar("T")

TERMS = ("fixed_s", "per_decode_s", "per_context_token_s")
"""T = alpha b + beta L + delta."""
REPEATS = 15
"""Of each step that is calibrated."""
REPLAYED = 32
"""Batches of a run that the estimator is judged by."""
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SWEEP = [
    *([length] * count for count in (1, 2, 3, 4, 6, 8, 12) for length in (16, 48, 96, 160, 256)),
    *([16, 160] * pairs for pairs in (1, 2, 3, 4)),
    *([32, 64, 256] * triples for triples in (1, 2)),
]
"""Lengths of the requests of each batch that the estimator is fitted to: few and many, alike and mixed."""


def setup(point: Point, context: Context) -> Turns | Simulated:
    """A stage with its arenas, and on the first rank a pool of prompts; or nothing, for simulated time."""
    print("\n".join(predictor.table()), flush=True)
    if point.params["time"] == "simulated":
        return Simulated(point)
    return Turns(point, context.device)


class Turns:
    """A step serves all requests, prompts too.

    Alone, this rank is one of S alike stages and has all layers, so that tokens come out. Else each rank is a stage,
    with its layers, its arenas and its link, and does what the first one decides.
    """

    def __init__(self, point: Point, device: str) -> None:
        self.params = params = point.params
        self.place, self.kind = device, device.partition(":")[0]
        shape, size = spec.model(params), spec.BLOCK_TOKENS
        self.mesh = Mesh.make(1, int(params["nodes"]) * int(params["gpus"]))
        self.first = self.mesh.pp_rank == 0
        self.stage = Stage(shape, self.mesh, device=device, dtype=DTYPE[self.kind])
        loader.random_init(self.stage, point.seed)
        self.plain = self._plain(point.seed)
        if self.kind == "cpu":
            prepack(self.stage)
        self.trace = _trace(params, shape.vocab, point.seed)
        self.host_blocks = sum(-(-each.longest_kv_tokens // size) for each in self.trace)
        layout = str(params["layout"])
        self.kv = self.stage.new_kv(int(params["kv_tokens"]) // size, size, layout=layout)
        self.host = self.stage.new_kv(self.host_blocks, size, layout=layout, device="cpu", pinned=self.kind == "cuda")
        refuse_what_cannot_run(self.trace, self.kv.blocks, size, shape.max_positions)
        self.worker = Worker(self.stage, self.kv)
        most_rows = max(prefill.MOST_TOKENS, *(len(each.prompt) for each in self.trace))
        self.activations = Activations(self.stage, most_rows) if self.mesh.pp == 1 else None
        self.policy = simulation.policy(str(params["variant"]), int(params["stages"]))
        self.memory_bytes_per_s = self._agreed(measure.memory_bytes_per_s(device, device))
        self.raw_bytes_per_s = self._agreed(measure.memory_bytes_per_s(device, "cpu"))
        emulated = params["time"] == "emulated"
        self.link = EmulatedLink(float(params["emulated_link"]) * self.memory_bytes_per_s) if emulated else None
        self.rate = self._agreed(measure.link_bytes_per_s(self.kv, self.host, self.link, self.raw_bytes_per_s))
        fitted = self._led(self._calibrate, self._copies_beside())
        self.fitted = fitted or Fit(CostModel(0.0), 0.0, 0.0)
        self.prefill_s_per_token = self._led(self._prefill_s_per_token) or 0.0
        contexts = [len(each.prompt) + place for each in self.trace for place in range(each.max_new_tokens)]
        flop = sum(stepcost.forward_flop(shape, stepcost.Batch.decode([context])) for context in contexts)
        self.work = Work(len(contexts) / self.mesh.pp, flop / self.mesh.pp)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self._decode()
        return self.work

    def check(self) -> Check:
        """The tokens, by the full forward pass; and what the turns, the estimator and the layout say."""
        expected = self._expected() if self.first else None
        decoded = self._decode()
        turns = decoded[0].turns if decoded else []
        estimator: dict[str, float] | None = {}
        if self.policy.offload:  # else it decides nothing
            estimator = self._led(lambda: self._estimator(turns), self._copies_beside())
        if decoded is None or estimator is None or expected is None or self.plain is None:
            return Check(True, {}, "tokens are checked on the first rank")
        rotation, requests = decoded
        check = check_tokens(
            self.plain,
            [(each.prompt, each.max_new_tokens) for each in self.trace],
            [each.generated for each in requests],
        )
        numbers = simulation.figures(rotation) | {
            "stages_here": float(self.mesh.pp),
            "preemptions": float(sum(each.preemptions for each in requests)),
            "fit_median_error": self.fitted.median_error,
            "fit_worst_error": self.fitted.worst_error,
            "link_emulated": float(self.link is not None),
            "link_bytes_per_s": self.link.bytes_per_s if self.link else self.raw_bytes_per_s,
            "link_bytes_per_s_measured": self.rate,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "predicted_moved_share": expected.moved_share,
            "predicted_work_per_s": expected.tokens_per_s,
            "predicted_mean_batch": expected.batch,
        }
        copies = measure.layout_copies(str(self.params["layout"]), self.place, self.raw_bytes_per_s)
        return Check(check.passed, {**check.numbers, **numbers, **estimator, **copies}, check.why, (self._label(),))

    def close(self) -> None:
        """Threads end with each step."""

    def _label(self) -> str:
        link = "an emulated link" if self.link else "PCIe" if self.kind == "cuda" else "copies in memory"
        if self.mesh.pp > 1:
            return f"a pipeline of {self.mesh.pp} stages, each with {link}"
        return f"a replay of one of {self.params['stages']} alike stages over {link}"

    def _plain(self, seed: int) -> Stage | None:
        """The whole model, on the first rank. One that nothing was laid out anew for is its own."""
        if not self.first or (self.kind != "cpu" and self.mesh.pp == 1):
            return self.stage if self.first else None
        plain = Stage(self.stage.spec, device=self.stage.device, dtype=self.stage.dtype)
        loader.random_init(plain, seed)
        return plain

    def _agreed(self, measured: float) -> float:
        """What the first rank has measured."""
        if self.mesh.pp == 1:
            return measured
        found = torch.tensor([measured], dtype=torch.float64, device=self.place)
        dist.broadcast(found, 0)
        return float(found)

    def _led(self, work: Callable[[], T], beside: AbstractContextManager[None] | None = None) -> T | None:
        """On the first rank, `work`, whose steps the others take with it; they have nothing to tell."""
        with beside or nullcontext():
            if self.first:
                found = work()
                send(self.worker, [], STOP)
                return found
            with self._arenas() as arenas:
                follow(self.worker, arenas)
        return None

    def _copies_beside(self) -> AbstractContextManager[None]:
        """What runs beside the steps of a trace; the device's arena is lost."""
        if not self.policy.offload:
            return nullcontext()
        return measure.links_busy(self.kv, self.host, self.link, self.raw_bytes_per_s)

    def _arenas(self) -> Arenas:
        return Arenas(self.kv, self.host, self.link, str(self.params["order"]), self.raw_bytes_per_s)

    def _calibrate(self) -> Fit:
        loads, step_s = self._stage_samples(SWEEP)
        return fit(loads, step_s, TERMS)

    def _stage_samples(self, shapes: Sequence[Sequence[int]]) -> tuple[list[Load], list[float]]:
        """Decode steps and the time that each stage takes for them."""
        loads, all_s = decode_samples(OneByOne(self.worker), shapes, REPEATS)
        return loads, [each / self.mesh.pp for each in all_s]

    def _prefill_s_per_token(self) -> float:
        return measure.prefill_s_per_token(OneByOne(self.worker), self.trace) / self.mesh.pp

    def _expected(self) -> Expected:
        """On paper, printed before the run."""
        per_token = self.kv.block_bytes / self.kv.block_size
        room = float(self.kv.blocks * self.kv.block_size)
        stage = StageModel(room, self.fitted.model, self.prefill_s_per_token, self.rate / per_token)
        expected = expect(self.trace, stage, self.policy)
        print(
            f"{self.params['variant']}, predicted here: moved {expected.moved_share:.2f}, "
            f"batch {expected.batch:.2f} requests, {expected.tokens_per_s:.0f} tokens/s",
            flush=True,
        )
        return expected

    def _estimator(self, turns: Sequence[Turn]) -> dict[str, float]:
        """|predicted / measured - 1| of batches the run had: each again, and the median of its times counts.

        A single turn is late for whatever else the machine does, which no estimator of b and L can know. The sweep is
        run again in turn with these batches, so that both have the machine of the same minute: `estimator_*` are of
        its fit, `stale_*` of the one that the run was decided by, minutes before.
        """
        decoding = [turn.lengths for turn in turns if min(turn.lengths) > 1]
        shapes = [*SWEEP, *decoding[:: -(-len(decoding) // REPLAYED)]]
        loads, step_s = self._stage_samples(shapes)
        swept = len(loads) - len(shapes) + len(SWEEP)  # of the sweep, what the cache has room for
        fitted = fit(loads[:swept], step_s[:swept], TERMS)
        found: dict[str, float] = {}
        for name, model in (("estimator", fitted.model), ("stale_estimator", self.fitted.model)):
            pairs = zip(loads[swept:], step_s[swept:], strict=True)
            errors = sorted(abs(model.step_s(load) / took_s - 1) for load, took_s in pairs)
            found |= {f"{name}_median_error": errors[len(errors) // 2], f"{name}_worst_error": errors[-1]}
        return found

    def _pool(self) -> HostPool:
        """All requests in it, always in the same blocks."""
        pool = HostPool(self.host_blocks, spec.BLOCK_TOKENS)
        for request in self.trace:
            pool.enter(request)
        return pool

    def _decode(self) -> tuple[Rotation, list[Request]] | None:
        return self._led(self._serve)

    def _serve(self) -> tuple[Rotation, list[Request]]:
        requests = [
            Request(each.id, each.prompt, each.max_new_tokens, kind=each.kind, computed=each.computed)
            for each in self.trace
        ]
        state = PooledState(BlockAllocator(self.kv.blocks, self.kv.block_size), self._pool())
        with self._arenas() as arenas:
            device = RealDevice(state, self.worker, arenas, self.rate, self.activations)
            rotation = Rotation(state, self.policy, device, self.fitted.model, self.kv.block_bytes)
            if self.policy.phases:
                device.prefill(requests, over_link=self.policy.offload)
            rotation.serve(requests)
        return rotation, requests


def _trace(params: Params, vocabulary: int, seed: int) -> list[Request]:
    """Lengths of the data set, divided; all but the last token of a prompt will be computed before its first step."""
    shrink = int(params["shrink"])
    rows = [
        TraceRow(0.0, max(2, row.prompt_tokens // shrink), max(1, row.new_tokens // shrink))
        for row in simulation.rows(params, seed)
    ]
    found = trace.to_requests(rows, vocabulary, seed)
    simulation.prefilled(found)
    return found


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
