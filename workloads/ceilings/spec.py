"""The ceilings: matrix products, 3D convolutions, memory copies and all-reduces at growing size. Imports no torch."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError

TITLE = "Ceilings: what a device sustains on dense kernels and a memory copy, and ranks on an all-reduce"
PAPER = "Empirical ceilings as in the Empirical Roofline Toolkit, Yang et al., arXiv:2009.05257"
WORK_UNIT = "calls"

VOXELS_PER_SIDE, BATCH, KERNEL_VOXELS = 16, 2, 27

PARAMETERS = (
    Parameter("kernel", "gemm", "", "what is timed", choices=("gemm", "conv3d", "copy", "allreduce")),
    Parameter(
        "size",
        1024,
        "n",
        "gemm: n x n matrices; conv3d: n/16 -> n/16 channels, 2 volumes of 16^3; copy: n x n numbers",
        minimum=16,
    ),
    Parameter("message_bytes", 2**20, "bytes", "allreduce: what each rank contributes", minimum=4),
    Parameter(
        "transport",
        "torch",
        "",
        "allreduce: torch's NCCL on GPUs and gloo on CPUs, or MPI (host memory) under an MPI launcher",
        choices=("torch", "mpi"),
    ),
    Parameter(
        "precision", "fp32", "", "type of the numbers; tf32 needs a GPU", choices=("fp32", "tf32", "bf16", "fp16")
    ),
)

MESSAGES = {"8": 8, "1Ki": 2**10, "64Ki": 2**16, "1Mi": 2**20, "4Mi": 2**22, "16Mi": 2**24, "64Mi": 2**26}


def _message(label: str, message_bytes: int) -> Rung:
    return Rung(label, {"kernel": "allreduce", "message_bytes": message_bytes}, message_bytes)


AXES = (
    Axis(
        "kernel",
        "",
        tuple(Rung(name, {"kernel": name}, place) for place, name in enumerate(("gemm", "conv3d", "copy"))),
    ),
    Axis("size", "n", tuple(Rung(str(n), {"size": n}, n) for n in (512, 1024, 2048, 4096, 8192))),
    Axis("message", "bytes", tuple(_message(label, n) for label, n in MESSAGES.items())),
)

CLAIMS: tuple[Claim, ...] = ()


def channels(params: Params) -> int:
    """Input and output channels of the convolution."""
    return int(params["size"]) // 16


def cost(params: Params) -> Cost:
    """One call. Raises SaihError for an all-reduce on one rank, and for numbers that MPI has no type for."""
    n, word = int(params["size"]), 2 if params["precision"] in ("bf16", "fp16") else 4
    if params["kernel"] == "allreduce":
        if int(params["nodes"]) * int(params["gpus"]) == 1:
            raise SaihError("an all-reduce wants several ranks: --set gpus=2")
        message = float(params["message_bytes"])
        if params["transport"] == "mpi" and params["precision"] == "bf16":
            raise SaihError("MPI has no bf16; transport=mpi goes with precision=fp32")
        return Cost(0.0, 1.0, (Operation(0.0, 2 * message),), device_bytes=2 * message, message_bytes=message)
    if params["kernel"] == "gemm":
        flop, moved, held = 2.0 * n**3, 3.0 * n * n * word, 3.0 * n * n * word
    elif params["kernel"] == "conv3d":
        voxels, width = BATCH * VOXELS_PER_SIDE**3, channels(params)
        flop = 2.0 * KERNEL_VOXELS * width * width * voxels
        moved = held = word * (2.0 * voxels * width + KERNEL_VOXELS * width * width)
    else:
        flop, moved, held = 0.0, 2.0 * n * n * word, 2.0 * n * n * word
    return Cost(flop, 1.0, (Operation(flop, moved),), device_bytes=2 * held, check_steps=2)
