"""What a transformer layer is made of, on packed rows only: norms, rotary positions, attention, MLP, the block.

T rows of all sequences, D hidden, H query heads and G KV heads of this rank, d their size, F my part of the MLP.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from workloads.llm.attention import AttnMeta, Backend
from workloads.llm.config import ModelSpec, RopeScaling
from workloads.llm.kv import PagedKV
from workloads.llm.shard import ColumnLinear, Cut, Make, Mesh, RowLinear, copy_to_ranks, cut, cut_kv_heads

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of every row's angles, each [T, 1, d/2]."""


class Norm(nn.Module):
    """Layer norm, or RMS norm (Zhang and Sennrich, 2019), over the last dimension."""

    def __init__(self, kind: str, size: int, eps: float, made: Make) -> None:
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = made.parameter(size)
        self.bias = made.parameter(size) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.size, self.weight, self.eps)
        return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)


def rotation(
    positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles of rotary positions (Su et al., 2021): position * theta^(-2i/d), computed in fp32."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions_T[:, None, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, by: RopeScaling) -> Tensor:
    """Llama 3.1's: slow ones over the factor, fast ones as they are, between them by their waves in the old context."""
    waves = by.old_positions * frequencies / (2 * math.pi)
    kept = ((waves - by.low) / (by.high - by.low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / by.factor)


def rotate(x_THd: Tensor, by: Rotation) -> Tensor:
    """Rotate pairs (i, i + d/2), as Hugging Face checkpoints have them; the paper pairs (2i, 2i + 1)."""
    (cos, sin), (a, b) = by, x_THd.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) over packed rows; each rank has some of the heads.

    With fewer KV heads than ranks, gradients of K and V matrices are partial: such a split is for inference.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, backend: Backend, made: Make) -> None:
        super().__init__()
        self.head_dim, self.backend, self.mesh = spec.head_dim, backend, mesh
        q, kv = (
            Cut(heads.whole * self.head_dim, heads.start * self.head_dim, heads.stop * self.head_dim)
            for heads in (cut(spec.heads, mesh, "heads"), cut_kv_heads(spec.kv_heads, mesh))
        )
        self.qkv = ColumnLinear(spec.hidden, {"q": q, "k": kv, "v": kv}, spec.qkv_bias, mesh, made)
        self.out = RowLinear(q, spec.hidden, spec.out_bias, mesh, made)
        self.q_norm, self.k_norm = (
            Norm("rms", spec.head_dim, spec.norm_eps, made) if spec.qk_norm else None for _ in "qk"
        )

    def forward(self, h_TD: Tensor, meta: AttnMeta, by: Rotation | None, kv: PagedKV | None, layer: int) -> Tensor:
        q_THd, k_TGd, v_TGd = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(h_TD).split(self.qkv.sizes, -1))
        q_THd, k_TGd = self._normed(q_THd, self.q_norm), self._normed(k_TGd, self.k_norm)
        if by is not None:
            q_THd, k_TGd = rotate(q_THd, by), rotate(k_TGd, by)
        o_THd = self.backend(q_THd, k_TGd, v_TGd, meta, kv, layer)
        return cast(Tensor, self.out(o_THd.flatten(1)))

    def _normed(self, x_THd: Tensor, norm: Norm | None) -> Tensor:
        """The weight is the same on all ranks but sees only their heads: its gradients add up."""
        if norm is None:
            return x_THd
        return F.rms_norm(x_THd, norm.size, copy_to_ranks(norm.weight, self.mesh), norm.eps)


class MLP(nn.Module):
    """Up, activation, down; or SwiGLU (Shazeer, 2020)."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, made: Make) -> None:
        super().__init__()
        self.activation = spec.activation
        ffn = cut(spec.ffn, mesh, "MLP columns")
        parts = {"gate": ffn, "up": ffn} if spec.gated else {"up": ffn}
        self.up = ColumnLinear(spec.hidden, parts, spec.mlp_bias, mesh, made)
        self.down = RowLinear(ffn, spec.hidden, spec.mlp_bias, mesh, made)

    def forward(self, h_TD: Tensor) -> Tensor:
        return cast(Tensor, self.down(activate(self.up(h_TD), self.activation)))


def activate(x_TF: Tensor, name: str) -> Tensor:
    """The activation of this name; 'swiglu' halves the columns."""
    if name == "swiglu":
        gate_TF, up_TF = x_TF.chunk(2, -1)
        return F.silu(gate_TF) * up_TF
    if name == "relu":
        return F.relu(x_TF)
    return F.gelu(x_TF, approximate="tanh" if name == "gelu_tanh" else "none")


class Block(nn.Module):
    """One layer: attention and MLP, each added to what came in; normalised before (most) or after (BERT)."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, backend: Backend, made: Make) -> None:
        super().__init__()
        self.post_norm = spec.post_norm
        self.attn_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        self.attn = Attention(spec, mesh, backend, made)
        self.mlp_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        self.mlp = MLP(spec, mesh, made)

    def forward(
        self, h_TD: Tensor, meta: AttnMeta, by: Rotation | None = None, kv: PagedKV | None = None, layer: int = 0
    ) -> Tensor:
        """`by` turns q and k where positions are rotary; `layer` counts from the first one that `kv` has."""
        if self.post_norm:
            h_TD = self.attn_norm(h_TD + self.attn(h_TD, meta, by, kv, layer))
            return cast(Tensor, self.mlp_norm(h_TD + self.mlp(h_TD)))
        h_TD = h_TD + self.attn(self.attn_norm(h_TD), meta, by, kv, layer)
        return cast(Tensor, h_TD + self.mlp(self.mlp_norm(h_TD)))
