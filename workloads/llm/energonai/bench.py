"""Run windows of batches through the engine, and compare them with one process that has the whole model."""

from __future__ import annotations

import datetime
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.llm.attention import AttnMeta
from workloads.llm.config import ModelSpec
from workloads.llm.energonai import overlap, spec, window
from workloads.llm.energonai.engine import Batch, Engine
from workloads.llm.energonai.message import Kind, Message
from workloads.llm.energonai.pmep import Pmep
from workloads.llm.energonai.stages import ComputedStage, EmulatedStage, Job, prepare
from workloads.llm.energonai.worker import ENGINE, StageOfRank, Worker
from workloads.llm.kv import EmulatedLink
from workloads.llm.loader import random_init
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh, silence

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
CHECKED_SEQUENCES, CHECKED_TOKENS = 4, 48
"""Of each checked batch: enough to tell batches apart, cheap for large models."""
CHECK_DELAY_S = 0.02
LAYER_RUNS = 5
"""Of the layer whose time the overlap condition is checked with."""
IDLE = datetime.timedelta(days=7)
"""A rank may wait so long for a command. Ranks that die are noticed by their connections, not by this."""


def setup(point: Point, context: Context) -> Windows:
    """Weights on every rank, then the engine on the first and its followers."""
    return Windows(point, context)


