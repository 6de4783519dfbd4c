"""A pipeline stage: some layers of a transformer, the embedding before the first, the head behind the last."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from workloads.llm.attention import AttnMeta, backend
from workloads.llm.blocks import Block, Norm, Rotation, activate, rotation
from workloads.llm.config import ModelSpec, split_layers
from workloads.llm.kv import PagedKV
from workloads.llm.shard import ColumnLinear, Cut, Make, Mesh, Piece, VocabMatrix, cut_kv_heads, pieces


class Stage(nn.Module):
    """Layers of one pipeline stage, cut over its tensor-parallel ranks. The whole model is a stage of all layers.

    `layers` maps numbers in the whole model to blocks. With tied embeddings and several stages, the first and the last
    each have a copy of the matrix (`tokens`), with its own gradient: whoever trains adds the two.
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
        on_host: Container[int] = (),
        head: bool = True,
    ) -> None:
        """Uninitialised weights: `loader.load(stage, folder)` or `loader.random_init(stage, seed)` fills them.

        mesh: this rank's place (default: alone). layers: default the mesh's share by `config.split_layers`.
        attention: a name of `attention.BACKENDS` or "auto"; splits: of the paged decode kernel.
        on_host: layers made in host memory whatever the device; they run once something has brought them there.
        head: without one the last stage ends with its final norm and gives h [T, D], as checkpoints of a bare model do.
        Raises SaihError if heads cannot be cut, or the device lacks the attention backend.
        """
        super().__init__()
        self.spec, self.mesh = spec, mesh or Mesh()
        self.range = layers if layers is not None else split_layers(spec.layers, self.mesh.pp)[self.mesh.pp_rank]
        self.first, self.last = self.range.start == 0, self.range.stop == spec.layers
        self.headed = self.last and head
        self.device, self.dtype = torch.device(device), dtype
        self.backend = backend(attention, device, dtype, splits)
        made = Make(self.device, dtype)
        if self.first or (self.headed and spec.tied):
            head_bias = spec.masked_lm and spec.tied and self.headed
            self.tokens = VocabMatrix(spec.vocab, spec.hidden, head_bias, self.mesh, made)
        if self.first and spec.table_rows:
            self.positions = made.parameter(spec.table_rows, spec.hidden)
        if self.first and spec.masked_lm:
            self.segments = made.parameter(2, spec.hidden)
        if self.first and spec.post_norm:
            self.embed_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        host = Make(torch.device("cpu"), dtype)
        self.layers = nn.ModuleDict(
            {
                str(number): Block(spec, self.mesh, self.backend, host if number in on_host else made)
                for number in self.range
            }
        )
        if self.last and not spec.post_norm:
            self.final_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        if self.headed and spec.masked_lm:
            self.head_dense = ColumnLinear(spec.hidden, {"": Cut(spec.hidden, 0, spec.hidden)}, True, Mesh(), made)
            self.head_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        if self.headed and not spec.tied:
            self.head = VocabMatrix(spec.vocab, spec.hidden, spec.masked_lm, self.mesh, made)

    def forward(self, x: Tensor, meta: AttnMeta, kv: PagedKV | None = None, rows: Tensor | None = None) -> Tensor:
        """Ids [T] (first stage) or h [T, D] -> h [T, D], or under a head logits [R, V] of `rows` (default: all).

        Logits are whole on every tensor-parallel rank. For the next token: rows=meta.last_rows.
        If meta has block tables, `kv` takes this step's keys and values and gives those of earlier steps.
        """
        h_TD = self.embed(x, meta) if self.first else x
        by = self.rotation(meta)
        for place, block in enumerate(self.layers.values()):
            h_TD = block(h_TD, meta, by, kv, place)
        if self.headed:
            return self.logits(h_TD, rows)
        return self.normed(h_TD) if self.last else h_TD

    def embed(self, ids_T: Tensor, meta: AttnMeta) -> Tensor:
        """[T] -> [T, D], with learned positions and BERT's first segment."""
        h_TD = self.tokens.embed(ids_T)
        if self.spec.table_rows:
            h_TD = h_TD + F.embedding(meta.positions_T + self.spec.position_offset, self.positions)
        if self.spec.masked_lm:
            h_TD = h_TD + self.segments[0]
        return cast(Tensor, self.embed_norm(h_TD)) if self.spec.post_norm else h_TD

    def rotation(self, meta: AttnMeta) -> Rotation | None:
        """The angles of a step, the same for all layers; None without rotary positions."""
        if not self.spec.rope_theta:
            return None
        spec = self.spec
        return rotation(meta.positions_T, spec.head_dim, spec.rope_theta, self.dtype, spec.rope_scaling)

    def normed(self, h_TD: Tensor) -> Tensor:
        """The last layer's output under the final norm; models that normalise after each branch have none."""
        return h_TD if self.spec.post_norm else cast(Tensor, self.final_norm(h_TD))

    def logits(self, h_TD: Tensor, rows: Tensor | None = None) -> Tensor:
        """[T, D] behind the last layer -> [R, V]."""
        h_RD = self.normed(h_TD if rows is None else h_TD.index_select(0, rows))
        if self.spec.masked_lm:
            h_RD = self.head_norm(activate(self.head_dense(h_RD), self.spec.activation))
        return (self.tokens if self.spec.tied else self.head).logits(h_RD)

    def pieces(self) -> Iterator[Piece]:
        """Which slices of which tensors of the whole model this stage holds."""
        return pieces(self)

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
        return PagedKV(
            len(self.range),
            len(cut_kv_heads(self.spec.kv_heads, self.mesh)),
            self.spec.head_dim,
            blocks=blocks,
            block_size=block_size,
            layout=layout,
            device=self.device if device is None else device,
            dtype=self.dtype,
            pinned=pinned,
        )
