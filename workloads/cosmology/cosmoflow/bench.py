"""One training step of CosmoFlow: read counts, move them, forward, backward, reduce gradients, update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.cosmology.cosmoflow import execution, spec
from workloads.cosmology.cosmoflow.model import Regressor, build, from_counts
from workloads.cosmology.cosmoflow.parallel import Spatial, parallel
from workloads.cosmology.cosmoflow.spatial import gradient_error
from workloads.cosmology.dataset import Dataset, Recipe, generate
from workloads.cosmology.universe import PARTICLES_PER_CELL

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
CHECK_UPDATES = 3
CHECKED_RANKS = 8
"""Ranks whose batches the gradient check joins: enough to show the reduction, cheap on a thousand ranks."""
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 2e-2, "bf16": 0.1}
"""Largest |gradient - plain one| / |plain one|, over all parameters; the plain one is fp32's."""


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
        self.point, self.params = point, point.params
        self.place, self.device, self.dataset = context.place, context.device, dataset
        self.precision = str(self.params["precision"])
        self.batch = spec.batch_per_rank(self.params)
        self.cost = spec.cost(self.params)
        self.steps_done = 0
        execution.allow_tf32(self.precision == "tf32", self.device)
        network = self._build()
        execution.arrange(network, self.params)
        self.parallel = parallel(str(self.params["backend"]), network, self.place, self.device)
        execution.compile_in_place(network, self.params, self._example())
        self.optimizer = _optimizer(network)
        self.scaler = execution.scaler(self.device, self.precision)

    def step(self, clock: Clock) -> Work:
        """`communication` is what backward waits for after its last gradient: the part no computation hides."""
        clock.enter("input")
        counts, targets = self._read(self._indices(self.parallel.reader[0], self.steps_done))
        clock.enter("transfer")
        counts, targets = counts.to(self.device), targets.to(self.device)
        clock.enter("compute")
        loss = self._loss(self.parallel.model, counts, targets)
        self._update(loss, self.optimizer, self.scaler, clock)
        self.steps_done += 1
        return Work(self.cost.work, self.cost.flop, sum(operation.moved_bytes for operation in self.cost.operations))

    def check(self) -> Check:
        """The loss falls on a fixed batch; the gradients are those of the plain step on all batches joined.

        The plain step is that of one rank at the defaults: fp32, eager, channels last, nothing computed anew.
        """
        network = self.parallel.network
        network.eval()  # no dropout: both sides of a comparison see the same network
        numbers = self._losses_on_a_fixed_batch()
        if self.place.world > 1 or not spec.is_plain(self.params):
            numbers["gradient_error"] = self._gradient_error()
        notes = self._diagnose()
        network.train()
        finite = all(torch.isfinite(torch.tensor(value)) for value in numbers.values())
        falls = numbers["loss_last"] < numbers["loss_first"]
        equal = numbers.get("gradient_error", 0.0) <= TOLERANCE[self.precision]
        why = "" if finite else "a number is not finite; "
        why += "" if falls else "the loss does not fall on a fixed batch; "
        why += "" if equal else "gradients differ from those of the plain step on the joined batch; "
        why += ", ".join(f"{k} = {v:.6g}" for k, v in numbers.items())
        return Check(finite and falls and equal, numbers, why, notes)

    def close(self) -> None:
        self.parallel.close()
        execution.allow_tf32(False, self.device)

    def _build(self) -> Regressor:
        """The network with the weights that its seed gives, on the device; every time the same ones."""
        torch.manual_seed(self.point.seed)
        return build(spec.network(self.params), int(self.params["channels"])).to(self.device)

    def _example(self) -> Tensor:
        """A batch of volumes as the network gets them."""
        counts = torch.zeros(self.batch, *self.dataset.recipe.shape, dtype=torch.int16)
        return self._volumes(self.parallel.share(counts).to(self.device))

    def _indices(self, rank: int, step: int) -> list[int]:
        first = (step * self.parallel.reader[1] + rank) * self.batch
        return [index % self.dataset.recipe.samples for index in range(first, first + self.batch)]

    def _read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.parallel.share(self.dataset.read(indices)), self.dataset.targets(indices)

    def _volumes(self, counts_BDHWC: Tensor) -> Tensor:
        inputs_BCDHW = from_counts(counts_BDHWC, PARTICLES_PER_CELL)
        return inputs_BCDHW if self.params["layout"] == "channels-last" else inputs_BCDHW.contiguous()

    def _loss(self, model: nn.Module, counts_BDHWC: Tensor, targets_BT: Tensor) -> Tensor:
        inputs_BCDHW = self._volumes(counts_BDHWC)
        with execution.autocast(self.device, self.precision):
            outputs_BT = model(inputs_BCDHW)
        return nn.functional.mse_loss(outputs_BT.float(), targets_BT)

    def _update(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clock: Clock
    ) -> None:
        self.parallel.backward(scaler.scale(loss), clock)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def _own_loss(self) -> Tensor:
        """Of the first batch of this rank."""
        counts, targets = self._read(self._indices(self.parallel.reader[0], 0))
        return self._loss(self.parallel.model, counts.to(self.device), targets.to(self.device))

    def _losses_on_a_fixed_batch(self) -> dict[str, float]:
        """The mean loss over ranks before the first and after the last of a few updates, which are then taken back."""
        parameters = list(self.parallel.network.parameters())
        before = [each.detach().clone() for each in parameters]
        optimizer, scaler = _optimizer(self.parallel.network), execution.scaler(self.device, self.precision)
        losses = []
        for _ in range(CHECK_UPDATES):
            loss = self._own_loss()
            losses.append(self._mean(loss))
            self._update(loss, optimizer, scaler, Unclocked())
        with torch.no_grad():
            losses.append(self._mean(self._own_loss()))
            for each, value in zip(parameters, before, strict=True):
                each.copy_(value)
        return {"loss_first": losses[0], "loss_last": losses[-1]}

    def _mean(self, loss: Tensor) -> float:
        mean = loss.detach().double() / self.place.world
        if self.place.world > 1:
            dist.all_reduce(mean)
        return mean.item()

    def _gradient_error(self) -> float:
        """|gradient - plain| / |plain| over all parameters; ranks beyond the first few add a loss of zero.

        With spatial parallelism the plain step may not fit on one device: its stages are compared on a thin volume.
        """
        if isinstance(self.parallel, Spatial):
            autocast = execution.autocast(self.device, self.precision)
            channels = int(self.params["channels"])
            return gradient_error(self.parallel.network, self._build(), self.parallel.slabs, channels, autocast)
        rank, readers = self.parallel.reader
        joined_ranks = min(readers, CHECKED_RANKS)
        scaler = execution.scaler(self.device, self.precision)
        loss = scaler.scale((1.0 if rank < joined_ranks else 0.0) * self._own_loss())
        self.parallel.backward(loss, Unclocked())
        shared = _flat(self.parallel.gradients()) / (scaler.get_scale() if scaler.is_enabled() else 1.0)
        self.parallel.network.zero_grad()
        plain = self._build().eval()
        execution.arrange(plain, {**spec.PLAIN, "backend": "ddp"})
        for reader in range(joined_ranks):
            counts, targets = self._read(self._indices(reader, 0))
            outputs_BT = plain(from_counts(counts.to(self.device), PARTICLES_PER_CELL))
            (nn.functional.mse_loss(outputs_BT, targets.to(self.device)) / readers).backward()
        joined = _flat([each.grad for each in plain.parameters()])
        return float((shared - joined).norm() / joined.norm())

    def _diagnose(self) -> tuple[str, ...]:
        """What the kernels of a forward pass tell; not of compiled ones, which have names of their own."""
        if self.params["execution"] != "eager":
            return ()
        with torch.no_grad():
            return execution.diagnose(self._own_loss)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors if each is not None]).double()
