"""Tensor parallelism (Megatron-LM, 2019): groups of ranks, matrices cut over them, and the sums that join the parts.

Activations are whole on every rank of the group; between a column and a row matrix each rank has its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from saih.errors import SaihError


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands among its tensor-parallel neighbours and the pipeline stages. No groups if alone.

    Layers of a `silent` one keep their part to themselves: what they compute is worthless, and costs no sum.
    """

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    silent: bool = False

    @classmethod
    def make(cls, tp: int, pp: int) -> Mesh:
        """Split all ranks of the initialised default group: rank = pp_rank * tp + tp_rank. Every rank calls it.

        Raises SaihError unless there are tp * pp ranks.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != tp * pp:
            raise SaihError(f"tp={tp} x pp={pp} needs {tp * pp} ranks, there are {ranks}")
        if ranks == 1:
            return cls()
        tp_group, _ = dist.new_subgroups_by_enumeration([list(range(s * tp, (s + 1) * tp)) for s in range(pp)])
        pp_group, _ = dist.new_subgroups_by_enumeration([list(range(t, ranks, tp)) for t in range(tp)])
        pp_rank, tp_rank = divmod(dist.get_rank(), tp)
        return cls(tp, pp, tp_rank, pp_rank, tp_group, pp_group)


@dataclass(frozen=True)
class Cut:
    """The part [start, stop) that one rank has of something of `whole` elements."""

    whole: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut(whole: int, mesh: Mesh, what: str) -> Cut:
    """Equal parts. Raises SaihError if it does not divide."""
    if whole % mesh.tp:
        raise SaihError(f"{whole} {what} cannot be cut over tp={mesh.tp}; tp must divide it")
    part = whole // mesh.tp
    return Cut(whole, mesh.tp_rank * part, (mesh.tp_rank + 1) * part)


def cut_kv_heads(heads: int, mesh: Mesh) -> Cut:
    """Equal parts; with fewer KV heads than ranks, each is copied to the tp / heads ranks whose query heads use it."""
    if heads >= mesh.tp:
        return cut(heads, mesh, "KV heads")
    if mesh.tp % heads:
        raise SaihError(f"{heads} KV heads cannot be shared by tp={mesh.tp} ranks evenly")
    mine = mesh.tp_rank * heads // mesh.tp
    return Cut(heads, mine, mine + 1)


def cut_vocab(vocab: int, mesh: Mesh) -> Cut:
    """Parts of ceil(vocab / tp) rows; the last ranks may have fewer."""
    part = -(-vocab // mesh.tp)
    return Cut(vocab, min(mesh.tp_rank * part, vocab), min((mesh.tp_rank + 1) * part, vocab))


# -- Sums, whose gradients are the identity, and the other way round ---------------------------------------------------


class _Copy(torch.autograd.Function):
    """Megatron's f: the same input on every rank, so the gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """Megatron's g: partial results add up, so each gets the whole gradient. Adds in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    """Columns of all ranks side by side; each gets back the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.width, ctx.rank = x.shape[-1], dist.get_rank(group)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][..., ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width], None


def copy_to_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """The identity, ahead of what a rank does with its part; the gradient is summed over the group."""
    return x if mesh.tp == 1 or mesh.silent else cast(Tensor, _Copy.apply(x, mesh.tp_group))  # type: ignore[no-untyped-call]


def sum_over_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over the group, in place."""
    return x if mesh.tp == 1 or mesh.silent else cast(Tensor, _Sum.apply(x, mesh.tp_group))  # type: ignore[no-untyped-call]


def silence(module: nn.Module) -> None:
    """From here on the layers of this module tell no other rank anything."""
    for each in module.modules():
        if isinstance(each, ColumnLinear | RowLinear | VocabMatrix):
            each.mesh = replace(each.mesh, silent=True)


# -- Layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A named tensor of the whole model, which slice of it this rank holds, and where: `rows` of a parameter."""

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    parameter: nn.Parameter
    rows: slice

    @property
    def target(self) -> Tensor:
        """The memory to fill."""
        return self.parameter.data[self.rows]


def pieces(module: nn.Module) -> Iterator[Piece]:
    """All pieces of a module: parameters that are not cut, and what the layers below say of theirs."""
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, ColumnLinear | RowLinear | VocabMatrix):
                yield from owner.pieces(path, leaf, parameter)
            else:
                yield _whole(path, leaf, parameter)


def _whole(path: str, leaf: str, parameter: nn.Parameter) -> Piece:
    everything = tuple(slice(0, size) for size in parameter.shape)
    name = ".".join(filter(None, (path, leaf)))
    return Piece(name, tuple(parameter.shape), everything, parameter, slice(None))


