"""Samples of a data set as one packed batch, and its parts for micro-batches and ranks. T rows, B sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from saih.errors import SaihError
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


def joined_batches(samples: Sequence[int], batch: int, seed: int, epoch: int, world: int) -> list[tuple[int, ...]]:
    """The mini-batches of an epoch as all ranks together have them: parts of `epoch_batches`, rank by rank."""
    parts = [epoch_batches(samples, batch, seed, epoch, rank, world) for rank in range(world)]
    return [tuple(chain(*each)) for each in zip(*parts, strict=True)]


def epoch_batches(
    samples: Sequence[int], batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[tuple[int, ...]]:
    """This rank's part of each mini-batch of an epoch. The last mini-batch may be smaller.

    A rank keeps every world-th sample, whose activations it has, and takes them in an order of its own for each epoch.
    Raises SaihError if ranks would have different numbers of samples.
    """
    if len(samples) % world or batch % world:
        raise SaihError(f"{len(samples)} samples and batches of {batch} cannot be shared evenly by {world} ranks")
    mine, size = samples[rank::world], batch // world
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_009 + rank)
    order = [mine[place] for place in torch.randperm(len(mine), generator=generator).tolist()]
    return [tuple(order[begin : begin + size]) for begin in range(0, len(order), size)]
