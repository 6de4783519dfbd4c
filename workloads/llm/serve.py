"""The serving loop: requests arrive, the scheduler decides, an executor runs batches, in real or in simulated time."""

from collections import deque
from collections.abc import Collection, Generator, Iterable
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
) -> Generator[Iteration, None, None]:
    """Serves until all requests have ended, and yields after each batch; `depth` batches are in flight at a time.

    A request that could never finish, or whose id is in use, ends as REFUSED with the reason in `refusal`; one that was
    cancelled before it came is passed over. Whoever leaves early waits for the batches in flight, and what has not
    ended goes on when the same `state` is served again. Raises SaihError for a request that was served before or is
    listed twice, and where the scheduler lets requests wait for nothing.
    """
    arriving = deque(sorted(requests, key=lambda request: request.arrival_s))
    _refuse_served(arriving)
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
            iteration = Iteration(start_s, end_s, load, state.complete(plan, tokens, end_s))
            try:
                yield iteration
            except GeneratorExit:
                for _, _, plan in flying:
                    state.complete(plan, executor.collect(), executor.now_s())
                raise
        elif arriving:
            executor.wait_until(arriving[0].arrival_s)
        elif state.busy:
            waiting = len(state.waiting) + len(state.running)
            raise SaihError(f"{type(scheduler).__name__} runs nothing while {waiting} requests wait on an idle server")


def _refuse_served(requests: Collection[Request]) -> None:
    """What a caller can only do by mistake, before anything runs."""
    seen: set[Request] = set()
    for request in requests:
        if request in seen:
            raise SaihError(f"request {request.id} is listed twice")
        if request.phase not in (Phase.WAITING, Phase.CANCELLED):
            raise SaihError(f"request {request.id} is {request.phase.value}: make a new one to serve it again")
        seen.add(request)


def _submit(state: ServerState, request: Request) -> None:
    if request.phase is Phase.CANCELLED:
        return
    try:
        state.submit(request)
    except SaihError as error:
        request.phase = Phase.REFUSED
        request.refusal = str(error)
