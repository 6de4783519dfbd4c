"""What runs next: the batch plan, what a server knows about its requests, and first come, first served.

A scheduler is any object with `next_batch(state) -> BatchPlan | None`. It works on integers alone, so the same one runs
in real and in simulated time.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator
from workloads.llm.request import Phase, Request


class Load(NamedTuple):
    """What one batch asks of the device; the terms of the cost model."""

    decodes: int
    """Requests that run one token, whose cache holds all before it."""
    context_tokens: int
    """Sum of the lengths they attend to."""
    longest_tokens: int
    """The longest of these lengths."""
    prefill_tokens: int
    """Tokens of all other requests."""


@dataclass(slots=True)
class BatchPlan:
    """One iteration: `tokens[i]` tokens of `requests[i]` from its position `computed` on.

    `evicted` lost their blocks to make room.
    """

    requests: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    evicted: list[Request] = field(default_factory=list)

    def add(self, request: Request, tokens: int) -> None:
        self.requests.append(request)
        self.tokens.append(tokens)

    def sampled(self) -> list[Request]:
        """The requests that get a token from this batch: those of which nothing stays pending."""
        pairs = zip(self.requests, self.tokens, strict=True)
        return [request for request, tokens in pairs if tokens == request.pending]

    def load(self) -> Load:
        decodes = context = longest = prefill = 0
        for request, tokens in zip(self.requests, self.tokens, strict=True):
            if tokens == 1 and request.computed:
                length = request.computed + 1
                decodes += 1
                context += length
                longest = max(longest, length)
            else:
                prefill += tokens
        return Load(decodes, context, longest, prefill)


def refuse_what_cannot_run(
    requests: Iterable[Request], blocks: int, block_size: int, max_positions: int | None
) -> None:
    """Before anything is computed. Raises SaihError for a request that exceeds the cache or the model's positions."""
    state = ServerState(BlockAllocator(blocks, block_size), max_positions)
    for request in requests:
        state.submit(request)


class ServerState:
    """Requests in order of arrival, waiting or running, and the blocks they hold."""

    def __init__(self, blocks: BlockAllocator, max_positions: int | None = None, vocabulary: int | None = None) -> None:
        """`max_positions` and `vocabulary` are the model's; in simulated time there may be none."""
        self.blocks = blocks
        self.max_positions, self.vocabulary = max_positions, vocabulary
        self.depth = 1
        """Batches in flight at a time, one for each pipeline stage; `serve` sets it."""
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._present: set[int] = set()
        """Ids of those waiting or running: blocks belong to ids, so no two may share one."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def share(self, requests: int) -> int:
        """How many of these requests one batch may take, so that there are some for every batch in flight."""
        return -(-requests // self.depth)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises SaihError for one that could never finish, was served before, or whose id is in use.
        """
        where = f"request {request.id}"
        if request.phase is not Phase.WAITING:
            raise SaihError(f"{where} is {request.phase.value}: only one that was never served can be submitted")
        if request.id in self._present:
            raise SaihError(f"{where}: another request with this id is waiting or running")
        if not request.prompt or request.max_new_tokens < 1:
            raise SaihError(f"{where}: a request needs a prompt and at least one new token")
        if self.vocabulary is not None and not 0 <= min(request.prompt) <= max(request.prompt) < self.vocabulary:
            raise SaihError(f"{where}: its prompt has tokens outside the vocabulary of {self.vocabulary}")
        room = self.blocks.blocks * self.blocks.block_size
        if request.longest_kv_tokens > room:
            raise SaihError(
                f"{where}: {len(request.prompt)} prompt and {request.max_new_tokens} new tokens exceed the KV cache, "
                f"which holds {room} tokens"
            )
        if self.max_positions is not None and request.longest_kv_tokens > self.max_positions:
            raise SaihError(
                f"{where}: {len(request.prompt)} prompt and {request.max_new_tokens} new tokens exceed the model's "
                f"{self.max_positions} positions"
            )
        self.waiting.append(request)
        self._present.add(request.id)

    def start(self, request: Request) -> None:
        """The first of those waiting runs from now on."""
        self.waiting.popleft()
        request.phase = Phase.RUNNING
        self.running[request.id] = request

    def preempt(self, request: Request) -> None:
        """Takes the request's blocks and puts it first in line; its keys and values will be computed again."""
        self._leave(request, Phase.WAITING)
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def cancel(self, request: Request) -> None:
        """Ends the request; the blocks of one in flight are free when its batch has returned.

        One that has not arrived yet is never submitted.
        """
        if request.phase is Phase.WAITING and request not in self.waiting:
            request.phase = Phase.CANCELLED
            return
        if request.phase is Phase.WAITING:
            self.waiting.remove(request)
        if request.in_flight:
            request.phase = Phase.CANCELLED
        elif request.phase in (Phase.WAITING, Phase.RUNNING):
            self._leave(request, Phase.CANCELLED)

    def launch(self, plan: BatchPlan) -> None:
        """The plan's requests are in flight until `complete`."""
        for request in plan.requests:
            request.in_flight = True

    def complete(self, plan: BatchPlan, tokens: Sequence[int], now_s: float) -> list[Request]:
        """Books a batch that has returned with one token for each of `plan.sampled()`; returns those still wanted."""
        chosen = iter(tokens)
        emitted = []
        for request, ran in zip(plan.requests, plan.tokens, strict=True):
            token = next(chosen) if ran == request.pending else None
            request.in_flight = False
            request.computed += ran
            if request.phase is Phase.CANCELLED:
                self._leave(request, Phase.CANCELLED)
            elif token is not None:
                emitted.append(request)
                if request.emit(token, now_s):
                    self._leave(request, Phase.FINISHED)
        return emitted

    def _leave(self, request: Request, phase: Phase) -> None:
        request.phase = phase
        self.running.pop(request.id, None)
        self.blocks.release(request.id)
        if phase is not Phase.WAITING:
            self._present.discard(request.id)


