"""Epochs that ranks do together on a planned layout: shown to learn what one rank does, timed, gone on with when lost.

Epoch 1 goes through the plan's pipeline; with a cache its activations are redistributed and later epochs are
data-parallel, without a backbone. See `collaborate` for both.
"""

from __future__ import annotations

import math
import statistics
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.llm.pac import spec
from workloads.llm.pac.batch import DataSet, joined_batches
from workloads.llm.pac.cache import ActivationCache, fingerprint, open_rank_cache
from workloads.llm.pac.collaborate import Collaboration, Epoch
from workloads.llm.pac.planned import TOLERANCE, make_plan
from workloads.llm.pac.stages import Settings, make, make_backbone
from workloads.llm.pac.training import Optimizer, Recipe

COMPARED_EPOCHS = 3
"""With those of one rank, at most: rounding grows with the steps."""


class JointEpochs:
    """A fine-tuning over ranks, the epochs of which are timed: the first, a later one, or all of them.

    What it has finished is kept until the point is measured, so that a run which lost a rank goes on when it is started
    again.
    """

    def __init__(self, point: Point, context: Context, settings: Settings, data: DataSet, recipe: Recipe) -> None:
        """Raises SaihError as `make_plan` and `Collaboration` do."""
        params = self.params = point.params
        self.settings, self.data, self.recipe = settings, data, recipe
        self.samples, self.cost = range(int(params["samples"])), spec.cost(params)
        self.profile, self.plan = make_plan(params, settings, data.batch(self.samples[: recipe.batch]))
        cache = self._cache(Path(context.data_folder)) if settings.variant == "pa-cache" else None
        folder = None
        if cache is not None:
            folder = Path(context.kept_folder)
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lost = folder, False
        self.together = Collaboration(
            settings,
            data,
            self.samples,
            recipe,
            self.plan,
            cache,
            micro_batches=int(params["micro_batches"]),
            schedule=str(params["schedule"]),
            folder=folder,
        )
        self.found = self.together.epochs
        """Epochs that a run before this one has finished."""

    def step(self, clock: Clock) -> Work:
        """Phases: communication is waiting for rows and sums, and redistribution; input what the cache gives."""
        span = self.params["span"]
        if span != "later" and self.together.epochs:
            self.together.reset()
        for _ in range(int(self.params["epochs"]) if span == "whole" else 1):
            self._epoch(clock)
        return Work(self.cost.work, self.cost.flop, sum(each.moved_bytes for each in self.cost.operations))

    def check(self) -> Check:
        """Carry the run out: losses are those of one rank that goes through its backbone in every epoch.

        Only sums over ranks are in another order, so they agree to `TOLERANCE` where activations are kept in fp32. Told
        are seconds of each epoch, and what redistribution took. Steps begin anew, or go on with later epochs.
        """
        span = self.params["span"]
        wanted = int(self.params["epochs"]) if span == "whole" else {"filling": 1, "later": 2}[str(span)]
        while self.together.epochs < wanted:
            self._epoch(Unclocked())
        done = self.together.done[:wanted]
        numbers = {"finished_before": float(self.found), "stages": float(len(self.plan.stages))}
        numbers |= self._compared(done) | self._took(done)
        allowed = math.inf if self.params["cache_dtype"] != "fp32" else TOLERANCE
        passed = numbers["loss_difference"] <= allowed
        if span != "later" or not passed:
            self.together.reset()
        if span != "later":
            self.together.remember_start()
        why = f"losses are {numbers['loss_difference']:.3g} off those of one rank"
        return Check(passed, numbers, why, self._notes(done))

    def close(self) -> None:
        """All ranks part. A whole cache on the disk stays; finished epochs stay only if a rank is lost."""
        if not self.lost:
            self.together.forget()
            self.together.close()
            if self.folder is not None and self.recipe.rank == 0:
                self.folder.rmdir()
        if self.together.cache is not None:
            self.together.cache.close()

    def _epoch(self, clock: Clock) -> None:
        self.lost = True
        self.together.epoch(clock)
        self.lost = False

    def _cache(self, root: Path) -> ActivationCache:
        settings, recipe = self.settings, self.recipe
        return open_rank_cache(
            root,
            self.params,
            self.data,
            self.samples,
            self._fingerprint(),
            points=settings.spec.layers + 1,
            width=settings.spec.hidden,
            place=(recipe.rank, recipe.world),
            device=settings.device,
        )

    def _fingerprint(self) -> torch.Tensor:
        """Of the whole backbone: the sum of those of all stages, each told by the first of its ranks."""
        total = torch.zeros(4, dtype=torch.int64)
        for stage in self.plan.stages:
            if stage.active[0] == self.recipe.rank:
                total += fingerprint(make_backbone(self.settings, stage.layers, head=False))
        dist.all_reduce(total)
        return total

    def _compared(self, done: list[Epoch]) -> dict[str, float]:
        """Losses beside those of one rank, which is rank 0 while the others wait."""
        some = done[:COMPARED_EPOCHS]
        numbers = torch.zeros(2, dtype=torch.float64)
        if self.recipe.rank == 0:
            pairs = zip(chain(*(each.losses for each in some)), self._of_one_rank(len(some)), strict=True)
            apart = [abs(a - b) for a, b in pairs]
            numbers = torch.tensor([max(apart), apart.count(0.0) / len(apart)], dtype=torch.float64)
        with self.together.watch.during("the check of its losses"):
            dist.broadcast(numbers, 0)
        return dict(zip(("loss_difference", "same_as_one_rank"), numbers.tolist(), strict=True))

    def _of_one_rank(self, epochs: int) -> list[float]:
        """Losses of all mini-batches, in the order in which the ranks together have them."""
        stage, recipe, found = make(self.settings), self.recipe, list[float]()
        optimizer = Optimizer(stage.trained(), recipe.learning_rate)
        for epoch in range(epochs):
            for samples in joined_batches(self.samples, recipe.batch, recipe.seed, epoch, recipe.world):
                batch = self.data.batch(samples, self.settings.device)
                meta = batch.meta(self.settings.spec.causal)
                loss = stage.loss(stage(stage.start(batch.ids_T, meta), meta), batch, meta) / len(batch)
                loss.backward()
                found.append(optimizer.step(loss, Unclocked()))
        return found

    def _took(self, done: list[Epoch]) -> dict[str, float]:
        """Seconds of epochs; of redistribution those of the rank that took longest, and the bytes of all."""
        numbers = {"first_epoch_s": done[0].seconds}
        if done[1:]:
            numbers["later_epoch_s"] = statistics.median(each.seconds for each in done[1:])
        exchange = done[0].exchange
        if exchange is not None:
            longest, total = torch.tensor(exchange.seconds), torch.tensor(exchange.sent_bytes)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            dist.all_reduce(total)
            numbers |= {"redistribution_s": float(longest), "redistributed_bytes": float(total)}
        return numbers

    def _notes(self, done: list[Epoch]) -> tuple[str, ...]:
        seconds = ", ".join(f"{each.seconds:.3g}" for each in done)
        notes = [f"the plan, before the run: {self.plan.describe(self.profile)}", f"seconds of each epoch: {seconds}"]
        if self.found:
            notes.append(f"went on behind epoch {self.found}, which a run before this one had finished")
        return tuple(notes)
