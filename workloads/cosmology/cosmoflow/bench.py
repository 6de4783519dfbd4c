"""One training step of CosmoFlow: read counts, move them, forward, backward, reduce gradients, update."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from itertools import count, repeat

import torch
from torch import Tensor, nn

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.cosmology import symmetry as symmetries
from workloads.cosmology.cosmoflow import learning, spec
from workloads.cosmology.cosmoflow.data import Standard, training_volumes, validation_volumes
from workloads.cosmology.cosmoflow.model import CosmoFlow
from workloads.cosmology.cosmoflow.parallel import data_parallel
from workloads.cosmology.loader import Loader, Order
from workloads.cosmology.volumes import Volumes

DROPOUT = {False: 0.5, True: 0.0}
"""Whether it learns: MLPerf HPC's dropout is for hundreds of epochs, and slows short training down."""
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
CHECK_UPDATES = 3
CHECKED_RANKS = 8
"""Ranks whose batches the gradient check joins: enough to show the reduction, cheap on a thousand ranks."""
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def setup(point: Point, context: Context) -> Training:
    """Make the data set where it is missing, then the network and its optimizer; train it, if it is to be."""
    training = Training(point, context, training_volumes(point.params, point.seed, context))
    if point.params["train"] == "until-mae":
        training.learn(validation_volumes(point.params, point.seed, context))
    return training


