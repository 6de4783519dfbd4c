"""Parallel adapters: a ladder of narrow layers beside a frozen backbone, which no gradient ever enters.

PAC (Ouyang et al., ICPP 2024, arXiv:2408.10746), after Ladder Side-Tuning (Sung et al., NeurIPS 2022):

    a_0 = W_0 e,    a_i = S_i(a_(i-1) + W_i h_i),    out = h_L + U norm(a_L)

T rows of all sequences, D hidden width of the backbone, S = D / reduction width of the ladder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from workloads.llm.attention import AttnMeta, backend
from workloads.llm.blocks import Block, Norm, Rotation, rotation
from workloads.llm.config import ModelSpec
from workloads.llm.loader import random_init
from workloads.llm.pac.widths import side_spec
from workloads.llm.shard import ColumnLinear, Cut, Make, Mesh, Piece, pieces

ATTENTION = "even"
"""The kernel of every layer, of the backbone and beside it."""
GATE_TEMPERATURE = 0.1
"""Of learnable gates, as Ladder Side-Tuning has it."""
MERGE_GATE = -0.2
"""alpha of the last gate at first, which lets an eighth of the ladder through; other gates start in the middle. AdamW
moves all weights as fast, so U norm(a), as large as a norm makes it, would soon drown h_L, and overfit."""


def linear(inputs: int, outputs: int, made: Make) -> ColumnLinear:
    """A matrix without bias, not cut."""
    return ColumnLinear(inputs, {"": Cut(outputs, 0, outputs)}, False, Mesh(), made)


class SideLayer(nn.Module):
    """a_i = S_i(a_(i-1) + W_i h_i); gated: S_i(g a_(i-1) + (1 - g) W_i h_i) with g = sigmoid(alpha / temperature)."""

    def __init__(self, spec: ModelSpec, side: ModelSpec, gated: bool, made: Make) -> None:
        super().__init__()
        self.down = linear(spec.hidden, side.hidden, made)
        self.block = Block(side, Mesh(), backend(ATTENTION, made.device, made.dtype), made)
        self.gate = made.parameter(1, 1) if gated else None

    def forward(self, a_TS: Tensor, h_TD: Tensor, meta: AttnMeta, by: Rotation | None) -> Tensor:
        down_TS = self.down(h_TD)
        if self.gate is None:
            merged_TS = a_TS + down_TS
        else:
            merged_TS = torch.lerp(down_TS, a_TS, torch.sigmoid(self.gate / GATE_TEMPERATURE))
        out_TS: Tensor = self.block(merged_TS, meta, by)
        return out_TS


class Ladder(nn.Module):
    """The side layers beside some layers of a backbone; W_0 before the first, the norm and U behind the last.

    U starts at zero, so a ladder that has learned nothing changes nothing.
    """

    def __init__(self, spec: ModelSpec, layers: range, reduction: int, gated: bool, made: Make, seed: int) -> None:
        """Layers are random, as a pure function of seed and name: the same ladder for any split.

        Raises SaihError for a reduction that does not divide the widths.
        """
        super().__init__()
        self.side = side_spec(spec, reduction)
        if layers.start == 0:
            self.down = linear(spec.hidden, self.side.hidden, made)
        self.layers = nn.ModuleDict({str(i): SideLayer(spec, self.side, gated, made) for i in layers})
        self.last = layers.stop == spec.layers
        if self.last:
            self.final_norm = Norm(spec.norm, self.side.hidden, spec.norm_eps, made)
            self.up = linear(self.side.hidden, spec.hidden, made)
            self.gate = made.parameter(1, 1) if gated else None
        initialise(self, seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "up.weight" or name.endswith("gate"):
                    parameter.fill_(MERGE_GATE if name == "gate" else 0.0)

    def start(self, e_TD: Tensor, meta: AttnMeta) -> Tensor:
        """a_0 of the embeddings."""
        a_TS: Tensor = self.down(e_TD)
        return a_TS

    def climb(self, a_TS: Tensor, taps: Sequence[Tensor], meta: AttnMeta) -> Tensor:
        """Through all layers here; taps: what each layer of the backbone beside them put out, [T, D]."""
        by = self._rotation(meta, a_TS.dtype)
        for layer, h_TD in zip(self.layers.values(), taps, strict=True):
            a_TS = layer(a_TS, h_TD, meta, by)
        return a_TS

    def merge(self, h_TD: Tensor, a_TS: Tensor) -> Tensor:
        """h_L + U norm(a_L), the second weighed by a gate if there are gates."""
        out_TD: Tensor = self.up(self.final_norm(a_TS))
        return h_TD + out_TD if self.gate is None else h_TD + torch.sigmoid(self.gate / GATE_TEMPERATURE) * out_TD

    def _rotation(self, meta: AttnMeta, dtype: torch.dtype) -> Rotation | None:
        side = self.side
        if not side.rope_theta:
            return None
        return rotation(meta.positions_T, side.head_dim, side.rope_theta, dtype, side.rope_scaling)


def initialise(module: nn.Module, seed: int) -> None:
    """Matrices uniform within 1/sqrt(inputs), norms 1, biases 0: an element depends on seed, name and place alone."""
    random_init(_Pieces(module), seed, std=3**-0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(parameter.shape[1] ** -0.5)


class _Pieces:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def pieces(self) -> Iterator[Piece]:
        return pieces(self.module)
