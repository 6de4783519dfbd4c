"""Points that do what their `fault` says."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Parameter, Params, Rung

TITLE = "Faulty: points that fail on purpose"
PAPER = "none"
WORK_UNIT = "calls"
FAULTS = ("none", "error", "error-on-last-rank", "out-of-memory", "check-failed", "killed", "exit", "slow")

PARAMETERS = (
    Parameter("fault", "none", "", "what goes wrong", choices=FAULTS),
    Parameter("amount", 1, "", "tells points apart"),
    Parameter("step_ms", 1.0, "ms", "how long a step takes"),
    Parameter("slow_s", 75.0, "s", "how long a step takes that was not predicted to"),
)
AXES = (Axis("size", "", tuple(Rung(str(n), {"amount": n}, n) for n in range(1, 9))),)
CLAIMS: tuple[Claim, ...] = ()


def cost(params: Params) -> Cost:
    sleeps = int(params["warmup"]) + int(params["steps"])
    return Cost(1e6 * int(params["amount"]), 1.0, setup_s=sleeps * float(params["step_ms"]) / 1e3)
