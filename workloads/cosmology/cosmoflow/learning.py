"""Train until a quality is reached, and tell what was learnt: the mean absolute error on universes never seen.

Recipe: AdamW with decoupled weight decay (Loshchilov & Hutter 2019), one cycle of the learning rate (Smith & Topin
2018), gradients clipped to norm 1. Without the clip this network diverges at the learning rates that learn fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.cosmology.power import RANGES
from workloads.cosmology.volumes import Volumes

LARGEST_RATE = 1e-3
LARGEST_GRADIENT = 1.0
JUDGED = ("omega_m", "sigma_8")
"""What the target is about: n_s and h leave little trace in boxes of 128 to 256 Mpc/h."""


@dataclass(frozen=True)
class Lesson:
    """How long is learnt, and what is good enough."""

    epochs: int
    steps_per_epoch: int
    target_mae: float
    """Of JUDGED, on targets within [-1, 1]; 0: all epochs are done, and the last one is judged."""


class Learner:
    """A network in training: its optimizer and learning rate over the whole lesson."""

    def __init__(self, network: nn.Module, lesson: Lesson) -> None:
        self.network, self.lesson = network, lesson
        self.optimizer = torch.optim.AdamW(network.parameters(), LARGEST_RATE)
        steps = max(2, lesson.epochs * lesson.steps_per_epoch)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LARGEST_RATE, total_steps=steps)

    def learn(
        self, losses: Iterator[Tensor], backward: Callable[[Tensor], None], validate: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Numbers of the last validation, with the epochs it took and the loss of the last one.

        Args:
            losses: the loss of one batch after another, on this rank.
            backward: leaves in the network the gradients of all ranks.
            validate: mean absolute errors; the same on every rank, so all stop together.
        """
        for epoch in range(1, self.lesson.epochs + 1):
            total = 0.0
            for _ in range(self.lesson.steps_per_epoch):
                loss = next(losses)
                backward(loss)
                self._update()
                total += loss.item()
            if self.lesson.target_mae == 0 and epoch < self.lesson.epochs:
                continue
            numbers = validate() | {"loss": total / self.lesson.steps_per_epoch, "epochs": float(epoch)}
            if numbers["mae_judged"] <= self.lesson.target_mae:
                break
        return numbers

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def validate(
    predict: Callable[[Tensor], Tensor], volumes: Volumes, batch: int, reader: tuple[int, int], device: str
) -> dict[str, float]:
    """Mean absolute error of each parameter, all targets within [-1, 1], over all ranks.

    Args:
        predict: int16 counts [B, N, N, N, C] to targets [B, 4].
        volumes: as many of them are looked at as all readers have equal shares.
        batch: volumes at a time.
        reader: which of how many readers of disjoint volumes this rank is.
        device: where `predict` computes.
    """
    number, readers = reader
    share = range(number, len(volumes) // readers * readers, readers)
    sums = torch.zeros(len(RANGES) + 1, device=device)
    with torch.no_grad():
        for first in range(0, len(share), batch):
            indices = share[first : first + batch]
            errors = predict(volumes.read(indices).to(device)) - volumes.targets(indices).to(device)
            sums += torch.cat([errors.abs().sum(0), errors.new_tensor([len(indices)])])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return _named((sums[:-1] / sums[-1]).tolist())


def predict_the_mean(training: Volumes, validation: Volumes) -> dict[str, float]:
    """What a network is worth that has learnt nothing but the mean of the targets."""
    mean = training.targets(range(len(training))).mean(0)
    return _named((validation.targets(range(len(validation))) - mean).abs().mean(0).tolist())


def _named(errors: Sequence[float]) -> dict[str, float]:
    maes = dict(zip(RANGES, errors, strict=True))
    judged = sum(maes[name] for name in JUDGED) / len(JUDGED)
    return {f"mae_{name}": mae for name, mae in maes.items()} | {"mae": sum(errors) / len(errors), "mae_judged": judged}