class Training:
    """CosmoFlow made ready to train on one rank, or on several whose gradients are averaged."""

    def __init__(self, point: Point, context: Context, volumes: Volumes) -> None:
        self.params, self.place, self.device, self.volumes = point.params, context.place, context.device, volumes
        self.seed = point.seed + point.repeat  # of weights, order and augmentation; the universes stay the same
        self.precision = str(point.params["precision"])
        self.batch = spec.batch_per_rank(point.params)
        self.cost = spec.cost(point.params)
        self.target_mae = float(point.params["target_mae"]) if point.params["labels"] == "own" else 0.0
        self.steps_done = 0
        torch.manual_seed(self.seed)
        learns = point.params["train"] == "until-mae"
        self.network = CosmoFlow(spec.network(point.params), DROPOUT[learns]).to(self.device)
        self.network.stages.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        first_layer, backend = self.network.stages[0], str(point.params["backend"])
        self.parallel = data_parallel(backend, self.network, first_layer, self.place, self.device)
        self.optimizer = _optimizer(self.network)
        self.standard = Standard(volumes, self.device)
        rank, world = self.place.rank, self.place.world
        self.order = Order(len(volumes), self.batch, self.seed, rank, world, volumes.per_file)
        self.learnt: dict[str, float] = {}
        pinned = self.device.startswith("cuda")
        self.loader = Loader(volumes, self.order.steps(), int(point.params["readers"]), pinned=pinned)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(self.loader)
        self.slow_rank_s = float(point.params["emulated_slow_rank_s"])
        self.link_bytes_per_s = float(point.params["emulated_link_bytes_per_s"])

    def learn(self, validation: Volumes) -> None:
        """Train for as long as the parameters say, and note what came of it: `spec` has their meaning."""
        if self.params["labels"] == "mean":
            self.learnt = learning.predict_the_mean(self.volumes, validation)
            return
        lesson = learning.Lesson(int(self.params["epochs"]), spec.steps_per_epoch(self.params), self.target_mae)
        learner = learning.Learner(self.network, lesson)
        self.learnt = learner.learn(
            (self._loss(self.parallel.model, *self._next(Unclocked())) for _ in count()),
            lambda loss: self.parallel.backward(loss, Unclocked()),
            lambda: self._validate(validation),
        )
        self.learnt["samples_to_target"] = self.learnt["epochs"] * len(self.volumes)
        self.optimizer = learner.optimizer  # what is timed is the step that has learnt

    def step(self, clock: Clock) -> Work:
        """`communication` is what backward waits for after its last gradient: the part no computation hides."""
        counts, targets = self._next(clock)
        loss = self._loss(self.parallel.model, counts, targets)
        self._lag()
        self.parallel.backward(loss, clock)
        self._crawl(clock)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Work(self.cost.work, self.cost.flop, sum(operation.moved_bytes for operation in self.cost.operations))

    def ablate(self, part: str) -> None:
        """From here on, one batch is taken again and again; or gradients are zeros that nothing computed, reduced as
        ever and applied to nothing; or gradients stay where they are."""
        if part == "input":
            counts, targets = next(self.loader)
            kept = counts.clone(), targets.clone()
            self.loader.close()
            self.batches = repeat(kept)
        elif part == "compute":
            self.slow_rank_s = 0.0
            self.standard = lambda counts_BDHWC: counts_BDHWC  # type: ignore[assignment]
            self.network.forward = self._zeros  # type: ignore[method-assign, assignment]
            self.optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
        else:
            self.link_bytes_per_s = 0.0
            self.parallel.silence()

    def _zeros(self, counts_BDHWC: Tensor) -> Tensor:
        """What stands for the network's output [B, TARGETS]: it depends on every parameter, and costs a sum of them."""
        total = torch.stack([parameter.sum() for parameter in self.network.parameters()]).sum()
        return (0.0 * total).expand(len(counts_BDHWC), spec.TARGETS)

    def _lag(self) -> None:
        """Emulated: the last rank is slower."""
        if self.slow_rank_s and self.place.rank == self.place.world - 1:
            time.sleep(self.slow_rank_s)

    def _crawl(self, clock: Clock) -> None:
        """Emulated: the gradients' way is as long as at a rate, whatever the real link has done already."""
        if self.link_bytes_per_s and self.place.world > 1:
            clock.enter("communication")
            time.sleep(self.cost.message_bytes / self.link_bytes_per_s)
            clock.enter("compute")

    def check(self) -> Check:
        """The loss falls on a fixed batch; the reduced gradients are those of one rank on all batches joined."""
        self.network.eval()  # no dropout: both sides of a comparison see the same network
        numbers = self._losses_on_a_fixed_batch()
        if self.place.world > 1:
            numbers["gradient_error"] = self._gradient_error()
        self.network.train()
        numbers |= self.learnt
        wrongs = {
            "a number is not finite": not all(math.isfinite(value) for value in numbers.values()),
            "the loss does not fall on a fixed batch": not numbers["loss_last"] < numbers["loss_first"],
            "gradients differ from those of one rank on the joined batch": (
                numbers.get("gradient_error", 0.0) > TOLERANCE[self.precision]
            ),
            f"target_mae={self.target_mae:g} is not reached": numbers.get("mae_judged", 0.0) > self.target_mae > 0,
        }
        why = "; ".join(text for text, is_wrong in wrongs.items() if is_wrong)
        told = ", ".join(f"{name} = {value:.6g}" for name, value in numbers.items())
        return Check(not why, numbers, why and f"{why}: {told}")

    def close(self) -> None:
        self.loader.close()
        self.parallel.close()

    def _next(self, clock: Clock) -> tuple[Tensor, Tensor]:
        """The next batch of this rank on its device, seen from a side of its own if it is to be augmented."""
        clock.enter("input")
        counts_BDHWC, targets_BT = next(self.batches)
        clock.enter("transfer")
        counts_BDHWC, targets_BT = counts_BDHWC.to(self.device), targets_BT.to(self.device)
        clock.enter("compute")
        if self.params["augment"] == "symmetry":
            side, periodic = self.volumes.shape[0], self.volumes.periodic
            symmetry = symmetries.draw(self.seed, self.steps_done, self.place.rank, side, periodic)
            counts_BDHWC = symmetry.apply(counts_BDHWC)
        self.steps_done += 1
        return counts_BDHWC, targets_BT

    def _predict(self, model: nn.Module, counts_BDHWC: Tensor) -> Tensor:
        inputs_BCDHW = self.standard(counts_BDHWC)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs_BT: Tensor = model(inputs_BCDHW)
        return outputs_BT.float()

    def _loss(self, model: nn.Module, counts_BDHWC: Tensor, targets_BT: Tensor) -> Tensor:
        return nn.functional.mse_loss(self._predict(model, counts_BDHWC), targets_BT)

    def _loss_of_rank(self, model: nn.Module, rank: int) -> Tensor:
        indices = self.order.indices(0, rank)
        counts, targets = self.volumes.read(indices), self.volumes.targets(indices)
        return self._loss(model, counts.to(self.device), targets.to(self.device))

    def _validate(self, validation: Volumes) -> dict[str, float]:
        self.network.eval()
        reader = self.place.rank, self.place.world
        numbers = learning.validate(
            lambda counts: self._predict(self.parallel.model, counts), validation, self.batch, reader, self.device
        )
        self.network.train()
        return numbers

    def _losses_on_a_fixed_batch(self) -> dict[str, float]:
        trial = copy.deepcopy(self.network)
        optimizer = _optimizer(trial)
        losses = []
        for _ in range(CHECK_UPDATES):
            loss = self._loss_of_rank(trial, self.place.rank)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(self._loss_of_rank(trial, self.place.rank).item())
        return {"loss_first": losses[0], "loss_last": losses[-1]}

    def _gradient_error(self) -> float:
        """|reduced - joined| / |joined| over all parameters; ranks beyond the first few add a loss of zero."""
        joined_ranks = min(self.place.world, CHECKED_RANKS)
        share = 1.0 if self.place.rank < joined_ranks else 0.0
        loss = share * self._loss_of_rank(self.parallel.model, self.place.rank)
        self.parallel.backward(loss, Unclocked())
        reduced = _flat_gradient(self.network)
        self.network.zero_grad()
        trial = copy.deepcopy(self.network)
        for rank in range(joined_ranks):
            (self._loss_of_rank(trial, rank) / self.place.world).backward()
        joined = _flat_gradient(trial)
        return float((reduced - joined).norm() / joined.norm())


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)


def _flat_gradient(network: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None]).double()
