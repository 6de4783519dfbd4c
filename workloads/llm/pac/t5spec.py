"""The shapes of T5 (Raffel et al., 2020), and what its two stacks cost. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from workloads.llm import stepcost
from workloads.llm.config import ModelSpec

ANSWER = 5
"""Rows of a made-up answer: the token it starts with, three of the class, the one it ends with."""


@dataclass(frozen=True)
class T5Spec(ModelSpec):
    """An encoder of `layers` and a decoder of as many: RMS norms before, no biases, relative positions, a tied head."""

    buckets: int = 32
    """Of distances; half of them for those that are one token apart each."""
    far: int = 128
    """Tokens from which on all distances share the last bucket."""

    @property
    def table_rows(self) -> int:
        return 0


def t5(layers: int, hidden: int, heads: int, ffn: int, vocab: int = 32128) -> T5Spec:
    """A T5 of the first version: ReLU, heads of `hidden / heads`."""
    return T5Spec(
        family="t5",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
        max_positions=512,
        norm="rms",
        norm_eps=1e-6,
        activation="relu",
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )


T5_SHAPES = {
    "t5-tiny": t5(3, 64, 4, 256, 512),
    "t5-small": t5(6, 512, 8, 2048),
    "t5-base": t5(12, 768, 12, 3072),
    "t5-large": t5(24, 1024, 16, 4096),
}


def cross_parameters(spec: ModelSpec) -> int:
    """Elements of what a decoder layer has besides: q, k, v and out over the encoder's rows, and their norm."""
    return 4 * spec.hidden * spec.heads * spec.head_dim + spec.hidden


def decoder_parameters(spec: T5Spec) -> int:
    """Elements of the decoder's layers, the norms behind both stacks but one, and both tables of distances."""
    per_layer = stepcost.layer_parameters(spec) + cross_parameters(spec)
    return spec.layers * per_layer + spec.hidden + 2 * spec.buckets * spec.heads
