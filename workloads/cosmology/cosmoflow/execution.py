"""How a network's kernels run: order in memory, recomputation, compiled or as a CUDA graph, and in which numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saih.core import Params
from saih.errors import SaihError
from workloads.cosmology.cosmoflow.model import Regressor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SLOW_CONVOLUTION = "aten::slow_conv3d_forward"


def arrange(network: Regressor, params: Params) -> None:
    """In place: the order of the weights, and whether stages are computed anew in backward.

    FSDP wants weights contiguous; volumes that are channels last make convolutions follow anyway.
    """
    if params["layout"] == "channels-last" and params["backend"] != "fsdp":
        network.stages.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.recompute = bool(params["checkpoint"])


def compile_in_place(network: nn.Module, params: Params, example: Tensor) -> None:
    """Compiled by TorchInductor at its first call, or captured now as CUDA graphs of forward and backward.

    Raises:
        SaihError: CUDA graphs on a device that is not a GPU.
    """
    if params["execution"] == "compile":
        network.compile()
    elif params["execution"] == "cuda-graph":
        if example.device.type != "cuda":
            raise SaihError("execution=cuda-graph needs a GPU; eager and compile run anywhere")
        with autocast(example.device, str(params["precision"]), graphed=True):
            torch.cuda.make_graphed_callables(network, (example,))


def autocast(
    device: torch.device | str, precision: str, graphed: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """Where a network's arithmetic is done in `precision`; fp32 and tf32 cast nothing."""
    kind, dtype = torch.device(device).type, AUTOCAST.get(precision)
    return torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=not graphed)


def scaler(device: torch.device | str, precision: str) -> torch.amp.GradScaler:
    """Keeps fp16 gradients within range; does nothing for other precisions."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def allow_tf32(allowed: bool, device: torch.device | str) -> None:
    """Whether matrix products and convolutions in fp32 may round their operands to TF32.

    Raises:
        SaihError: TF32 on a device that is not a GPU.
    """
    if allowed and torch.device(device).type != "cuda":
        raise SaihError("precision=tf32 needs a GPU; fp32, bf16 and fp16 run anywhere")
    torch.backends.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]


def diagnose(call: Callable[[], object]) -> tuple[str, ...]:
    """What the names of the kernels that `call` runs tell of its speed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    if SLOW_CONVOLUTION not in {event.name for event in profile.events()}:
        return ()
    return (
        "torch runs its slow_conv3d here, which is several times slower than oneDNN's convolution: it does so for fp32 "
        "at batch 1 on one thread, and for fp16 on processors without it",
    )
