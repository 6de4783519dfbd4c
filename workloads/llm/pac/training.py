"""Fine-tuning on one rank or data-parallel over all: epochs through the model, or from the cache once it is filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih.core import Clock
from saih.timing import Unclocked
from workloads.llm.attention import AttnMeta
from workloads.llm.pac.batch import Batch, DataSet, epoch_batches
from workloads.llm.pac.cache import ActivationCache
from workloads.llm.pac.stages import Backbone, Flow, SideTuned, Tuned


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    batch: int
    """Sequences of a mini-batch, of all ranks together."""
    learning_rate: float
    seed: int
    rank: int = 0
    world: int = 1


class Optimizer:
    """AdamW over what trains, after gradients of all ranks are added up."""

    def __init__(self, trained: dict[str, nn.Parameter], learning_rate: float, world: int = 1) -> None:
        self.trained, self.world = trained, world
        self.start: dict[str, Tensor] = {}
        self.adam = torch.optim.AdamW(trained.values(), lr=learning_rate, fused=True)

    def remember_start(self) -> None:
        """What trains, as it is now: where `reset` goes back to. Takes as much memory again."""
        self.start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def reset(self) -> None:
        """What trains is what it was at `remember_start`, and nothing is remembered of any step."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.start[name])
                parameter.grad = None
        self.adam.state.clear()

    def step(self, loss: Tensor, clock: Clock) -> float:
        """One step; `loss` has its gradients behind it and is this rank's part. Returns the sum over ranks."""
        total = loss.detach()
        if self.world > 1:
            clock.enter("communication")
            total = self._all_reduce(total)
            clock.enter("compute")
        self.adam.step()
        self.adam.zero_grad()
        return float(total)

    def state(self) -> dict[str, Any]:
        """What a rerun goes on from: tensors and numbers alone."""
        return {"trained": {name: p.detach() for name, p in self.trained.items()}, "adam": self.adam.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.adam.load_state_dict(state["adam"])

    def _all_reduce(self, loss: Tensor) -> Tensor:
        """Gradients and the loss in one message."""
        gradients = [cast(Tensor, parameter.grad) for parameter in self.trained.values()]
        flat = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        dist.all_reduce(flat)
        summed = flat[1:].split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(summed, gradients, strict=True)])
        return flat[0]


class FineTuning:
    """A whole model on this rank, its samples, and the cache if there is one."""

    def __init__(
        self,
        stage: SideTuned | Tuned,
        data: DataSet,
        samples: Sequence[int],
        recipe: Recipe,
        cache: ActivationCache | None = None,
    ) -> None:
        """samples: those to train on, of all ranks."""
        self.stage, self.data, self.samples, self.recipe, self.cache = stage, data, samples, recipe, cache
        self.device = stage.settings.device
        self.optimizer = Optimizer(stage.trained(), recipe.learning_rate, recipe.world)
        self.epochs = 0
        """Those done."""
        self._away: Backbone | None = None

    def reset(self) -> None:
        """As it was before the first epoch."""
        self.optimizer.reset()
        self.epochs = 0
        self.bring_backbone()
        if self.cache is not None:
            self.cache.clear()

    def epoch(self, clock: Clock) -> list[float]:
        """One epoch; the mean loss of each mini-batch over its sequences, of all ranks.

        With a cache, the first epoch fills it, unless it is whole already, and later ones need no backbone.
        """
        batches = self._batches()
        losses = []
        for batch, taps in self._inputs(batches, clock):
            clock.enter("compute")
            loss = self._loss(batch, taps, clock)
            loss.backward()
            losses.append(self.optimizer.step(loss, clock))
        if self.cache is not None and not self.cache.complete:
            clock.enter("input")
            self.cache.finish()
        self.epochs += 1
        return losses

    def loss(self, watched: AbstractContextManager[None]) -> Tensor:
        """Of the first mini-batch of the next epoch, its graph made under `watched` and still alive."""
        batch, taps = next(iter(self._inputs(self._batches()[:1], Unclocked())))
        with watched:
            return self._loss(batch, taps, Unclocked())

    @torch.no_grad()
    def accuracy(self, samples: Sequence[int]) -> float:
        """Share of these samples that are put into their class. Needs the backbone."""
        right = 0
        for begin in range(0, len(samples), self.recipe.batch):
            batch = self.data.batch(samples[begin : begin + self.recipe.batch], self.device)
            meta = batch.meta(self.stage.settings.spec.causal)
            logits_BC = self.stage.logits(self.stage(self.stage.start(batch.ids_T, meta), meta), meta)
            right += int((logits_BC.argmax(1) == batch.labels_B).sum())
        return right / len(samples)

    def put_backbone_away(self) -> None:
        """Off the model, to be brought again; who never wants it again calls `forget_backbone`."""
        if isinstance(self.stage, SideTuned) and self.stage.backbone is not None:
            self._away, self.stage.backbone = self.stage.backbone, None

    def bring_backbone(self) -> None:
        """What was put away is there again."""
        if self._away is not None:
            cast(SideTuned, self.stage).backbone, self._away = self._away, None

    def forget_backbone(self) -> None:
        """Its memory is free; epochs come from the cache from now on."""
        self.put_backbone_away()
        self._away = None

    def _batches(self) -> list[Batch]:
        recipe = self.recipe
        order = epoch_batches(self.samples, recipe.batch, recipe.seed, self.epochs, recipe.rank, recipe.world)
        return [self.data.batch(samples, self.device) for samples in order]

    def _inputs(self, batches: list[Batch], clock: Clock) -> Iterator[tuple[Batch, list[Tensor] | None]]:
        """Each mini-batch, with its activations if the cache has them."""
        if self.cache is None or not self.cache.complete:
            for batch in batches:
                yield batch, None
            return
        self.put_backbone_away()
        stored = self.cache.ahead([batch.samples for batch in batches])
        for batch in batches:
            clock.enter("input")
            yield batch, next(stored)

    def _loss(self, batch: Batch, taps: list[Tensor] | None, clock: Clock) -> Tensor:
        """This rank's part of the mean over the mini-batch."""
        meta = batch.meta(self.stage.settings.spec.causal)
        if taps is None:
            flow = self._through_the_model(batch, meta, clock)
        else:
            flow = cast(SideTuned, self.stage).from_taps(taps, meta)
        return self.stage.loss(flow, batch, meta) / (len(batch) * self.recipe.world)

    def _through_the_model(self, batch: Batch, meta: AttnMeta, clock: Clock) -> Flow:
        if self.cache is None:
            return cast(Flow, self.stage(self.stage.start(batch.ids_T, meta), meta))
        stage = cast(SideTuned, self.stage)
        stage.record = True
        flow: Flow = stage(stage.start(batch.ids_T, meta), meta)
        stage.record = False
        clock.enter("input")
        self.cache.put_batch(batch.samples, stage.take_taps())
        clock.enter("compute")
        return flow
