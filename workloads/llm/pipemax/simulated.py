"""The stage in simulated time: steps by a cost model, copies by the rate of a link each way. No measurement."""

from __future__ import annotations

from workloads.llm.costs import CostModel
from workloads.llm.pipemax.rotation import Beside, written
from workloads.llm.pool import PooledState
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan
from workloads.llm.transfer import SimulatedLink, Transfer, Urgency

CHUNK_BLOCKS = 16


class SimulatedDevice:
    """Prefill is part of it: a request that has not run yet brings the time of its prompt along.

    Where prefill has phases of its own, that time passes for all batches at once; otherwise it makes the step of the
    batch that the request joins longer. offload: prompts go to the host over the link while they are computed, and
    their phase lasts until they are there; otherwise a prefill leaves them on the device, and what an eviction brings
    away of them costs nothing. block_copy_s: what a block takes beside its bytes, by the layout. row_bytes: of an
    activation, which comes over the link before its step.
    """

    depth = 1

    def __init__(
        self,
        state: PooledState,
        model: CostModel,
        block_bytes: int,
        link_bytes_per_s: float,
        block_copy_s: float,
        order: str,
        *,
        prefill_s_per_token: float = 0.0,
        phases: bool = True,
        offload: bool = False,
        row_bytes: float = 0.0,
    ) -> None:
        self.state, self.model, self.block_bytes = state, model, block_bytes
        block_s = block_bytes / link_bytes_per_s + block_copy_s
        self.rate = block_bytes / block_s
        self.inward, self.outward = (SimulatedLink(self.rate, order) for _ in range(2))
        self.prefill_s_per_token, self.phases, self.offloads = prefill_s_per_token, phases, offload
        self.row_bytes = row_bytes
        self.prefill_s = 0.0
        self._now_s = 0.0
        self._launched = 0
        self._joining_s: dict[int, float] = {}
        """Prompts that are computed with the next step of their request."""
        self._prefilled: set[int] = set()
        self._coming: dict[int, Transfer] = {}
        self._going: dict[int, list[Transfer]] = {}
        self._left_s = 0.0
        """When all that was given up on the device is on the host: its room is free for what is fetched."""

    def now_s(self) -> float:
        return self._now_s

    def wait_until(self, then_s: float) -> None:
        self._now_s = max(self._now_s, then_s)

    def launch(self, plan: BatchPlan) -> Beside:
        begin_s = self._now_s
        if self.row_bytes:
            activation = Transfer(Urgency.ACTIVATION, [int(self.row_bytes * len(plan.requests))])
            self._settle(self.inward, self.inward.submit(activation, begin_s))
        activation_s = self._now_s - begin_s
        joining_s = sum(self._joining_s.pop(each.id, 0.0) for each in plan.requests)
        self._now_s += self.model.step_s(plan.load()) + joining_s
        self._launched = len(plan.requests)
        return Beside(activation_s, prompts_s=joining_s)

    def collect(self) -> list[int]:
        return [0] * self._launched

    def stage_s(self, took_s: float, predicted_s: float) -> float:
        return took_s

    def place(self, request: Request) -> None:
        self._prefill(request)

    def fetch(self, request: Request) -> None:
        self._prefill(request)
        blocks = self.state.blocks.blocks_for(request.computed)
        self._coming[request.id] = self._send(self.inward, Urgency.PREFETCH, blocks, self._left_s)

    def wait(self, request: Request) -> None:
        transfer = self._coming.pop(request.id, None)
        if transfer is not None:
            self._settle(self.inward, transfer)

    def offload(self, request: Request) -> None:
        stored = self.state.pool.stored_tokens(request.id)
        if written(request) > stored:
            blocks = self.state.blocks.blocks_for(written(request)) - stored // self.state.blocks.block_size
            self._going.setdefault(request.id, []).append(self._send(self.outward, Urgency.OFFLOAD, blocks))
            self.state.pool.hold(request.id, written(request))

    def evict(self, request: Request) -> None:
        coming = self._coming.pop(request.id, None)
        if coming is not None:
            coming.dropped = True
        self.offload(request)
        for transfer in self._going.pop(request.id, []):
            if not transfer.done:
                self.outward.finish(transfer)
            self._left_s = max(self._left_s, transfer.ended_s or 0.0)

    def forget(self, request: Request) -> None:
        for transfer in (self._coming.pop(request.id, None), *self._going.pop(request.id, [])):
            if transfer is not None:
                transfer.dropped = True

    def fetch_bytes_per_s(self) -> float:
        return self.rate

    def _prefill(self, request: Request) -> None:
        if request.id in self._prefilled:
            return
        self._prefilled.add(request.id)
        took_s = self.prefill_s_per_token * len(request.prompt)
        begin_s = self._now_s
        if self.offloads:
            self.offload(request)
        else:
            self.state.pool.hold(request.id, request.computed)
        if self.phases:
            self._now_s += took_s
            for transfer in self._going.pop(request.id, []):
                self._settle(self.outward, transfer)
            self.prefill_s += self._now_s - begin_s
        else:
            self._joining_s[request.id] = took_s
            self.prefill_s += took_s

    def _settle(self, link: SimulatedLink, transfer: Transfer) -> None:
        """Until the transfer has arrived, before all others."""
        link.advance(self._now_s)
        if not transfer.done or (transfer.ended_s or 0.0) > self._now_s:
            self.wait_until(link.finish(transfer))

    def _send(self, link: SimulatedLink, urgency: Urgency, blocks: int, not_before_s: float = 0.0) -> Transfer:
        """It begins at `not_before_s` at the earliest."""
        whole, rest = divmod(blocks, CHUNK_BLOCKS)
        sizes = [CHUNK_BLOCKS] * whole + [rest] * bool(rest)
        chunks = [size * self.block_bytes for size in sizes]
        return link.submit(Transfer(urgency, chunks, not_before_s=not_before_s), self._now_s)
