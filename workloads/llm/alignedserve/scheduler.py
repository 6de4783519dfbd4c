"""What decodes next: one by one in the order of a line, or in batches of like length (arXiv 2605.23389)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from workloads.llm.alignedserve.quadtree import QuadTree, node_of
from workloads.llm.alignedserve.state import DecodeState, Line
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, ServerState

BATCH_SHARE = 0.4
"""Of the device's blocks that a batch may take: room to grow, and for the next batch to come in beside it (Bmax)."""
FEWEST_REQUESTS = 36
"""A batch has this many where the pool does (Kmin)."""
SPARE_SHARE = 0.1
"""Of as many blocks as the device has: what the stage holds for refilling the running batch. Our choice."""
REFILL_LEVELS = 3
"""A batch is refilled from the range of the tree's node so many levels above its own. Our choice: see the README."""
WATERMARK = 0.01
"""Of the device's blocks that stay free when a request joins, so that it is not evicted at once (as in vLLM)."""


def stage_blocks(device_blocks: int) -> int:
    """Blocks of the stage: the next batch, and spare requests."""
    return max(1, int((BATCH_SHARE + SPARE_SHARE) * device_blocks))


@dataclass
class DecodeScheduler:
    """What all variants share: running requests grow, evict where there is no room, and each decodes one token.

    Attributes:
        max_requests: most requests in one batch.
        prefetch: whether what runs next is copied near the device before there is room for it.
    """

    max_requests: int
    prefetch: bool = True

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        assert isinstance(state, DecodeState)  # noqa: S101
        state.admit()
        self._grow(state)
        self._fill(state)
        if not state.running:
            self._start_any(state)
        if self.prefetch:
            self._stock(state)
        running = list(state.running.values())
        return BatchPlan(running, [1] * len(running)) if running else None

    def _fill(self, state: DecodeState) -> None:
        """Starts what there is room for."""
        raise NotImplementedError

    def _stock(self, state: DecodeState) -> None:
        """Chooses what runs next and sends for it."""
        raise NotImplementedError

    def _victim(self, state: DecodeState) -> Request:
        """Who gives up its blocks: the newest."""
        return state.running[next(reversed(state.running))]

    def _grow(self, state: DecodeState) -> None:
        size = state.blocks.block_size
        for request in list(state.running.values()):
            if request.computed % size or request.id not in state.running:
                continue
            while not state.blocks.grow(request.id, request.context_tokens):
                victim = self._victim(state)
                state.suspend(victim)
                if victim is request:
                    break

    def _start_any(self, state: DecodeState) -> None:
        """An idle device waits for whoever is next."""
        raise NotImplementedError

    def _join(self, state: DecodeState, request: Request) -> bool:
        """Starts the request if there is room to spare for it."""
        spare = max(1, int(WATERMARK * state.blocks.blocks))
        needed = state.blocks.blocks_for(request.context_tokens)
        if len(state.running) >= self.max_requests or state.blocks.free_blocks < needed + spare:
            return False
        state.blocks.grow(request.id, request.context_tokens)
        state.start(request)
        return True


@dataclass
class Continuous(DecodeScheduler):
    """Continuous batching in the order of the state's line; nobody overtakes."""

    def _next(self, state: DecodeState) -> Request | None:
        """First in line; those already chosen come first."""
        if state.chosen:
            return next(iter(state.chosen.values()))
        assert isinstance(state.index, Line)  # noqa: S101
        return state.index.first()

    def _start_any(self, state: DecodeState) -> None:
        request = self._next(state)
        if request is not None:
            state.blocks.grow(request.id, request.context_tokens)
            state.start(request)

    def _fill(self, state: DecodeState) -> None:
        while (request := self._next(state)) is not None:
            sent_for = not self.prefetch or request.id in state.chosen
            if not sent_for or not state.mover.arrived(request) or not self._join(state, request):
                return

    def _stock(self, state: DecodeState) -> None:
        assert isinstance(state.index, Line)  # noqa: S101
        while (request := state.index.first()) is not None and state.mover.prefetch(request):
            state.choose(request)


