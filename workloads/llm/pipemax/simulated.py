"""The stage in simulated time: steps by a cost model, copies by the rate of a link each way. No measurement."""

from __future__ import annotations

from workloads.llm.costs import CostModel
from workloads.llm.pool import PooledState
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan
from workloads.llm.transfer import SimulatedLink, Transfer, Urgency

CHUNK_BLOCKS = 16


class SimulatedDevice:
    """Prefill is part of it: a request that has not run yet brings the time of its prompt along.

    Where prefill has phases of its own, that time passes for all batches at once; otherwise it makes the step of the
    batch that the request joins longer. `block_copy_s`: what a block takes beside its bytes, by the layout.
    """

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
    ) -> None:
        self.state, self.model, self.block_bytes = state, model, block_bytes
        block_s = block_bytes / link_bytes_per_s + block_copy_s
        self.rate = block_bytes / block_s
        self.inward, self.outward = (SimulatedLink(self.rate, 0.0, order) for _ in range(2))
        self.prefill_s_per_token, self.phases = prefill_s_per_token, phases
        self.prefill_s = 0.0
        self._now_s = 0.0
        self._joining_s = 0.0
        self._fresh: set[int] = set()
        self._coming: dict[int, Transfer] = {}
        self._going: dict[int, Transfer] = {}

    def now_s(self) -> float:
        return self._now_s

    def wait_until(self, then_s: float) -> None:
        self._now_s = max(self._now_s, then_s)

    def run(self, plan: BatchPlan) -> list[int]:
        self._now_s += self.model.step_s(plan.load()) + self._joining_s
        self._joining_s = 0.0
        return [0] * len(plan.requests)

    def stage_s(self, took_s: float, predicted_s: float) -> float:
        return took_s

    def place(self, request: Request) -> None:
        self._prefill(request)

    def fetch(self, request: Request) -> None:
        self._prefill(request)
        blocks = self.state.blocks.blocks_for(request.computed)
        self._coming[request.id] = self._send(self.inward, Urgency.PREFETCH, blocks)

    def wait(self, request: Request) -> None:
        transfer = self._coming.pop(request.id, None)
        if transfer is not None:
            self.inward.advance(self._now_s)
            if not transfer.done or (transfer.ended_s or 0.0) > self._now_s:
                self.wait_until(self.inward.finish(transfer))

    def offload(self, request: Request) -> None:
        size = self.state.blocks.block_size
        first = self.state.pool.stored_tokens(request.id) // size
        blocks = self.state.blocks.blocks_for(request.computed) - first
        self.state.pool.hold(request.id, request.computed)
        if blocks:
            self._going[request.id] = self._send(self.outward, Urgency.OFFLOAD, blocks)

    def evict(self, request: Request) -> None:
        self._coming.pop(request.id, None)
        if request.computed > self.state.pool.stored_tokens(request.id):
            self.offload(request)
        transfer = self._going.pop(request.id, None)
        if transfer is not None:
            self.outward.advance(self._now_s)
            if not transfer.done or (transfer.ended_s or 0.0) > self._now_s:
                self.wait_until(self.outward.finish(transfer))

    def fetch_bytes_per_s(self) -> float:
        return self.rate

    def _prefill(self, request: Request) -> None:
        if request.id in self._fresh or not self.prefill_s_per_token:
            return
        self._fresh.add(request.id)
        took_s = self.prefill_s_per_token * len(request.prompt)
        self.prefill_s += took_s
        if self.phases:
            self._now_s += took_s
        else:
            self._joining_s += took_s

    def _send(self, link: SimulatedLink, urgency: Urgency, blocks: int) -> Transfer:
        whole, rest = divmod(blocks, CHUNK_BLOCKS)
        sizes = [CHUNK_BLOCKS] * whole + [rest] * bool(rest)
        return link.submit(Transfer(urgency, [size * self.block_bytes for size in sizes]), self._now_s)
