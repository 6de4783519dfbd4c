"""Serving in simulated time: any scheduler over any trace under a cost model. Deterministic; no measurement."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, Scheduler, ServerState
from workloads.llm.serve import Iteration, serve


class SimulatedExecutor:
    """A pipeline of stages that all take `stage_s(plan)` for a batch, in order; one stage is a device by itself.

    `busy_s[stage]` lists when each stage was at work, as (start, end).
    """

    def __init__(self, stage_s: Callable[[BatchPlan], float], stages: int = 1) -> None:
        self.stage_s = stage_s
        self.busy_s: list[list[tuple[float, float]]] = [[] for _ in range(stages)]
        self._now_s = 0.0
        self._flying: deque[tuple[float, int]] = deque()

    def now_s(self) -> float:
        return self._now_s

    def wait_until(self, then_s: float) -> None:
        self._now_s = then_s

    def launch(self, plan: BatchPlan) -> None:
        took_s, ready_s = self.stage_s(plan), self._now_s
        for busy in self.busy_s:
            start_s = max(ready_s, busy[-1][1]) if busy else ready_s
            ready_s = start_s + took_s
            busy.append((start_s, ready_s))
        self._flying.append((ready_s, len(plan.sampled())))

    def collect(self) -> list[int]:
        self._now_s, sampled = self._flying.popleft()
        return [0] * sampled


@dataclass(frozen=True)
class Simulation:
    """What came out; `origin` says so wherever it is shown."""

    requests: Sequence[Request]
    iterations: list[Iteration]
    stage_busy_s: list[list[tuple[float, float]]]
    origin: str = field(default="simulated", init=False)


def simulate(
    requests: Sequence[Request],
    scheduler: Scheduler,
    state: ServerState,
    stage_s: Callable[[BatchPlan], float],
    stages: int = 1,
) -> Simulation:
    """Serves the requests with one batch in flight for each stage.

    `stage_s` gives a batch's seconds on one stage: `lambda plan: model.step_s(plan.load())` for a `CostModel`.
    """
    executor = SimulatedExecutor(stage_s, stages)
    iterations = list(serve(requests, scheduler, state, executor, depth=stages))
    return Simulation(requests, iterations, executor.busy_s)
