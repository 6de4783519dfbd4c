"""T5 on packed rows, and the ladders beside its encoder and its decoder.

The ladders follow the rule of `adapters`, one beside each stack. The decoder's side layers cross-attend to what the
encoder's ladder ends with, as its layers do to the encoder's output. The norm between the ladders, and a W_0 and a
table of distances for each, are a reconstruction: the paper draws them as T5 has them.

T rows of all sequences, of each the source's and then the answer's; D hidden, S width of the ladders, H heads, d their
size, Q and K rows of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from workloads.llm.attention import AttnMeta
from workloads.llm.blocks import MLP, Norm
from workloads.llm.pac.adapters import initialise, linear
from workloads.llm.pac.batch import PairMeta
from workloads.llm.pac.t5spec import T5Spec
from workloads.llm.pac.widths import side_spec
from workloads.llm.shard import ColumnLinear, Cut, Make, Mesh, Piece, RowLinear, VocabMatrix, pieces

Run = Callable[..., Tensor]
Bias = dict[int, Tensor]
"""Tokens of a sequence -> [1, H, Q, Q] added to its scores."""


class Attention(nn.Module):
    """Self-attention with a bias for each distance. Scores are not scaled, as T5 has it."""

    def __init__(self, spec: T5Spec, made: Make) -> None:
        super().__init__()
        width = spec.heads * spec.head_dim
        whole = Cut(width, 0, width)
        self.head_dim = spec.head_dim
        self.qkv = ColumnLinear(spec.hidden, {"q": whole, "k": whole, "v": whole}, False, Mesh(), made)
        self.out = RowLinear(whole, spec.hidden, False, Mesh(), made)

    def forward(self, h_TD: Tensor, meta: AttnMeta, bias: Bias) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(h_TD).split(self.qkv.sizes, -1))
        return cast(Tensor, self.out(_attend(q, k, v, meta.query_lens, meta.query_lens, bias)))


class CrossAttention(nn.Module):
    """The answer's rows over those of the source."""

    def __init__(self, spec: T5Spec, made: Make) -> None:
        super().__init__()
        width = spec.heads * spec.head_dim
        whole = Cut(width, 0, width)
        self.head_dim = spec.head_dim
        self.q = ColumnLinear(spec.hidden, {"": whole}, False, Mesh(), made)
        self.kv = ColumnLinear(spec.hidden, {"k": whole, "v": whole}, False, Mesh(), made)
        self.out = RowLinear(whole, spec.hidden, False, Mesh(), made)

    def forward(self, h_TD: Tensor, source_TD: Tensor, meta: PairMeta) -> Tensor:
        q = self.q(h_TD).unflatten(-1, (-1, self.head_dim))
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.kv(source_TD).split(self.kv.sizes, -1))
        return cast(Tensor, self.out(_attend(q, k, v, meta.target.query_lens, meta.source.query_lens, {})))


class Layer(nn.Module):
    """Of the encoder, or with `cross` of the decoder."""

    def __init__(self, spec: T5Spec, cross: bool, made: Make) -> None:
        super().__init__()
        self.attn_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        self.attn = Attention(spec, made)
        if cross:
            self.cross_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
            self.cross = CrossAttention(spec, made)
        self.mlp_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        self.mlp = MLP(spec, Mesh(), made)

    def forward(self, h_TD: Tensor, meta: PairMeta, bias: Bias, source_TD: Tensor | None = None) -> Tensor:
        """`source_TD`: of a decoder's layer, what the encoder put out."""
        rows = meta.source if source_TD is None else meta.target
        h_TD = h_TD + self.attn(self.attn_norm(h_TD), rows, bias)
        if source_TD is not None:
            h_TD = h_TD + self.cross(self.cross_norm(h_TD), source_TD, meta)
        return cast(Tensor, h_TD + self.mlp(self.mlp_norm(h_TD)))


