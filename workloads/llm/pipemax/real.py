"""The stages in real time: rank 0 decides and tells all, each computes its layers and moves its blocks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from workloads.llm.allocator import BlockAllocator
from workloads.llm.kv import PagedKV
from workloads.llm.pipemax.activations import Activations
from workloads.llm.pipemax.arenas import Arenas
from workloads.llm.pipemax.orders import Kind, Order, from_words, to_words
from workloads.llm.pipemax.rotation import Beside, written
from workloads.llm.pool import PooledState
from workloads.llm.prefill import packs, prefilled_tokens
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan
from workloads.llm.worker import Step, Worker

LATELY = 32
"""So many steps tell what speed the stages have that are not there."""


def send(worker: Worker, orders: Sequence[Order], step: Step) -> None:
    """Rank 0 to all others: orders, and then a step; STOP lets them go."""
    if worker.mesh.pp > 1:
        words = to_words(orders)
        worker.send(torch.cat([torch.tensor([len(words), *words], dtype=torch.int32), step.words()]))


def follow(worker: Worker, arenas: Arenas) -> None:
    """On every rank but 0: does what `send` says until STOP."""
    while True:
        words = worker.receive()
        split = 1 + int(words[0])
        for order in from_words(words[1:split].tolist()):
            arenas.do(order)
        step = Step.from_words(words[split:])
        if not len(step.ids_T):
            return
        arenas.before_step(step.blocks.tolist())
        worker.run(step)


def prompt_step(requests: Sequence[Request], blocks: BlockAllocator) -> Step:
    """Keys and values of all but the last token of each prompt, into its blocks; nobody gets a token."""
    prompts = [Request(each.id, each.prompt, 1) for each in requests if prefilled_tokens(each)]
    return Step.of(BatchPlan(prompts, [prefilled_tokens(each) for each in prompts]), blocks)


class OneByOne:
    """Steps through all stages, each when the one before has returned: their time is that of all stages."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @property
    def kv(self) -> PagedKV:
        return self.worker.kv

    def run(self, step: Step) -> None:
        send(self.worker, [], step)
        if self.worker.run(step) is None:
            self.worker.receive_tokens(len(step.sampled_R))


