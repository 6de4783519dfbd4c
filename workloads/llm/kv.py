"""Paged KV cache: blocks of tokens in an arena on a device or the host, in one of two layouts, and copies of blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saih.errors import SaihError, unknown

LAYOUTS = ("layer_first", "block_first")


class PagedKV:
    """Keys and values of `blocks` blocks of `block_size` tokens each, for the layers of one stage.

    A slot is block * block_size + place in the block. Layer numbers count from the stage's first layer.
    layer_first [L, N, 2, S, G, d] keeps a layer together, as most engines do. block_first [N, L, 2, S, G, d] keeps a
    block together, so that a run of blocks moves in one copy (PipeMax; vLLM 0.12 and later for offloading).

    N blocks, L layers, S tokens a block, G KV heads of this rank, d their size.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        blocks: int,
        block_size: int = 16,
        layout: str = "layer_first",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pinned: bool = False,
    ) -> None:
        """`pinned` page-locks a host arena, which asynchronous copies from and to CUDA need."""
        if layout not in LAYOUTS:
            raise unknown("KV layout", layout, LAYOUTS)
        self.layers, self.blocks, self.block_size, self.layout = layers, blocks, block_size, layout
        outer = (layers, blocks) if layout == "layer_first" else (blocks, layers)
        shape = (*outer, 2, block_size, kv_heads, head_dim)
        self.arena = torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
        self._rows_RGd = self.arena.view(-1, kv_heads, head_dim)
        pair = 2 * block_size
        layer_first = layout == "layer_first"
        self._rows_per_block = pair if layer_first else pair * layers
        self._rows_per_layer = pair * blocks if layer_first else pair

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.arena.nbytes // self.blocks

    def write(self, layer: int, slots_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Store one key and one value a slot."""
        rows_T = self._rows(layer, slots_T)
        self._rows_RGd.index_copy_(0, rows_T, k_TGd)
        self._rows_RGd.index_copy_(0, rows_T + self.block_size, v_TGd)

    def read(self, layer: int, slots_K: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in these slots, each [K, G, d]."""
        rows_K = self._rows(layer, slots_K)
        return self._rows_RGd.index_select(0, rows_K), self._rows_RGd.index_select(0, rows_K + self.block_size)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values, each [N, S, G, d]; strided over the blocks."""
        pair_N2SGd = self.arena[layer] if self.layout == "layer_first" else self.arena[:, layer]
        return pair_N2SGd[:, 0], pair_N2SGd[:, 1]

    def _rows(self, layer: int, slots: Tensor) -> Tensor:
        block = slots // self.block_size
        return slots + block * (self._rows_per_block - self.block_size) + layer * self._rows_per_layer


@dataclass(frozen=True)
class EmulatedLink:
    """A slower link than the machine has: every transfer takes at least its bytes over this rate. Emulated."""

    bytes_per_s: float
    copy_s: float = 0.0
    """Fixed time of each copy."""

    def seconds(self, moved_bytes: int, copies: int) -> float:
        return moved_bytes / self.bytes_per_s + copies * self.copy_s


@dataclass(frozen=True)
class Moved:
    """What a copy of blocks took."""

    bytes: int
    copies: int


def copy_blocks(
    source: PagedKV,
    target: PagedKV,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    link: EmulatedLink | None = None,
) -> Moved:
    """Copy source_blocks[i] to target_blocks[i]: one copy a run of consecutive blocks, one a layer if layer-first.

    Copies between pinned host memory and CUDA are asynchronous on the current stream: the caller orders them by events.
    With an emulated link the call returns after the link's time at the earliest.
    Raises SaihError if layouts or shapes of the arenas differ.
    """
    if len(source_blocks) != len(target_blocks):
        raise SaihError(f"{len(source_blocks)} blocks cannot be copied to {len(target_blocks)}")
    ours, theirs = (_shape_of_a_block(kv) for kv in (source, target))
    if ours != theirs:
        raise SaihError(f"KV arenas differ: {ours} and {theirs}")
    begin, copies = time.perf_counter(), 0
    for a, b, length in _runs(source_blocks, target_blocks):
        for into, out_of in zip(_chunks(target, b, length), _chunks(source, a, length), strict=True):
            into.copy_(out_of, non_blocking=True)
            copies += 1
    moved = Moved(source.block_bytes * len(source_blocks), copies)
    if link is not None:
        time.sleep(max(0.0, begin + link.seconds(moved.bytes, moved.copies) - time.perf_counter()))
    return moved


def _shape_of_a_block(kv: PagedKV) -> tuple[object, ...]:
    return kv.layout, kv.layers, *kv.arena.shape[2:], kv.arena.dtype


def _chunks(kv: PagedKV, first: int, length: int) -> Iterator[Tensor]:
    """The contiguous pieces of a run of blocks."""
    if kv.layout == "block_first":
        yield kv.arena[first : first + length]
    else:
        yield from kv.arena[:, first : first + length]


def _runs(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first source block, first target block, length) of each run that is consecutive on both sides."""
    start = 0
    for end in range(1, len(source) + 1):
        if end == len(source) or source[end] != source[end - 1] + 1 or target[end] != target[end - 1] + 1:
            yield source[start], target[start], end - start
            start = end
