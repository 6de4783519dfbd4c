"""Notices that a rank is gone, and knows which: one that fails because of it can say so."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from saih.errors import SaihError

AT_MOST_S = 10.0
"""From the failure of a message to the news of who is gone: their connections break at the same moment."""
IDLE = datetime.timedelta(days=7)
"""A rank may be silent for so long. One that dies is noticed by its connections, not by this."""


class Watch:
    """A thread for each other rank waits for a word that only comes when all is well: its connection breaks before.

    The first rank that goes is the one that was lost; others end because of it.
    """

    def __init__(self) -> None:
        """All ranks make one together."""
        self.lost: int | None = None
        self._known = threading.Event()
        self._threads: list[threading.Thread] = []
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=IDLE)
            self._others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
            self._threads = [threading.Thread(target=self._listen, args=(rank,), daemon=True) for rank in self._others]
            for thread in self._threads:
                thread.start()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """A message that fails in here becomes a SaihError: which rank was lost, and `what` was going on."""
        try:
            yield
        except RuntimeError as error:
            if self._group is None or not self._known.wait(AT_MOST_S):
                raise
            raise SaihError(f"rank {self.lost} was lost in {what}") from error

    def close(self) -> None:
        """All ranks are well, and part."""
        if self._group is None:
            return
        words = [dist.isend(torch.ones(1), rank, group=self._group) for rank in self._others]
        for word in words:
            if word is not None:
                word.wait()
        for thread in self._threads:
            thread.join()
        dist.destroy_process_group(self._group)

    def _listen(self, rank: int) -> None:
        try:
            dist.recv(torch.empty(1), rank, group=self._group)
        except RuntimeError:
            if not self._known.is_set():
                self.lost = rank
                self._known.set()
