"""The two families of networks, layer by layer: parameters, FLOP, traffic, what backward keeps. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saih.core import Operation

TARGETS = 4
KERNEL_VOXELS = 27
HEAD_CHANNELS = 64
"""Width of one attention head, as in the vision transformers of Dosovitskiy et al., arXiv:2010.11929."""
INDEX_BYTES = 8
"""MaxPool3d keeps int64 positions of the maxima."""


@dataclass(frozen=True)
class Unit:
    """A stage or block, for one sample: recomputed together, sharded together, its memory given back together."""

    parameters: int
    input_bytes: float
    """All that is kept of it when it is recomputed in backward; 0 for the first, whose input is the volume."""
    kept_bytes: float
    """What its backward needs beside its input."""
    backward_bytes: float
    """Gradients and workspace alive at the worst moment of its backward."""


@dataclass(frozen=True)
class Conv:
    """A 3x3x3 convolution over side^3 voxels; the last one of a stage is followed by pooling to (side/2)^3."""

    side: int
    inputs: int
    outputs: int
    pooled: bool = True

    @property
    def parameters(self) -> int:
        return KERNEL_VOXELS * self.inputs * self.outputs + self.outputs

    @property
    def flop(self) -> float:
        """Forward FLOP of one sample, 2 for each multiply-add."""
        return 2.0 * KERNEL_VOXELS * self.inputs * self.outputs * self.side**3

    @property
    def volume(self) -> int:
        """Numbers it puts out for one sample, before pooling."""
        return self.outputs * self.side**3


@dataclass(frozen=True)
class ConvNet:
    """CosmoFlow: stages of convolutions that double the channels and halve the volume, then dense layers."""

    stages: tuple[tuple[Conv, ...], ...]
    dense: tuple[tuple[int, int], ...]
    """(inputs, outputs) of each fully connected layer."""

    @property
    def convs(self) -> tuple[Conv, ...]:
        return tuple(conv for stage in self.stages for conv in stage)

    @property
    def coarsest(self) -> int:
        """Side of the volume that the dense layers see."""
        return self.convs[-1].side // 2

    @property
    def parameters(self) -> int:
        return sum(conv.parameters for conv in self.convs) + _dense_parameters(self.dense)

    @property
    def forward_flop(self) -> float:
        """Per sample."""
        return sum(conv.flop for conv in self.convs) + sum(2.0 * i * o for i, o in self.dense)

    @property
    def training_flop(self) -> float:
        """Per sample: forward, and both gradients of every layer but the first, which has no input gradient."""
        return 3 * self.forward_flop - self.convs[0].flop

    def operations(self, batch: int, word: int, checkpoint: bool) -> list[Operation]:
        """Kernels of a step but for the optimizer: convolutions, pooling and dense layers, forward and backward."""
        found = []
        for place, conv in enumerate(self.convs):
            flop, pooled = conv.flop * batch, word * batch * conv.volume
            moved = word * batch * conv.side**3 * (conv.inputs + conv.outputs) + word * conv.parameters
            found += [Operation(flop, moved)] * ((3 if place else 2) + checkpoint)
            if conv.pooled:  # pooling; its gradient, zeroed first; leaky ReLU of the pooled volume, and its gradient
                found += [Operation(0.0, 1.5 * pooled)] * (1 + checkpoint) + [Operation(0.0, 2.5 * pooled)]
                found += [Operation(0.0, pooled / 4)] * (2 + checkpoint)
            else:
                found += [Operation(0.0, 2 * pooled)] * (2 + checkpoint)
        return found + _dense_operations(self.dense, batch, word)

    def units(self, word: int) -> list[Unit]:
        """The stages, then the dense layers."""
        found = []
        for place, stage in enumerate(self.stages):
            inner, last = stage[:-1], stage[-1]
            pooled = last.volume / 8
            kept = word * (sum(conv.volume for conv in inner) + last.volume) + pooled * (word + INDEX_BYTES)
            pooling = word * (last.volume + pooled)  # its gradient, while the volume and the positions are still there
            entering = word * stage[0].side ** 3 * stage[0].inputs if place else 0
            found.append(Unit(sum(conv.parameters for conv in stage), entering, kept, pooling))
        flat = word * self.dense[0][0]
        return [*found, Unit(_dense_parameters(self.dense), flat, 0.0, 2 * flat)]


@dataclass(frozen=True)
class Transformer:
    """A vision transformer over patches of the volume: pre-norm blocks, mean of the tokens, one dense layer."""

    tokens: int
    patch_numbers: int
    """Numbers in one patch: its voxels times the channels."""
    width: int
    blocks: int

    @property
    def heads(self) -> int:
        return self.width // HEAD_CHANNELS

    @property
    def block_parameters(self) -> int:
        """Four projections and their biases, an MLP of four times the width, two layer norms."""
        return 12 * self.width**2 + 13 * self.width

    @property
    def embedding_parameters(self) -> int:
        """The projection of a patch with its bias, and a learned vector for each place."""
        return (self.patch_numbers + 1 + self.tokens) * self.width

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.blocks * self.block_parameters + self._head_parameters

    @property
    def forward_flop(self) -> float:
        """Per sample; attention counts its two products over all pairs of tokens."""
        return self._embedding_flop + self.blocks * self._block_flop + 2.0 * self.width * TARGETS

    @property
    def training_flop(self) -> float:
        """Per sample: forward, and both gradients of every layer but the first, which has no input gradient."""
        return 3 * self.forward_flop - self._embedding_flop

    def operations(self, batch: int, word: int, checkpoint: bool) -> list[Operation]:
        """Kernels of a step but for the optimizer: each matrix product, forward and backward, and what lies between."""
        rows = batch * self.tokens
        products = [(self.width, 3 * self.width), (self.width, self.width)]
        products += [(self.width, 4 * self.width), (4 * self.width, self.width)]
        block = [Operation(2.0 * rows * i * o, word * (i * o + rows * (i + o))) for i, o in products]
        block.append(Operation(4.0 * rows * self.tokens * self.width, 4.0 * word * rows * self.width))
        block += [Operation(0.0, 2.0 * word * rows * self.width)] * 4  # layer norms, residuals
        block.append(Operation(0.0, 8.0 * word * rows * self.width))  # GELU
        moved = word * (rows * (self.patch_numbers + self.width) + self.patch_numbers * self.width)
        found = [Operation(self._embedding_flop * batch, moved)] * 2
        found += block * (self.blocks * (3 + checkpoint))
        return found + _dense_operations([(self.width, TARGETS)], batch, word)

    def units(self, word: int) -> list[Unit]:
        """The embedding of patches, the blocks, then the dense layer."""
        stream = self.tokens * self.width
        patches = self.tokens * self.patch_numbers
        embedding = Unit(self.embedding_parameters, 0.0, word * patches, word * stream)
        # the inputs of both norms, in fp32; those of products, queries, keys, values, the MLP before and after GELU
        kept = (4 * 2 + word * 14.0) * stream + 4.0 * self.tokens * self.heads
        block = Unit(self.block_parameters, word * stream, kept, word * 5.0 * stream)
        head = Unit(self._head_parameters, word * stream, word * stream, word * 2.0 * stream)
        return [embedding, *([block] * self.blocks), head]

    @property
    def _embedding_flop(self) -> float:
        return 2.0 * self.tokens * self.patch_numbers * self.width

    @property
    def _block_flop(self) -> float:
        return 24.0 * self.tokens * self.width**2 + 4.0 * self.tokens**2 * self.width

    @property
    def _head_parameters(self) -> int:
        return 2 * self.width + _dense_parameters([(self.width, TARGETS)])


Network = ConvNet | Transformer


def conv_net(mesh: int, channels: int, width: int, stages: int, depth: int) -> ConvNet:
    """`stages` stages of `depth` convolutions each; the first puts out `width` channels, each stage twice as many."""
    found = []
    for stage in range(stages):
        side, outputs = mesh >> stage, width << stage
        inputs = channels if stage == 0 else outputs // 2
        found.append(
            tuple(Conv(side, outputs if place else inputs, outputs, place == depth - 1) for place in range(depth))
        )
    flat = (width << (stages - 1)) * (mesh >> stages) ** 3
    return ConvNet(tuple(found), ((flat, 128), (128, 64), (64, TARGETS)))


def transformer(mesh: int, channels: int, width: int, patch: int, blocks: int) -> Transformer:
    """`blocks` blocks of `width` channels over patches of `patch`^3 voxels."""
    return Transformer((mesh // patch) ** 3, channels * patch**3, width, blocks)


def deepest(mesh: int) -> int:
    """How often a volume of mesh^3 can be halved."""
    return int(math.log2(mesh))


def _dense_parameters(dense: Sequence[tuple[int, int]]) -> int:
    return sum(inputs * outputs + outputs for inputs, outputs in dense)


def _dense_operations(dense: Sequence[tuple[int, int]], batch: int, word: int) -> list[Operation]:
    found = []
    for inputs, outputs in dense:
        moved = word * (inputs * outputs + batch * (inputs + outputs))
        found += [Operation(2.0 * batch * inputs * outputs, moved)] * 3
    return found
