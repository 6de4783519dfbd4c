"""Spatial parallelism: every rank holds a slab of each volume, and convolutions borrow their neighbours' planes.

Domain decomposition as Oyama et al. (arXiv:2007.12856) did for CosmoFlow: volumes are cut along depth, D. Before a
3x3x3 convolution each rank receives the plane next to its slab from both neighbours (zeros at the ends, as padding);
slabs have an even number of planes before pooling, so that stays local. The dense layers see the gathered volume.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.cosmology.cosmoflow.model import Regressor


@dataclass(frozen=True)
class Slabs:
    """The ranks in the order of their slabs, with a process group that nothing else waits in."""

    rank: int
    world: int
    group: Any

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slab of a whole tensor."""
        return x.tensor_split(self.world, dim)[self.rank]

    def swap(self, to_previous: Tensor, to_next: Tensor) -> tuple[Tensor, Tensor]:
        """Send a plane to each neighbour; returns what the previous and the next rank sent here, zeros at the ends."""
        from_previous, from_next = torch.zeros_like(to_next), torch.zeros_like(to_previous)
        exchanges = []
        for neighbour, sent, received in (
            (self.rank - 1, to_previous, from_previous),
            (self.rank + 1, to_next, from_next),
        ):
            if 0 <= neighbour < self.world:
                exchanges.append(dist.P2POp(dist.isend, sent, neighbour, self.group))
                exchanges.append(dist.P2POp(dist.irecv, received, neighbour, self.group))
        for request in dist.batch_isend_irecv(exchanges):
            request.wait()
        return from_previous, from_next


def share_out(network: Regressor, slabs: Slabs) -> None:
    """Make a CosmoFlow network, in place, take slabs of its input: same weights, same output on every rank."""
    for stage in network.stages:
        stage.convs = nn.ModuleList(SlabConv3d(conv, slabs) for conv in stage.convs)  # type: ignore[union-attr]
    network.head = nn.Sequential(Gather(slabs), network.head)


def gradient_error(
    network: Regressor, plain: Regressor, slabs: Slabs, channels: int, autocast: AbstractContextManager[Any]
) -> float:
    """|gradient - plain one| / |plain one| of the stages' weights, on a volume as thin as these stages can pool.

    `plain` has the same weights, whole, on every rank, and computes in fp32; `network` is shared out, and `autocast`.
    """
    side = 2 ** len(network.stages)
    device = next(plain.parameters()).device
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, channels, 2 * side * slabs.world, side, side, generator=generator).to(device)
    plain.stages(volume).square().mean().backward()
    with autocast:
        slab = network.stages(slabs.cut(volume, dim=2))
    (slab.float().square().mean() / slabs.world).backward()
    gradients = torch.cat([cast(Tensor, each.grad).flatten() for each in network.stages.parameters()]).double()
    dist.all_reduce(gradients, group=slabs.group)
    network.zero_grad()
    wanted = torch.cat([cast(Tensor, each.grad).flatten() for each in plain.stages.parameters()]).double()
    return float((gradients - wanted).norm() / wanted.norm())


class SlabConv3d(nn.Module):
    """A 3x3x3 convolution of the whole volume, computed on one slab of it."""

    def __init__(self, conv: nn.Conv3d, slabs: Slabs) -> None:
        super().__init__()
        self.weight, self.bias, self.slabs = conv.weight, conv.bias, slabs

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        padded = _Halo.apply(x_BCDHW, self.slabs)  # type: ignore[no-untyped-call]
        return nn.functional.conv3d(padded, self.weight, self.bias, padding=(0, 1, 1))


class Gather(nn.Module):
    """Slabs -> the whole volume, on every rank."""

    def __init__(self, slabs: Slabs) -> None:
        super().__init__()
        self.slabs = slabs

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        gathered: Tensor = _Gathered.apply(x_BCDHW, self.slabs)  # type: ignore[no-untyped-call]
        return gathered


class _Halo(torch.autograd.Function):
    """[B, C, D, H, W] -> [B, C, D + 2, H, W]; a borrowed plane's gradient goes back to whom it belongs to."""

    @staticmethod
    def forward(ctx: Any, x_BCDHW: Tensor, slabs: Slabs) -> Tensor:
        ctx.slabs = slabs
        previous, following = slabs.swap(x_BCDHW[:, :, :1].contiguous(), x_BCDHW[:, :, -1:].contiguous())
        padded = torch.cat([previous, x_BCDHW, following], dim=2)
        return padded.contiguous(memory_format=_layout(x_BCDHW))

    @staticmethod
    def backward(ctx: Any, gradient_BCDHW: Tensor) -> tuple[Tensor, None]:
        to_previous, to_next = gradient_BCDHW[:, :, :1].contiguous(), gradient_BCDHW[:, :, -1:].contiguous()
        previous, following = ctx.slabs.swap(to_previous, to_next)
        own = gradient_BCDHW[:, :, 1:-1].clone(memory_format=_layout(gradient_BCDHW))
        own[:, :, :1] += previous
        own[:, :, -1:] += following
        return own, None


class _Gathered(torch.autograd.Function):
    """All slabs, joined. Every rank computes the same loss from them, so each takes its own slab of the gradient.

    Times the number of ranks, for the gradients of the weights are averaged afterwards where they should add up.
    """

    @staticmethod
    def forward(ctx: Any, x_BCDHW: Tensor, slabs: Slabs) -> Tensor:
        ctx.slabs = slabs
        mine = x_BCDHW.contiguous()
        every = [torch.empty_like(mine) for _ in range(slabs.world)]
        dist.all_gather(every, mine, slabs.group)
        return torch.cat(every, dim=2)

    @staticmethod
    def backward(ctx: Any, gradient_BCDHW: Tensor) -> tuple[Tensor, None]:
        return ctx.slabs.cut(gradient_BCDHW, dim=2) * ctx.slabs.world, None


def _layout(x_BCDHW: Tensor) -> torch.memory_format:
    last = x_BCDHW.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format
