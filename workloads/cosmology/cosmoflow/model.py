"""The MLPerf HPC CosmoFlow network (v1.0 and later: 3x3x3 kernels) at any width and depth, and vision transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workloads.cosmology.cosmoflow import vit
from workloads.cosmology.cosmoflow.networks import TARGETS, Conv, Network, Transformer

SLOPE = 0.3
OUTPUT_SCALE = 1.2


class Stage(nn.Module):
    """Convolutions with leaky ReLUs; the last one is pooled.

    Pooling comes before the activation: both are monotone, so the result is the same, with an eighth of the traffic.
    """

    def __init__(self, convs: Sequence[Conv]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(each.inputs, each.outputs, kernel_size=3, padding=1) for each in convs)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x_BCDHW = nn.functional.leaky_relu(conv(x_BCDHW), SLOPE, inplace=True)
        x_BCDHW = self.convs[-1](x_BCDHW)
        with torch.autocast("cpu", enabled=False):  # which would pool a copy in fp32
            return nn.functional.leaky_relu(self.pool(x_BCDHW), SLOPE, inplace=True)


class Regressor(nn.Module):
    """[B, C, D, H, W] float -> [B, 4] in (-1.2, 1.2): stages or blocks, then a head, at any size of either family."""

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.head = head
        self.recompute = False
        """Keep the inputs of the stages alone, and compute the rest anew in backward."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        x = x_BCDHW
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False) if self.recompute else stage(x)
        return OUTPUT_SCALE * torch.tanh(self.head(x))


def build(network: Network, channels: int = 4, dropout: float = 0.5) -> Regressor:
    """The network with fresh weights. Dropout is CosmoFlow's, in its dense layers; a vision transformer has none."""
    if isinstance(network, Transformer):
        blocks = [vit.Block(network.width) for _ in range(network.blocks)]
        return Regressor([vit.Embedding(network, channels), *blocks], vit.Head(network.width, TARGETS))
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in network.dense[:-1]:
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(SLOPE), nn.Dropout(dropout)]
    head = nn.Sequential(*layers, nn.Linear(*network.dense[-1]))
    return Regressor([Stage(stage) for stage in network.stages], head)


def from_counts(counts_BDHWC: Tensor, mean_count: float) -> Tensor:
    """int16 particle counts -> log1p of the density in units of its mean, [B, C, D, H, W] in channels-last memory."""
    return torch.log1p(counts_BDHWC.float() / mean_count).permute(0, 4, 1, 2, 3)
