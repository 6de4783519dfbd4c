"""A vision transformer over the patches of a volume (Dosovitskiy et al., arXiv:2010.11929), pre-norm, in 3D."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workloads.cosmology.cosmoflow.networks import HEAD_CHANNELS, Transformer

PLACE_DEVIATION = 0.02


class Embedding(nn.Module):
    """[B, C, D, H, W] -> [B, T, E]: patches as vectors, projected, plus a learned vector for each place."""

    def __init__(self, network: Transformer, channels: int) -> None:
        super().__init__()
        self.side = round((network.patch_numbers / channels) ** (1 / 3))
        self.project = nn.Linear(network.patch_numbers, network.width)
        self.place_TE = nn.Parameter(torch.randn(network.tokens, network.width) * PLACE_DEVIATION)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        batch, channels, mesh = x_BCDHW.shape[:3]
        count, side = mesh // self.side, self.side
        x = x_BCDHW.permute(0, 2, 3, 4, 1).reshape(batch, count, side, count, side, count, side, channels)
        patches_BTN = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, count**3, side**3 * channels)
        embedded: Tensor = self.project(patches_BTN) + self.place_TE
        return embedded


class Block(nn.Module):
    """Attention over all tokens and an MLP of four times the width, each behind a norm and beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_CHANNELS
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTE: Tensor) -> Tensor:
        x_BTE = x_BTE + self.attend(self.norm_1(x_BTE))
        mixed: Tensor = x_BTE + self.mlp(self.norm_2(x_BTE))
        return mixed

    def attend(self, x_BTE: Tensor) -> Tensor:
        batch, tokens, width = x_BTE.shape
        q_BHTD, k_BHTD, v_BHTD = self.qkv(x_BTE).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        y_BHTD = nn.functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD)
        attended: Tensor = self.out(y_BHTD.transpose(1, 2).reshape(batch, tokens, width))
        return attended


class Head(nn.Module):
    """[B, T, E] -> [B, 4]: the normalised mean of the tokens, one dense layer."""

    def __init__(self, width: int, targets: int) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(width), nn.Linear(width, targets)

    def forward(self, x_BTE: Tensor) -> Tensor:
        read: Tensor = self.dense(self.norm(x_BTE).mean(1))
        return read