class T5(nn.Module):
    """A whole T5, or what comes behind its layers. Uninitialised weights, as `model.Stage`."""

    def __init__(self, spec: T5Spec, layers: range, head: bool, device: str) -> None:
        super().__init__()
        self.spec, made = spec, Make(torch.device(device), torch.float32)
        self.whole = len(layers) == spec.layers
        if self.whole or head:
            self.tokens = VocabMatrix(spec.vocab, spec.hidden, False, Mesh(), made)
        if self.whole:
            self.encoder, self.decoder = (_stack(spec, cross, made) for cross in (False, True))
            self.encoder_distances, self.decoder_distances = (made.parameter(spec.buckets, spec.heads) for _ in "ed")
            self.encoder_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)
        self.final_norm = Norm(spec.norm, spec.hidden, spec.norm_eps, made)

    @property
    def layers(self) -> nn.ModuleDict:
        """Of both stacks."""
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return nn.ModuleDict({f"{name}{i}": layer for name, stack in stacks.items() for i, layer in stack.items()})

    def embed(self, ids_T: Tensor, meta: AttnMeta) -> Tensor:
        """[T] -> [T, D], of both stacks."""
        return self.tokens.embed(ids_T)

    def rows(self, h_TD: Tensor, meta: PairMeta, run: Run) -> list[Tensor]:
        """What layer i of the encoder and layer i of the decoder put out, [T, D]. `run` calls each layer."""
        source_TD, target_TD = meta.apart(h_TD)
        encoded, decoded = [], []
        bias = biases(self.encoder_distances, meta.source.query_lens, self.spec, ahead=True)
        for layer in self.encoder.values():
            source_TD = run(layer, source_TD, meta, bias)
            encoded.append(source_TD)
        source_TD = self.encoder_norm(source_TD)
        bias = biases(self.decoder_distances, meta.target.query_lens, self.spec, ahead=False)
        for layer in self.decoder.values():
            target_TD = run(layer, target_TD, meta, bias, source_TD)
            decoded.append(target_TD)
        return [meta.together(*each) for each in zip(encoded, decoded, strict=True)]

    @torch.no_grad()
    def spread_words(self) -> None:
        """Random embeddings as T5 starts with, of deviation 1: its head makes logits smaller by sqrt(hidden)."""
        if hasattr(self, "tokens"):
            self.tokens.weight.div_(self.tokens.weight.std())

    def logits(self, h_TD: Tensor) -> Tensor:
        """Of the answer's rows [T, D] behind the last layer -> [T, V]."""
        return self.tokens.logits(self.final_norm(h_TD) * self.spec.hidden**-0.5)

    def pieces(self) -> Iterator[Piece]:
        """For the loader."""
        return pieces(self)


class SideLayer(nn.Module):
    """a_i = S_i(a_(i-1) + W_i h_i), S_i a layer of T5."""

    def __init__(self, spec: T5Spec, side: T5Spec, cross: bool, made: Make) -> None:
        super().__init__()
        self.down = linear(spec.hidden, side.hidden, made)
        self.block = Layer(side, cross, made)

    def forward(
        self, a_TS: Tensor, h_TD: Tensor, meta: PairMeta, bias: Bias, source_TS: Tensor | None = None
    ) -> Tensor:
        return cast(Tensor, self.block(a_TS + self.down(h_TD), meta, bias, source_TS))


