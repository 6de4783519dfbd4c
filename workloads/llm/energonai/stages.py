"""What a rank makes of a command: rows, padded or packed (DRCE), through its layers; or a sleep in their place.

T rows, D hidden, V vocabulary, R rows whose logits are wanted.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from workloads.llm.attention import AttnMeta
from workloads.llm.energonai.message import Message
from workloads.llm.model import Stage


@dataclass(frozen=True)
class Job:
    """A command made ready for this rank. All it needs was in the command: no stage asks another for shapes."""

    command: Message
    ids_T: Tensor
    meta: AttnMeta
    rows_R: Tensor | None
    """Rows that are a result; None: all."""


def prepare(command: Message, device: torch.device, causal: bool = True) -> Job:
    """Lay the command's tokens out in rows.

    Packed rows are the tokens themselves, so layers, sums and hand-offs never see padding; padded rows are what a
    system without DRCE works on. The rows that are a result hold the same tokens in both.
    """
    ids_T = command.words.to(device)
    packed = AttnMeta.packed(command.lens, causal=causal, device=device)
    if not command.padded:
        return Job(command, ids_T, packed, None if command.every_row else packed.last_rows)
    padded = AttnMeta.padded(command.lens, causal=causal, device=device)
    filled_T = F.pad(ids_T, (0, len(padded.positions_T) - len(ids_T)))
    rows_T = torch.zeros_like(filled_T).index_copy(0, packed.padded_rows_T, ids_T)
    return Job(command, rows_T, padded, packed.padded_rows_T if command.every_row else padded.last_rows)


class ComputedStage:
    """The layers of a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device, self.dtype = stage, stage.device, stage.dtype
        self.vocab, self.max_positions = stage.spec.vocab, stage.spec.max_positions
        self.hidden, self.result_width = stage.spec.hidden, stage.spec.vocab

    def prepare(self, command: Message) -> Job:
        return prepare(command, self.device, self.stage.spec.causal)

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor:
        """h [T, D], or on the last stage logits [R, V]."""
        h: Tensor = self.stage(job.ids_T if x_TD is None else x_TD, job.meta, rows=job.rows_R)
        return h


class EmulatedStage:
    """Sleeps as long as the command says, and passes rows of real size on.

    Column 0 has the ids; every stage adds 1, so a result shows its tokens and the number of stages it went through.
    """

    vocab = 2**23
    """Whole numbers to twice as many are the same in fp32."""
    max_positions = sys.maxsize

    def __init__(self, hidden: int, last: bool) -> None:
        self.hidden = self.result_width = hidden
        self.last, self.device, self.dtype = last, torch.device("cpu"), torch.float32

    def prepare(self, command: Message) -> Job:
        return prepare(command, self.device)

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor:
        """[T, D], or on the last stage [R, D]."""
        end_s = time.perf_counter() + 1e-6 * job.command.emulated_us
        if x_TD is None:
            x_TD = torch.empty(len(job.ids_T), self.hidden)
            x_TD[:, 0] = job.ids_T
        x_TD[:, 0] += 1
        if self.last and job.rows_R is not None:
            x_TD = x_TD.index_select(0, job.rows_R)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return x_TD
