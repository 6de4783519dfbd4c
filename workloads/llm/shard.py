"""Tensor parallelism: the groups of ranks, linear and embedding layers cut over them, and the sums that join them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands: tensor-parallel neighbours inside one pipeline stage, and the stages. No groups if alone."""

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    @classmethod
    def make(cls, tp: int, pp: int) -> Mesh:
        """Split all ranks of the initialised default group: rank = pp_rank * tp + tp_rank. Every rank calls it.

        Raises SaihError unless there are tp * pp ranks.
        """
        raise NotImplementedError