@dataclass
class Aligned(DecodeScheduler):
    """Batches of like length out of the quad-tree, refilled with like lengths, one after the other.

    Every iteration: finished requests make room for spare ones of the nearest lengths; when there are none left, the
    next batch comes in as soon as it fits beside the running one, which goes on until it is done, its longest requests
    giving way where blocks run out. While somebody has waited for longer than `starvation_s`, nobody is refilled, so
    that there is room for the next batch, which is from around the one that has been in the pool for longest.

    Attributes:
        starvation_s: the bound; 0 = none, density alone decides.
        switches: times a batch came in beside another.
        mixed_iterations: iterations with requests of two batches.
    """

    starvation_s: float = 0.0
    switches: int = field(default=0, init=False)
    mixed_iterations: int = field(default=0, init=False)
    _old: dict[int, Request] = field(default_factory=dict, init=False)
    _batch: list[Request] = field(default_factory=list, init=False)
    """The next one; chosen, unless a request has ended meanwhile."""
    _batch_level: int = field(default=0, init=False)
    _level: int = field(default=0, init=False)
    """Of the tree's node that the running batch is from."""
    _spares: dict[int, Request] = field(default_factory=dict, init=False)

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        plan = super().next_batch(state)
        if plan and self._old:
            self._old = {key: each for key, each in self._old.items() if key in state.running}
            self.mixed_iterations += 0 < len(self._old) < len(state.running)
        return plan

    def _fill(self, state: DecodeState) -> None:
        if self._refill(state):
            return
        if not self._batch and not self.prefetch:
            self._choose_batch(state)
        self._switch(state)

    def _refill(self, state: DecodeState) -> bool:
        """Whether the running batch has been filled up, or will be by what is on its way."""
        if not state.running:
            return False
        for request in self._spare(state):
            if not state.mover.arrived(request):
                continue
            if not self._join(state, request):
                return True
            self._spares.pop(request.id, None)
        return bool(self._spares)

    def _spare(self, state: DecodeState) -> Iterator[Request]:
        if not self.prefetch:
            yield from self._like_the_running(state)
            return
        for key in list(self._spares):
            if key in state.chosen:
                yield self._spares[key]
            else:
                del self._spares[key]

    def _like_the_running(self, state: DecodeState) -> Iterator[Request]:
        """In the pool, the nearest lengths first, within REFILL_LEVELS above the batch's node."""
        if self._is_late(state) or not len(_tree(state)):
            return
        new = [each.context_tokens for key, each in state.running.items() if key not in self._old]
        middle = int(sum(new) / len(new)) if new else _mean_context(state)
        yield from _tree(state).nearest(middle, node_of(middle, max(0, self._level - REFILL_LEVELS)))

    def _switch(self, state: DecodeState, wait: bool = False) -> None:
        """The next batch comes in if all of it is ready and fits beside the running one."""
        batch = [each for each in self._batch if each.id in state.chosen]
        needed = sum(state.blocks.blocks_for(each.context_tokens) for each in batch)
        fits = needed <= state.blocks.free_blocks and len(batch) + len(state.running) <= self.max_requests
        if not batch or not fits or not (wait or all(map(state.mover.arrived, batch))):
            self._batch = batch
            return
        self._old = dict(state.running)
        self.switches += bool(self._old)
        for request in batch:
            state.blocks.grow(request.id, request.context_tokens)
            state.start(request)
        self._batch, self._level = [], self._batch_level

    def _start_any(self, state: DecodeState) -> None:
        if not self._batch:  # the spares of a batch that has gone: chosen already, so they are in no other one
            self._batch = [each for key, each in self._spares.items() if key in state.chosen]
            self._batch_level, self._spares = self._level, {}
        if not self._batch:
            self._choose_batch(state)
        self._switch(state, wait=True)

    def _stock(self, state: DecodeState) -> None:
        if not self._batch:
            self._choose_batch(state)
        room = int(SPARE_SHARE * state.blocks.blocks)
        room -= sum(state.blocks.blocks_for(each.context_tokens) for each in self._spares.values())
        if room <= 0 or not state.running:
            return
        for request in self._like_the_running(state):
            room -= state.blocks.blocks_for(request.context_tokens)
            if room < 0 or not state.mover.prefetch(request):
                return
            state.choose(request)
            self._spares[request.id] = request

    def _choose_batch(self, state: DecodeState) -> None:
        most = max(1, int(BATCH_SHARE * state.blocks.blocks))
        longest_waiting = self._starving(state)
        found, node = _tree(state).batch(most, FEWEST_REQUESTS, longest_waiting)
        self._batch, self._batch_level = found[: self.max_requests], node[0]
        for request in self._batch:
            state.choose(request)
            if self.prefetch:
                state.mover.prefetch(request)

    def _starving(self, state: DecodeState) -> Request | None:
        """Who has been in the pool for longest, if that is longer than the bound."""
        if not self.starvation_s or not state.pooled:
            return None
        oldest = next(iter(state.pooled))
        return state.pooled[oldest] if state.now_s() - state.since_s[oldest] > self.starvation_s else None

    def _is_late(self, state: DecodeState) -> bool:
        """Whether somebody waits beyond the bound, in the pool or in the next batch, which needs room."""
        now_s, batch = state.now_s(), [each for each in self._batch if each.id in state.chosen]
        return self._starving(state) is not None or (
            self.starvation_s > 0 and any(now_s - state.since_s[each.id] > self.starvation_s for each in batch)
        )

    def _victim(self, state: DecodeState) -> Request:
        """During a switch the longest of the old batch, else the newest."""
        old = [each for key, each in self._old.items() if key in state.running]
        return max(old, key=lambda each: each.context_tokens) if old else super()._victim(state)


def _tree(state: DecodeState) -> QuadTree:
    assert isinstance(state.index, QuadTree)  # noqa: S101
    return state.index


def _mean_context(state: DecodeState) -> int:
    running = state.running.values()
    return sum(each.context_tokens for each in running) // len(running)
