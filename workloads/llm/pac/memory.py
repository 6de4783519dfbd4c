"""What a training step keeps for backward, and the most that is resident during it. Measured, not modelled."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
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


def release() -> None:
    """Give freed memory back to the system, so that what is resident is what is used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(device: str) -> float:
    """On a GPU what torch has allocated, on a CPU what is resident; NaN where nobody tells."""
    if device.startswith("cuda"):
        return float(torch.cuda.memory_allocated(device))
    return _resident("VmRSS")


def peak_bytes(run: Callable[[], object], device: str) -> float:
    """The most of `resident_bytes` while `run` runs."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    run()
    return _resident("VmHWM")


def _resident(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return float(line.split()[1]) * 1024
    return math.nan
