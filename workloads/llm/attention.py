"""How packed rows form sequences (AttnMeta), and the attention kernels to choose from.

T packed query rows, K packed keys, B sequences, Q and L the longest query and key rows, H heads, G KV heads, d their
size, N blocks of S tokens.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saih.errors import SaihError, unknown
from workloads.llm.kv import PagedKV

BACKENDS = ("padded", "loop", "even", "varlen", "triton")
"""padded: SDPA over [B, longest], any device. loop: SDPA for each sequence, cached keys read in place, any device.
even: padded where nothing has to be filled up, which is one call, else loop: any device, for steps without a cache.
varlen: torch's flash kernel over packed rows, CUDA and half precision. triton: as varlen, and decode steps read the
cache in place, in splits."""


@dataclass(frozen=True)
class AttnMeta:
    """How the T packed rows of a step form B sequences, and where keys and values lie. The same for every layer.

    Sequence b owns the query rows cu_q[b]:cu_q[b+1]. Its first row stands at position starts[b]: so many of its tokens
    are in the KV cache already. Prefill, a chunk of a prefill, decode and an encoder are all this.
    """

    query_lens: tuple[int, ...]
    """Rows of each sequence in this step."""
    kv_lens: tuple[int, ...]
    """Keys each sequence may attend to, those of this step included."""
    starts: tuple[int, ...]
    causal: bool
    cu_q: Tensor
    """int32 [B+1]"""
    cu_k: Tensor
    """int32 [B+1]: first key of each sequence among the keys that attention gets packed."""
    kv_lens_B: Tensor
    """int32: kv_lens, on the device."""
    positions_T: Tensor
    """int64: place of each row in its sequence."""
    last_rows: Tensor
    """int64 [B]: the row of the last token of each sequence."""
    block_table_BN: Tensor | None = None
    """int64: cache blocks of each sequence in order, filled up with 0. None: there is no cache in this step."""
    block_size: int = 0
    slots_T: Tensor | None = None
    """int64: cache slot that each row's key and value go to."""

    @classmethod
    def packed(
        cls,
        query_lens: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        block_tables: Sequence[Sequence[int]] | None = None,
        block_size: int = 0,
        causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> AttnMeta:
        """Sequences of these lengths, one after the other, without padding.

        With `block_tables` (cache blocks of each sequence, in order) keys and values go through a paged cache, and
        `starts` says how many tokens of each sequence are there already (default 0). A decode step is
        query_lens=[1, ...] with starts=lengths so far.
        Raises SaihError for an empty batch, an empty sequence, `starts` without a cache, too few blocks.
        """
        lens, begins = tuple(query_lens), tuple(starts) if starts is not None else (0,) * len(query_lens)
        _check(lens, begins, block_tables, block_size)
        kv_lens = tuple(start + length for start, length in zip(begins, lens, strict=True))
        cu_q, cu_k = _edges(lens, device), _edges(kv_lens, device)
        sequence_T, place_T = _places(lens, cu_q)
        positions_T = place_T + _on(begins, device)[sequence_T]
        table_BN = slots_T = None
        if block_tables is not None:
            widest = max(map(len, block_tables))
            table_BN = _on([[*blocks, *[0] * (widest - len(blocks))] for blocks in block_tables], device)
            slots_T = _slots(table_BN, block_size, sequence_T, positions_T)
        kv_lens_B, last_rows = cu_k.diff(), cu_q[1:].long() - 1
        return cls(
            lens, kv_lens, begins, causal, cu_q, cu_k, kv_lens_B, positions_T, last_rows, table_BN, block_size, slots_T
        )

    @classmethod
    def padded(cls, lens: Sequence[int], *, causal: bool = True, device: torch.device | str = "cpu") -> AttnMeta:
        """The wasteful form: every sequence takes max(lens) rows, and rows behind its length hold rubbish.

        Rows b*max(lens) : b*max(lens)+lens[b] are valid; nothing valid attends to rubbish. No cache.
        """
        starts = (0,) * len(lens)
        _check(lens, starts, None, 0)
        rows = (max(lens),) * len(lens)
        edges, kv_lens_B = _edges(rows, device), _on(lens, device, torch.int32)
        _, place_T = _places(rows, edges)
        last_rows = edges[:-1].long() + kv_lens_B - 1
        return cls(rows, tuple(lens), starts, causal, edges, edges, kv_lens_B, place_T, last_rows)

    @property
    def decode(self) -> bool:
        """Whether every sequence has one row."""
        return max(self.query_lens) == 1

    @property
    def fresh(self) -> bool:
        """Whether no sequence has earlier tokens: this step's keys are all there are."""
        return not any(self.starts)

    @cached_property
    def key_rows(self) -> tuple[int, ...]:
        """Rows of each sequence among the packed keys; more than kv_lens in the padded form."""
        return tuple(start + length for start, length in zip(self.starts, self.query_lens, strict=True))

    @cached_property
    def slots_K(self) -> Tensor:  # noqa: N802
        """int64: cache slots of all keys of all sequences, packed. Only with block tables."""
        if self.block_table_BN is None:
            raise SaihError("a step without block tables has no cache slots")
        return _slots(self.block_table_BN, self.block_size, *_places(self.key_rows, self.cu_k))

    @cached_property
    def blocks(self) -> list[list[int]]:
        """The cache blocks that the keys of each sequence fill, in order. Only with block tables."""
        if self.block_table_BN is None:
            raise SaihError("a step without block tables has no cache blocks")
        filled = (-(-length // self.block_size) for length in self.kv_lens)
        return [row[:count] for row, count in zip(self.block_table_BN.tolist(), filled, strict=True)]

    @cached_property
    def blocks_of_each(self) -> list[Tensor]:
        """int64: `blocks`, of each sequence a row on the device. Only with block tables."""
        rows = zip(cast(Tensor, self.block_table_BN), self.blocks, strict=True)
        return [row_N[: len(blocks)] for row_N, blocks in rows]

    @cached_property
    def padded_blocks_BN(self) -> Tensor:  # noqa: N802
        """int64: `blocks`, filled up with the first of each sequence, its own keys. Only with block tables."""
        table_BN = cast(Tensor, self.block_table_BN)
        place_N = torch.arange(-(-max(self.kv_lens) // self.block_size), device=table_BN.device)
        filled_BN = place_N * self.block_size < self.kv_lens_B[:, None]
        return torch.where(filled_BN, table_BN[:, : len(place_N)], table_BN[:, :1])

    @cached_property
    def tails(self) -> Tensor:
        """int64: rows of `padded_blocks_BN`, of [B * L], that were not written: behind the length, in each last block.

        Of a sequence that does not fill its first block these are all rows behind its length.
        """
        size, longest = self.block_size, self.padded_blocks_BN.shape[1] * self.block_size
        ends = (longest if length < size else -(-length // size) * size for length in self.kv_lens)
        rows = (
            range(place * longest + length, place * longest + end)
            for place, (length, end) in enumerate(zip(self.kv_lens, ends, strict=True))
        )
        return _on([row for tail in rows for row in tail], self.cu_q.device)

    @cached_property
    def padded_rows_T(self) -> Tensor:  # noqa: N802
        """int64: where each packed row stands in [B * Q]."""
        sequence_T, place_T = _places(self.query_lens, self.cu_q)
        return sequence_T * max(self.query_lens) + place_T

    @cached_property
    def padded_rows_K(self) -> Tensor:  # noqa: N802
        """int64: where each packed key stands in [B * L]."""
        sequence_K, place_K = _places(self.key_rows, self.cu_k)
        return sequence_K * max(self.key_rows) + place_K

    @cached_property
    def mask_B1QL(self) -> Tensor:  # noqa: N802
        """Whether a padded query may see a padded key."""
        device = self.cu_q.device
        key_L, query_Q = (torch.arange(max(rows), device=device) for rows in (self.key_rows, self.query_lens))
        seen = key_L < self.kv_lens_B[:, None, None, None]
        if self.causal:
            seen = seen & (key_L <= (_on(self.starts, device)[:, None] + query_Q)[:, None, :, None])
        return seen.expand(-1, -1, len(query_Q), -1)


def _check(lens: Sequence[int], starts: Sequence[int], tables: Sequence[Sequence[int]] | None, block_size: int) -> None:
    if not lens:
        raise SaihError("an empty batch: a step needs at least one sequence")
    if min(lens) < 1:
        raise SaihError(f"sequence {list(lens).index(min(lens))} has {min(lens)} rows; at least 1 is needed")
    if len(starts) != len(lens):
        raise SaihError(f"{len(starts)} starts for {len(lens)} sequences")
    if tables is None:
        if any(starts):
            raise SaihError("sequences that go on (starts > 0) need a KV cache: block_tables")
        return
    if block_size < 1 or len(tables) != len(lens):
        raise SaihError(f"{len(tables)} block tables of blocks of {block_size} tokens for {len(lens)} sequences")
    for sequence, (table, start, length) in enumerate(zip(tables, starts, lens, strict=True)):
        if len(table) * block_size < start + length:
            raise SaihError(
                f"sequence {sequence} has {len(table)} blocks of {block_size} tokens, too few for {start + length}"
            )


def _on(numbers: Sequence[Any], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _edges(lens: Sequence[int], device: torch.device | str) -> Tensor:
    return _on([0, *accumulate(lens)], device, torch.int32)


def _places(lens: Sequence[int], edges: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of every packed row and its place there, computed where `edges` is without waiting for it."""
    rows = sum(lens)
    sequence_T = torch.repeat_interleave(edges.diff(), output_size=rows)
    return sequence_T, torch.arange(rows, device=edges.device) - edges[sequence_T]


def _slots(table_BN: Tensor, block_size: int, sequence_T: Tensor, position_T: Tensor) -> Tensor:
    return table_BN[sequence_T, position_T // block_size] * block_size + position_T % block_size


# -- Kernels over packed keys ------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor, AttnMeta], Tensor]
"""q [T, H, d], keys and values [K, G, d], or a layer of the cache [N, S, G, d] -> [T, H, d]."""


def padded(q_THd: Tensor, k_KGd: Tensor, v_KGd: Tensor, meta: AttnMeta) -> Tensor:
    """Fill up to the longest sequence, attend, and take the valid rows out again."""
    q_BHQd = _pad(q_THd, meta.query_lens, meta.padded_rows_T)
    k_BGLd, v_BGLd = (_pad(x, meta.key_rows, meta.padded_rows_K) for x in (k_KGd, v_KGd))
    triangle = meta.causal and meta.fresh  # rubbish is behind what is valid: the triangle hides it
    full = min(meta.kv_lens) == max(meta.key_rows) and (meta.decode or not meta.causal)
    mask = None if triangle or full else meta.mask_B1QL
    o_BHQd = F.scaled_dot_product_attention(
        q_BHQd, k_BGLd, v_BGLd, attn_mask=mask, is_causal=triangle, enable_gqa=q_BHQd.shape[1] != k_BGLd.shape[1]
    )
    o_RHd = o_BHQd.transpose(1, 2).flatten(0, 1)
    return o_RHd if len(o_RHd) == len(q_THd) else o_RHd.index_select(0, meta.padded_rows_T)


class Scratch:
    """Memory for a tensor of each call, kept between calls: fresh pages cost a CPU more than what is put there.

    As much as the largest took, and a fourth: batches grow by and by. For inference: no gradient flows through it.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Of what is there, whatever it holds; valid until the next call."""
        size = math.prod(shape)
        kept = self._flat
        if kept is None or len(kept) < size or (kept.dtype, kept.device) != (like.dtype, like.device):
            self._flat = kept = None  # before the next is made
            with torch.inference_mode(False):  # a tensor for calls in this mode and out of it
                self._flat = kept = torch.empty(size + size // 4, dtype=like.dtype, device=like.device)
        return kept[:size].view(*shape)


class PaddedInCache:
    """One row a sequence; whole blocks are read, for everybody as many as for the longest. Not for two threads."""

    def __init__(self) -> None:
        self._keys, self._values = Scratch(), Scratch()

    def __call__(self, q_THd: Tensor, k_NSGd: Tensor, v_NSGd: Tensor, meta: AttnMeta) -> Tensor:
        rows, heads, size = q_THd.shape
        k_BLGd, v_BLGd = self._filled_up(k_NSGd, self._keys, meta), self._filled_up(v_NSGd, self._values, meta)
        q_BGRd = q_THd.view(rows, k_BLGd.shape[2], -1, size)  # the heads of a KV head take one pass over its keys
        seen_BL = torch.arange(k_BLGd.shape[1], device=q_THd.device) < meta.kv_lens_B[:, None]
        o_BGRd = F.scaled_dot_product_attention(
            q_BGRd, k_BLGd.transpose(1, 2), v_BLGd.transpose(1, 2), seen_BL[:, None, None]
        )
        return o_BGRd.reshape(rows, heads, size)

    @staticmethod
    def _filled_up(x_NSGd: Tensor, scratch: Scratch, meta: AttnMeta) -> Tensor:
        """[B, L, G, d]; index_select copies whole blocks, where indexing goes number by number."""
        blocks = meta.padded_blocks_BN.flatten()
        x_MSGd = torch.index_select(x_NSGd, 0, blocks, out=scratch.take((len(blocks), *x_NSGd.shape[1:]), x_NSGd))
        x_XGd = x_MSGd.flatten(0, 1)
        x_XGd.index_fill_(0, meta.tails, 0)  # what was left there may be no number, which times 0 is none either
        return x_XGd.view(len(meta.kv_lens), -1, *x_XGd.shape[1:])


def _pad(x_THd: Tensor, lens: Sequence[int], rows_T: Tensor) -> Tensor:
    """[T, H, d] -> [B, H, longest, d] with zeros behind the shorter sequences; a view if there are none."""
    size = len(lens) * max(lens)
    if len(x_THd) != size:
        x_THd = x_THd.new_zeros(size, *x_THd.shape[1:]).index_copy_(0, rows_T, x_THd)
    return x_THd.view(len(lens), -1, *x_THd.shape[1:]).transpose(1, 2)


def loop(q_THd: Tensor, k_KGd: Tensor, v_KGd: Tensor, meta: AttnMeta) -> Tensor:
    """One call a sequence: no padding, many small kernels."""
    each = zip(
        q_THd.split(list(meta.query_lens)),
        k_KGd.split(list(meta.key_rows)),
        v_KGd.split(list(meta.key_rows)),
        meta.kv_lens,
        strict=True,
    )
    return torch.cat([_attend(q, k, v, length, meta.causal) for q, k, v, length in each])


def even(q_THd: Tensor, k_KGd: Tensor, v_KGd: Tensor, meta: AttnMeta) -> Tensor:
    """One call where all sequences are of one length, else one a sequence; never a mask, which is slow on CPUs."""
    alike = len({*meta.query_lens}) == len({*meta.kv_lens, *meta.key_rows}) == 1 and meta.fresh
    return (padded if alike else loop)(q_THd, k_KGd, v_KGd, meta)


def loop_in_cache(q_THd: Tensor, k_NSGd: Tensor, v_NSGd: Tensor, meta: AttnMeta) -> Tensor:
    """One call a sequence, its keys read where they lie: without a copy if that is one block."""
    each = zip(q_THd.split(list(meta.query_lens)), meta.blocks_of_each, meta.kv_lens, strict=True)
    return torch.cat(
        [_attend(q, _join(k_NSGd, blocks), _join(v_NSGd, blocks), length, meta.causal) for q, blocks, length in each]
    )


def _join(x_NSGd: Tensor, blocks: Tensor) -> Tensor:
    """The blocks of one sequence in order, [tokens, G, d]."""
    return x_NSGd[blocks[0]] if len(blocks) == 1 else x_NSGd.index_select(0, blocks).flatten(0, 1)


def _attend(q_QHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, length: int, causal: bool) -> Tensor:
    """One sequence: its rows against its first `length` keys; if causal, its rows are the last ones of those."""
    rows, heads, size = q_QHd.shape
    k_1GLd, v_1GLd = (x[: max(length, rows)].transpose(0, 1).unsqueeze(0) for x in (k_LGd, v_LGd))
    if rows == 1:
        return _attend_one(q_QHd.view(1, k_1GLd.shape[1], -1, size), k_1GLd, v_1GLd).view(1, heads, size)
    mask = None
    if not causal:
        k_1GLd, v_1GLd = k_1GLd[:, :, :length], v_1GLd[:, :, :length]
    elif rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool, device=q_QHd.device).tril(length - rows)
    o_1HQd = F.scaled_dot_product_attention(
        q_QHd.transpose(0, 1).unsqueeze(0),
        k_1GLd,
        v_1GLd,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=heads != k_1GLd.shape[1],
    )
    return o_1HQd[0].transpose(0, 1)


def _attend_one(q_1GRd: Tensor, k_1GLd: Tensor, v_1GLd: Tensor) -> Tensor:
    """One row: the R query heads of a KV head are as good as R rows of one head, and take one pass over its keys.

    On a CPU in fp32: torch's kernel is two to six times as slow for a single row of bf16.
    """
    if q_1GRd.dtype == torch.bfloat16 and q_1GRd.device.type == "cpu":
        o_1GRd = F.scaled_dot_product_attention(q_1GRd.float(), k_1GLd.float(), v_1GLd.float())
        return o_1GRd.to(torch.bfloat16)
    return F.scaled_dot_product_attention(q_1GRd, k_1GLd, v_1GLd)


def varlen(q_THd: Tensor, k_KGd: Tensor, v_KGd: Tensor, meta: AttnMeta) -> Tensor:
    """torch's flash attention over packed rows. Its causal triangle ends at the last query and the last key."""
    from torch.nn.attention.varlen import varlen_attn  # absent in builds without flash attention

    if meta.kv_lens != meta.key_rows:
        raise SaihError("attention backend 'varlen' takes packed rows only; use 'padded' for padded ones")
    kernel: Callable[..., Any] = varlen_attn
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        kernel = partial(varlen_attn, enable_gqa=True)
    else:  # torch 2.11
        k_KGd, v_KGd = (x.repeat_interleave(q_THd.shape[1] // x.shape[1], dim=1) for x in (k_KGd, v_KGd))
    longest_q, longest_k = max(meta.query_lens), max(meta.key_rows)
    window = (-1, 0) if meta.causal else (-1, -1)
    o_THd: Tensor = kernel(q_THd, k_KGd, v_KGd, meta.cu_q, meta.cu_k, longest_q, longest_k, window_size=window)
    return o_THd


# -- The choice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What a stage attends with: a kernel over packed keys, and kernels over the cache itself, where there are any."""

    name: str
    kernel: Kernel
    decode_in_cache: Kernel | None = None
    """For steps of one row a sequence; k and v are a layer of the cache, [N, S, G, d]."""
    in_cache: Kernel | None = None
    """For all other steps that have earlier tokens."""

    def __call__(
        self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, meta: AttnMeta, kv: PagedKV | None, layer: int
    ) -> Tensor:
        """Attention of this step's rows; with a cache, their keys and values are stored first."""
        if meta.slots_T is None or meta.block_table_BN is None:
            return self.kernel(q_THd, k_TGd, v_TGd, meta)
        if kv is None:
            raise SaihError("this step has block tables but no KV cache was given")
        kv.write(layer, meta.slots_T, k_TGd, v_TGd)
        if meta.fresh:
            return self.kernel(q_THd, k_TGd, v_TGd, meta)
        in_cache = self.decode_in_cache if meta.decode else self.in_cache
        if in_cache is not None:
            return in_cache(q_THd, *kv.layer(layer), meta)
        return self.kernel(q_THd, *kv.read(layer, meta.slots_K), meta)


def backend(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    splits: int | None = None,
) -> Backend:
    """The backend of this name, or the best that device and dtype have.

    splits: into how many parts a decode step cuts each sequence's keys (Dao et al., Flash-Decoding, 2023); 1 is one
    thread block a sequence and KV head, None fills the GPU. Only 'triton' has them.
    Raises SaihError for an unknown name and for a backend that the device or the dtype lacks.
    """
    device = torch.device(device)
    lacks = {each: _lack(each, device, dtype) for each in BACKENDS}
    if name == "auto":
        order = ("loop",) if device.type == "cpu" else ("triton", "varlen", "padded")
        name = next(each for each in order if not lacks[each])
    if name not in BACKENDS:
        raise unknown("attention backend", name, ("auto", *BACKENDS))
    if lacks[name]:
        able = ", ".join(each for each in BACKENDS if not lacks[each])
        raise SaihError(f"attention backend {name!r} {lacks[name]}; possible on {device} with {dtype}: {able}")
    if splits is not None and name != "triton":
        raise SaihError(f"attention backend {name!r} has no splits, only 'triton' has")
    if name == "triton":
        return Backend(name, varlen, partial(_split_decode, splits))
    if name == "loop":
        return Backend(name, loop, loop_in_cache, loop_in_cache)
    if name == "padded":
        return Backend(name, padded, PaddedInCache())
    return Backend(name, {"even": even, "varlen": varlen}[name])


def _split_decode(splits: int | None, q_THd: Tensor, k_NSGd: Tensor, v_NSGd: Tensor, meta: AttnMeta) -> Tensor:
    from workloads.llm.triton_decode import paged_decode

    return paged_decode(q_THd, k_NSGd, v_NSGd, cast(Tensor, meta.block_table_BN), meta.kv_lens_B, splits)


def _lack(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot be used here; empty if it can."""
    if name in ("padded", "loop", "even"):
        return ""
    if device.type != "cuda":
        return "needs CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs fp16 or bf16"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    return ""
