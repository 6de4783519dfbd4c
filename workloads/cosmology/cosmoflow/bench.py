"""One training step of CosmoFlow: read counts, move them, forward, backward, reduce gradients, update."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.cosmology.cosmoflow import spec
from workloads.cosmology.cosmoflow.model import CosmoFlow, from_counts
from workloads.cosmology.cosmoflow.parallel import data_parallel
from workloads.cosmology.dataset import Dataset, Recipe, generate
from workloads.cosmology.universe import PARTICLES_PER_CELL

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
CHECK_UPDATES = 3
CHECKED_RANKS = 8
"""Ranks whose batches the gradient check joins: enough to show the reduction, cheap on a thousand ranks."""
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def setup(point: Point, context: Context) -> Training:
    """Make the data set where it is missing, then the network and its optimizer."""
    params = point.params
    recipe = Recipe(int(params["mesh"]), int(params["channels"]), point.seed, int(params["samples"]))
    generate(Path(context.data_folder), recipe, context.place.rank, context.place.world)
    if context.place.world > 1:
        dist.barrier()
    return Training(point, context, Dataset(Path(context.data_folder), recipe))


class Training:
    """CosmoFlow made ready to train on one rank, or on several whose gradients are averaged."""

    def __init__(self, point: Point, context: Context, dataset: Dataset) -> None:
        self.place, self.device, self.dataset = context.place, context.device, dataset
        self.precision = str(point.params["precision"])
        self.batch = spec.batch_per_rank(point.params)
        self.cost = spec.cost(point.params)
        self.steps_done = 0
        torch.manual_seed(point.seed)
        self.network = CosmoFlow(spec.network(point.params)).to(self.device)
        self.network.stages.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        first_layer, backend = self.network.stages[0], str(point.params["backend"])
        self.parallel = data_parallel(backend, self.network, first_layer, self.place, self.device)
        self.optimizer = _optimizer(self.network)

    def step(self, clock: Clock) -> Work:
        """`communication` is what backward waits for after its last gradient: the part no computation hides."""
        clock.enter("input")
        counts, targets = self._read(self._indices(self.place.rank, self.steps_done))
        clock.enter("transfer")
        counts, targets = counts.to(self.device), targets.to(self.device)
        clock.enter("compute")
        loss = self._loss(self.parallel.model, counts, targets)
        self.parallel.backward(loss, clock)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return Work(self.cost.work, self.cost.flop, sum(operation.moved_bytes for operation in self.cost.operations))

    def check(self) -> Check:
        """The loss falls on a fixed batch; the reduced gradients are those of one rank on all batches joined."""
        self.network.eval()  # no dropout: both sides of a comparison see the same network
        numbers = self._losses_on_a_fixed_batch()
        if self.place.world > 1:
            numbers["gradient_error"] = self._gradient_error()
        self.network.train()
        finite = all(torch.isfinite(torch.tensor(value)) for value in numbers.values())
        falls = numbers["loss_last"] < numbers["loss_first"]
        equal = numbers.get("gradient_error", 0.0) <= TOLERANCE[self.precision]
        why = "" if finite else "a number is not finite; "
        why += "" if falls else "the loss does not fall on a fixed batch; "
        why += "" if equal else "gradients differ from those of one rank on the joined batch; "
        return Check(finite and falls and equal, numbers, why + ", ".join(f"{k} = {v:.6g}" for k, v in numbers.items()))

    def close(self) -> None:
        self.parallel.close()

    def _indices(self, rank: int, step: int) -> list[int]:
        first = (step * self.place.world + rank) * self.batch
        return [index % self.dataset.recipe.samples for index in range(first, first + self.batch)]

    def _read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.dataset.read(indices), self.dataset.targets(indices)

    def _loss(self, model: nn.Module, counts_BDHWC: Tensor, targets_BT: Tensor) -> Tensor:
        inputs_BCDHW = from_counts(counts_BDHWC, PARTICLES_PER_CELL)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs_BT = model(inputs_BCDHW)
        return nn.functional.mse_loss(outputs_BT.float(), targets_BT)

    def _loss_of_rank(self, model: nn.Module, rank: int) -> Tensor:
        counts, targets = self._read(self._indices(rank, 0))
        return self._loss(model, counts.to(self.device), targets.to(self.device))

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
