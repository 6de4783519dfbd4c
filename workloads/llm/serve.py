"""The serving loop: requests arrive, the scheduler decides, an executor runs batches, in real or in simulated time."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from saih.errors import SaihError
from workloads.llm.request import Phase, Request
from workloads.llm.scheduler import BatchPlan, Load, Scheduler, ServerState


class Executor(Protocol):
    """Runs batches in the order of their launch, and is the clock."""

    def now_s(self) -> float:
        """Time since the serving began."""

    def wait_until(self, then_s: float) -> None:
        """Returns when `now_s()` is `then_s`."""

    def launch(self, plan: BatchPlan) -> None:
        """Starts a batch; may return before it has run."""

    def collect(self) -> list[int]:
        """Waits for the oldest batch not yet collected; one token for each of its `sampled()`."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """A batch that has run: from launch to its tokens, what it asked of the device, and who got a token."""

    start_s: float
    end_s: float
    load: Load
    emitted: list[Request]


def serve(
    requests: Iterable[Request], scheduler: Scheduler, state: ServerState, executor: Executor, depth: int = 1
) -> Iterator[Iteration]:
    """Serves until all requests have ended, and yields after each batch; `depth` batches are in flight at a time.

    A request that could never finish ends as REFUSED with the reason in `refusal`. Raises SaihError where the scheduler
    lets requests wait for nothing.
    """
    arriving = deque(sorted(requests, key=lambda request: request.arrival_s))
    state.depth = depth
    flying: deque[tuple[float, Load, BatchPlan]] = deque()
    while arriving or state.busy:
        while arriving and arriving[0].arrival_s <= executor.now_s():
            _submit(state, arriving.popleft())
        while len(flying) < depth and (plan := scheduler.next_batch(state)):
            flying.append((executor.now_s(), plan.load(), plan))
            state.launch(plan)
            executor.launch(plan)
        if flying:
            start_s, load, plan = flying.popleft()
            tokens = executor.collect()
            end_s = executor.now_s()
            yield Iteration(start_s, end_s, load, state.complete(plan, tokens, end_s))
        elif arriving:
            executor.wait_until(arriving[0].arrival_s)
        elif state.busy:
            waiting = len(state.waiting) + len(state.running)
            raise SaihError(f"{type(scheduler).__name__} runs nothing while {waiting} requests wait on an idle server")


def _submit(state: ServerState, request: Request) -> None:
    try:
        state.submit(request)
    except SaihError as error:
        request.phase = Phase.REFUSED
        request.refusal = str(error)
