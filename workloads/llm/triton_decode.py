"""Paged decode attention in Triton: one query row a sequence against the KV cache in place, its keys cut into splits.

Flash-Decoding (Dao et al., 2023): each split attends to its part of the keys, then the parts are weighed by their
log-sum-exp. With one split, a thread block a sequence and KV head, the longest sequence decides the time of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA brings none, and attention.backend() says so
    triton = None

TILE = 64
"""Keys read at a time."""
LEAST_ROWS = 16
"""A matrix product of Triton takes no fewer rows: query heads that share a KV head are filled up to this."""
KEYS_WORTH_A_SPLIT = 256
PROGRAMS_PER_SM = 2


def paged_decode(
    q_BHd: Tensor, k_NSGd: Tensor, v_NSGd: Tensor, table_BN: Tensor, lens_B: Tensor, splits: int | None = None
) -> Tensor:
    """One row [H, d] a sequence against its lens_B[b] >= 1 first keys in the blocks of table_BN -> [B, H, d].

    k and v are views of one arena with the same strides. splits: None takes as many as fill the GPU.
    """
    batch, heads, size = q_BHd.shape
    block_size, kv_heads = k_NSGd.shape[1:3]
    splits = splits or _filling(q_BHd.device, batch * kv_heads, table_BN.shape[1] * block_size)
    parts_BHPd = torch.empty(batch, heads, splits, size, dtype=torch.float32, device=q_BHd.device)
    weight_BHP = torch.empty(batch, heads, splits, dtype=torch.float32, device=q_BHd.device)
    group = heads // kv_heads
    _attend_to_a_split[(batch, kv_heads, splits)](
        q_BHd.contiguous(),
        k_NSGd,
        v_NSGd,
        table_BN,
        lens_B,
        parts_BHPd,
        weight_BHP,
        size**-0.5,
        table_BN.stride(0),
        *k_NSGd.stride()[:3],
        GROUP=group,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
        SIZE=size,
        COLUMNS=max(LEAST_ROWS, triton.next_power_of_2(size)),
        BLOCK_SIZE=block_size,
        TILE=TILE,
    )
    if splits == 1:
        return parts_BHPd[:, :, 0].to(q_BHd.dtype)
    share_BHP = torch.softmax(weight_BHP, -1)
    return torch.einsum("bhp,bhpd->bhd", share_BHP, parts_BHPd).to(q_BHd.dtype)


def _filling(device: torch.device, programs: int, most_keys: int) -> int:
    """Splits that give every multiprocessor PROGRAMS_PER_SM programs, unless they would have too few keys."""
    wanted = -(-PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count // programs)
    return max(1, min(wanted, most_keys // KEYS_WORTH_A_SPLIT))


def _split_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    lens: tl.tensor,
    parts: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    place_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: the query heads of a sequence that share a KV head, over one split of the keys."""
    b, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lens + b)
    span = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
    begin = part * span
    end = tl.minimum(begin + span, length)

    row, column, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
    head = (b * tl.num_programs(1) + g) * GROUP + row
    mine_RC = (row < GROUP)[:, None] & (column < SIZE)[None, :]
    q_RC = tl.load(q + head[:, None] * SIZE + column[None, :], mask=mine_RC, other=0.0)

    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    o_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, TILE):
        key = first + place
        valid = key < end
        block = tl.load(table + b * table_stride + key // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        start = block * block_stride + (key % BLOCK_SIZE) * place_stride + g * head_stride
        there = start[:, None] + column[None, :]
        valid_TC = valid[:, None] & (column < SIZE)[None, :]
        k_TC = tl.load(k + there, mask=valid_TC, other=0.0)
        v_TC = tl.load(v + there, mask=valid_TC, other=0.0)
        score_RT = tl.dot(q_RC, tl.trans(k_TC), input_precision="ieee") * scale
        score_RT = tl.where(valid[None, :], score_RT, float("-inf"))
        larger_R = tl.maximum(most_R, tl.max(score_RT, 1))
        shrink_R = tl.exp(most_R - larger_R)
        p_RT = tl.exp(score_RT - larger_R[:, None])
        sum_R = sum_R * shrink_R + tl.sum(p_RT, 1)
        o_RC = o_RC * shrink_R[:, None] + tl.dot(p_RT.to(v_TC.dtype), v_TC, input_precision="ieee")
        most_R = larger_R

    some = begin < length  # a split without keys weighs nothing: exp(-inf)
    sum_R = tl.where(some, sum_R, 1.0)
    out = head * splits + part
    tl.store(parts + out[:, None] * SIZE + column[None, :], o_RC / sum_R[:, None], mask=mine_RC)
    tl.store(weight + out, most_R + tl.log(sum_R), mask=row < GROUP)


_attend_to_a_split: Any = triton.jit(_split_kernel) if triton is not None else None
