"""One training step of CosmoFlow: read counts, move them, forward, backward, reduce gradients, update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih.core import Check, Clock, Context, Point, Work
from saih.timing import Unclocked
from workloads.cosmology import symmetry as symmetries
from workloads.cosmology.cosmoflow import execution, learning, spec
from workloads.cosmology.cosmoflow.data import VALIDATION_SEED, Standard, training_volumes, validation_volumes
from workloads.cosmology.cosmoflow.model import Regressor, build
from workloads.cosmology.cosmoflow.networks import TARGETS
from workloads.cosmology.cosmoflow.parallel import Spatial, parallel
from workloads.cosmology.cosmoflow.saving import Checkpoint
from workloads.cosmology.cosmoflow.spatial import gradient_error
from workloads.cosmology.loader import Loader, Order
from workloads.cosmology.volumes import Volumes

DROPOUT = {False: 0.5, True: 0.0}
"""Whether it learns: MLPerf HPC's dropout is for hundreds of epochs, and slows short training down."""
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
CHECK_UPDATES = 3
CHECKED_RANKS = 8
"""Ranks whose batches the gradient check joins: enough to show the reduction, cheap on a thousand ranks."""
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 2e-2, "bf16": 0.1}
"""Largest |gradient - plain one| / |plain one|, over all parameters; the plain one is fp32's."""


def setup(point: Point, context: Context) -> Training:
    """Make the data set where it is missing, then the network and its optimizer; train it, if it is to be."""
    training = Training(point, context, training_volumes(point.params, point.seed, context))
    if spec.learns(point.params):
        training.learn(validation_volumes(point.params, point.seed, context))
    return training


