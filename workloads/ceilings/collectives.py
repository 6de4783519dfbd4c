"""The all-reduce of the ceilings: over torch's process group, or over MPI."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from saih import mpi
from saih.core import Context, Place, Point

SMALL = 7
"""The largest number a rank adds in the check."""


def all_reduce(point: Point, context: Context, dtype: torch.dtype) -> AllReduce:
    """The all-reduce a point asks for. Raises SaihError for MPI under a launcher that is not MPI's."""
    over_mpi = point.params["transport"] == "mpi"
    count = max(1, int(point.params["message_bytes"]) // dtype.itemsize)
    x_N = torch.zeros(count, dtype=dtype, device="cpu" if over_mpi else context.device)
    return AllReduce(x_N, context.place, mpi_sum(x_N) if over_mpi else lambda: dist.all_reduce(x_N))


def mpi_sum(x_N: Tensor) -> Callable[[], object]:
    """The sum of x_N, in host memory, over MPI's ranks, in place."""
    communicator = mpi.communicator()
    from mpi4py import MPI

    buffer = x_N.numpy()
    return lambda: communicator.Allreduce(MPI.IN_PLACE, buffer)


class AllReduce:
    """The sum over ranks, in place. It is timed on zeros: they stay what they are however often they are summed."""

    phase = "communication"

    def __init__(self, x_N: Tensor, place: Place, call: Callable[[], object]) -> None:
        self.x_N, self.place, self.call = x_N, place, call

    def error(self) -> float:
        """0, or infinity: sums of small whole numbers are exact in any order.

        In bf16 they are as far as 256, so each number is added to by so many ranks at most, taking turns along x_N.
        """
        most_ranks = int(2 / torch.finfo(self.x_N.dtype).eps) // SMALL
        turns = -(-self.place.world // most_ranks)
        period = torch.arange(SMALL * turns)
        sums = sum(_addend(rank, turns, period) for rank in range(self.place.world))
        place_N = torch.arange(len(self.x_N)) % len(period)
        self.x_N.copy_(_addend(self.place.rank, turns, period)[place_N])
        self.call()
        correct = torch.equal(self.x_N.cpu(), torch.as_tensor(sums)[place_N].to(self.x_N.dtype))
        self.x_N.zero_()
        return 0.0 if correct else float("inf")


def _addend(rank: int, turns: int, place: Tensor) -> Tensor:
    """What a rank adds at these places: 1 to SMALL where it is its turn, else 0."""
    return torch.where(place % turns == rank % turns, 1 + (place + rank) % SMALL, 0)


class PingPong:
    """A message from rank 0 to rank 1 and back. It is timed on zeros."""

    phase = "communication"

    def __init__(self, x_N: Tensor, place: Place) -> None:
        self.x_N, self.place = x_N, place

    @classmethod
    def of(cls, point: Point, context: Context, dtype: torch.dtype) -> PingPong:
        """The message that a point asks for."""
        count = max(1, int(point.params["message_bytes"]) // dtype.itemsize)
        return cls(torch.zeros(count, dtype=dtype, device=context.device), context.place)

    def call(self) -> None:
        if self.place.rank == 0:
            dist.send(self.x_N, 1)
            dist.recv(self.x_N, 1)
        else:
            dist.recv(self.x_N, 0)
            dist.send(self.x_N, 0)

    def error(self) -> float:
        """0, or infinity: whole numbers go there and come back as what they were, and only rank 0 had them."""
        numbers_N = (torch.arange(len(self.x_N)) % SMALL).to(self.x_N)
        self.x_N.copy_(numbers_N if self.place.rank == 0 else -1 - numbers_N)
        self.call()
        correct = torch.equal(self.x_N, numbers_N)
        self.x_N.zero_()
        return 0.0 if correct else float("inf")
