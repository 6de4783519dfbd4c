"""Time one kernel over and over, after comparing its result with what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from saih.errors import SaihError
from workloads.ceilings import spec
from workloads.ceilings.collectives import PingPong, all_reduce
from workloads.ceilings.files import Opens, Read, Write
from workloads.ceilings.kernels import Conv3d, Copy, Gemm, HostLink, Launches, Triad

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2, "fp16": 4e-3}
"""Largest |result - float64| / |float64|, as norms over what is compared."""


class Kernel(Protocol):
    """One kernel with its operands. It may have `prepare()`, which comes before each call, and `close()`."""

    phase: str
    """What its time counts as."""

    def call(self) -> object:
        """Run it once."""

    def error(self) -> float:
        """Relative error of its result, or of a part of it."""


def setup(point: Point, context: Context) -> Ceiling:
    """The kernel a point names, with its operands or files."""
    return Ceiling(point, _kernel(point, context))


def _kernel(point: Point, context: Context) -> Kernel:
    name, dtype = str(point.params["kernel"]), DTYPES[str(point.params["precision"])]
    if name == "allreduce":
        return all_reduce(point, context, dtype)
    if name == "pingpong":
        return PingPong.of(point, context, dtype)
    if name == "launch":
        return Launches(context.device)
    folder = Path(context.data_folder, f"ceilings-{point.id}-{context.place.rank}")
    if name == "open":
        return Opens(folder)
    if name in spec.FILES:
        transfer = Read if name == "read" else Write
        return transfer(folder.with_suffix(".bin"), point.params, point.seed)
    return _on_the_device(name, point, context.device, dtype)


def _on_the_device(name: str, point: Point, device: str, dtype: torch.dtype) -> Kernel:
    """Random operands: zeros can run faster than real data. Raises SaihError for a host link where there is none."""
    generator = torch.Generator().manual_seed(point.seed)
    if point.params["precision"] == "tf32":
        if not device.startswith("cuda"):
            raise SaihError("precision=tf32 needs a GPU; fp32, bf16 and fp16 run anywhere")
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]

    def operand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    n = int(point.params["size"])
    if name == "gemm":
        return Gemm(operand(n, n).to(device), operand(n, n).to(device))
    if name == "conv3d":
        width, side = spec.channels(point.params), spec.VOXELS_PER_SIDE
        volumes, weights = operand(spec.BATCH, width, side, side, side), operand(width, width, 3, 3, 3)
        return Conv3d(volumes.to(device), weights.to(device))
    if name == "copy":
        return Copy(operand(n, n).to(device))
    if name == "triad":
        return Triad(operand(n, n).to(device), operand(n, n).to(device))
    if not device.startswith("cuda"):
        raise SaihError(f"kernel={name} copies between a host and a GPU; this job has none")
    host = operand(n, n)
    host = host.pin_memory() if point.params["pinned"] else host
    return HostLink(host, host.to(device)) if name == "upload" else HostLink(host.to(device), host)


class Ceiling:
    """A kernel made ready to be called."""

    def __init__(self, point: Point, kernel: Kernel) -> None:
        self.kernel = kernel
        self.tolerance = TOLERANCE[str(point.params["precision"])]
        cost = spec.cost(point.params)
        self.work = Work(cost.work, cost.flop, sum(operation.moved_bytes for operation in cost.operations))
        self.prepare = getattr(kernel, "prepare", lambda: None)

    def check(self) -> Check:
        error = self.kernel.error()
        return Check(
            error <= self.tolerance, {"relative_error": error}, f"relative error {error:.3g} > {self.tolerance:g}"
        )

    def step(self, clock: Clock) -> Work:
        """What `prepare` takes counts as `other`, which no rate includes."""
        self.prepare()
        clock.enter(self.kernel.phase)
        self.kernel.call()
        return self.work

    def close(self) -> None:
        """Let go of files; fp32 means fp32 again."""
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
        if isinstance(self.kernel, (Read, Write, Opens)):
            self.kernel.close()