class Windows:
    """The engine and its ranks, ready for batches."""

    def __init__(self, point: Point, context: Context) -> None:
        self.params, self.device, self.seed = point.params, context.device, point.seed
        self.shape, self.cost = spec.shape(point.params), spec.cost(point.params)
        self.dtype = DTYPE[str(point.params["precision"])]
        self.mesh = Mesh.make(self.shape.tp, self.shape.pp)
        alone = self.shape.ranks == 1
        self.control = None if alone else dist.new_group(backend="gloo", timeout=IDLE)
        handoff = str(point.params["handoff"])
        depth = int(point.params["buffer"]) if handoff == "nbpp" else 0
        self.pmep: Pmep | None = None
        self.worker = Worker(self._stage(), self.mesh, self.control, depth=depth)
        self.batches = make_batches(point, self.shape.model)
        self.engine: Engine | None = None
        if context.place.rank == ENGINE:
            self.engine = Engine(self.worker, padded=self.shape.padded, blocking=handoff == "blocking")
        else:
            self.worker.start_following()

    def step(self, clock: Clock) -> Work:
        """One window: every batch submitted, every result collected. Phases: see `Worker`."""
        self.worker.use(clock)
        if self.engine is None:
            self.worker.wait_for(len(self.batches))
        else:
            futures = [self.engine.run(batch) for batch in self.batches]
            for future in futures:
                future.result()
        self.worker.use(Unclocked())
        computed = () if self.cost.emulated_s else self.cost.operations
        return Work(self.cost.work, self.cost.flop, sum(operation.moved_bytes for operation in computed))

    def ablate(self, part: str) -> None:
        """Activations, sums and logits stay on their rank: every stage computes at once, on zeros. Commands and results
        go on as ever."""
        self.worker.silent = True
        if isinstance(self.worker.stage, ComputedStage):
            silence(self.worker.stage.stage)

    def check(self) -> Check:
        """While commands are picked up at random, every ticket's result is that of its own batch.

        With computed stages: the logits of all tokens are those of one process with the whole model, and those of
        padded and packed rows are the same bits where kernels allow it. With weights put away: they are the same bits
        as with all of them at hand; the times of a copy and of a layer are told, and what follows from them. With
        emulated stages: every result shows the tokens of its batch and the number of stages.
        """
        batches = [_first_part(batch) for batch in self.batches[: self.shape.pp + 2]]
        batches = [batches[place % len(batches)] for place in range(max(3, self.shape.pp + 2))]
        forms = [False, True] if self.params["attention"] in ("padded", "loop") else [False]
        self.worker.pickup_delay_s = CHECK_DELAY_S
        try:
            if self.engine is None:
                self.worker.wait_for(len(batches) * len(forms))
                return Check(True, {}, "results are checked on the first rank")
            runs = [[self.engine.run(batch, padded=form, every_row=True) for batch in batches] for form in forms]
            results = [[future.result().to(self.device) for future in run] for run in runs]
        finally:
            self.worker.pickup_delay_s = 0.0
        return self._verdict(batches, results)

    def close(self) -> None:
        """End all threads of all ranks, and the groups."""
        if self.engine is not None:
            self.engine.close()
        self.worker.join(timeout_s=10.0)
        if self.pmep is not None:
            self.pmep.stop()
        if self.worker.failure:
            return  # threads may still wait in these groups; whoever ends this process ends them
        for group in (self.control, self.mesh.tp_group, self.mesh.pp_group):
            if group is not None:
                dist.destroy_process_group(group)

    def _stage(self) -> StageOfRank:
        if self.shape.emulated:
            return EmulatedStage(self.shape.model.hidden, last=self.mesh.pp_rank == self.mesh.pp - 1)
        stage = Stage(
            self.shape.model,
            self.mesh,
            attention=str(self.params["attention"]),
            device=self.device,
            dtype=self.dtype,
            on_host=self.shape.offloaded,
        )
        random_init(stage, self.seed)
        if self.shape.offloaded:
            self.pmep = self._put_away(stage)
        return ComputedStage(stage)

    def _put_away(self, stage: Stage) -> Pmep:
        params = self.params
        store = "host" if params["weights"] == "cpu-offload" else f"peer:{(stage.device.index or 0) + 1}"
        link = EmulatedLink(1e9 * float(params["link_gb_per_s"])) if params["link_gb_per_s"] else None
        return Pmep(stage, int(params["offload_interval"]), store, depth=int(params["staging"]), link=link)

    def _verdict(self, batches: list[Batch], results: list[list[Tensor]]) -> Check:
        if self.shape.emulated:
            expected = [batch.ids_T.float() + self.shape.pp for batch in batches]
            wrong = sum(not torch.equal(x[:, 0], ids) for run in results for x, ids in zip(run, expected, strict=True))
            return Check(wrong == 0, {"wrong_results": wrong}, f"{wrong} results are of other batches")
        expected = self._logits_of_one_process(batches)
        error = max(float((x - y).abs().max()) for run in results for x, y in zip(run, expected, strict=True))
        forms = float(max((a - b).abs().max() for a, b in zip(results[0], results[-1], strict=True)))
        allowed = 0.0 if self._same_bits() else TOLERANCE[str(self.params["precision"])]
        numbers = {"largest_error": error, "packed_minus_padded": forms}
        good = error <= TOLERANCE[str(self.params["precision"])] and forms <= allowed
        if self.pmep is not None:
            numbers["offloaded_minus_resident"] = self._offloaded_minus_resident(batches, results)
            good = good and numbers["offloaded_minus_resident"] == 0.0
            numbers |= self._overlap(self.pmep)
        return Check(good, numbers, ", ".join(f"{name} = {value:.3g}" for name, value in numbers.items()))

    def _same_bits(self) -> bool:
        """Attention pads in both forms and sums of two ranks have one order; other kernels may depend on the rows."""
        return self.params["attention"] == "padded" and self.device == "cpu" and self.shape.tp <= 2

    @torch.inference_mode()
    def _logits_of_one_process(self, batches: list[Batch]) -> list[Tensor]:
        """All tokens of all batches at once, packed, through the whole model; one layer is in memory at a time."""
        meta = AttnMeta.packed([n for batch in batches for n in batch.lens], device=self.device)
        h = torch.cat([batch.ids_T for batch in batches]).to(self.device)
        for layer in range(self.shape.model.layers):
            h = self._layer(layer, "loop")(h, meta)
        return list(h.split([len(batch.ids_T) for batch in batches]))

    @torch.inference_mode()
    def _offloaded_minus_resident(self, batches: list[Batch], results: list[list[Tensor]]) -> float:
        """Largest difference from the same batches through the same kernels, each layer at hand when its turn comes."""
        jobs = [
            self._job(batch, padded, every_row=True) for padded in (False, True)[: len(results)] for batch in batches
        ]
        hs = [job.ids_T for job in jobs]
        for number in range(self.shape.model.layers):
            layer = self._layer(number, str(self.params["attention"]))
            hs = [layer(h, job.meta, rows=job.rows_R) for h, job in zip(hs, jobs, strict=True)]
        found = [x for run in results for x in run]
        return max(float((x - y).abs().max()) for x, y in zip(found, hs, strict=True))

    @torch.inference_mode()
    def _overlap(self, pmep: Pmep) -> dict[str, float]:
        """Times of a copy and of a layer, and what they predict: `room` times a copy fits beside the layers between.

        With one staging buffer nothing waits where room >= 1; slowdown is over weights at hand.
        """
        stage, job = self._layer(0, str(self.params["attention"])), self._job(self.batches[0], self.shape.padded)
        layer, h_TD = stage.layers["0"], torch.rand(len(job.ids_T), stage.spec.hidden).to(self.device, self.dtype)
        layer_s = statistics.median(
            self._seconds(lambda: layer(h_TD, job.meta, stage.rotation(job.meta), None, 0)) for _ in range(LAYER_RUNS)
        )
        copy_s = statistics.median(pmep.copies_s())
        layers, interval = self.shape.model.layers, int(self.params["offload_interval"])
        step_s = overlap.predicted_step_s(layers, interval, copy_s, layer_s, pmep.depth)
        return {
            "emulated_link": float(pmep.emulated),
            "copy_s": copy_s,
            "layer_s": layer_s,
            "room": (interval - 1) * layer_s / copy_s,
            "predicted_slowdown": step_s / (layers * layer_s),
        }

    def _layer(self, number: int, attention: str) -> Stage:
        """One layer of the model, with the embedding before the first and the head behind the last."""
        only = range(number, number + 1)
        stage = Stage(self.shape.model, layers=only, attention=attention, device=self.device, dtype=self.dtype)
        random_init(stage, self.seed)
        return stage

    def _job(self, batch: Batch, padded: bool, every_row: bool = False) -> Job:
        command = Message(Kind.RUN, 0, batch.lens, batch.ids_T, padded, every_row)
        return prepare(command, torch.device(self.device), self.shape.model.causal)

    def _seconds(self, run: Callable[[], object]) -> float:
        """Of one call, its kernels included."""
        self._synchronize()
        began_s = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - began_s

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def make_batches(point: Point, model: ModelSpec) -> list[Batch]:
    """The batches of a window, the same on every rank; lengths are the same in another order, tokens are random."""
    params, seed = point.params, point.seed
    count, mean_s = int(params["batches"]), 1e-3 * float(params["emulated_stage_ms"])
    times_s = window.durations_s(str(params["emulated_durations"]), count, mean_s)
    generator = torch.Generator().manual_seed(random.Random(f"{seed} ids").getrandbits(32))  # noqa: S311
    found = []
    for number in range(count):
        lens = window.shuffled_lengths(
            int(params["batch"]), int(params["length"]), float(params["valid"]), seed, number
        )
        ids_T = torch.randint(model.vocab, (sum(lens),), generator=generator)
        found.append(Batch(lens, ids_T, round(1e6 * times_s[number])))
    return found


def _first_part(batch: Batch) -> Batch:
    """A small batch out of a large one: the first tokens of the first sequences."""
    firsts = [ids[:CHECKED_TOKENS] for ids in batch.ids_T.split(list(batch.lens))[:CHECKED_SEQUENCES]]
    return Batch(tuple(map(len, firsts)), torch.cat(firsts), batch.emulated_us)
