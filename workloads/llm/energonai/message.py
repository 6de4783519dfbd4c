"""What the engine and the ranks say to each other: whole numbers in a fixed layout, over gloo, never pickles.

A message is HEADER words, and behind them as many as it says: the lengths and ids of a batch, or a text's bytes.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

HEADER = 7
"""Words, int64: kind, ticket, sequences, further words, padded, every_row, emulated_us."""


class Kind(IntEnum):
    """What a message means."""

    RUN = 1
    """To all ranks: execute this batch."""
    STOP = 2
    """To all ranks: execute what came before, then end."""
    ABORT = 3
    """To all ranks: the text says what failed."""
    RESULT = 4
    """To the engine: the result of a ticket follows."""
    FAILED = 5
    """To the engine: the text says what."""
    STOPPED = 6
    """To the engine: this rank has executed everything, and waits for END."""
    END = 7
    """To all ranks: all have executed everything, nothing can fail any more."""


@dataclass(frozen=True)
class Message:
    """A command, or a report."""

    kind: Kind
    ticket: int = 0
    lens: tuple[int, ...] = ()
    """Tokens of each sequence."""
    words: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [T]: the ids of all sequences, one after the other, without padding; or the bytes of a text."""
    padded: bool = False
    """Compute on rows filled up to the longest sequence, instead of the tokens alone."""
    every_row: bool = False
    """Wanted are the logits of every token, not only of each sequence's last."""
    emulated_us: int = 0
    """How long an emulated stage takes."""

    @classmethod
    def text(cls, kind: Kind, text: str) -> Message:
        return cls(kind, words=torch.tensor(list(text.encode()), dtype=torch.int64))

    def with_ticket(self, ticket: int) -> Message:
        return replace(self, ticket=ticket)

    def read_text(self) -> str:
        return bytes(self.words.tolist()).decode()

    def parts(self) -> list[Tensor]:
        """The header, and the rest where there is any."""
        size = len(self.lens) + len(self.words)
        flags = (self.padded, self.every_row, self.emulated_us)
        header = torch.tensor([self.kind, self.ticket, len(self.lens), size, *flags], dtype=torch.int64)
        rest = torch.cat([torch.tensor(self.lens, dtype=torch.int64), self.words])
        return [header, rest] if size else [header]


def send(
    message: Message, to: list[int], group: dist.ProcessGroup | None, timeout: datetime.timedelta | None = None
) -> None:
    """To several ranks at once; returns when all have taken it.

    Raises RuntimeError if one is gone, or has not taken it within `timeout` (None: the group's).
    """
    works = [dist.isend(part, rank, group=group) for part in message.parts() for rank in to]
    for work in works:
        if work is not None:
            work.wait(timeout) if timeout is not None else work.wait()


def receive(source: int, group: dist.ProcessGroup | None) -> Message:
    """The next message of that rank. Raises RuntimeError if it is gone."""
    header = torch.empty(HEADER, dtype=torch.int64)
    dist.recv(header, source, group=group)
    kind, ticket, sequences, size, padded, every_row, emulated_us = header.tolist()
    rest = torch.empty(size, dtype=torch.int64)
    if size:
        dist.recv(rest, source, group=group)
    lens = tuple(rest[:sequences].tolist())
    return Message(Kind(kind), ticket, lens, rest[sequences:], bool(padded), bool(every_row), emulated_us)
