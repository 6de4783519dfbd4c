"""Generate text by the engine of the core or by a peer; first show that the tokens are the most likely ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from saih.core import Check, Clock, Context, Params, Point, Work
from saih.errors import SaihError
from workloads.llm import loader, metrics, peers, stepcost
from workloads.llm.attention import AttnMeta
from workloads.llm.check import TOLERANCE, check_tokens, logit_gaps
from workloads.llm.engine import Engine
from workloads.llm.generation import spec
from workloads.llm.model import Stage
from workloads.llm.prepack import prepack
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan
from workloads.llm.serve import Iteration
from workloads.llm.trace import to_requests
from workloads.llm.worker import Step, Worker

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def setup(point: Point, context: Context) -> Serving | OneStep:
    """The model, and around it the engine that the point names."""
    requests = to_requests(spec.rows(point.params, point.seed), spec.model(point.params).vocab, point.seed)
    if point.params["task"] != "serve":
        return OneStep(point, context.device, requests)
    return Serving(point, context.device, requests)


def stage_of(point: Point, device: str) -> Stage:
    """The whole model with the weights of the point."""
    stage = Stage(spec.model(point.params), device=device, dtype=DTYPE[str(point.params["precision"])])
    if point.params["checkpoint"]:
        loader.load(stage, str(point.params["checkpoint"]))
    else:
        loader.random_init(stage, point.seed)
    return stage


class OurEngine:
    """The engine of the core."""

    def __init__(self, point: Point, device: str, requests: Sequence[Request]) -> None:
        params, trace = point.params, spec.rows(point.params, point.seed)
        size = spec.block_size(params, trace, device)
        stage = stage_of(point, device)
        if device == "cpu" and params["matrices"] == "prepacked":
            prepack(stage)
        self.iterations: list[Iteration] = []
        self.engine = Engine(
            Worker(stage, stage.new_kv(spec.blocks(params, trace, size), size)), spec.scheduler(params)
        )

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        self.iterations = list(self.engine.serve(requests))
        refused = next((request.refusal for request in requests if request.refusal), "")
        if refused:
            raise SaihError(refused)
        return [request.generated for request in requests]

    def ablate(self, part: str) -> None:
        """The model is not run: every logit is zero. Scheduling, batching and choosing tokens are what is left."""
        _without_model(self.engine.worker)

    def figures(self, requests: Sequence[Request]) -> dict[str, float]:
        """What users felt (TTFT, TPOT) and what the device did, of these requests, the last that were served."""
        found = metrics.summary(requests, self.iterations)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def close(self) -> None:
        """Nothing runs beside."""


def _without_model(worker: Worker) -> None:
    stage = worker.stage

    def zeros(x: torch.Tensor, meta: AttnMeta, kv: object, rows_R: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows_R), stage.spec.vocab, dtype=stage.dtype, device=stage.device)

    stage.forward = zeros  # type: ignore[method-assign, assignment]


def _generator(point: Point, device: str, requests: Sequence[Request]) -> peers.Generator:
    params, engine = point.params, str(point.params["engine"])
    if engine == "saih":
        return OurEngine(point, device, requests)
    if params["checkpoint"]:
        model = peers.hf_checkpoint(str(params["checkpoint"]), DTYPE[str(params["precision"])], device)
    else:
        stage = stage_of(point, device)
        model = peers.hf_model(stage.spec, loader.state_dict(stage), stage.dtype, device)
    most = int(params["max_requests"]), int(params["max_tokens"])
    return peers.peer(engine, model, requests, str(params["batching"]), *most)


class Serving:
    """A step serves the whole trace."""

    def __init__(self, point: Point, device: str, requests: Sequence[Request]) -> None:
        self.point, self.device, self.trace = point, device, requests
        self.work = _work(point.params, point.seed)
        self.generator = _generator(point, device, requests)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self.generator.generate(_fresh(self.trace))
        return self.work

    def check(self) -> Check:
        """Every token of every request is the most likely one after its prompt and the tokens before it, says the
        core's full forward pass: no cache, no batching, no prepacked matrices."""
        served = _fresh(self.trace)
        found = self.generator.generate(served)
        asked = [(request.prompt, request.max_new_tokens) for request in self.trace]
        check = check_tokens(stage_of(self.point, self.device), asked, found)
        figures = self.generator.figures(served) if isinstance(self.generator, OurEngine) and check.passed else {}
        return Check(check.passed, {**check.numbers, **figures}, check.why)

    def ablate(self, part: str) -> None:
        if not isinstance(self.generator, OurEngine):
            raise SaihError(f"ablation={part} takes the model out of engine=saih, not of another")
        self.generator.ablate(part)

    def close(self) -> None:
        self.generator.close()


class OneStep:
    """A step is one prefill of all requests, or one decode step of all, always at the same place of the cache."""

    def __init__(self, point: Point, device: str, requests: Sequence[Request]) -> None:
        self.work = _work(point.params, point.seed)
        ours = OurEngine(point, device, requests)
        self.worker, blocks = ours.engine.worker, ours.engine.state.blocks
        for request in requests:
            if not blocks.grow(request.id, request.context_tokens + 1):
                raise SaihError(
                    f"task={point.params['task']} runs all requests at once: set max_requests={len(requests)}"
                )
        self.prefill = Step.of(BatchPlan(list(requests), [request.pending for request in requests]), blocks)
        self.first = self._tokens(self.prefill)
        for request, token in zip(requests, self.first, strict=True):
            request.computed = request.context_tokens
            request.emit(token, 0.0)
        self.decode = Step.of(BatchPlan(list(requests), [1] * len(requests)), blocks)
        self.timed = self.prefill if point.params["task"] == "prefill" else self.decode
        self.point, self.device, self.requests = point, device, requests

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self.worker.run(self.timed)
        return self.work

    def check(self) -> Check:
        """The tokens of both steps are the most likely ones, says the full forward pass."""
        stage = stage_of(self.point, self.device)
        pairs = zip(self.requests, self.first, self._tokens(self.decode), strict=True)
        gap = max(float(logit_gaps(stage, request.prompt, [a, b]).max()) for request, a, b in pairs)
        return Check(gap <= TOLERANCE[stage.dtype], {"largest_gap_std": gap}, _why(gap))

    def ablate(self, part: str) -> None:
        """The model is not run; packing a batch and choosing tokens are what is left."""
        _without_model(self.worker)

    def _tokens(self, step: Step) -> list[int]:
        return [int(token) for token in cast(torch.Tensor, self.worker.run(step)).tolist()]

    def close(self) -> None:
        """Nothing runs beside."""


def _why(gap: float) -> str:
    return f"a token is {gap:.3g} standard deviations below the most likely one"


def _fresh(trace: Sequence[Request]) -> list[Request]:
    return [Request(each.id, each.prompt, each.max_new_tokens, each.arrival_s) for each in trace]


def _work(params: Params, seed: int) -> Work:
    """What a step does on paper; the trace of another seed has other lengths than the plan."""
    model, word, batches = spec.model(params), spec.WORD[str(params["precision"])], spec.batches(params, seed)
    rows, new = sum(batch.rows for batch in batches), sum(batch.head_rows for batch in batches)
    return Work(
        float(rows if params["task"] == "prefill" else new),
        float(sum(stepcost.forward_flop(model, batch) for batch in batches)),
        float(sum(stepcost.step_bytes(model, batch, word) for batch in batches)),
    )
