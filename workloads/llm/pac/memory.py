"""What a training step keeps for backward, and the most that is resident during it. Measured, not modelled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


class Saved:
    """Bytes of the storages that autograd kept, each counted once; those of parameters do not count."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._standing = {each.untyped_storage().data_ptr() for each in parameters}
        self._kept: dict[int, int] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around a forward pass whose graph is alive when this ends: storages then cannot have been used twice."""
        with torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor):
            yield

    @property
    def nbytes(self) -> int:
        return sum(self._kept.values())

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._standing:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def peak_growth_bytes(run: Callable[[], object], device: str) -> float:
    """How far memory rises above where it stands, at the most, while `run` runs; NaN where nobody tells.

    On a GPU of what torch allocates; on a CPU of what is resident, which also has what the allocator does not return.
    """
    gc.collect()
    if device.startswith("cuda"):
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - allocated)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    return float("nan")
