"""What a video transformer of a given family and size consists of and costs: what planning needs, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from saih.errors import SaihError

FAMILIES = ("wan", "cogvideox", "hunyuanvideo")
HEAD_DIMS = {"wan": (128, 96, 64, 48, 24, 12), "cogvideox": (64, 48, 32, 16), "hunyuanvideo": (128, 96, 64, 48, 24, 12)}
"""Of attention: what the published models have, and what narrower ones may; rotary angles split a head in three."""
REFINERS = 2
"""Blocks that HunyuanVideo's text goes through first."""


def head_dim(family: str, width: int) -> int:
    """Of a model this wide. Raises SaihError where no whole number of heads makes the width."""
    for dim in HEAD_DIMS[family]:
        if width % dim == 0:
            return dim
    raise SaihError(f"width {width}: a {family} with random weights takes multiples of {HEAD_DIMS[family][-1]}")


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
    branches = 2
    """Forwards of a guided step; 1 where guidance is an input of the model."""

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


@dataclass(frozen=True)
class Joint(DiT):
    """Families whose blocks let video and text tokens attend to each other; `time_width` is what blocks get."""

    def forward_flop(self, grid: tuple[int, int, int]) -> float:
        """As above. The text's way to the first block is left out: for these sizes it is below one per cent."""
        s, d = self.tokens(grid) + self.text_tokens, self.width
        block = 8 * s * d * d + 4 * s * s * d + 4 * s * d * self.hidden
        ends = 4 * self.tokens(grid) * d * self.channels * prod(self.patch) + 2 * self.text_tokens * self.text_width * d
        return float(self.layers * block + ends)


@dataclass(frozen=True)
class CogVideoX(Joint):
    """Sizes of a CogVideoX transformer with rotary positions."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        d, t, head = self.width, self.time_width, head_dim("cogvideox", self.width)
        modulation = 6 * d * t + 6 * d + 2 * d
        block = 2 * modulation + 4 * (d * d + d) + 4 * head + 2 * d * self.hidden + self.hidden + d
        pixels = self.channels * prod(self.patch)
        ends = pixels * d + d + self.text_width * d + d + d * t + t + t * t + t
        return self.layers * block + ends + 2 * d + 2 * d * t + 2 * d + 2 * d + d * pixels + pixels


@dataclass(frozen=True)
class HunyuanVideo(Joint):
    """Sizes of a HunyuanVideo transformer: a third of `layers` have weights of their own for text, the rest share."""

    branches = 1

    @property
    def double(self) -> int:
        """Blocks with two sets of weights."""
        return round(self.layers / 3)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        d, head = self.width, head_dim("hunyuanvideo", self.width)
        square, mlp = d * d + d, 2 * d * self.hidden + self.hidden + d
        double = 2 * (6 * square + 4 * square + 2 * head + mlp)
        single = 6 * square + 2 * head + mlp + d * d  # what joins attention and the rest is wider by d
        time, pooled, text = (width * d + d + square for width in (self.time_width, POOLED_WIDTH, self.text_width))
        refiner = 4 * d + 4 * square + mlp + 2 * square
        context = time + text + self.text_width * d + d + REFINERS * refiner
        pixels = self.channels * prod(self.patch)
        ends = pixels * d + d + 2 * time + pooled + 2 * square + d * pixels + pixels
        return self.double * double + (self.layers - self.double) * single + context + ends


POOLED_WIDTH = 768
"""Of the second, pooled text embedding that HunyuanVideo takes."""

TOYS = {
    "toy": DiT(8, 96, 384, 1, (2, 4, 4), 7, 32, 64),
    "toy-4step": DiT(8, 96, 384, 1, (2, 4, 4), 7, 32, 64),
    "toy-small": DiT(2, 96, 384, 1, (2, 4, 4), 7, 32, 64),
}
"""The shipped models, by name."""


def random(family: str, layers: int, width: int) -> DiT:
    """A model of that family and size with its own latents and text; Wan's 30 x 1536 is 1.3B and 40 x 5120 is 14B.

    Raises SaihError for a width that no whole number of heads makes.
    """
    head_dim(family, width)
    if family == "cogvideox":
        return CogVideoX(layers, width, 4 * width, 16, (1, 2, 2), 226, 4096, 512)
    if family == "hunyuanvideo":
        return HunyuanVideo(layers, width, 4 * width, 16, (1, 2, 2), 256, 4096, 256)
    hidden = {1536: 8960, 5120: 13824}.get(width, 4 * width)
    return DiT(layers, width, hidden, 16, (1, 2, 2), 226, 4096, 256)


KINDS: dict[str, type[DiT]] = {"CogVideoXTransformer3DModel": CogVideoX, "HunyuanVideoTransformer3DModel": HunyuanVideo}
"""Class name of a diffusers transformer -> its sizes, where it is no Wan."""


def of_config(config: Mapping[str, Any]) -> DiT:
    """The sizes in a diffusers transformer's config.json."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = config["num_layers"] + config.get("num_single_layers", 0)
    patch, per_frame = config["patch_size"], config.get("patch_size_t") or 1
    kind = KINDS.get(config.get("_class_name", ""), DiT)
    return kind(
        layers,
        width,
        config.get("ffn_dim") or 4 * width,
        config["in_channels"],
        (patch[0], patch[1], patch[2]) if isinstance(patch, Sequence) else (per_frame, patch, patch),
        config.get("max_text_seq_length", 256 if kind is HunyuanVideo else 226),
        config.get("text_dim") or config["text_embed_dim"],
        config.get("time_embed_dim") or config.get("freq_dim", 256),
    )


def settings(family: str, layers: int, width: int) -> dict[str, Any]:
    """Keyword arguments of the diffusers transformer for `random(family, layers, width)`."""
    shape, head = random(family, layers, width), head_dim(family, width)
    heads = {"num_attention_heads": width // head, "attention_head_dim": head}
    if family == "cogvideox":
        return {"num_layers": layers, "use_rotary_positional_embeddings": True, **heads}
    if isinstance(shape, HunyuanVideo):
        side = 2 * (head // 6)
        axes = (16, 56, 56) if head == 128 else (head - 2 * side, side, side)
        return {"num_layers": shape.double, "num_single_layers": layers - shape.double, "rope_axes_dim": axes, **heads}
    return {"num_layers": layers, "ffn_dim": shape.hidden, **heads}
