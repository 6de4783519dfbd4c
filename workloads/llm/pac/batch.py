"""Samples of a data set as one packed batch, and its parts for micro-batches and ranks. T rows, B sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain

import torch
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.attention import AttnMeta


@dataclass(frozen=True)
class PairMeta(AttnMeta):
    """How packed rows form sequences that are a source and an answer each: as a whole, and either part by itself."""

    source: AttnMeta = field(kw_only=True)
    target: AttnMeta = field(kw_only=True)
    order_T: Tensor = field(kw_only=True)
    """int64: rows of all sources, then those of all answers."""
    back_T: Tensor = field(kw_only=True)
    """int64: the place of each row in that order."""

    @classmethod
    def of(cls, lens: Sequence[int], answers: Sequence[int], device: torch.device) -> PairMeta:
        """lens: of sources with their answers. Raises SaihError where one has no source or no answer."""
        sources = [rows - answer for rows, answer in zip(lens, answers, strict=True)]
        whole = AttnMeta.packed(lens, causal=True, device=device)
        answering_T = torch.cat([(torch.arange(a, device=device) >= s) for a, s in zip(lens, sources, strict=True)])
        order_T = torch.argsort(answering_T.int(), stable=True)
        return cls(
            **{each.name: getattr(whole, each.name) for each in fields(AttnMeta)},
            source=AttnMeta.packed(sources, causal=False, device=device),
            target=AttnMeta.packed(answers, causal=True, device=device),
            order_T=order_T,
            back_T=torch.argsort(order_T),
        )

    def apart(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the sources, and of the answers."""
        rows = sum(self.source.query_lens)
        return x_TD.index_select(0, self.order_T[:rows]), x_TD.index_select(0, self.order_T[rows:])

    def together(self, source_TD: Tensor, target_TD: Tensor) -> Tensor:
        """What `apart` took apart."""
        return torch.cat([source_TD, target_TD]).index_select(0, self.back_T)


@dataclass(frozen=True)
class Batch:
    """Sequences, one behind the other, without padding; of an encoder-decoder each is a source and then its answer."""

    samples: tuple[int, ...]
    """Their numbers in the data set: the keys of the activation cache."""
    lens: tuple[int, ...]
    ids_T: Tensor
    """int64: tokens of all sequences."""
    labels_B: Tensor
    """int64: the class of each sequence."""
    answers: tuple[int, ...] = ()
    """Rows at the end of each sequence that are its answer; empty where there are none."""

    def meta(self, causal: bool) -> AttnMeta:
        """Which rows form which sequence; a `PairMeta` where there are answers."""
        device = self.ids_T.device
        if self.answers:
            return PairMeta.of(self.lens, self.answers, device)
        return AttnMeta.packed(self.lens, causal=causal, device=device)

    def said(self) -> tuple[Tensor, ...]:
        """Of each sequence the tokens that a language model learns to say: the answer, or all there are."""
        counts = self.answers or self.lens
        return tuple(ids[-count:] for ids, count in zip(self.ids_T.split(list(self.lens)), counts, strict=True))

    def part(self, start: int, stop: int) -> Batch:
        """The sequences [start, stop)."""
        rows = slice(sum(self.lens[:start]), sum(self.lens[:stop]))
        here = slice(start, stop)
        return Batch(self.samples[here], self.lens[here], self.ids_T[rows], self.labels_B[here], self.answers[here])

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
    answers: tuple[int, ...] = ()
    """Of an encoder-decoder: how many tokens at the end of each sample are its answer."""

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, samples: Sequence[int], device: str = "cpu") -> Batch:
        """The samples of these numbers, in this order."""
        ids_T = torch.cat([self.ids[sample] for sample in samples]).to(device)
        labels_B = torch.tensor([self.labels[sample] for sample in samples], device=device)
        lens = tuple(len(self.ids[sample]) for sample in samples)
        answers = tuple(self.answers[sample] for sample in samples) if self.answers else ()
        return Batch(tuple(samples), lens, ids_T, labels_B, answers)


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
