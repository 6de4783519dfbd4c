"""Batches that take turns on S pipeline stages, whose keys and values come and go; any clock, any link.

Where one stage stands for all, they are alike, so each is busy with the same batch for the same time: a batch that took
T on this stage is back after S T, when it has been through all of them. Where all are there, so many batches are in
flight, and one is back when its tokens have come. What is decided for the first stage holds for each: all do the same
in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from saih.errors import SaihError
from workloads.llm.costs import CostModel
from workloads.llm.pipemax.compose import MOST_SKIPPED, Candidate, Held, compose
from workloads.llm.pool import PooledState
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import BatchPlan

GROWTH = 1.05
"""A batch may take so much longer than the mean of the last rotation. Our choice."""
MOST_NEW = 256
"""Of those that wait in the pool so many, the oldest, are looked at for a batch: a longer line costs no time."""
WATERMARK = 0.02
"""Of the device's blocks that stay free for growth when a request comes in."""


class Beside(NamedTuple):
    """What a batch takes on this stage beside its step."""

    activation_s: float = 0.0
    """Waited for what the stage before has computed."""
    blocks_s: float = 0.0
    """Waited until blocks that it writes to have left."""
    prompts_s: float = 0.0
    """For the prompts that joined it."""


class Device(Protocol):
    """The stage: its clock, its computation, and its link to the host."""

    @property
    def depth(self) -> int:
        """Batches in flight: as many as there are stages; 1 where one stands for all."""

    def now_s(self) -> float:
        """Time since the serving began."""

    def wait_until(self, then_s: float) -> None:
        """Returns when `now_s()` is `then_s` or later."""

    def launch(self, plan: BatchPlan) -> Beside:
        """Starts a batch; returns when this stage has run it, or earlier."""

    def collect(self) -> list[int]:
        """Waits for the oldest batch not yet collected; a token for each of its requests."""

    def stage_s(self, took_s: float, predicted_s: float) -> float:
        """What a step takes on each of the other stages that took so long on this one; without prompts."""

    def place(self, request: Request) -> None:
        """Its keys and values are on the device, as a prefill that ran here would have left them; of a request that the
        pool has nothing of, from its first step on, which computes them."""

    def fetch(self, request: Request) -> None:
        """Starts copying them from the host, beside the computation."""

    def wait(self, request: Request) -> None:
        """Until what was fetched is there."""

    def offload(self, request: Request) -> None:
        """Starts copying what the host does not have yet."""

    def evict(self, request: Request) -> None:
        """Its blocks may be overwritten by what is fetched or computed next, once the host has all of it."""

    def forget(self, request: Request) -> None:
        """It has ended: returns when nothing of it is moving."""

    def fetch_bytes_per_s(self) -> float:
        """What the link to the device gives."""


def written(request: Request) -> int:
    """Tokens of which the device has keys and values, once what was launched has run."""
    return request.computed + request.in_flight


@dataclass(frozen=True)
class Policy:
    """How a variant differs.

    Attributes:
        slots: batches that take turns.
        stages: a batch is back after so many times its own step.
        steal: batches are kept equally large; without it a request stays in the batch it came into.
        offload: batches that wait may leave the device.
        phases: prompts are computed in a phase of their own; otherwise each with the step of the batch it joins.
        fixed_share: of the device's blocks that are fetched in a step; 0 = as many as its time allows.
    """

    slots: int
    stages: int
    steal: bool = True
    offload: bool = False
    phases: bool = True
    fixed_share: float = 0.0


@dataclass
class Turn:
    """A batch that has run."""

    begin_s: float
    end_s: float
    predicted_s: float
    """Of decoding alone."""
    lengths: list[int]
    """Tokens that each of its requests attends to."""
    stalled_s: float
    """Waited for what was fetched, and for blocks that had to leave."""
    bubble_s: float
    """Waited for the batch to come back from the other stages."""
    beside: Beside
    fetched_blocks: int

    @property
    def computed_s(self) -> float:
        """Of decoding alone."""
        return self.end_s - self.begin_s - sum(self.beside)

    @property
    def requests(self) -> int:
        return len(self.lengths)


