"""What one forward step of a model costs on paper: FLOP, bytes, memory, messages. Imports no torch.

2 FLOP a multiply-add; only products are counted (projections, scores, weighted sums), as torch's FLOP counter does.
`word` is the bytes of an element of weights, activations and cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workloads.llm.config import ModelSpec


@dataclass(frozen=True)
class Batch:
    """The rows of one step: for every sequence its rows in this step and its tokens in the cache before it."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    head_rows: int
    """Rows that get logits."""

    @classmethod
    def prefill(cls, lengths: Sequence[int]) -> Batch:
        """Whole prompts, the next token of each wanted."""
        return cls(tuple(lengths), (0,) * len(lengths), len(lengths))

    @classmethod
    def decode(cls, contexts: Sequence[int]) -> Batch:
        """One more token for each sequence of this length."""
        return cls((1,) * len(contexts), tuple(contexts), len(contexts))

    def __add__(self, other: Batch) -> Batch:
        """Both in one step."""
        return Batch(self.queries + other.queries, self.contexts + other.contexts, self.head_rows + other.head_rows)

    @property
    def rows(self) -> int:
        return sum(self.queries)

    @property
    def keys(self) -> int:
        """Keys of all sequences, those of this step included."""
        return self.rows + sum(self.contexts)

    def pairs(self, causal: bool) -> int:
        """Query-key pairs that attention needs."""
        square = sum(q * (q + c) for q, c in zip(self.queries, self.contexts, strict=True))
        return square - sum(q * (q - 1) // 2 for q in self.queries) if causal else square


def layer_matrices(spec: ModelSpec) -> int:
    """Elements of the matrices of one layer."""
    heads = 2 * spec.heads + 2 * spec.kv_heads  # q and out; k and v
    return spec.hidden * (heads * spec.head_dim + (3 if spec.gated else 2) * spec.ffn)


def layer_parameters(spec: ModelSpec) -> int:
    """Elements of one layer: matrices, biases and norms."""
    biases = spec.qkv_bias * (spec.heads + 2 * spec.kv_heads) * spec.head_dim + spec.out_bias * spec.hidden
    biases += spec.mlp_bias * ((2 if spec.gated else 1) * spec.ffn + spec.hidden)
    return layer_matrices(spec) + biases + 2 * _norm(spec) + (2 * spec.head_dim if spec.qk_norm else 0)


def _norm(spec: ModelSpec) -> int:
    return spec.hidden * (2 if spec.norm == "layer" else 1)


def _head_matrices(spec: ModelSpec) -> int:
    return spec.hidden * (spec.vocab + (spec.hidden if spec.masked_lm else 0))


def parameters(spec: ModelSpec) -> int:
    """Elements of the whole model; a tied matrix counts once."""
    embedding = spec.hidden * (spec.vocab + spec.table_rows + (2 if spec.masked_lm else 0))
    head = _head_matrices(spec) - (spec.hidden * spec.vocab if spec.tied else 0)
    if spec.masked_lm:
        head += spec.hidden + spec.vocab + _norm(spec)
    return embedding + spec.layers * layer_parameters(spec) + _norm(spec) + head  # of the embedding, or the final one


def linear_flop(spec: ModelSpec, batch: Batch) -> int:
    """Projections of all layers, and the head."""
    return 2 * (batch.rows * spec.layers * layer_matrices(spec) + batch.head_rows * _head_matrices(spec))


def attention_flop(spec: ModelSpec, batch: Batch) -> int:
    """Scores and weighted sums of all layers, of the pairs that the triangle leaves."""
    return 4 * spec.layers * spec.heads * spec.head_dim * batch.pairs(spec.causal)


def forward_flop(spec: ModelSpec, batch: Batch) -> int:
    """One step; training takes three times as much, less the input gradient of the first layer."""
    return linear_flop(spec, batch) + attention_flop(spec, batch)


def kv_bytes_per_token(spec: ModelSpec, word: int) -> int:
    """Keys and values of all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * word


def weight_bytes(spec: ModelSpec, batch: Batch, word: int) -> int:
    """Weights that a step reads, each once: all of them, but of an untied embedding and of positions only rows used."""
    table = spec.hidden * ((0 if spec.tied else spec.vocab) + spec.table_rows)
    looked_up = batch.rows * spec.hidden * (2 if spec.table_rows else 1)
    return word * (parameters(spec) - table + looked_up)


def kv_traffic_bytes(spec: ModelSpec, batch: Batch, word: int) -> int:
    """Cache written by this step's rows and read by its attention, each key once."""
    return kv_bytes_per_token(spec, word) * (batch.rows + batch.keys)


def activation_traffic_bytes(spec: ModelSpec, batch: Batch, word: int) -> int:
    """Inputs and outputs of every operation of the layers, unfused: norms, projections, attention, activation, sums."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    up = spec.ffn * (2 if spec.gated else 1)
    per_row = 2 * 2 * spec.hidden + 2 * 3 * spec.hidden  # norms; sums
    per_row += (spec.hidden + q + 2 * kv) + 2 * q + (q + spec.hidden)  # qkv; attention; out
    per_row += (spec.hidden + up) + (up + spec.ffn) + (spec.ffn + spec.hidden)  # up; activation; down
    head = batch.head_rows * (2 * spec.hidden + spec.vocab)
    return word * (batch.rows * spec.layers * per_row + head)


def step_bytes(spec: ModelSpec, batch: Batch, word: int) -> int:
    """All memory traffic of one step."""
    return (
        weight_bytes(spec, batch, word)
        + kv_traffic_bytes(spec, batch, word)
        + activation_traffic_bytes(spec, batch, word)
    )


def activation_bytes(spec: ModelSpec, batch: Batch, word: int, tp: int = 1) -> int:
    """Most bytes of activations alive at once in a forward step without gradients, on one rank.

    In the MLP that is the residual, its norm, and both sides of the activation; in the head the logits.
    """
    up = spec.ffn * (2 if spec.gated else 1) / tp
    q, kv = spec.heads * spec.head_dim / tp, spec.kv_heads * spec.head_dim / tp
    mlp = 2 * spec.hidden + up + spec.ffn / tp * (2 if spec.gated else 1)
    attention = 2 * spec.hidden + 2 * (q + 2 * kv) + q
    layer = batch.rows * max(mlp, attention)
    head = batch.rows * spec.hidden + batch.head_rows * (spec.hidden + spec.vocab)
    return int(word * max(layer, head))


def tp_bytes(spec: ModelSpec, batch: Batch, word: int, tp: int) -> int:
    """Bytes each rank gives to collectives: two sums a layer, one for the embedding; its part of the logits.

    A ring moves 2 (tp - 1) / tp times what is summed and tp - 1 times what is gathered.
    """
    if tp == 1:
        return 0
    sums = (2 * spec.layers + 1) * batch.rows * spec.hidden
    return word * (sums + batch.head_rows * -(-spec.vocab // tp))


def pp_bytes(spec: ModelSpec, batch: Batch, word: int, pp: int) -> int:
    """Bytes sent from stage to stage, over all pp - 1 boundaries; every tensor-parallel rank sends as many."""
    return (pp - 1) * batch.rows * spec.hidden * word
