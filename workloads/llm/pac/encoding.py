"""How the cached activations of a sample are stored: fp32 as they are, fp16, or int8 with a scale a row.

P = layers + 1 points of the backbone, T tokens of the sample, D hidden.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from saih.errors import SaihError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
INT8_LEVELS = 127
"""What is read from int8 differs by half a scale at most: 1/254 of the largest value of its row."""


class Encoded(NamedTuple):
    """A sample as it is stored."""

    values_PTD: Tensor
    scales_PT1: Tensor | None = None
    """fp32; of int8 alone."""

    @property
    def nbytes(self) -> int:
        return self.values_PTD.nbytes + (0 if self.scales_PT1 is None else self.scales_PT1.nbytes)

    @property
    def crc32(self) -> int:
        checksum = zlib.crc32(self.values_PTD.numpy().data)
        return checksum if self.scales_PT1 is None else zlib.crc32(self.scales_PT1.numpy().data, checksum)


def encode(rows_PTD: Tensor, precision: str) -> Encoded:
    """A copy of fp32 rows. Raises SaihError where fp16 has no number that large."""
    if precision == "int8":
        scales_PT1 = rows_PTD.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / INT8_LEVELS
        return Encoded((rows_PTD / scales_PT1).round().to(torch.int8), scales_PT1)
    values_PTD = torch.empty(rows_PTD.shape, dtype=DTYPES[precision]).copy_(rows_PTD)
    if precision == "fp16" and not bool(values_PTD.isfinite().all()):
        largest = float(rows_PTD.abs().max())
        raise SaihError(f"an activation of {largest:.3g} is too large for fp16; choose cache_dtype=fp32 or int8")
    return Encoded(values_PTD)


def decode_into(out_PTD: Tensor, sample: Encoded) -> None:
    """Write the sample as fp32."""
    out_PTD.copy_(sample.values_PTD)
    if sample.scales_PT1 is not None:
        out_PTD.mul_(sample.scales_PT1)
