"""Cross attention of a Wan transformer, watched and amplified: which video tokens look at which words.

Token-guided attention amplification (TGAA) is Chorus' (arXiv:2604.04451); the paper's formula was not at hand. Here the
weight of the chosen text tokens is multiplied by lambda before the softmax is normalised:
A = softmax(Q K^T / sqrt(d) + log(lambda) [j in D]), for columns D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saih.errors import SaihError
from workloads.video.adapters import Adapter, WanAdapter


class CrossAttention:
    """The cross attention of all blocks of a model."""

    def __init__(self, adapter: Adapter) -> None:
        if not isinstance(adapter, WanAdapter):
            raise SaihError(
                f"{type(adapter.module).__name__} has no cross attention: regions and amplification are for Wan"
            )
        self.modules = [block.attn2 for block in adapter.blocks]
        self._kept = [torch.empty(0), torch.empty(0)]
        """Queries [H, S, D] and keys [H, L, D]."""

    @contextmanager
    def amplified(self, columns: Sequence[int], factor: float) -> Iterator[None]:
        """Text tokens of these columns weigh `factor` times as much; a factor of 1 changes nothing, not a bit."""
        if factor == 1 or not columns:
            yield
            return
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        class Amplified(WanAttnProcessor):  # type: ignore[misc]
            bias: Tensor | None = None

            def __call__(self, attn: Any, video: Tensor, text: Tensor, *rest: Any) -> Tensor:
                if self.bias is None:  # the same in all blocks
                    self.bias = video.new_zeros(1, 1, 1, text.shape[1])
                    self.bias[..., list(columns)] = math.log(factor)
                mixed: Tensor = super().__call__(attn, video, text, self.bias, None)
                return mixed

        before = [module.processor for module in self.modules]
        processor = Amplified()
        try:
            for module in self.modules:
                module.set_processor(processor)
            yield
        finally:
            for module, earlier in zip(self.modules, before, strict=True):
                module.set_processor(earlier)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what `seen` is counted from, in the block in the middle of the model: one tells, and costs little."""
        module = self.modules[len(self.modules) // 2]

        def keep(norm: nn.Module, given: object, projected: Tensor) -> None:
            self._kept[norm is module.norm_k] = projected[0].unflatten(1, (module.heads, -1)).transpose(0, 1)

        handles = [norm.register_forward_hook(keep) for norm in (module.norm_q, module.norm_k)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self) -> Tensor:
        """What each text token got from each video token in the last forward that was watched: float32 [L, S], the mean
        over heads."""
        query_HSD, key_HLD = self._kept
        weights = (key_HLD @ query_HSD.transpose(1, 2) / math.sqrt(query_HSD.shape[-1])).softmax(dim=1)
        return weights.mean(dim=0).float()
