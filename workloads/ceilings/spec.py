"""The ceilings: dense matrix products, 3D convolutions and memory copies at growing size. Imports no torch."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung

TITLE = "Ceilings: what one device sustains on dense kernels and on a memory copy"
PAPER = "Empirical ceilings as in the Empirical Roofline Toolkit, Yang et al., arXiv:2009.05257"
WORK_UNIT = "calls"

VOXELS_PER_SIDE, BATCH, KERNEL_VOXELS = 16, 2, 27

PARAMETERS = (
    Parameter("kernel", "gemm", "", "what is timed", choices=("gemm", "conv3d", "copy")),
    Parameter(
        "size",
        1024,
        "n",
        "gemm: n x n matrices; conv3d: n/16 -> n/16 channels, 2 volumes of 16^3; copy: n x n numbers",
        minimum=16,
    ),
    Parameter("precision", "fp32", "", "type of the numbers", choices=("fp32", "bf16")),
)

AXES = (
    Axis(
        "kernel",
        "",
        tuple(Rung(name, {"kernel": name}, place) for place, name in enumerate(("gemm", "conv3d", "copy"))),
    ),
    Axis("size", "n", tuple(Rung(str(n), {"size": n}, n) for n in (512, 1024, 2048, 4096, 8192))),
)

CLAIMS: tuple[Claim, ...] = ()


def channels(params: Params) -> int:
    """Input and output channels of the convolution."""
    return int(params["size"]) // 16


def cost(params: Params) -> Cost:
    """One call."""
    n, word = int(params["size"]), 2 if params["precision"] == "bf16" else 4
    if params["kernel"] == "gemm":
        flop, moved, held = 2.0 * n**3, 3.0 * n * n * word, 3.0 * n * n * word
    elif params["kernel"] == "conv3d":
        voxels, width = BATCH * VOXELS_PER_SIDE**3, channels(params)
        flop = 2.0 * KERNEL_VOXELS * width * width * voxels
        moved = held = word * (2.0 * voxels * width + KERNEL_VOXELS * width * width)
    else:
        flop, moved, held = 0.0, 2.0 * n * n * word, 2.0 * n * n * word
    return Cost(flop, 1.0, (Operation(flop, moved),), device_bytes=2 * held, check_steps=2)
