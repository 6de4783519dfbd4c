"""Hidden states on the link that blocks are on: what one stage that stands for all gets from the one before."""

from __future__ import annotations

import torch

from workloads.llm.kv import PagedKV
from workloads.llm.model import Stage
from workloads.llm.pipemax.arenas import Arenas
from workloads.llm.transfer import Urgency


class Activations:
    """Rows come over the link before a step and leave over it afterwards, ahead of blocks. What is in them is nobody's.

    A row is moved as a block of one token, half of it as a key and half as a value.
    """

    def __init__(self, stage: Stage, most_rows: int) -> None:
        self.device, self.host = (
            PagedKV(
                1,
                1,
                stage.spec.hidden // 2,
                blocks=most_rows,
                block_size=1,
                layout="block_first",
                device=place,
                dtype=stage.dtype,
                pinned=place != stage.device,
            )
            for place in (stage.device, torch.device("cpu"))
        )

    def come(self, arenas: Arenas, rows: int) -> float:
        """Returns when they are there; seconds waited."""
        pairs = [(row, row) for row in range(rows)]
        return arenas.inward.wait(arenas.inward.submit(Urgency.ACTIVATION, self.host, self.device, pairs))

    def go(self, arenas: Arenas, rows: int) -> None:
        """Starts them on their way."""
        arenas.outward.submit(Urgency.ACTIVATION, self.device, self.host, [(row, row) for row in range(rows)])
