"""How packed rows form sequences (AttnMeta), and the attention kernels to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    positions_T: Tensor
    """int64: place of each row in its sequence."""
    cu_q: Tensor
    """int32 [B+1]"""
    cu_k: Tensor
    """int32 [B+1]: first key of each sequence among the keys that attention gets packed."""
    block_table_BN: Tensor | None = None
    """int32: cache blocks of each sequence in order, filled up with 0. None: there is no cache in this step."""
    slots_T: Tensor | None = None
    """int64: cache slot that each row's key and value go to."""
    slots_K: Tensor | None = None
    """int64: cache slots of all keys of all sequences, packed."""
    block_size: int = 0

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
        raise NotImplementedError

    @classmethod
    def padded(cls, lens: Sequence[int], *, causal: bool = True, device: torch.device | str = "cpu") -> AttnMeta:
        """The wasteful form: every sequence takes max(lens) rows, and rows behind its length hold rubbish.

        Rows b*max(lens) : b*max(lens)+lens[b] are valid; nothing valid attends to rubbish. No cache.
        """
        raise NotImplementedError

    @property
    def last_rows(self) -> Tensor:
        """int64 [B]: the row of the last token of each sequence."""
        raise NotImplementedError

    @property
    def decode(self) -> bool:
        """Whether every sequence has one row."""
        raise NotImplementedError
