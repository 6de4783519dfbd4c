"""What a Wan transformer of a given size consists of and costs: the arithmetic planning needs, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

HEAD_DIM = 128
"""Of Wan's attention; narrower models have a single head or a few smaller ones."""


@dataclass(frozen=True)
class DiT:
    """Sizes of a Wan transformer and of a request for it.

    Attributes:
        layers: blocks.
        width: D.
        hidden: inner width of the feed-forward.
        channels: of the latents.
        patch: latent frames, rows and columns of one token.
        text_tokens, text_width: of an encoded prompt.
        time_width: of the sinusoidal time embedding.
    """

    layers: int
    width: int
    hidden: int
    channels: int
    patch: tuple[int, int, int]
    text_tokens: int
    text_width: int
    time_width: int

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        d = self.width
        attention = 4 * (d * d + d) + 2 * d
        block = 2 * attention + 2 * d + 2 * d * self.hidden + self.hidden + d + 6 * d
        text = self.text_width * d + d + d * d + d
        time = self.time_width * d + d + d * d + d + 6 * d * d + 6 * d
        pixels = self.channels * prod(self.patch)
        return self.layers * block + text + time + pixels * d + d + d * pixels + pixels + 2 * d

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Video tokens of a grid of latent frames, rows and columns."""
        return prod(size // step for size, step in zip(grid, self.patch, strict=True))

    def forward_flop(self, grid: tuple[int, int, int]) -> float:
        """One branch of one step, 2 for each multiply-add: matrix products and attention, as torch counts them."""
        s, text, d = self.tokens(grid), self.text_tokens, self.width
        attention = 8 * s * d * d + 4 * s * s * d
        cross = 4 * s * d * d + 4 * text * d * d + 4 * s * text * d
        block = attention + cross + 4 * s * d * self.hidden
        ends = 4 * s * d * self.channels * prod(self.patch)
        conditions = 2 * text * (self.text_width * d + d * d) + 2 * (self.time_width * d + d * d + 6 * d * d)
        return float(self.layers * block + ends + conditions)


TOYS = {
    "toy": DiT(8, 96, 384, 1, (2, 4, 4), 7, 32, 64),
    "toy-small": DiT(3, 72, 216, 1, (2, 4, 4), 7, 32, 64),
}
"""The shipped models, by name."""


def wan(layers: int, width: int) -> DiT:
    """A Wan of that size; 30 x 1536 is 1.3B and 40 x 5120 is 14B."""
    hidden = {1536: 8960, 5120: 13824}.get(width, 4 * width)
    return DiT(layers, width, hidden, 16, (1, 2, 2), 226, 4096, 256)


def of_config(config: Mapping[str, Any]) -> DiT:
    """The sizes in a diffusers transformer's config.json; for planning, the other families are taken for a Wan."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = config["num_layers"] + config.get("num_single_layers", 0)
    patch, per_frame = config["patch_size"], config.get("patch_size_t") or 1
    return DiT(
        layers,
        width,
        config.get("ffn_dim", 4 * width),
        config["in_channels"],
        (patch[0], patch[1], patch[2]) if isinstance(patch, Sequence) else (per_frame, patch, patch),
        config.get("max_text_seq_length", 226),
        config.get("text_dim") or config["text_embed_dim"],
        config.get("freq_dim", 256),
    )


def wan_shape(layers: int, width: int) -> dict[str, Any]:
    """Keyword arguments of diffusers' WanTransformer3DModel for `wan(layers, width)`."""
    shape = wan(layers, width)
    head = min(HEAD_DIM, width)
    return {
        "num_layers": layers,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "ffn_dim": shape.hidden,
    }
