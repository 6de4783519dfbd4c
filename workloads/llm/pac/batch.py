"""Samples of a data set as one packed batch, and its parts for micro-batches and ranks. T rows, B sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workloads.llm.attention import AttnMeta


@dataclass(frozen=True)
class Batch:
    """Sequences, one behind the other, without padding."""

    samples: tuple[int, ...]
    """Their numbers in the data set: the keys of the activation cache."""
    lens: tuple[int, ...]
    ids_T: Tensor
    """int64: tokens of all sequences."""
    labels_B: Tensor
    """int64: the class of each sequence."""

    def meta(self, causal: bool) -> AttnMeta:
        """Which rows form which sequence."""
        return AttnMeta.packed(self.lens, causal=causal, device=self.ids_T.device)

    def part(self, start: int, stop: int) -> Batch:
        """The sequences [start, stop)."""
        rows = slice(sum(self.lens[:start]), sum(self.lens[:stop]))
        return Batch(self.samples[start:stop], self.lens[start:stop], self.ids_T[rows], self.labels_B[start:stop])

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class DataSet:
    """Tokenised sequences with their classes; a sample is known by its number."""

    ids: tuple[Tensor, ...]
    labels: tuple[int, ...]
    classes: int
    tokenisation: str
    """How text became tokens, truncation included: part of the key of cached activations."""

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, samples: Sequence[int], device: str = "cpu") -> Batch:
        """The samples of these numbers, in this order."""
        ids_T = torch.cat([self.ids[sample] for sample in samples]).to(device)
        labels_B = torch.tensor([self.labels[sample] for sample in samples], device=device)
        return Batch(tuple(samples), tuple(len(self.ids[sample]) for sample in samples), ids_T, labels_B)


def epoch_order(samples: Sequence[int], batch: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The mini-batches of an epoch: all samples in an order that seed and epoch decide. The last may be smaller."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = [samples[place] for place in torch.randperm(len(samples), generator=generator).tolist()]
    return [tuple(order[begin : begin + batch]) for begin in range(0, len(order), batch)]
