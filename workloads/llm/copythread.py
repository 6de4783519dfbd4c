"""Blocks on their way between two arenas, moved by a thread beside the computation in the order of their urgency."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from saih.errors import SaihError
from workloads.llm.kv import EmulatedLink, PagedKV, copy_blocks
from workloads.llm.transfer import CopyQueue, Transfer, Urgency

RATE_CHUNKS = 64
"""Chunks over which the rate is averaged."""


@dataclass(eq=False)
class BlockTransfer(Transfer):
    """Blocks of one arena on their way to another."""

    source: PagedKV = field(kw_only=True)
    target: PagedKV = field(kw_only=True)
    chunks: Sequence[Sequence[tuple[int, int]]] = field(kw_only=True)
    """(source block, target block) of each chunk."""
    behind: Sequence[BlockTransfer] = ()
    """Those that go first: they write what this one reads, or read what it overwrites."""
    after: torch.cuda.Event | None = None
    """On CUDA: the computation that wrote the source, or read the target, before the transfer was asked for."""
    arrived: threading.Event = field(default_factory=threading.Event)

    def ready(self, now_s: float) -> bool:
        return all(each.done for each in self.behind)


class CopyThread:
    """Moves blocks in a thread of its own over one direction of a link, real or emulated, one chunk at a time.

    On CUDA the thread has a stream of its own, orders it behind the computation by events, and waits for every chunk.
    A transfer may have to wait for others, of this thread or of one `beside` it; meanwhile the next ones go.
    An error in the thread is raised by the next `wait`.
    """

    def __init__(
        self,
        link: EmulatedLink | None = None,
        *,
        order: str = "priority",
        chunk_bytes: int = 1 << 20,
        device: torch.device | str = "cpu",
        beside: CopyThread | None = None,
    ) -> None:
        self.link, self.chunk_bytes = link, chunk_bytes
        self._queue = CopyQueue(order)
        self._rates: deque[tuple[int, float]] = deque(maxlen=RATE_CHUNKS)
        self._changed: threading.Condition = beside._changed if beside else threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self._moving: Transfer | None = None
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def submit(
        self,
        urgency: Urgency,
        source: PagedKV,
        target: PagedKV,
        pairs: Sequence[tuple[int, int]],
        behind: Sequence[BlockTransfer] = (),
    ) -> BlockTransfer:
        """Asks for copies (source block, target block), which begin when those of `behind` have ended or were dropped.

        No block may be given to anybody else until they are there.
        """
        size = max(1, self.chunk_bytes // source.block_bytes)
        chunks = [pairs[first : first + size] for first in range(0, len(pairs), size)]
        transfer = BlockTransfer(
            urgency,
            [len(each) * source.block_bytes for each in chunks],
            source=source,
            target=target,
            chunks=chunks,
            behind=behind,
        )
        if self._stream is not None:
            transfer.after = torch.cuda.Event()
            transfer.after.record()
        if transfer.done:
            transfer.arrived.set()
        else:
            with self._changed:
                self._queue.add(transfer)
                self._changed.notify_all()
        return transfer

    def wait(self, transfer: BlockTransfer) -> float:
        """Until the transfer has arrived, before all others; seconds waited. Raises SaihError if copying failed."""
        begin_s = time.perf_counter()
        if not transfer.arrived.is_set():
            with self._changed:
                self._queue.hurry(transfer)
            while not transfer.arrived.wait(1.0) and self._error is None:
                pass
        self.raise_error()
        return time.perf_counter() - begin_s

    def raise_error(self) -> None:
        """Raises SaihError if copying failed."""
        if self._error is not None:
            raise SaihError(f"a copy of blocks failed: {self._error}") from self._error

    def drop(self, transfer: BlockTransfer) -> None:
        """Nobody wants the rest; returns when no chunk of it is moving."""
        with self._changed:
            transfer.dropped = True
            self._changed.notify_all()  # those behind it may begin
            self._changed.wait_for(lambda: self._moving is not transfer)

    def bytes_per_s(self, default: float) -> float:
        """What the link gave over the last chunks, waiting for work not counted; `default` before there were any."""
        rates = list(self._rates)
        took_s = sum(seconds for _, seconds in rates)
        return sum(moved for moved, _ in rates) / took_s if took_s else default

    def close(self) -> None:
        """Ends the thread; what was not moved stays where it is."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (transfer := self._take()) is not None:
            begin_s = time.perf_counter()
            try:
                self._copy(transfer)
            except Exception as error:  # whoever waits is told; nothing more moves
                with self._changed:
                    self._error, self._moving = error, None
                    self._changed.notify_all()
                return
            end_s = time.perf_counter()
            self._rates.append((transfer.chunk_bytes[transfer.moved], end_s - begin_s))
            self._book(transfer, end_s)

    def _take(self) -> BlockTransfer | None:
        """The transfer to move a chunk of now, as soon as there is one; None at the end."""
        with self._changed:
            while not self._closing and (transfer := self._queue.next()) is None:
                self._changed.wait()
            if self._closing:
                return None
            self._moving = transfer
            return cast(BlockTransfer, transfer)

    def _copy(self, transfer: BlockTransfer) -> None:
        source_blocks, target_blocks = zip(*transfer.chunks[transfer.moved], strict=True)
        if self._stream is None:
            copy_blocks(transfer.source, transfer.target, source_blocks, target_blocks, self.link)
            return
        with torch.cuda.stream(self._stream):
            if transfer.after is not None:
                self._stream.wait_event(transfer.after)
            copy_blocks(transfer.source, transfer.target, source_blocks, target_blocks, self.link)
        self._stream.synchronize()

    def _book(self, transfer: BlockTransfer, now_s: float) -> None:
        with self._changed:
            transfer.moved += 1
            self._moving = None
            if transfer.done:
                transfer.ended_s = now_s
                transfer.arrived.set()
            self._changed.notify_all()