@dataclass
class Rotation:
    """Decodes a pool of prefilled requests in turns. `turns` tells what happened."""

    state: PooledState
    policy: Policy
    device: Device
    model: CostModel
    block_bytes: int
    max_requests: int = 256
    turns: list[Turn] = field(default_factory=list)
    _slots: list[dict[int, Request]] = field(init=False)
    _ready_s: list[float] = field(init=False)
    _shared: list[Request] = field(default_factory=list, init=False)
    """Members of no batch for a moment: too many in one, not yet in the next."""
    _saturated: int = field(default=0, init=False)
    """Turns since all that was wanted could be fetched."""
    _skipped: dict[int, int] = field(default_factory=dict, init=False)
    """Turns of its batch that a member waited for."""
    _overtaken: dict[int, int] = field(default_factory=dict, init=False)
    """Turns of all batches in which a younger one came out of the pool."""
    _flying: deque[BatchPlan] = field(default_factory=deque, init=False)
    _waited_s: float = field(default=0.0, init=False)
    """For tokens of batches in flight, since the last turn."""

    def __post_init__(self) -> None:
        self._slots = [{} for _ in range(self.policy.slots)]
        self._ready_s = [0.0] * self.policy.slots

    def serve(self, requests: Sequence[Request]) -> None:
        """Until all have ended. Raises SaihError for one that could never run."""
        for request in requests:
            self.state.submit(request)
        self.state.admit()
        if self.policy.steal:
            self._place_all()
        else:
            for slot in range(self.policy.slots):
                self._place(slot)
        turn = idle = 0
        while self.state.busy:
            self.state.admit()
            slot = turn % self.policy.slots
            ran = self._turn(slot)
            idle = 0 if ran else idle + 1
            if idle > 2 * self.policy.slots + self.device.depth:
                raise SaihError(f"{len(self.state.running) + len(self.state.pooled)} requests wait, and none can run")
            turn += 1

    def _turn(self, slot: int) -> bool:
        following = (slot + 1) % self.policy.slots
        while any(each.in_flight for each in self._slots[slot].values()):
            self._collect(len(self._flying) - 1)
        self._forget_the_ended(slot)
        if not any(self._resident(each) for each in self._slots[slot].values()):
            self._fill(slot, at_once=True)
        batch = [each for each in self._slots[slot].values() if self._resident(each)][: self.max_requests]
        begin_s = self.device.now_s()
        for request in batch:
            self.device.wait(request)
        stalled_s = self.device.now_s() - begin_s
        batch = [each for each in batch if self._grow(each, slot)]
        batch = [each for each in batch if self._resident(each)]
        if not batch:
            self._fill(following)
            self._collect(0)
            return False
        plan = BatchPlan(batch, [1] * len(batch))
        lengths = [request.context_tokens for request in batch]
        predicted_s = self.model.step_s(plan.load())
        fetched = self._fill(following, predicted_s, running=slot)
        waited_s = self.device.now_s()
        self.device.wait_until(self._ready_s[slot])
        begin_s = self.device.now_s()
        bubble_s, self._waited_s = self._waited_s + begin_s - waited_s, 0.0
        self.state.launch(plan)
        beside = self.device.launch(plan)
        end_s = self.device.now_s()
        if self.device.depth == 1:
            stage_s = self.device.stage_s(end_s - begin_s - beside.prompts_s, predicted_s) + beside.prompts_s
            self._ready_s[slot] = begin_s + self.policy.stages * stage_s
        stalled_s += beside.blocks_s
        self.turns.append(Turn(begin_s, end_s, predicted_s, lengths, stalled_s, bubble_s, beside, fetched))
        self._flying.append(plan)
        if self.policy.offload:
            for request in batch:
                if self._goes_on(request) and self._unsaved(request) >= self.state.blocks.block_size:
                    self.device.offload(request)
        self._collect(self.device.depth - 1)
        return True

    def _collect(self, most: int) -> None:
        """Books the oldest batches, as they return, until at most so many are in flight."""
        while len(self._flying) > most:
            begin_s, plan = self.device.now_s(), self._flying.popleft()
            tokens = self.device.collect()
            now_s = self.device.now_s()
            self._waited_s += now_s - begin_s
            self.state.complete(plan, tokens, now_s)
            for request in plan.requests:
                if request.phase is not Phase.RUNNING:
                    self.device.forget(request)

    def _goes_on(self, request: Request) -> bool:
        """Whether the token that it gets now is not its last."""
        return len(request.generated) + request.in_flight < request.max_new_tokens

    def _resident(self, request: Request) -> bool:
        return bool(self.state.blocks.table(request.id))

    def _unsaved(self, request: Request) -> int:
        return written(request) - self.state.pool.stored_tokens(request.id)

    def _forget_the_ended(self, slot: int) -> None:
        """Cancelled ones too, which no batch brought back."""
        members, running = self._slots[slot], self.state.running
        for request in [each for key, each in members.items() if key not in running]:
            self.device.forget(request)
            del members[request.id]

    def _grow(self, request: Request, slot: int) -> bool:
        """Whether the request has a block for its next token; it waits for its next turn otherwise."""
        if not self._resident(request):
            return False
        if self.state.blocks.grow(request.id, request.context_tokens):
            return True
        return self._make_room(1, slot, (slot + 1) % self.policy.slots) and self.state.blocks.grow(
            request.id, request.context_tokens
        )

    def _make_room(self, blocks: int, running: int, following: int) -> bool:
        """Takes blocks of batches whose turn is furthest away; the running and the next one keep theirs."""
        if not self.policy.offload:
            return self._preempt(blocks, running)
        return self._evict(self._leaving(running, following), blocks) or self._preempt(blocks, running)

    def _preempt(self, blocks: int, running: int) -> bool:
        """The newest go back to the pool until there is room."""
        for request in reversed(list(self.state.running.values())):
            if self.state.blocks.free_blocks >= blocks:
                return True
            if self._resident(request) and not request.in_flight:
                self.device.evict(request)
                for members in self._slots:
                    members.pop(request.id, None)
                self._shared = [each for each in self._shared if each is not request]
                self.state.suspend(request)
        return self.state.blocks.free_blocks >= blocks

    def _fill(self, slot: int, step_s: float = 0.0, running: int = -1, *, at_once: bool = False) -> int:
        """Makes the next batch up; blocks that will be fetched for it. at_once: the device is idle, wait for one."""
        self._forget_the_ended(slot)
        if self.policy.steal:
            self._balance(slot)
        if not self.policy.offload:
            self._place(slot)
            return 0
        return self._fetch(slot, step_s, running, at_once)

    def _balance(self, slot: int) -> None:
        """The batch gets its share of all members: what it has beyond goes to the next ones."""
        members = self._slots[slot]
        share = -(-len(self.state.running) // self.policy.slots)
        while len(members) > share:
            key = next(reversed(members))
            self._shared.append(members.pop(key))
        self._shared = [each for each in self._shared if each.id in self.state.running]
        while self._shared and len(members) < share:
            request = self._shared.pop(0)
            members[request.id] = request

    def _place(self, slot: int) -> None:
        """Resident variants: requests come in as soon as there is room, oldest first."""
        members = self._slots[slot]
        size = self.state.blocks.blocks
        while self.state.pooled and len(members) < self.max_requests:
            request = next(iter(self.state.pooled.values()))
            needed = self.state.blocks.blocks_for(request.context_tokens)
            spare = 1 + int(WATERMARK * size)
            free = self.state.blocks.free_blocks
            if not self.policy.steal:  # each batch has its own part of the cache
                held = sum(len(self.state.blocks.table(key)) for key in members)
                free = min(free, size // self.policy.slots - held) if members else free
                spare = spare // self.policy.slots if members else 0
            elif len(members) > len(self.state.running) // self.policy.slots:
                return
            if free < needed + (spare if self.state.running else 0):
                return
            self._enter(request, slot)

    def _place_all(self) -> None:
        """What a prefill phase leaves: the device full, batches equally large."""
        spare = 1 + int(WATERMARK * self.state.blocks.blocks)
        for place, request in enumerate(list(self.state.pooled.values())):
            needed = self.state.blocks.blocks_for(request.context_tokens)
            if self.state.blocks.free_blocks < needed + (spare if place else 0):
                return
            self._enter(request, place % self.policy.slots)

    def _enter(self, request: Request, slot: int) -> None:
        self.state.blocks.grow(request.id, request.context_tokens)
        self.state.start(request)
        self._slots[slot][request.id] = request
        self.device.place(request)

    def _fetch(self, slot: int, step_s: float, running: int, at_once: bool) -> int:
        """Within what the link moves during the step: members that are away, then new ones."""
        members = self._slots[slot]
        budget = self._budget(step_s)
        here: list[Request] = []
        away: list[Request] = []
        for member in members.values():
            (here if self._resident(member) else away).append(member)
        target_s = self._mean_step_s() if step_s else 0.0
        new = list(islice(self.state.pooled.values(), min(MOST_NEW, self.max_requests - len(members))))
        if any(each.id in self._skipped for each in away) and len(away) > len(here):
            new = []  # more members than are fetched in time: no others for now
        held = Held(len(here), sum(each.context_tokens for each in here))
        candidates = [self._candidate(each) for each in [*away, *new]]
        if at_once and not here and candidates:
            chosen = [min(candidates, key=lambda each: each.blocks)]
        else:
            chosen = compose(held, candidates, budget, self.model, target_s)
            if not chosen and candidates and max(each.skipped for each in candidates) >= MOST_SKIPPED:
                chosen = [max(candidates, key=lambda each: each.skipped)]  # late, rather than never
        by_id = {each.id: each for each in [*away, *new]}
        fetched = 0
        spare = 0 if at_once else 1 + int(WATERMARK * self.state.blocks.blocks)
        leaving = self._leaving(running, slot)
        for each in chosen:
            request = by_id[each.id]
            room = self._evict(leaving, each.blocks + spare)
            if not room and not (running < 0 and self._make_room(each.blocks + spare, slot, slot)):
                break
            self.state.blocks.grow(request.id, request.context_tokens)
            if request.id in self.state.pooled:
                self.state.start(request)
                members[request.id] = request
            self.device.fetch(request)
            for waits in (self._skipped, self._overtaken):
                waits.pop(request.id, None)
            fetched += each.blocks
        self._saturated = self._saturated + 1 if fetched < sum(each.blocks for each in candidates) else 0
        for request in away:
            if not self._resident(request):
                self._skipped[request.id] = self._skipped.get(request.id, 0) + 1
        started = [place for place, each in enumerate(new) if each.phase is Phase.RUNNING]
        for request in new[: max(started, default=0)]:
            if request.phase is not Phase.RUNNING:
                self._overtaken[request.id] = self._overtaken.get(request.id, 0) + 1
        return fetched

    def _leaving(self, running: int, following: int) -> Iterator[Request]:
        """Of the waiting batches, the one whose turn is furthest away first."""
        slots = self.policy.slots
        waiting = [] if running < 0 else [(running - back) % slots for back in range(1, slots)]
        for slot in waiting:
            if slot != following:
                yield from list(self._slots[slot].values())

    def _evict(self, leaving: Iterator[Request], blocks: int) -> bool:
        """Takes blocks of these, one after the other, until so many are free; whether they are."""
        while self.state.blocks.free_blocks < blocks:
            request = next(leaving, None)
            if request is None:
                return False
            if self._resident(request):
                self.device.evict(request)
                self.state.blocks.release(request.id)
        return True

    def _budget(self, step_s: float) -> int:
        """Blocks that can be fetched: P = T_exec x BW_eff, or a fixed share of the device."""
        if self.policy.fixed_share:
            return int(self.policy.fixed_share * self.state.blocks.blocks)
        return int(step_s * self.device.fetch_bytes_per_s() / self.block_bytes)

    def _mean_step_s(self) -> float:
        """Of the last rotation; 0 while the link and the device could take more in it."""
        last = self.turns[-self.policy.slots :]
        if self._saturated < self.policy.slots:
            return 0.0
        return GROWTH * sum(each.predicted_s for each in last) / len(last)

    def _candidate(self, request: Request) -> Candidate:
        """A rotation in which it was overtaken counts as one in which its batch ran without it."""
        tokens = request.context_tokens
        skipped = self._skipped.get(request.id, 0) + self._overtaken.get(request.id, 0) // self.policy.slots
        return Candidate(request.id, tokens, self.state.blocks.blocks_for(tokens), skipped)
