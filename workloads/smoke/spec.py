"""The smoke test that `saih site check` runs: a few small all-reduces. Imports no torch."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung

TITLE = "Smoke test: ranks, devices, collectives, files and clocks of a job, as `saih site check` asks for them"
PAPER = "none: it measures nothing of interest"
WORK_UNIT = "all reduces"

COLD_START_S = 60.0
"""What a job's time limit grants a first import of torch from a busy shared file system."""

PARAMETERS = (
    Parameter("size", 1024, "numbers", "length of the vectors that are summed over all ranks", minimum=1),
    Parameter("folder", "", "", "folder in the data folder where whoever submits has left a file `login`; empty: none"),
)

AXES = (
    Axis(
        "shape",
        "nodes x ranks",
        tuple(
            Rung(f"{nodes}x{gpus}", {"nodes": nodes, "gpus": gpus}, place)
            for place, (nodes, gpus) in enumerate(((1, 1), (1, 2), (2, 1), (2, 2)))
        ),
        named=True,
    ),
)

CLAIMS: tuple[Claim, ...] = ()


def cost(params: Params) -> Cost:
    """One all-reduce of float64."""
    held = 8.0 * int(params["size"])
    return Cost(0.0, 1.0, (Operation(0.0, 2 * held),), device_bytes=held, message_bytes=held, setup_s=COLD_START_S)
