"""What the first stage tells all stages to do with their arenas, as integers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What happens to the blocks of a request."""

    PLACE = 0
    """Host blocks are copied to device blocks at once, without the link: what a prefill would have left."""
    KEEP = 1
    """Device blocks are copied to host blocks at once, without the link."""
    FETCH = 2
    """Host blocks start over the link to device blocks."""
    WAIT = 3
    """Returns when what was fetched is there."""
    OFFLOAD = 4
    """Device blocks start over the link to host blocks."""
    LEAVE = 5
    """Its device blocks are no longer its own, though what was offloaded may still be read; nothing is fetched."""
    FORGET = 6
    """Nothing on its way is wanted; returns when nothing moves."""


class Order(NamedTuple):
    """One of them, for one request; pairs: (from block, to block)."""

    kind: Kind
    owner: int
    pairs: Sequence[tuple[int, int]] = ()


def to_words(orders: Iterable[Order]) -> list[int]:
    """Kind, owner, number of pairs, pairs; one order after the other."""
    words: list[int] = []
    for order in orders:
        words += [order.kind, order.owner, len(order.pairs)]
        words += [block for pair in order.pairs for block in pair]
    return words


def from_words(words: Sequence[int]) -> Iterator[Order]:
    """The orders that `to_words` has written."""
    at = 0
    while at < len(words):
        kind, owner, count = words[at : at + 3]
        blocks = words[at + 3 : at + 3 + 2 * count]
        yield Order(Kind(kind), owner, list(zip(blocks[::2], blocks[1::2], strict=True)))
        at += 3 + 2 * count
