"""What parallel adapters are compared with: LoRA and bottleneck adapters put into the blocks of a frozen backbone."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from workloads.llm.blocks import Block
from workloads.llm.pac.adapters import initialise, linear
from workloads.llm.shard import ColumnLinear, Make, RowLinear


class LoraLinear(nn.Module):
    """W x + (alpha / r) B A x (Hu et al., 2021), for several matrices W over one input; B starts at zero."""

    def __init__(self, base: ColumnLinear, rank: int, alpha: float, made: Make) -> None:
        super().__init__()
        inputs = base.weight.shape[1]
        self.base, self.sizes, self.rank, self.scale = base, base.sizes, rank, alpha / rank
        self.a = made.parameter(rank * len(base.sizes), inputs)
        """A of every matrix, one below the other."""
        self.b = nn.ParameterList(made.parameter(size, rank) for size in base.sizes)

    def forward(self, x_TD: Tensor) -> Tensor:
        low = F.linear(x_TD, self.a).split(self.rank, -1)
        added = torch.cat([F.linear(x, b) for x, b in zip(low, self.b, strict=True)], -1)
        out: Tensor = self.base(x_TD) + self.scale * added
        return out


class Adapted(nn.Module):
    """y + U gelu(V y) behind a matrix (Houlsby et al., 2019); U starts at zero."""

    def __init__(self, base: RowLinear, bottleneck: int, made: Make) -> None:
        super().__init__()
        outputs = base.weight.shape[0]
        self.base = base
        self.down, self.up = linear(outputs, bottleneck, made), linear(bottleneck, outputs, made)

    def forward(self, x_TF: Tensor) -> Tensor:
        y_TD: Tensor = self.base(x_TF)
        up_TD: Tensor = self.up(F.gelu(self.down(y_TD)))
        return y_TD + up_TD


def add_lora(layers: nn.ModuleDict, rank: int, alpha: float, made: Make, seed: int) -> dict[str, nn.Parameter]:
    """LoRA on q, k and v of every block; what trains, by its name."""
    trained: dict[str, nn.Parameter] = {}
    for number, block in cast("list[tuple[str, Block]]", list(layers.items())):
        lora = LoraLinear(block.attn.qkv, rank, alpha, made)
        block.attn.qkv = lora  # type: ignore[assignment]
        trained |= _started(f"layers.{number}.attn.qkv", lora, seed, ("b.",))
    return trained


def add_adapters(layers: nn.ModuleDict, bottleneck: int, made: Make, seed: int) -> dict[str, nn.Parameter]:
    """A bottleneck adapter behind attention and behind the MLP of every block; what trains, by its name."""
    trained: dict[str, nn.Parameter] = {}
    for number, block in cast("list[tuple[str, Block]]", list(layers.items())):
        for name, leaf in (("attn", "out"), ("mlp", "down")):
            owner = getattr(block, name)
            adapted = Adapted(getattr(owner, leaf), bottleneck, made)
            setattr(owner, leaf, adapted)
            path = f"layers.{number}.{name}.{leaf}"
            trained |= _started(path, adapted, seed, ("up.",))
    return trained


def _started(path: str, module: nn.Module, seed: int, zero: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """New parameters of a module around `base`: random by seed and full name, or zero."""
    base = module.base
    del module.base
    holder = nn.Module()
    holder.add_module(path.replace(".", "/"), module)
    initialise(holder, seed)
    found = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in found.items():
            if name.startswith(zero):
                parameter.zero_()
    module.base = base
    return {f"{path}.{name}": parameter for name, parameter in found.items()}
