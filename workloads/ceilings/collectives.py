"""The all-reduce of the ceilings: over torch's process group, or over MPI."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from saih import mpi
from saih.core import Context, Place, Point
from saih.errors import SaihError


def all_reduce(point: Point, context: Context, dtype: torch.dtype) -> AllReduce:
    """The all-reduce a point asks for. Raises SaihError on one rank, and for MPI under a launcher that is not MPI's."""
    if context.place.world == 1:
        raise SaihError("an all-reduce wants several ranks: --set gpus=2")
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
        """Sums of small whole numbers are exact."""
        pattern_N = (torch.arange(len(self.x_N), device=self.x_N.device) % 7).to(self.x_N.dtype)
        self.x_N.copy_(pattern_N + self.place.rank)
        self.call()
        ranks = self.place.world
        correct = torch.equal(self.x_N, ranks * pattern_N + ranks * (ranks - 1) // 2)
        self.x_N.zero_()
        return 0.0 if correct else float("inf")
