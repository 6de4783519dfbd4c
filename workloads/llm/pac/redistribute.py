"""Between the phases: from ranks that hold some layers of a sample to ranks that hold samples, and the ladder to all.

After epoch 1 a rank has what its layers put out for the samples of its slices. From then on it needs all layers of its
own samples, which it works on in every epoch. P points (e and every layer's output), T tokens, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.pac.batch import Batch
from workloads.llm.pac.channel import EmulatedPort

SAMPLES_AT_ONCE = 64
"""In one exchange: what is under way beside the cache stays small."""


class Shelf:
    """What the layers here put out in epoch 1, until it goes to the rank that has the sample."""

    def __init__(self, layers: range) -> None:
        self.first_point = layers.start + 1 if layers.start else 0
        """Point 0 is e; point i + 1 is what layer i put out."""
        self.held: dict[int, Tensor] = {}
        """Sample -> [P of here, T, D]."""

    def put(self, batch: Batch, taps: Sequence[Tensor]) -> None:
        """Packed rows [T, D] of each point here. As `record` of a pipeline."""
        points_PTD = torch.stack(list(taps))
        for sample, rows_PTD in zip(batch.samples, points_PTD.split(list(batch.lens), 1), strict=True):
            self.held[sample] = rows_PTD.contiguous()


@dataclass(frozen=True)
class Exchange:
    """What a redistribution took on this rank."""

    seconds: float
    sent_bytes: int
    """To other ranks."""


def redistribute(
    shelf: Shelf,
    owner: Callable[[int], int],
    samples: Sequence[int],
    points: int,
    width: int,
    put: Callable[[int, list[Tensor]], None],
    port: EmulatedPort | None = None,
) -> Exchange:
    """All-to-all: `put(sample, [e, h_1, ..., h_L])` is called for each sample of this rank, each tensor [T, D].

    All ranks call it with the same `samples`, all that there are. The shelf is empty afterwards.
    Raises SaihError if a sample of this rank does not arrive whole, RuntimeError if a rank is gone.
    """
    began_s, sent_bytes = time.perf_counter(), 0
    for begin in range(0, len(samples), SAMPLES_AT_ONCE):
        some = samples[begin : begin + SAMPLES_AT_ONCE]
        arrived, sent = _exchange(shelf, owner, some, width, port)
        sent_bytes += sent
        for sample in some:
            if owner(sample) == _rank():
                put(sample, _joined(sample, arrived.get(sample, {}), points))
    return Exchange(time.perf_counter() - began_s, sent_bytes)


def _exchange(
    shelf: Shelf, owner: Callable[[int], int], samples: Sequence[int], width: int, port: EmulatedPort | None
) -> tuple[dict[int, dict[int, Tensor]], int]:
    """One all-to-all: sample -> first point -> [P, T, D], of all stages; and the bytes that left this rank."""
    world = _world()
    leaving = [[s for s in samples if s in shelf.held and owner(s) == rank] for rank in range(world)]
    labels = [[(s, shelf.first_point, *shelf.held[s].shape[:2]) for s in each] for each in leaving]
    values = [[shelf.held.pop(s).flatten() for s in each] for each in leaving]
    heads = _all_to_all([torch.tensor(each, dtype=torch.int64).flatten() for each in labels])
    sent_bytes = sum(x.nbytes for rank, each in enumerate(values) for x in each if rank != _rank())
    if port is not None:
        port.leave(sent_bytes)
    rows = _all_to_all([torch.cat(each) if each else torch.empty(0) for each in values])
    arrived: dict[int, dict[int, Tensor]] = {}
    for head, flat in zip(heads, rows, strict=True):
        place = 0
        for sample, first, points, tokens in head.view(-1, 4).tolist():
            size = points * tokens * width
            arrived.setdefault(sample, {})[first] = flat[place : place + size].view(points, tokens, width)
            place += size
    return arrived, sent_bytes


def _joined(sample: int, parts: Mapping[int, Tensor], points: int) -> list[Tensor]:
    """Points of all stages in order. Raises SaihError if one is missing."""
    found = [rows for first in sorted(parts) for rows in parts[first]]
    if len(found) != points:
        raise SaihError(f"sample {sample}: {len(found)} of {points} cached activations arrived; was epoch 1 whole?")
    return found


def share_weights(mine: Mapping[str, Tensor], everything: Mapping[str, Tensor]) -> int:
    """Fill `everything` with what some rank has by that name: weights, and what an optimiser keeps for them.

    Of several ranks the first counts. Returns the bytes that this rank sent to each other one.
    Raises SaihError for a name that no rank has.
    """
    names, rank, world = sorted(everything), _rank(), _world()
    owners = torch.tensor([rank if name in mine else world for name in names])
    if world > 1:
        dist.all_reduce(owners, dist.ReduceOp.MIN)
    sent = 0
    for source in range(world):
        theirs = [name for name, owner in zip(names, owners.tolist(), strict=True) if owner == source]
        if not theirs:
            continue
        tensors = mine if source == rank else everything
        flat = torch.cat([tensors[name].detach().flatten() for name in theirs])
        if world > 1:
            dist.broadcast(flat, source)
        sent += flat.nbytes if source == rank and world > 1 else 0
        with torch.no_grad():
            for name, part in zip(theirs, flat.split([everything[n].numel() for n in theirs]), strict=True):
                everything[name].copy_(part.view_as(everything[name]))
    missing = [name for name, owner in zip(names, owners.tolist(), strict=True) if owner == world]
    if missing:
        raise SaihError(f"no rank has {missing[0]} and {len(missing) - 1} other tensors: the plan lacks a layer")
    return sent


def _all_to_all(leaving: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors, one for each rank -> one from each rank."""
    if _world() == 1:
        return list(leaving)
    sizes = torch.tensor([len(each) for each in leaving])
    theirs = torch.empty_like(sizes)
    dist.all_to_all_single(theirs, sizes)
    arrived = torch.empty(int(theirs.sum()), dtype=leaving[0].dtype)
    dist.all_to_all_single(arrived, torch.cat(list(leaving)), theirs.tolist(), sizes.tolist())
    return list(arrived.split(theirs.tolist()))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
