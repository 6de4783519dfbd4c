"""The MLPerf HPC CosmoFlow network (v1.0 and later: 3x3x3 kernels) at any width and depth."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from workloads.cosmology.cosmoflow.spec import Network

SLOPE = 0.3
OUTPUT_SCALE = 1.2


class Stage(nn.Module):
    """Convolution, pooling, leaky ReLU.

    Pooling comes before the activation: both are monotone, so the result is the same, with an eighth of the traffic.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel_size=3, padding=1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.pool(self.conv(x_BCDHW)), SLOPE, inplace=True)


class CosmoFlow(nn.Module):
    """[B, C, D, H, W] float -> [B, 4] in (-1.2, 1.2)."""

    def __init__(self, network: Network, dropout: float = 0.5) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(Stage(conv.inputs, conv.outputs) for conv in network.convs))
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in network.dense[:-1]:
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(*network.dense[-1]), nn.Tanh())

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        return cast(Tensor, OUTPUT_SCALE * self.head(self.stages(x_BCDHW)))


def from_counts(counts_BDHWC: Tensor, mean_count: float) -> Tensor:
    """int16 particle counts -> log1p of the density in units of its mean, [B, C, D, H, W] in channels-last memory."""
    return torch.log1p(counts_BDHWC.float() / mean_count).permute(0, 4, 1, 2, 3)