class T5Ladder(nn.Module):
    """The ladders of both stacks; behind the decoder's the norm and U, which starts at zero."""

    gate = None

    def __init__(self, spec: T5Spec, reduction: int, made: Make, seed: int) -> None:
        """Random, as a pure function of seed and name. Raises SaihError for a reduction that divides no widths."""
        super().__init__()
        self.side = side = cast(T5Spec, side_spec(spec, reduction))
        self.encoder, self.decoder = (
            nn.ModuleDict({str(i): SideLayer(spec, side, cross, made) for i in range(spec.layers)})
            for cross in (False, True)
        )
        self.encoder_down, self.decoder_down = (linear(spec.hidden, side.hidden, made) for _ in "ed")
        self.encoder_distances, self.decoder_distances = (made.parameter(side.buckets, side.heads) for _ in "ed")
        self.encoder_norm, self.final_norm = (Norm(side.norm, side.hidden, side.norm_eps, made) for _ in "ed")
        self.up = linear(side.hidden, spec.hidden, made)
        initialise(self, seed)
        nn.init.zeros_(self.up.weight)

    def start(self, e_TD: Tensor, meta: AttnMeta) -> Tensor:
        """a_0 of the embeddings, of both stacks."""
        pair = cast(PairMeta, meta)
        source_TD, target_TD = pair.apart(e_TD)
        return pair.together(self.encoder_down(source_TD), self.decoder_down(target_TD))

    def climb(self, a_TS: Tensor, taps: Sequence[Tensor], pair: AttnMeta) -> Tensor:
        """a_L [T, S] of the answers' rows; taps: what layer i of both stacks put out, [T, D]."""
        meta = cast(PairMeta, pair)
        source_TS, target_TS = meta.apart(a_TS)
        pairs = [meta.apart(tap_TD) for tap_TD in taps]
        bias = biases(self.encoder_distances, meta.source.query_lens, self.side, ahead=True)
        for layer, (h_TD, _) in zip(self.encoder.values(), pairs, strict=True):
            source_TS = layer(source_TS, h_TD, meta, bias)
        source_TS = self.encoder_norm(source_TS)
        bias = biases(self.decoder_distances, meta.target.query_lens, self.side, ahead=False)
        for layer, (_, h_TD) in zip(self.decoder.values(), pairs, strict=True):
            target_TS = layer(target_TS, h_TD, meta, bias, source_TS)
        return target_TS

    def merge(self, h_TD: Tensor, a_TS: Tensor) -> Tensor:
        """h_L + U norm(a_L), of the answer's rows."""
        return h_TD + cast(Tensor, self.up(self.final_norm(a_TS)))


def biases(distances: Tensor, lens: Sequence[int], spec: T5Spec, ahead: bool) -> Bias:
    """From a table [buckets, H], for each length there is. Without `ahead` a row sees none behind it."""
    found: Bias = {}
    for tokens in set(lens):
        places = torch.arange(tokens, device=distances.device)
        apart_QQ = places[None, :] - places[:, None]
        bias = distances[bucket(apart_QQ, spec.buckets, spec.far, ahead)].permute(2, 0, 1)[None]
        found[tokens] = bias if ahead else bias.masked_fill(apart_QQ > 0, -math.inf)
    return found


def bucket(apart: Tensor, buckets: int, far: int, ahead: bool) -> Tensor:
    """Of how far a key stands behind its query (T5, section 2.1): one each if near, wider and wider up to `far`.

    With `ahead` one half of them is for keys that stand behind, else those share bucket 0.
    """
    first = torch.zeros_like(apart)
    if ahead:
        buckets //= 2
        first, distance = (apart > 0) * buckets, apart.abs()
    else:
        distance = (-apart).clamp_min(0)
    near = buckets // 2
    wide = torch.log(distance.clamp_min(1).float() / near) / math.log(far / near) * (buckets - near)
    return first + torch.where(distance < near, distance, (near + wide.long()).clamp_max(buckets - 1))


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], keys: Sequence[int], bias: Bias) -> Tensor:
    """[T, H, d] of each -> [T, H d]. One call if all sequences are as long, else one for each."""
    if len(set(rows)) == len(set(keys)) == 1:
        q_B, k_B, v_B = (x.unflatten(0, (len(rows), -1)).transpose(1, 2) for x in (q, k, v))
        mask = bias.get(rows[0])
        mask = None if mask is None else mask.expand(len(rows), -1, -1, -1)
        out = F.scaled_dot_product_attention(q_B, k_B, v_B, attn_mask=mask, scale=1.0)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
    apart = zip(q.split(list(rows)), k.split(list(keys)), v.split(list(keys)), strict=True)
    return torch.cat([_attend(*each, (len(each[0]),), (len(each[1]),), bias) for each in apart])


def _stack(spec: T5Spec, cross: bool, made: Make) -> nn.ModuleDict:
    return nn.ModuleDict({str(i): Layer(spec, cross, made) for i in range(spec.layers)})


def call(layer: nn.Module, *args: object) -> Tensor:
    """A layer of it."""
    return cast(Tensor, layer(*args))
