"""Side layers that start as the backbone's most important parts: structural pruning by Fisher information.

As Ladder Side-Tuning does (Sung et al., 2022, section 3.4): a width is kept where the loss feels it most, in the mean
square of gradients. D hidden widths of the backbone, S of them kept; F MLP columns; d widths of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from workloads.llm.blocks import Block
from workloads.llm.config import ModelSpec
from workloads.llm.model import Stage
from workloads.llm.pac.adapters import Ladder, SideLayer
from workloads.llm.pac.batch import Batch
from workloads.llm.pac.stages import Settings, Tail


def start_pruned(ladder: Ladder, backbone: Stage, settings: Settings, batches: Sequence[Batch]) -> None:
    """Fill the side layers with rows and columns of the backbone's, and each W_i with the choice of its S widths.

    The stream between layers is one, so all layers keep the same S of its widths. What they compute at first is a
    narrow copy of the backbone. U stays as it is, zero.
    """
    fisher = fisher_information(backbone, settings, batches)
    with torch.no_grad():
        kept_S = _strongest(_stream(backbone, fisher), ladder.side.hidden)
        _choose(ladder.down.weight, kept_S)
        for number, layer in ladder.layers.items():
            side = cast(SideLayer, layer)
            _choose(side.down.weight, kept_S)
            block = cast(Block, backbone.layers[number])
            _prune_block(side.block, block, f"layers.{number}.", fisher, kept_S, settings.spec, ladder.side)


def fisher_information(backbone: Stage, settings: Settings, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean square gradient of every matrix of the layers over mini-batches; the backbone is left as it was."""
    matrices = {name: p for name, p in backbone.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    found = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
    tail = Tail(settings, backbone)
    for parameter in matrices.values():
        parameter.requires_grad_(True)
    for batch in batches:
        meta = batch.meta(settings.spec.causal)
        h_TD, by = backbone.embed(batch.ids_T, meta), backbone.rotation(meta)
        for block in backbone.layers.values():
            h_TD = block(h_TD, meta, by)
        gradients = torch.autograd.grad(tail.loss(h_TD, batch, meta), list(matrices.values()))
        for total, gradient in zip(found.values(), gradients, strict=True):
            total += gradient.square() / len(batches)
    for parameter in matrices.values():
        parameter.requires_grad_(False)
    return found


def _stream(backbone: Stage, fisher: dict[str, Tensor]) -> Tensor:
    """[D]: what reads a width and what writes it, over all layers."""
    into = [fisher[f"layers.{n}.{name}.weight"].sum(0) for n in backbone.layers for name in ("attn.qkv", "mlp.up")]
    out = [fisher[f"layers.{n}.{name}.weight"].sum(1) for n in backbone.layers for name in ("attn.out", "mlp.down")]
    return torch.stack(into + out).sum(0)


def _strongest(importance: Tensor, count: int) -> Tensor:
    """The places of the largest, in order."""
    return importance.topk(count).indices.sort().values


def _choose(weight_SD: Tensor, kept_S: Tensor) -> None:
    weight_SD.zero_()
    weight_SD[torch.arange(len(kept_S)), kept_S] = 1.0


def _prune_block(
    side: Block, block: Block, path: str, fisher: dict[str, Tensor], kept_S: Tensor, spec: ModelSpec, narrow: ModelSpec
) -> None:
    rows, columns = _of_heads(fisher[f"{path}attn.qkv.weight"], spec, narrow)
    _copy(side.attn.qkv, block.attn.qkv, rows, kept_S)
    _copy(side.attn.out, block.attn.out, kept_S, columns)
    columns_F = _strongest(_mlp_columns(fisher, path, spec), narrow.ffn)
    both = torch.cat([columns_F, columns_F + spec.ffn]) if spec.gated else columns_F
    _copy(side.mlp.up, block.mlp.up, both, kept_S)
    _copy(side.mlp.down, block.mlp.down, kept_S, columns_F)
    for mine, theirs in ((side.attn_norm, block.attn_norm), (side.mlp_norm, block.mlp_norm)):
        mine.weight.copy_(theirs.weight[kept_S])
        if mine.bias is not None:
            mine.bias.copy_(cast(Tensor, theirs.bias)[kept_S])


def _mlp_columns(fisher: dict[str, Tensor], path: str, spec: ModelSpec) -> Tensor:
    up = fisher[f"{path}mlp.up.weight"].sum(1)
    return fisher[f"{path}mlp.down.weight"].sum(0) + (up[: spec.ffn] + up[spec.ffn :] if spec.gated else up)


def _of_heads(fisher_qkv: Tensor, spec: ModelSpec, narrow: ModelSpec) -> tuple[Tensor, Tensor]:
    """Rows of q, k and v that stay, the same share of each head, and columns of what takes the heads together.

    Query heads that share a KV head keep the widths of its k, of rotary positions whole pairs; v has widths of its own,
    and the columns are those.
    """
    importance = fisher_qkv.sum(1)
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    q_Hd, k_Gd, v_Gd = (part.view(-1, spec.head_dim) for part in importance.split([q, kv, kv]))
    shared = spec.heads // spec.kv_heads
    key_widths = [
        _widths(k_Gd[group] + q_Hd[group * shared : (group + 1) * shared].sum(0), spec, narrow.head_dim)
        for group in range(spec.kv_heads)
    ]
    value_widths = [_strongest(v_Gd[group], narrow.head_dim) for group in range(spec.kv_heads)]
    rows = [head * spec.head_dim + key_widths[head // shared] for head in range(spec.heads)]
    rows += [q + group * spec.head_dim + widths for group, widths in enumerate(key_widths)]
    rows += [q + kv + group * spec.head_dim + widths for group, widths in enumerate(value_widths)]
    columns = [head * spec.head_dim + value_widths[head // shared] for head in range(spec.heads)]
    return torch.cat(rows), torch.cat(columns)


def _widths(importance_d: Tensor, spec: ModelSpec, count: int) -> Tensor:
    if not spec.rope_theta:
        return _strongest(importance_d, count)
    half = spec.head_dim // 2
    pairs = _strongest(importance_d[:half] + importance_d[half:], count // 2)
    return torch.cat([pairs, pairs + half])


def _copy(side: nn.Module, wide: nn.Module, rows: Tensor, columns: Tensor) -> None:
    """weight[rows][:, columns], and the bias of those rows."""
    cast(Tensor, side.weight).copy_(cast(Tensor, wide.weight)[rows][:, columns])
    if side.bias is not None:
        cast(Tensor, side.bias).copy_(cast(Tensor, wide.bias)[rows])
