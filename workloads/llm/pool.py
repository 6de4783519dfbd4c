"""Requests whose keys and values wait on the host: the pool's blocks, and what a server with one knows."""

from __future__ import annotations

from collections.abc import Sequence

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import ServerState


class HostPool:
    """Which blocks of a host arena hold which request's keys and values, and of how many of its tokens.

    A request that enters gets blocks for all it may ever hold, so that none that was let in is ever without a place to
    be evicted to. Copies are pairs of blocks; those from the device are of what the pool does not hold yet.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = BlockAllocator(blocks, block_size)
        self._stored_tokens: dict[int, int] = {}

    def enter(self, request: Request) -> bool:
        """Reserves the request's blocks; False, and nothing changes, where there are too few. Twice is once."""
        if request.id in self._stored_tokens:
            return True
        if not self.blocks.grow(request.id, request.longest_kv_tokens):
            return False
        self._stored_tokens[request.id] = 0
        return True

    def leave(self, owner: int) -> None:
        self._stored_tokens.pop(owner, None)
        self.blocks.release(owner)

    def stored_tokens(self, owner: int) -> int:
        """Of how many of the request's tokens the pool holds keys and values."""
        return self._stored_tokens[owner]

    def hold(self, owner: int, tokens: int) -> None:
        """Books the first `tokens` tokens of the request as held: somebody has brought them here."""
        self._stored_tokens[owner] = max(tokens, self._stored_tokens[owner])

    def store(self, owner: int, tokens: int, device_table: Sequence[int]) -> list[tuple[int, int]]:
        """(device block, host block) to copy so that the pool holds the first `tokens` tokens; books them as held."""
        first = self._stored_tokens[owner] // self.blocks.block_size
        last = self.blocks.blocks_for(tokens)
        self.hold(owner, tokens)
        return list(zip(device_table[first:last], self.blocks.table(owner)[first:last], strict=True))

    def load(self, owner: int, device_table: Sequence[int]) -> list[tuple[int, int]]:
        """(host block, device block) to copy so that the device holds what the pool holds."""
        count = self.blocks.blocks_for(self._stored_tokens[owner])
        return list(zip(self.blocks.table(owner)[:count], device_table[:count], strict=True))


class PooledState(ServerState):
    """As every server, and between waiting and running a third place: in the pool, its keys and values on the host.

    `waiting` are those the pool has no blocks for. A request in the pool keeps Phase.WAITING and what was `computed`.
    """

    def __init__(self, blocks: BlockAllocator, pool: HostPool, max_positions: int | None = None) -> None:
        super().__init__(blocks, max_positions)
        self.pool = pool
        self.pooled: dict[int, Request] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.pooled or self.running)

    def submit(self, request: Request) -> None:
        """Queues a request; raises SaihError for one that could never finish."""
        room = self.pool.blocks.blocks * self.pool.blocks.block_size
        if request.longest_kv_tokens > room:
            raise SaihError(
                f"request {request.id}: its {request.longest_kv_tokens} tokens exceed the host pool, which holds {room}"
            )
        super().submit(request)

    def admit(self) -> list[Request]:
        """Lets those waiting into the pool, in order, while it has blocks; returns them."""
        admitted = []
        while self.waiting and self.pool.enter(self.waiting[0]):
            admitted.append(self.waiting.popleft())
            self.put(admitted[-1])
        return admitted

    def put(self, request: Request) -> None:
        """The request is in the pool from now on, last in line."""
        request.phase = Phase.WAITING
        self.pooled[request.id] = request

    def take(self, request: Request) -> None:
        """The request is no longer in the pool's line; its host blocks stay its own."""
        del self.pooled[request.id]

    def start(self, request: Request) -> None:
        """One that was in the pool runs from now on."""
        if request.id in self.pooled:
            self.take(request)
        request.phase = Phase.RUNNING
        self.running[request.id] = request

    def suspend(self, request: Request) -> None:
        """One that runs gives up its device blocks and goes back to the pool; what was computed stays computed."""
        del self.running[request.id]
        self.blocks.release(request.id)
        request.preemptions += 1
        self.put(request)

    def cancel(self, request: Request) -> None:
        """Ends the request wherever it is; the blocks of one in flight are free when its batch has returned."""
        if request.id in self.pooled:
            self.take(request)
            self._leave(request, Phase.CANCELLED)
        else:
            super().cancel(request)

    def _leave(self, request: Request, phase: Phase) -> None:
        super()._leave(request, phase)
        self.pool.leave(request.id)