class Scheduler(Protocol):
    """Decides what runs; everything else is shared by all systems."""

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        """The next iteration, from requests that are not in flight; None where nothing can run now."""


@dataclass(frozen=True)
class FirstComeFirstServed:
    """Continuous batching with chunked prefill, oldest request first (Orca, OSDI 2022; Sarathi-Serve, OSDI 2024).

    A request is let in once its whole context has blocks. When a running one needs a block and none is free, the newest
    gives up all of its own and is recomputed later. So those running are always the oldest, and the oldest always
    gets on: it fits by itself, or it would have been refused. Nobody comes back in the step that preempted it: the
    blocks it left are fewer than it needs.

    Attributes:
        max_tokens: most tokens in one batch; a longer prompt runs in chunks.
        max_requests: most requests in one batch. With several batches in flight, none takes more than its share of all
            requests: else the first would take every one, and only one pipeline stage would work at a time.
    """

    max_tokens: int
    max_requests: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_requests < 1:
            raise SaihError(
                f"a batch needs at least one token and one request, got max_tokens={self.max_tokens} "
                f"and max_requests={self.max_requests}"
            )

    def next_batch(self, state: ServerState) -> BatchPlan | None:
        plan = BatchPlan()
        budget = self._continue_running(state, plan)
        self._admit_waiting(state, plan, budget)
        return plan if plan.requests else None

    def _continue_running(self, state: ServerState, plan: BatchPlan) -> int:
        budget, most = self.max_tokens, min(self.max_requests, state.share(len(state.running)))
        for request in list(state.running.values()):
            if not budget or len(plan.requests) == most:
                break
            if request.in_flight or request.phase is not Phase.RUNNING:
                continue
            if not self._make_room(state, plan, request):
                break
            tokens = min(request.pending, budget)
            plan.add(request, tokens)
            budget -= tokens
        return budget

    def _make_room(self, state: ServerState, plan: BatchPlan, request: Request) -> bool:
        """Whether the request's context has blocks, after taking those of newer ones if need be."""
        while not state.blocks.grow(request.id, request.context_tokens):
            newest = state.running[next(reversed(state.running))]
            if newest.in_flight:
                return False
            state.preempt(newest)
            plan.evicted.append(newest)
            if newest is request:
                return False
        return True

    def _admit_waiting(self, state: ServerState, plan: BatchPlan, budget: int) -> None:
        most = min(self.max_requests, state.share(len(state.running) + len(state.waiting)))
        while state.waiting and budget and len(plan.requests) < most:
            request = state.waiting[0]
            if not state.blocks.grow(request.id, request.context_tokens):
                break
            state.start(request)
            tokens = min(request.pending, budget)
            plan.add(request, tokens)
            budget -= tokens
