"""The ceilings: dense kernels, memory, links, collectives, storage and launches at growing size. Imports no torch."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError

TITLE = "Ceilings: what a device sustains on dense kernels and in memory, ranks between them, and a node on its storage"
PAPER = "Empirical ceilings as in the Empirical Roofline Toolkit, Yang et al., arXiv:2009.05257; triad: STREAM"
CHECK = "what each kernel computes or moves is right within the rounding of its precision"
WORK_UNIT = "calls"

VOXELS_PER_SIDE, BATCH, KERNEL_VOXELS = 16, 2, 27

COMPUTE = ("gemm", "conv3d")
MEMORY = ("copy", "triad")
HOST_LINK = ("upload", "download")
"""From the host's memory to the device's, and back."""
BETWEEN_RANKS = ("allreduce", "pingpong")
FILES = ("read", "write")
KERNELS = (*COMPUTE, *MEMORY, *HOST_LINK, *BETWEEN_RANKS, *FILES, "open", "launch")

SEQUENTIAL_BLOCK_BYTES, RANDOM_BLOCK_BYTES, RANDOM_BLOCKS = 2**20, 2**12, 512
"""Blocks of a transfer to or from a file, as in storage benchmarks such as fio: 1 MiB, or 4 KiB at random places."""
OPENED_FILES, OPENED_BYTES = 256, 2**12
LAUNCHES = 1000
WRITE_BYTES_PER_S = 100e6
"""A careful figure, for planning."""

PARAMETERS = (
    Parameter("kernel", "gemm", "", "what is timed", choices=KERNELS),
    Parameter(
        "size",
        1024,
        "n",
        "gemm: n x n matrices; conv3d: n/16 -> n/16 channels, 2 volumes of 16^3; copy, triad, upload, download: n x n "
        "numbers",
        minimum=16,
    ),
    Parameter("message_bytes", 2**20, "bytes", "allreduce, pingpong: what each rank contributes", minimum=4),
    Parameter(
        "transport",
        "torch",
        "",
        "allreduce: torch's NCCL on GPUs and gloo on CPUs, or MPI (host memory) under an MPI launcher",
        choices=("torch", "mpi"),
    ),
    Parameter("pinned", False, "", "upload, download: the host's memory is page-locked"),
    Parameter(
        "pattern",
        "sequential",
        "",
        "read, write: the whole file in blocks of 1 MiB, or 512 blocks of 4 KiB at random places, one after the other",
        choices=("sequential", "random"),
    ),
    Parameter(
        "cache",
        "cold",
        "",
        "read: out of the page cache (warm), from storage (cold); write: into the page cache (warm), until it is on "
        "storage (cold); direct: past the cache, by O_DIRECT",
        choices=("cold", "warm", "direct"),
    ),
    Parameter("file_bytes", 2**26, "bytes", "read, write: length of the file", minimum=2**22),
    Parameter(
        "precision", "fp32", "", "type of the numbers; tf32 needs a GPU", choices=("fp32", "tf32", "bf16", "fp16")
    ),
)

MESSAGES = {"8": 8, "1Ki": 2**10, "64Ki": 2**16, "1Mi": 2**20, "4Mi": 2**22, "16Mi": 2**24, "64Mi": 2**26}


def _message(label: str, message_bytes: int) -> Rung:
    return Rung(label, {"kernel": "allreduce", "message_bytes": message_bytes}, message_bytes)


AXES = (
    Axis("kernel", "", tuple(Rung(name, {"kernel": name}, place) for place, name in enumerate(KERNELS)), named=True),
    Axis("size", "n", tuple(Rung(str(n), {"size": n}, n) for n in (512, 1024, 2048, 4096, 8192))),
    Axis("message", "bytes", tuple(_message(label, n) for label, n in MESSAGES.items())),
)

CLAIMS: tuple[Claim, ...] = ()


def channels(params: Params) -> int:
    """Input and output channels of the convolution."""
    return int(params["size"]) // 16


def transferred_bytes(params: Params) -> int:
    """Of one call of read or write."""
    return RANDOM_BLOCKS * RANDOM_BLOCK_BYTES if params["pattern"] == "random" else int(params["file_bytes"])


def cost(params: Params) -> Cost:
    """One call. Raises SaihError for what makes no sense: one rank between ranks, numbers MPI has no type for."""
    kernel = str(params["kernel"])
    if kernel in COMPUTE or kernel in MEMORY or kernel in HOST_LINK:
        return _on_the_device(kernel, params)
    if kernel in BETWEEN_RANKS:
        return _between_ranks(kernel, params)
    if kernel == "launch":
        return Cost(0.0, LAUNCHES, (Operation(0.0, 8.0),) * LAUNCHES, device_bytes=4.0, check_steps=1)
    if params["precision"] != "fp32":
        raise SaihError(f"{kernel} has no precision; leave it at fp32")
    if kernel == "open":
        held = OPENED_FILES * float(OPENED_BYTES)
        return _on_storage(OPENED_FILES, held, held)
    return _on_storage(1.0, float(transferred_bytes(params)), float(params["file_bytes"]))


def _on_storage(work: float, moved: float, held: float) -> Cost:
    """A call that moves so many bytes to or from files of so many."""
    return Cost(
        0.0,
        work,
        (Operation(0.0, moved),),
        device_bytes=held,
        input_bytes=moved,
        disk_bytes=held,
        setup_s=held / WRITE_BYTES_PER_S,
        check_steps=2,
    )


def _on_the_device(kernel: str, params: Params) -> Cost:
    n, word = int(params["size"]), 2 if params["precision"] in ("bf16", "fp16") else 4
    numbers = {"gemm": 3, "copy": 2, "triad": 3, "upload": 1, "download": 1}.get(kernel, 0)
    flop, moved = 2.0 * n**3 if kernel == "gemm" else 0.0, float(numbers * n * n * word)
    if kernel == "conv3d":
        voxels, width = BATCH * VOXELS_PER_SIDE**3, channels(params)
        flop = 2.0 * KERNEL_VOXELS * width * width * voxels
        moved = word * (2.0 * voxels * width + KERNEL_VOXELS * width * width)
    return Cost(flop, 1.0, (Operation(flop, moved),), device_bytes=2 * moved, check_steps=2)


def _between_ranks(kernel: str, params: Params) -> Cost:
    ranks = int(params["nodes"]) * int(params["gpus"])
    if ranks == 1:
        name = "an all-reduce" if kernel == "allreduce" else "a ping-pong"
        raise SaihError(f"{name} wants several ranks: --set gpus=2")
    if kernel == "pingpong" and ranks != 2:
        raise SaihError(f"a ping-pong is between two ranks, not {ranks}: --set nodes=1,gpus=2 or nodes=2,gpus=1")
    if params["transport"] == "mpi" and params["precision"] == "bf16":
        raise SaihError("MPI has no bf16; transport=mpi goes with precision=fp32")
    if params["transport"] == "mpi" and kernel == "pingpong":
        raise SaihError("a ping-pong goes over torch; transport=mpi is for kernel=allreduce")
    message = float(params["message_bytes"])
    return Cost(0.0, 1.0, (Operation(0.0, 2 * message),), device_bytes=2 * message, message_bytes=message)
