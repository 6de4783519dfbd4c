"""A pipeline stage: some layers of a transformer, with the embedding before them and the head behind where they belong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workloads.llm.attention import AttnMeta
from workloads.llm.config import ModelSpec
from workloads.llm.kv import PagedKV
from workloads.llm.shard import Mesh


class Stage(nn.Module):
    """Layers of one pipeline stage, cut over its tensor-parallel ranks. The whole model is a stage of all layers.

    T rows of all sequences, D hidden, V vocabulary, R chosen rows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh | None = None,
        layers: range | None = None,
        *,
        attention: str = "auto",
        splits: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Uninitialised weights: `loader.load(stage, folder)` or `loader.random_init(stage, seed)` fills them.

        mesh: this rank's place (default: alone). layers: default the mesh's share by `config.split_layers`.
        attention: a name of `attention.BACKENDS` or "auto"; splits: of the paged decode kernel.
        Raises SaihError if heads cannot be cut, or the device lacks the attention backend.
        """
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor, meta: AttnMeta, kv: PagedKV | None = None, rows: Tensor | None = None) -> Tensor:
        """Ids [T] (first stage) or h [T, D] -> h [T, D], or on the last stage logits [R, V] of `rows` (default: all).

        Logits are whole on every tensor-parallel rank. For the next token: rows=meta.last_rows.
        If meta has block tables, `kv` takes this step's keys and values and gives those of earlier steps.
        """
        raise NotImplementedError

    def new_kv(
        self,
        blocks: int,
        block_size: int = 16,
        *,
        layout: str = "layer_first",
        device: torch.device | str | None = None,
        pinned: bool = False,
    ) -> PagedKV:
        """A cache for this stage's layers and KV heads, on the stage's device unless another is named."""
        raise NotImplementedError
