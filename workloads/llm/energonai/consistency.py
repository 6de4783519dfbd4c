"""The distributed consistency queue: every rank executes tickets in one order, however its threads picked them up."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")

TICKETS = 10_000
"""Numbers of tickets; behind the last one comes 0 again."""


class ConsistencyQueue(Generic[Item]):
    """Items go in under their tickets in any order and come out in the order 0, 1, 2, ..., TICKETS - 1, 0, ...

    As long as fewer than TICKETS are under way, no two of them have the same ticket.
    """

    def __init__(self, tickets: int = TICKETS) -> None:
        self._tickets, self._next = tickets, 0
        self._items: dict[int, Item] = {}
        self._changed = threading.Condition()

    def put(self, ticket: int, item: Item) -> None:
        """Never waits. Raises ValueError for a ticket that is here already."""
        with self._changed:
            if ticket in self._items:
                raise ValueError(f"ticket {ticket} came twice")
            self._items[ticket] = item
            self._changed.notify_all()

    def pop(self) -> Item:
        """The item of the next ticket; waits for it, whatever else has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._next in self._items)
            item = self._items.pop(self._next)
            self._next = after(self._next, self._tickets)
            return item


def after(ticket: int, tickets: int = TICKETS) -> int:
    """The ticket behind this one."""
    return (ticket + 1) % tickets
