"""Kernels of one device: matrix product, convolution, memory copy and triad, host link, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.ceilings import spec

COMPARED = 64
SCALAR = 3.0
"""STREAM's own."""


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


class Triad:
    """c <- a + 3 b, as in STREAM; its bytes are those of three arrays."""

    phase = "compute"

    def __init__(self, a_MN: Tensor, b_MN: Tensor) -> None:
        self.a_MN, self.b_MN, self.c_MN = a_MN, b_MN, torch.empty_like(a_MN)

    def call(self) -> object:
        return torch.add(self.a_MN, self.b_MN, alpha=SCALAR, out=self.c_MN)

    def error(self) -> float:
        self.c_MN.fill_(float("nan"))
        self.call()
        return _relative(self.c_MN, self.a_MN.double() + SCALAR * self.b_MN.double())


class HostLink:
    """One copy between the host's memory and the device's."""

    phase = "transfer"

    def __init__(self, source_MN: Tensor, target_MN: Tensor) -> None:
        self.source_MN, self.target_MN = source_MN, target_MN

    def call(self) -> object:
        return self.target_MN.copy_(self.source_MN, non_blocking=True)

    def error(self) -> float:
        self.target_MN.fill_(float("nan"))
        self.call()
        torch.cuda.synchronize()
        return 0.0 if torch.equal(self.source_MN.cpu(), self.target_MN.cpu()) else float("inf")


class Launches:
    """Many kernels that do next to nothing, one after the other: what is left is the cost of launching them."""

    phase = "compute"

    def __init__(self, device: str) -> None:
        self.x = torch.zeros(1, device=device)

    def call(self) -> object:
        for _ in range(spec.LAUNCHES):
            self.x.add_(1.0)
        return self.x

    def error(self) -> float:
        self.x.zero_()
        return abs(float(self.call()) - spec.LAUNCHES)  # type: ignore[arg-type]


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