def _row_cuts(path: str, leaf: str, parameter: nn.Parameter, parts: Mapping[str, Cut]) -> Iterator[Piece]:
    """Pieces of a parameter whose rows are those of several tensors, one behind the other."""
    begin = 0
    for part, mine in parts.items():
        name = ".".join(filter(None, (path, part, leaf)))
        rest = tuple(slice(0, size) for size in parameter.shape[1:])
        rows = slice(begin, begin + len(mine))
        yield Piece(name, (mine.whole, *parameter.shape[1:]), (slice(mine.start, mine.stop), *rest), parameter, rows)
        begin += len(mine)


@dataclass(frozen=True)
class Make:
    """Where parameters are made, and of which type. They hold nothing yet."""

    device: torch.device
    dtype: torch.dtype

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D] W^T + b, of a weight [O, D] as it is or as `prepack.prepack` laid it out."""
    if weight.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


class ColumnLinear(nn.Module):
    """Several matrices over the same input as one, each cut by outputs: x [T, D] -> [T, all my outputs]."""

    def __init__(self, inputs: int, parts: Mapping[str, Cut], bias: bool, mesh: Mesh, made: Make) -> None:
        super().__init__()
        self.parts, self.mesh = dict(parts), mesh
        self.sizes = [len(part) for part in parts.values()]
        self.weight = made.parameter(sum(self.sizes), inputs)
        self.bias = made.parameter(sum(self.sizes)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return multiply(copy_to_ranks(x_TD, self.mesh), self.weight, self.bias)

    def pieces(self, path: str, leaf: str, parameter: nn.Parameter) -> Iterator[Piece]:
        yield from _row_cuts(path, leaf, parameter, self.parts)


class RowLinear(nn.Module):
    """A matrix cut by inputs: x [T, my inputs] -> [T, D], summed over the ranks. The bias is added once."""

    def __init__(self, inputs: Cut, outputs: int, bias: bool, mesh: Mesh, made: Make) -> None:
        super().__init__()
        self.inputs, self.mesh = inputs, mesh
        self.weight = made.parameter(outputs, len(inputs))
        self.bias = made.parameter(outputs) if bias else None

    def forward(self, x_TF: Tensor) -> Tensor:
        if self.mesh.tp == 1:
            return multiply(x_TF, self.weight, self.bias)
        h_TD = sum_over_ranks(multiply(x_TF, self.weight), self.mesh)
        return h_TD if self.bias is None else h_TD + self.bias

    def pieces(self, path: str, leaf: str, parameter: nn.Parameter) -> Iterator[Piece]:
        if leaf == "bias":
            yield _whole(path, leaf, parameter)
        else:
            index = (slice(0, parameter.shape[0]), slice(self.inputs.start, self.inputs.stop))
            yield Piece(f"{path}.{leaf}", (parameter.shape[0], self.inputs.whole), index, parameter, slice(None))


class VocabMatrix(nn.Module):
    """One row a word, cut by words: turns ids into embeddings, and hidden states into logits (with a bias, if any)."""

    def __init__(self, vocab: int, hidden: int, bias: bool, mesh: Mesh, made: Make) -> None:
        super().__init__()
        self.mine, self.mesh = cut_vocab(vocab, mesh), mesh
        self.weight = made.parameter(len(self.mine), hidden)
        self.bias = made.parameter(len(self.mine)) if bias else None
        self.prepacked: Tensor | None = None
        """A copy of the weight as logits want it (`prepack.prepack`); embeddings look up rows of the weight itself."""

    def embed(self, ids_T: Tensor) -> Tensor:
        """[T] -> [T, D]: each rank looks up the words it has, the others give zeros."""
        if self.mesh.tp == 1:
            return F.embedding(ids_T, self.weight)
        here_T = (ids_T >= self.mine.start) & (ids_T < self.mine.stop)
        rows_TD = F.embedding((ids_T - self.mine.start) * here_T, self.weight) * here_T[:, None]
        return sum_over_ranks(rows_TD, self.mesh)

    def logits(self, h_RD: Tensor) -> Tensor:
        """[R, D] -> [R, V], whole on every rank."""
        weight = self.weight if self.prepacked is None else self.prepacked
        mine_RV = multiply(copy_to_ranks(h_RD, self.mesh), weight, self.bias)
        if self.mesh.tp == 1:
            return mine_RV
        widest = -(-self.mine.whole // self.mesh.tp)
        filled_RV = F.pad(mine_RV, (0, widest - len(self.mine)))
        if self.mesh.silent:
            return filled_RV.repeat(1, self.mesh.tp)[:, : self.mine.whole]
        all_RV: Tensor = _Gather.apply(filled_RV, self.mesh.tp_group)  # type: ignore[no-untyped-call]
        return all_RV[:, : self.mine.whole]

    def pieces(self, path: str, leaf: str, parameter: nn.Parameter) -> Iterator[Piece]:
        yield from _row_cuts(path, leaf, parameter, {"": self.mine})
