"""A checkpoint of training: network and optimizer on storage, whole before the file has its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saih.core import Place


class Checkpoint:
    """Written by the first rank, or, where each stores a part of the weights, by every rank its own part."""

    def __init__(self, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> None:
        """`path` without its ending; ranks that write their own part add their number."""
        self.network, self.optimizer, self.world = network, optimizer, place.world
        self.in_parts = any(isinstance(each, DTensor) for each in network.parameters())
        self.writes = self.in_parts or place.rank == 0
        self.path = path.with_suffix(f".{place.rank}.pt" if self.in_parts else ".pt")

    def save(self) -> None:
        """When this returns on any rank, all of it is on storage."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_suffix(".part")
            with aside.open("wb") as file:
                torch.save(self._state(), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        if self.world > 1:
            dist.barrier()

    def is_what_is_in_memory(self) -> bool:
        """Whether the file, read back, has every number of the network and the optimizer."""
        if not self.writes:
            return True
        read, held = _tensors(torch.load(self.path, weights_only=True, map_location="cpu")), _tensors(self._state())
        return read.keys() == held.keys() and all(torch.equal(read[name], held[name].cpu()) for name in held)

    def close(self) -> None:
        """Remove what was written."""
        for path in (self.path, self.path.with_suffix(".part")):
            if self.writes:
                path.unlink(missing_ok=True)

    def _state(self) -> dict[str, Any]:
        return {"network": _local(self.network.state_dict()), "optimizer": _local(self.optimizer.state_dict())}


def _local(state: Any) -> Any:
    """The same with this rank's own part in place of each tensor that is shared out."""
    if isinstance(state, dict):
        return {name: _local(each) for name, each in state.items()}
    if isinstance(state, list | tuple):
        return [_local(each) for each in state]
    return state.to_local() if isinstance(state, DTensor) else state


def _tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of nested dicts and lists, by where they are."""
    if isinstance(state, Tensor):
        return {name: state}
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: each for place, value in inside for key, each in _tensors(value, f"{name}/{place}").items()}