class Training:
    """CosmoFlow made ready to train on one rank, or on several that train as one."""

    def __init__(self, point: Point, context: Context, volumes: Volumes) -> None:
        self.params, self.place, self.device, self.volumes = point.params, context.place, context.device, volumes
        self.seed = point.seed + point.repeat  # of weights, order and augmentation; the universes stay the same
        self.precision = str(self.params["precision"])
        self.batch = spec.batch_per_rank(self.params)
        self.cost = spec.cost(self.params)
        self.target_mae = float(self.params["target_mae"]) if self.params["labels"] == "own" else 0.0
        self.steps_done = 0
        execution.allow_tf32(self.precision == "tf32", self.device)
        self.standard = Standard(volumes, self.device)
        network = self._build()
        execution.arrange(network, self.params)
        self.parallel = parallel(str(self.params["backend"]), network, self.place, self.device)
        execution.compile_in_place(network, self.params, self._example())
        self.optimizer = _optimizer(network)
        self.scaler = execution.scaler(self.device, self.precision)
        self.order = Order(len(volumes), self.batch, self.seed, *self.parallel.reader, volumes.per_file)
        self.learnt: dict[str, float] = {}
        pinned = self.device.startswith("cuda")
        self.loader = Loader(volumes, self.order.steps(), int(self.params["readers"]), pinned=pinned)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(self.loader)
        path = Path(context.data_folder, f"checkpoint-{point.id}")
        self.checkpoint = Checkpoint(path, network, self.optimizer, self.place) if self.params["save"] else None
        self.slow_rank_s = float(self.params["emulated_slow_rank_s"])
        self.link_bytes_per_s = float(self.params["emulated_link_bytes_per_s"])

    def learn(self, validation: Volumes) -> None:
        """Train for as long as the parameters say, and note what came of it: `spec` has their meaning."""
        if self.params["labels"] == "mean":
            self.learnt = learning.predict_the_mean(self.volumes, validation)
            return
        lesson = learning.Lesson(int(self.params["epochs"]), spec.steps_per_epoch(self.params), self.target_mae)
        learner = learning.Learner(self.parallel.network, lesson)
        self.learnt = learner.learn(
            (self._loss(self.parallel.model, *self._next(Unclocked())) for _ in count()),
            lambda loss: self.parallel.backward(loss, Unclocked()),
            lambda: self._validate(validation),
        )
        if self.target_mae > 0:
            together = self.batch * self.parallel.reader[1]
            self.learnt["samples_to_target"] = self.learnt["epochs"] * lesson.steps_per_epoch * together
        self.optimizer = learner.optimizer  # what is timed, and saved, is the step that has learnt
        if self.checkpoint:
            self.checkpoint.optimizer = learner.optimizer

    def step(self, clock: Clock) -> Work:
        """`communication` is what backward waits for after its last gradient: the part no computation hides."""
        loss = self._loss(self.parallel.model, *self._next(clock))
        self._lag()
        self._update(loss, self.optimizer, self.scaler, clock)
        if self.checkpoint:
            clock.enter("checkpoint")
            self.checkpoint.save()
        return Work(self.cost.work, self.cost.flop, sum(operation.moved_bytes for operation in self.cost.operations))

    def ablate(self, part: str) -> None:
        """From here on, one batch is taken again and again; or gradients are zeros that nothing computed, reduced as
        ever and applied to nothing; or gradients stay where they are."""
        if part == "input":
            counts, targets = next(self.loader)
            kept = torch.empty_like(counts, pin_memory=counts.is_pinned()).copy_(counts), targets.clone()
            self.loader.close()
            self.batches = repeat(kept)
        elif part == "compute":
            self.slow_rank_s = 0.0
            self.standard = lambda counts_BDHWC: counts_BDHWC  # type: ignore[assignment]
            self.parallel.network.forward = self._zeros  # type: ignore[method-assign, assignment]
            self.optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
        else:
            self.link_bytes_per_s = 0.0
            self.parallel.silence()

    def _zeros(self, counts_BDHWC: Tensor) -> Tensor:
        """What stands for the network's output [B, TARGETS]: it depends on every parameter, and costs a sum of them."""
        total = torch.stack([parameter.sum() for parameter in self.parallel.network.parameters()]).sum()
        return (0.0 * total).expand(len(counts_BDHWC), TARGETS)

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
        """The loss falls on a fixed batch; the gradients are those of the plain step on all batches joined.

        The plain step is that of one rank at the defaults: fp32, eager, channels last, nothing computed anew.
        """
        network = self.parallel.network
        network.eval()  # no dropout: both sides of a comparison see the same network
        numbers = self._losses_on_a_fixed_batch()
        if self.place.world > 1 or not spec.is_plain(self.params):
            numbers["gradient_error"] = self._gradient_error()
        saved = self._saves()
        notes = self._diagnose()
        network.train()
        numbers |= self.learnt
        wrongs = {
            "a number is not finite": not all(math.isfinite(value) for value in numbers.values()),
            "the loss does not fall on a fixed batch": not numbers["loss_last"] < numbers["loss_first"],
            "a checkpoint is not what was in memory": not saved,
            "gradients differ from those of the plain step on the joined batch": (
                numbers.get("gradient_error", 0.0) > TOLERANCE[self.precision]
            ),
            f"target_mae={self.target_mae:g} is not reached": numbers.get("mae_judged", 0.0) > self.target_mae > 0,
        }
        why = "; ".join(text for text, is_wrong in wrongs.items() if is_wrong)
        told = ", ".join(f"{name} = {value:.6g}" for name, value in numbers.items())
        return Check(not why, numbers, why and f"{why}: {told}", notes)

    def close(self) -> None:
        if self.checkpoint:
            self.checkpoint.close()
        self.loader.close()
        self.parallel.close()
        execution.allow_tf32(False, self.device)

    def _build(self) -> Regressor:
        """The network with the weights that its seed gives, on the device; every time the same ones."""
        torch.manual_seed(self.seed)
        dropout = DROPOUT[spec.learns(self.params)]
        return build(spec.network(self.params), int(self.params["channels"]), dropout).to(self.device)

    def _plain(self) -> Regressor:
        """The network of one rank at the defaults, with the weights that all ranks have now."""
        plain = self._build().eval()
        execution.arrange(plain, {**spec.PLAIN, "backend": "ddp"})
        with torch.no_grad():
            for own, weight in zip(plain.parameters(), self.parallel.weights(), strict=True):
                own.copy_(weight)
        return plain

    def _example(self) -> Tensor:
        """A batch of volumes as the network gets them."""
        counts = torch.zeros(self.batch, *self.volumes.shape, dtype=torch.int16, device=self.device)
        return self._inputs(self.parallel.share(counts))

    def _next(self, clock: Clock) -> tuple[Tensor, Tensor]:
        """What this rank sees of its next batch, on its device; from a side of its own if it is to be augmented."""
        clock.enter("input")
        counts_BDHWC, targets_BT = next(self.batches)
        clock.enter("transfer")
        counts_BDHWC, targets_BT = counts_BDHWC.to(self.device), targets_BT.to(self.device)
        clock.enter("compute")
        if self.params["augment"] == "symmetry":
            side, periodic = self.volumes.shape[0], self.volumes.periodic
            symmetry = symmetries.draw(self.seed, self.steps_done, self.parallel.reader[0], side, periodic)
            counts_BDHWC = symmetry.apply(counts_BDHWC)
        self.steps_done += 1
        return self.parallel.share(counts_BDHWC), targets_BT

    def _read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole volumes and their targets, on the device."""
        return self.volumes.read(indices).to(self.device), self.volumes.targets(indices).to(self.device)

    def _inputs(self, counts_BDHWC: Tensor) -> Tensor:
        inputs_BCDHW = self.standard(counts_BDHWC)
        return inputs_BCDHW if self.params["layout"] == "channels-last" else inputs_BCDHW.contiguous()

    def _predict(self, model: nn.Module, counts_BDHWC: Tensor) -> Tensor:
        inputs_BCDHW = self._inputs(counts_BDHWC)
        with execution.autocast(self.device, self.precision):
            outputs_BT: Tensor = model(inputs_BCDHW)
        return outputs_BT.float()

    def _loss(self, model: nn.Module, counts_BDHWC: Tensor, targets_BT: Tensor) -> Tensor:
        return nn.functional.mse_loss(self._predict(model, counts_BDHWC), targets_BT)

    def _update(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clock: Clock
    ) -> None:
        self.parallel.backward(scaler.scale(loss), clock)
        self._crawl(clock)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def _validate(self, validation: Volumes) -> dict[str, float]:
        self.parallel.network.eval()
        numbers = learning.validate(
            self._judge,
            validation,
            self.batch,
            self.parallel.reader,
            self.device,
        )
        self.parallel.network.train()
        return numbers

    def _judge(self, counts_BDHWC: Tensor) -> Tensor:
        """Targets [B, TARGETS] of whole volumes. Who has learnt from all sides is asked from several, for the mean."""
        sides = [counts_BDHWC]
        if self.params["augment"] == "symmetry":
            mesh, periodic = self.volumes.shape[0], self.volumes.periodic
            drawn = (symmetries.draw(VALIDATION_SEED, view, 0, mesh, periodic) for view in range(spec.VIEWS))
            sides = [symmetry.apply(counts_BDHWC) for symmetry in drawn]
        predicted = [self._predict(self.parallel.model, self.parallel.share(side)) for side in sides]
        return torch.stack(predicted).mean(0)

    def _own_loss(self) -> Tensor:
        """Of the first batch of this rank."""
        counts_BDHWC, targets_BT = self._read(self.order.indices(0))
        return self._loss(self.parallel.model, self.parallel.share(counts_BDHWC), targets_BT)

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
        plain = self._plain()
        if isinstance(self.parallel, Spatial):
            autocast = execution.autocast(self.device, self.precision)
            return gradient_error(
                self.parallel.network, plain, self.parallel.slabs, int(self.params["channels"]), autocast
            )
        rank, readers = self.parallel.reader
        joined_ranks = min(readers, CHECKED_RANKS)
        scaler = execution.scaler(self.device, self.precision)
        loss = scaler.scale((1.0 if rank < joined_ranks else 0.0) * self._own_loss())
        self.parallel.backward(loss, Unclocked())
        shared = _flat(self.parallel.gradients()) / (scaler.get_scale() if scaler.is_enabled() else 1.0)
        self.parallel.network.zero_grad()
        for reader in range(joined_ranks):
            counts_BDHWC, targets_BT = self._read(self.order.indices(0, reader))
            outputs_BT = plain(self.standard(counts_BDHWC))
            (nn.functional.mse_loss(outputs_BT, targets_BT) / readers).backward()
        joined = _flat([each.grad for each in plain.parameters()])
        return float((shared - joined).norm() / joined.norm())

    def _saves(self) -> bool:
        """Whether a checkpoint, where steps are to write one, has what is in memory."""
        if not self.checkpoint:
            return True
        self.checkpoint.save()
        return self.checkpoint.is_what_is_in_memory()

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
