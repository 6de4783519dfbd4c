"""Sleep, or fail. FAULTY_HEALED in the environment makes every point well."""

from __future__ import annotations

import os
import signal
import time

import torch

from saih.core import Check, Clock, Context, Point, Work


def setup(point: Point, context: Context) -> Faulty:
    return Faulty(point, context)


class Faulty:
    def __init__(self, point: Point, context: Context) -> None:
        self.fault = "none" if "FAULTY_HEALED" in os.environ else str(point.params["fault"])
        self.step_s = float(point.params["step_ms"]) / 1e3  # type: ignore[arg-type]
        if self.fault == "slow":
            self.step_s = float(point.params["slow_s"])  # type: ignore[arg-type]
        self.amount = int(point.params["amount"])
        self.last_rank = context.place.rank == context.place.world - 1

    def check(self) -> Check:
        return Check(self.fault != "check-failed", {"answer": 41.0}, "41 is not 42")

    def step(self, clock: Clock) -> Work:
        if self.fault == "error" or (self.fault == "error-on-last-rank" and self.last_rank):
            raise ValueError("this point is <b>broken</b>")
        if self.fault == "out-of-memory":
            torch.ones(2**36, dtype=torch.uint8)
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "exit":
            os._exit(3)
        clock.enter("compute")
        time.sleep(self.step_s)
        return Work(1.0, 1e6 * self.amount)

    def close(self) -> None:
        pass
