"""Fine-tuning by several ranks: epoch 1 through a plan's pipeline, then each rank from the cache of its own samples.

What an epoch ends with is kept, so that a run which lost a rank goes on behind the last epoch that was finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Clock
from saih.errors import SaihError
from saih.files import digest, write_atomic
from saih.timing import Unclocked
from workloads.llm.pac.batch import Batch, DataSet, joined_batches
from workloads.llm.pac.cache import ActivationCache
from workloads.llm.pac.channel import EmulatedPort
from workloads.llm.pac.pipeline import EmulatedDevice, Pipeline
from workloads.llm.pac.planner import Plan
from workloads.llm.pac.redistribute import Exchange, Shelf, redistribute, share_weights
from workloads.llm.pac.stages import Settings, SideTuned
from workloads.llm.pac.training import FineTuning, Optimizer, Recipe
from workloads.llm.pac.watch import Watch

FORMAT = 2
KEPT = "finished-epochs.pt"


@dataclass(frozen=True)
class Epoch:
    """One that is finished."""

    losses: list[float]
    """Of each mini-batch, of all ranks."""
    seconds: float
    exchange: Exchange | None
    """Of the first epoch, where there is a cache."""


class Collaboration:
    """A model that all ranks of the default group train together."""

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        samples: Sequence[int],
        recipe: Recipe,
        plan: Plan,
        cache: ActivationCache | None = None,
        *,
        micro_batches: int,
        schedule: str = "1f1b",
        folder: Path | None = None,
        emulated_device: EmulatedDevice | None = None,
        emulated_port: EmulatedPort | None = None,
    ) -> None:
        """Goes on behind the epochs that `folder`, shared by all ranks, has of the same run, whatever plan that had.

        `samples`: of all ranks. `cache`: for samples[rank::world]; without one every epoch goes through the pipeline.
        Raises SaihError for a folder without a cache, for one that cannot be read, and as `Pipeline` does.
        """
        if folder is not None and cache is None:
            raise SaihError("finished epochs are kept of what trains from an activation cache; variant=pa-cache does")
        self.settings, self.data, self.samples, self.recipe = settings, data, list(samples), recipe
        self.plan, self.cache, self.folder = plan, cache, folder
        self.done: list[Epoch] = []
        """The epochs that are finished, those of `folder` included."""
        self.schedule, self.micro_batches = schedule, micro_batches
        self.device, self.port = emulated_device, emulated_port
        self.pipeline: Pipeline | None = None
        self.later: FineTuning | None = None
        """Of the epochs from the cache."""
        self._start: tuple[Pipeline, Optimizer | None] | None = None
        """What `reset` goes back to, where it was remembered."""
        self.watch = Watch()
        kept = self._read()
        if kept is None:
            self._begin()
        else:
            self._go_on(kept)

    @property
    def epochs(self) -> int:
        """Those done."""
        return len(self.done)

    def epoch(self, clock: Clock) -> list[float]:
        """One epoch; the mean loss of each mini-batch, of all ranks.

        Raises SaihError naming the rank that was lost, and the epoch.
        """
        kept = f"; {self.epochs} finished epochs and the activations cached for them are kept" if self.folder else ""
        began_s, exchange = time.perf_counter(), None
        with self.watch.during(f"epoch {self.epochs + 1}{kept}"):
            losses = self.later.epoch(clock) if self.later else self._through_pipeline(clock)
            if self.cache is not None and self.later is None:
                exchange = self._redistribute(clock)
                self._leave_pipeline()
            self.done.append(Epoch(losses, time.perf_counter() - began_s, exchange))
            clock.enter("other")
            self._write()
        return losses

    def remember_start(self) -> None:
        """Before the first epoch: `reset` will come back here without making anything anew, so nothing is freed."""
        pipeline = cast(Pipeline, self.pipeline)
        if self.optimizer is not None:
            self.optimizer.remember_start()
        self._start = pipeline, self.optimizer

    def reset(self) -> None:
        """As it was before the first epoch; nothing is kept."""
        self.forget()
        if self._start is None:
            if self.pipeline is not None:
                self.pipeline.close()
            self._begin()
            return
        self.pipeline, self.optimizer = self._start
        if self.optimizer is not None:
            self.optimizer.reset()
        self._clear()

    def forget(self) -> None:
        """What was kept of finished epochs goes; the cache stays."""
        if self.folder is not None and _rank() == 0:
            (self.folder / KEPT).unlink(missing_ok=True)

    def close(self) -> None:
        """All ranks part; the cache's file and what is kept stay."""
        pipeline = self._start[0] if self._start else self.pipeline
        if pipeline is not None:
            pipeline.close()
        self.watch.close()

    # -- Epoch 1 -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Random adapters, an empty cache, the pipeline of the plan."""
        record = None if self.cache is None else lambda batch, taps: self.shelf.put(batch, taps)
        self.pipeline = Pipeline(
            self.settings,
            self.plan,
            micro_batches=self.micro_batches,
            schedule=self.schedule,
            emulated_device=self.device,
            emulated_port=self.port,
            record=record,
        )
        stage = self.pipeline.stage
        self.optimizer = None if stage is None else Optimizer(stage.trained(), self.recipe.learning_rate)
        self._clear()

    def _clear(self) -> None:
        """No epoch is done, nothing is cached."""
        self.done, self.later = [], None
        self.shelf = Shelf(cast(Pipeline, self.pipeline).mine.layers)
        if self.cache is not None:
            self.cache.clear()

    def _through_pipeline(self, clock: Clock) -> list[float]:
        losses = []
        for batch in self._batches():
            losses.append(cast(Pipeline, self.pipeline).step(batch, clock))
            if self.optimizer is not None:
                clock.enter("compute")
                self.optimizer.step(torch.tensor(losses[-1]), clock)
        return losses

    def _batches(self) -> Iterator[Batch]:
        """The joined mini-batches of all ranks."""
        recipe = self.recipe
        for samples in joined_batches(self.samples, recipe.batch, recipe.seed, self.epochs, recipe.world):
            yield self.data.batch(samples, self.settings.device)

    # -- Between the phases --------------------------------------------------------------------------------------------

    def _redistribute(self, clock: Clock) -> Exchange:
        """Every rank has the activations of its own samples."""
        cache, world = cast(ActivationCache, self.cache), self.recipe.world
        owners = {sample: place % world for place, sample in enumerate(self.samples)}
        clock.enter("communication")
        points, width = self.settings.spec.layers + 1, self.settings.spec.hidden
        exchange = redistribute(self.shelf, owners.__getitem__, self.samples, points, width, cache.put, self.port)
        cache.finish()
        return exchange

    def _leave_pipeline(self) -> None:
        """Every rank has the whole ladder, and what the optimiser knows of it; the backbone goes."""
        self._from_cache(epochs=1)
        mine = {} if self.optimizer is None else _tensors(self.optimizer)
        share_weights(mine, _tensors(cast(FineTuning, self.later).optimizer))
        if self._start is None:
            cast(Pipeline, self.pipeline).close()
        self.pipeline = self.optimizer = None

    def _from_cache(self, epochs: int) -> None:
        """The whole ladder behind so many epochs, no backbone beside it."""
        stage = SideTuned(self.settings, range(self.settings.spec.layers), backbone=False)
        self.later = FineTuning(stage, self.data, self.samples, self.recipe, self.cache)
        self.later.epochs = epochs

    # -- What is kept --------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Whole or absent; what was there before stays until then."""
        if self.folder is None or self.later is None or _rank() != 0:
            return
        value = {
            "format": FORMAT,
            "run": self._run,
            "epochs": [_plain(each) for each in self.done],
            "state": self.later.optimizer.state(),
        }
        write_atomic(self.folder / KEPT, lambda file: torch.save(value, file))

    def _read(self) -> dict[str, Any] | None:
        """What this run has finished; None if that is nothing."""
        if self.folder is None or not (path := self.folder / KEPT).exists():
            return None
        try:
            value: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:
            why = str(error).splitlines()[0][:200]
            raise SaihError(f"{path} cannot be read ({why}); without it, epoch 1 is done again") from None
        return value if (value.get("format"), value.get("run")) == (FORMAT, self._run) else None

    @property
    def _run(self) -> str:
        """Digits that change with anything that the weights after an epoch depend on, but for rounding.

        Not with the plan: one of measured speeds may differ the next time, and what is kept needs no pipeline.
        """
        recipe = replace(self.recipe, rank=0)
        return digest([repr(self.settings), repr(recipe), self.data.tokenisation, self.samples])

    def _go_on(self, kept: dict[str, Any]) -> None:
        """Behind the last finished epoch. Where a rank's cache is gone, the backbone fills it once more."""
        cache = cast(ActivationCache, self.cache)
        whole = torch.tensor(int(cache.complete))
        if self.recipe.world > 1:
            dist.all_reduce(whole, dist.ReduceOp.MIN)
        if not whole:
            self._begin()
            for batch in self._batches():
                cast(Pipeline, self.pipeline).step(batch)
            self._redistribute(Unclocked())
            cast(Pipeline, self.pipeline).close()
            self.pipeline = self.optimizer = None
        self.done = [_epoch(each) for each in kept["epochs"]]
        self._from_cache(self.epochs)
        cast(FineTuning, self.later).optimizer.load_state(kept["state"])


def _tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """What trains and what AdamW keeps for it, by name; zeros where no step was made yet."""
    found: dict[str, Tensor] = {}
    for name, parameter in optimizer.trained.items():
        state = optimizer.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found[name] = parameter
        found |= {f"{name} {key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found


def _plain(epoch: Epoch) -> list[Any]:
    """As numbers and lists, which a file has that is read without running anything."""
    exchange = epoch.exchange
    return [epoch.losses, epoch.seconds, None if exchange is None else [exchange.seconds, exchange.sent_bytes]]


def _epoch(plain: list[Any]) -> Epoch:
    losses, seconds, exchange = plain
    return Epoch(losses, seconds, None if exchange is None else Exchange(*exchange))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
