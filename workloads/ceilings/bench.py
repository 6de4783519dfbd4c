"""Time one kernel over and over, after comparing its result with what it must be."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from saih.errors import SaihError
from workloads.ceilings import spec
from workloads.ceilings.collectives import all_reduce

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2, "fp16": 4e-3}
"""Largest |result - float64| / |float64|, as norms over what is compared."""
COMPARED = 64


class Kernel(Protocol):
    """One kernel with its operands."""

    phase: str
    """What its time counts as."""

    def call(self) -> object:
        """Run it once."""

    def error(self) -> float:
        """Relative error of its result, or of a part of it."""


def setup(point: Point, context: Context) -> Ceiling:
    """Random operands on the device: zeros can run faster than real data."""
    generator = torch.Generator().manual_seed(point.seed)
    precision = str(point.params["precision"])
    if precision == "tf32":
        if not context.device.startswith("cuda"):
            raise SaihError("precision=tf32 needs a GPU; fp32, bf16 and fp16 run anywhere")
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    dtype = DTYPES[precision]

    def operand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(context.device, dtype)

    size = int(point.params["size"])
    kernel: Kernel
    if point.params["kernel"] == "gemm":
        kernel = Gemm(operand(size, size), operand(size, size))
    elif point.params["kernel"] == "conv3d":
        width, side = spec.channels(point.params), spec.VOXELS_PER_SIDE
        kernel = Conv3d(operand(spec.BATCH, width, side, side, side), operand(width, width, 3, 3, 3))
    elif point.params["kernel"] == "copy":
        kernel = Copy(operand(size, size))
    else:
        kernel = all_reduce(point, context, dtype)
    return Ceiling(point, kernel)


class Ceiling:
    """A kernel made ready to be called."""

    def __init__(self, point: Point, kernel: Kernel) -> None:
        self.kernel = kernel
        self.tolerance = TOLERANCE[str(point.params["precision"])]
        cost = spec.cost(point.params)
        self.work = Work(cost.work, cost.flop, cost.operations[0].moved_bytes)

    def check(self) -> Check:
        error = self.kernel.error()
        return Check(
            error <= self.tolerance, {"relative_error": error}, f"relative error {error:.3g} > {self.tolerance:g}"
        )

    def step(self, clock: Clock) -> Work:
        clock.enter(self.kernel.phase)
        self.kernel.call()
        return self.work

    def close(self) -> None:
        """fp32 means fp32 again."""
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]


class Gemm:
    """C = A B."""

    phase = "compute"

    def __init__(self, a_MK: Tensor, b_KN: Tensor) -> None:
        self.a_MK, self.b_KN = a_MK, b_KN
        self.c_MN = torch.empty_like(a_MK)

    def call(self) -> object:
        return torch.mm(self.a_MK, self.b_KN, out=self.c_MN)

    def error(self) -> float:
        self.c_MN.fill_(float("nan"))
        self.call()
        exact = self.a_MK[:COMPARED].double() @ self.b_KN.double()
        return _relative(self.c_MN[:COMPARED], exact)


class Conv3d:
    """3x3x3 convolution with padding, channels last."""

    phase = "compute"

    def __init__(self, x_BCDHW: Tensor, weight_OCDHW: Tensor) -> None:
        self.x_BCDHW = x_BCDHW.to(memory_format=torch.channels_last_3d)
        self.weight_OCDHW = weight_OCDHW.to(memory_format=torch.channels_last_3d)

    def call(self) -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.conv3d(self.x_BCDHW, self.weight_OCDHW, padding=1)

    def error(self) -> float:
        """Compares one corner and the interior next to it: the 2^3 first voxels of the first volume."""
        corner = self.x_BCDHW[:1, :, :3, :3, :3].double()
        exact = torch.nn.functional.conv3d(corner, self.weight_OCDHW.double(), padding=1)[..., :2, :2, :2]
        return _relative(self.call()[:1, :, :2, :2, :2], exact)


class Copy:
    """b <- a."""

    phase = "compute"

    def __init__(self, a_MN: Tensor) -> None:
        self.a_MN, self.b_MN = a_MN, torch.empty_like(a_MN)

    def call(self) -> object:
        return self.b_MN.copy_(self.a_MN)

    def error(self) -> float:
        self.b_MN.fill_(float("nan"))
        self.call()
        return 0.0 if torch.equal(self.a_MN, self.b_MN) else float("inf")


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