class RealDevice:
    """Rank 0's: a worker and its arenas, and behind them those of all other stages, if there are any."""

    def __init__(
        self, state: PooledState, worker: Worker, arenas: Arenas, rate: float, activations: Activations | None = None
    ) -> None:
        """rate: bytes/s of the link as measured with copies like these, before (`measure.link_bytes_per_s`).

        activations: of the one stage that stands for all; with a rank for each stage they go from rank to rank.
        """
        self.state, self.worker, self.arenas, self.rate = state, worker, arenas, rate
        self.activations = activations
        self.depth = worker.mesh.pp
        self._began_s = time.perf_counter()
        self._fresh: set[int] = set()
        """Requests whose prompts are computed with their first step."""
        self._lately: deque[float] = deque(maxlen=LATELY)
        """Of the last steps, what they took over what was predicted."""
        self._orders: list[Order] = []
        self._flying: deque[tuple[int, Tensor | None]] = deque()
        """Steps whose tokens are on their way, and how many they are: none for a prompt."""
        self._returned: deque[list[int]] = deque()

    def prefill(self, requests: Sequence[Request], *, over_link: bool) -> None:
        """The phase before decoding: some prompts after others; returns when the host has them all.

        over_link: each on its way beside the computation of the next ones; otherwise copied at once, without the link.
        """
        blocks = self.state.blocks
        leaving: deque[int] = deque()  # they keep their blocks as long as there are others: the next pack need not wait
        for pack in packs(requests, blocks):
            for request in pack:
                while not blocks.grow(request.id, prefilled_tokens(request)):
                    blocks.release(leaving.popleft())
            self._compute(pack)
            for request in pack:
                self._order(Kind.OFFLOAD if over_link else Kind.KEEP, request.id, self._to_store(request))
                self._order(Kind.LEAVE, request.id)
                leaving.append(request.id)
        for owner in leaving:
            blocks.release(owner)
        self.arenas.before_step(range(blocks.blocks))

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def wait_until(self, then_s: float) -> None:
        time.sleep(max(0.0, then_s - self.now_s()))

    def launch(self, plan: BatchPlan) -> Beside:
        begin_s = self.now_s()
        fresh = [each for each in plan.requests if each.id in self._fresh]
        self._fresh.difference_update(each.id for each in fresh)
        for pack in packs(fresh, self.state.blocks):
            self._compute(pack)
        prompts_s = self.now_s() - begin_s
        return self._run(Step.of(plan, self.state.blocks))._replace(prompts_s=prompts_s)

    def collect(self) -> list[int]:
        while not self._returned:
            self._receive()
        return self._returned.popleft()

    def stage_s(self, took_s: float, predicted_s: float) -> float:
        """As predicted, at the speed that steps have lately, with what they wait for on the link.

        What disturbed this step alone disturbs none of the stages that are not there.
        """
        self._lately.append(took_s / predicted_s)
        return predicted_s * median(self._lately)

    def place(self, request: Request) -> None:
        """A prefill phase would have written here: the copy stands for its writing, and takes no part of the link."""
        if request.computed and not self.state.pool.stored_tokens(request.id):
            self._fresh.add(request.id)
        else:
            self._order(Kind.PLACE, request.id, self._to_load(request))

    def fetch(self, request: Request) -> None:
        self._order(Kind.FETCH, request.id, self._to_load(request))

    def wait(self, request: Request) -> None:
        self._order(Kind.WAIT, request.id)

    def offload(self, request: Request) -> None:
        pairs = self._to_store(request)
        if pairs:
            self._order(Kind.OFFLOAD, request.id, pairs)

    def evict(self, request: Request) -> None:
        if request.id in self._fresh:  # nothing of it is here yet
            self._fresh.remove(request.id)
            return
        if written(request) > self.state.pool.stored_tokens(request.id):
            self.offload(request)
        self._order(Kind.LEAVE, request.id)

    def forget(self, request: Request) -> None:
        self._fresh.discard(request.id)
        self._order(Kind.FORGET, request.id)

    def fetch_bytes_per_s(self) -> float:
        return self.rate

    def _to_store(self, request: Request) -> list[tuple[int, int]]:
        return self.state.pool.store(request.id, written(request), self.state.blocks.table(request.id))

    def _to_load(self, request: Request) -> list[tuple[int, int]]:
        return self.state.pool.load(request.id, self.state.blocks.table(request.id))

    def _compute(self, requests: Sequence[Request]) -> None:
        step = prompt_step(requests, self.state.blocks)
        if len(step.ids_T):
            self._run(step)

    def _order(self, kind: Kind, owner: int, pairs: Sequence[tuple[int, int]] = ()) -> None:
        """Done here at once; the others hear of it with the next step."""
        order = Order(kind, owner, pairs)
        if self.depth > 1:
            self._orders.append(order)
        self.arenas.do(order)

    def _run(self, step: Step) -> Beside:
        """Returns when this stage has run it."""
        send(self.worker, self._orders, step)
        self._orders.clear()
        blocks_s, rows = self.arenas.before_step(step.blocks.tolist()), len(step.ids_T)
        activation_s = self.activations.come(self.arenas, rows) if self.activations else 0.0
        self._flying.append((len(step.sampled_R), self.worker.run(step)))
        if self.arenas.device.arena.is_cuda:
            torch.cuda.current_stream(self.arenas.device.arena.device).synchronize()
        if self.activations:
            self.activations.go(self.arenas, rows)
        while len(self._flying) > self.depth:  # the last stage goes on only while what it sends is taken
            self._receive()
        return Beside(activation_s, blocks_s)

    def _receive(self) -> None:
        count, tokens_R = self._flying.popleft()
        if tokens_R is None:
            tokens_R = self.worker.receive_tokens(count)
        if count:
            self._returned.append([int(token) for token in tokens_R.tolist()])
