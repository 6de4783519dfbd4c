"""Mini-batches of epoch 1 through a plan's pipeline, on ranks or an emulated cluster, and how long was predicted."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Mapping
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih.core import Check, Clock, Context, Params, Point, Work
from saih.errors import SaihError
from workloads.llm.pac import planner, spec
from workloads.llm.pac.batch import Batch, DataSet
from workloads.llm.pac.channel import EmulatedPort
from workloads.llm.pac.clusters import CLUSTERS
from workloads.llm.pac.pipeline import EmulatedDevice, Pipeline
from workloads.llm.pac.profiler import profile
from workloads.llm.pac.stages import Settings, make
from workloads.llm.pac.training import Optimizer, Recipe

TOLERANCE = 1e-5
TIMED = 3
"""Mini-batches in the check; the middle one counts."""
LAYOUTS = {"hybrid": planner.best_plan, "single": planner.data_parallel} | dict(planner.BASELINES)


def make_plan(params: Params, settings: Settings, batch: Batch) -> tuple[planner.Profile, planner.Plan]:
    """Profile this model on all ranks, with mini-batches like `batch`, and plan the layout. All ranks call it.

    Raises SaihError if mini-batches cannot be cut evenly, or no plan fits.
    """
    micro_batches = int(params["micro_batches"])
    if len(batch) % micro_batches:
        raise SaihError(f"batch={len(batch)} cannot be cut into micro_batches={micro_batches}")
    seen = profile(settings, batch.part(0, len(batch) // micro_batches), micro_batches, str(params["cluster"]))
    return seen, LAYOUTS[str(params["layout"])](seen)


class MiniBatches:
    """A pipeline and the mini-batches that go through it."""

    def __init__(
        self,
        point: Point,
        context: Context,
        settings: Settings,
        data: DataSet,
        recipe: Recipe,
    ) -> None:
        """Raises SaihError as `make_plan` does."""
        params = point.params
        samples, size, cluster = range(int(params["samples"])), recipe.batch, str(params["cluster"])
        self.cost, self.settings, self.emulated = spec.cost(params), settings, cluster != "none"
        self.batches = [data.batch(samples[begin : begin + size]) for begin in range(0, len(samples) - size + 1, size)]
        self.rank, self.device = context.place.rank, context.device
        self.profile, self.plan = make_plan(params, settings, self.batches[0])
        emulated_device = EmulatedDevice(self.profile.devices[self.rank]) if self.emulated else None
        emulated_port = EmulatedPort(CLUSTERS[cluster].emulated_bytes_per_s) if self.emulated else None
        self.pipeline = Pipeline(
            settings,
            self.plan,
            micro_batches=int(params["micro_batches"]),
            schedule=str(params["schedule"]),
            emulated_device=emulated_device,
            emulated_port=emulated_port,
        )
        self.trained = {} if self.pipeline.stage is None else self.pipeline.stage.trained()
        self.optimizer = Optimizer(self.trained, recipe.learning_rate) if self.trained else None
        self.coming = cycle(self.batches)

    def step(self, clock: Clock) -> Work:
        """One mini-batch. Phases: communication is waiting for rows and sums, what is emulated of links included."""
        loss = self.pipeline.step(next(self.coming), clock)
        if self.optimizer is not None:
            clock.enter("compute")
            self.optimizer.step(torch.tensor(loss), clock)
        moved_bytes = sum(operation.moved_bytes for operation in self.cost.operations)
        return Work(self.cost.work, self.cost.flop, moved_bytes)

    def check(self) -> Check:
        """Loss and gradients are those of one process with the whole model, from weights that no gradient is zero for.

        Told are bytes of all ranks for a mini-batch, and the time of one beside its prediction.
        """
        start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        shake(self.trained)
        error, traffic = self._error(self.batches[0])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[name])
        step_s, predicted_s = self._step_s(), self.plan.latency.step_s
        self._clear()
        word = "emulated_" if self.emulated else ""
        numbers = {"largest_error": error, "predicted_step_s": predicted_s, "stages": float(len(self.plan.stages))}
        numbers |= {f"{kind}_bytes": float(sent) for kind, sent in traffic.items()}
        numbers |= {f"{word}step_s": step_s, f"{word}off_prediction": abs(step_s / predicted_s - 1)}
        note = f"the plan, before the run: {self.plan.describe(self.profile)}"
        return Check(error <= TOLERANCE, numbers, f"loss or gradients are {error:.3g} off one process", (note,))

    def close(self) -> None:
        self.pipeline.close()

    def _error(self, batch: Batch) -> tuple[float, dict[str, int]]:
        """Largest of loss and gradients on any rank; bytes that all ranks sent."""
        before = self.pipeline.traffic_bytes
        loss = self.pipeline.step(batch)
        sent = torch.tensor([n - before[kind] for kind, n in self.pipeline.traffic_bytes.items()])
        wanted, gradients = one_process(self.settings, batch)
        errors = [abs(loss - wanted)]
        errors += [
            float((p.grad - gradients[name]).abs().max()) for name, p in self.trained.items() if p.grad is not None
        ]
        error = torch.tensor(max(errors), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(sent)
            dist.all_reduce(error, dist.ReduceOp.MAX)
        return float(error), dict(zip(before, sent.tolist(), strict=True))

    def _step_s(self) -> float:
        """Of a mini-batch, without the optimiser: all ranks end it together, with the sum of the loss."""
        found = []
        for batch in (self.batches * TIMED)[:TIMED]:
            if dist.is_initialized():
                dist.barrier()
            began_s = time.perf_counter()
            self.pipeline.step(batch)
            found.append(time.perf_counter() - began_s)
        return statistics.median(found)

    def _clear(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = None


def one_process(settings: Settings, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a mini-batch from shaken weights, without ranks."""
    whole, meta = make(settings), batch.meta(settings.spec.causal)
    shake(whole.trained())
    loss = whole.loss(whole(whole.start(batch.ids_T, meta), meta), batch, meta) / len(batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in whole.trained().items() if p.grad is not None}


def shake(trained: Mapping[str, nn.Parameter]) -> None:
    """Add small numbers that depend on the name alone: adapters start at zero, where gradients behind them are zero."""
    with torch.no_grad():
        for name, parameter in trained.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
