"""Requests in, tokens out, in real time: the serving loop over this rank's worker and all that follow it."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType

from torch import Tensor

from workloads.llm.allocator import BlockAllocator
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Scheduler, ServerState
from workloads.llm.serve import Iteration, serve
from workloads.llm.worker import STOP, Step, Worker


class Engine:
    """Rank 0's part: decides every batch, with one in flight for each pipeline stage. The other ranks `Worker.follow`.

        with Engine(Worker(stage, stage.new_kv(blocks)), scheduler) as engine:
            for request, token in engine.stream(requests): ...

    Leaving lets the followers return; after an error here they fail when this process ends. `state` holds the queues
    and blocks; `state.cancel(request)` ends a request.
    """

    def __init__(self, worker: Worker, scheduler: Scheduler) -> None:
        self.worker, self.scheduler = worker, scheduler
        blocks = BlockAllocator(worker.kv.blocks, worker.kv.block_size)
        self.state = ServerState(blocks, worker.stage.spec.max_positions, worker.stage.spec.vocab)
        self._began_s = 0.0
        self._flying: deque[tuple[int, Tensor | None]] = deque()

    def serve(self, requests: Sequence[Request]) -> Generator[Iteration, None, None]:
        """Serves requests as they arrive, from now on as time 0, and yields after each iteration.

        Requests that cannot be served end as refused (`workloads.llm.serve`).
        """
        self._began_s = time.perf_counter()
        yield from serve(requests, self.scheduler, self.state, self, depth=self.worker.mesh.pp)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """Each token of each request as soon as it is there."""
        with closing(self.serve(requests)) as iterations:
            for iteration in iterations:
                for request in iteration.emitted:
                    yield request, request.generated[-1]

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def wait_until(self, then_s: float) -> None:
        time.sleep(max(0.0, then_s - self.now_s()))

    def launch(self, plan: BatchPlan) -> None:
        step = Step.of(plan, self.state.blocks)
        self.worker.send_step(step)
        self._flying.append((len(step.sampled_R), self.worker.run(step)))

    def collect(self) -> list[int]:
        count, tokens_R = self._flying.popleft()
        if tokens_R is None:
            tokens_R = self.worker.receive_tokens(count)
        return [int(token) for token in tokens_R.tolist()]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else followers may be in the middle of a step, and see this process end
            self.worker.send_step(STOP)
            self.worker.wait()
