"""How much larger a batch gets, and how much faster decoding, if idle batches leave the device: on paper, beforehand.

S batches rotate over S stages. A stage has M bytes for their keys and values and W bytes of weights. If the share f of
a batch's x bytes leaves the device between two turns, (1 - f) x of each batch stays, and f x is there twice more: for
the one that runs, and the one that comes in. So x = M / (S (1 - f) + 2 f). A step reads W + x from device memory, and
meanwhile f x come in over the link: f x / link <= (W + x) / memory. Decoding is bound by memory: it gains
(x / (W + x)) / (x0 / (W + x0)), x0 = M / S.
"""

from __future__ import annotations

from dataclasses import dataclass

from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.config import preset
from workloads.llm.machines import MACHINES, USABLE_MEMORY, Machine

WORD = 2
PARAMETERS = {
    "llama-70b": float(stepcost.parameters(preset("llama-70b"))),
    "qwen3-235b-a22b": 235e9,
    "llama-405b": 405e9,
}
KNOWN = (
    *((name, "llama-70b", 0.0) for name in MACHINES),
    ("h200", "llama-70b", 32e9),
    ("h100", "qwen3-235b-a22b", 0.0),
    ("h200", "llama-405b", 0.0),
)
"""(machine, model, cap of a device's memory) that the table is printed for."""


@dataclass(frozen=True)
class Prediction:
    """Of one stage."""

    moved_share: float
    """f"""
    batch: float
    """x / x0"""
    gain: float
    """Of decode throughput over resident batches."""


def predict(kv_bytes: float, weight_bytes: float, stages: int, link_over_memory: float) -> Prediction:
    """kv_bytes: M; link_over_memory: rate of the host link over that of the device's memory.

    Raises SaihError where there is no room for keys and values.
    """
    if kv_bytes <= 0:
        raise SaihError("the weights of a stage leave no room for keys and values")
    low, high = 0.0, 1.0
    for _ in range(60):  # f on the right falls with x, which grows with f: one crossing
        share = (low + high) / 2
        held = kv_bytes / (stages * (1 - share) + 2 * share)
        low, high = (share, high) if share <= link_over_memory * (weight_bytes / held + 1) else (low, share)
    moved = low if stages > 2 else 0.0  # of two batches one runs and one comes in: nothing can be away
    resident = kv_bytes / stages
    held = kv_bytes / (stages * (1 - moved) + 2 * moved)
    gain = held / (weight_bytes + held) / (resident / (weight_bytes + resident))
    return Prediction(moved, held / resident, gain)


def predict_on(machine: Machine, parameters: float, memory_bytes: float = 0.0) -> Prediction:
    """A model in 16 bits, one pipeline stage a device; memory_bytes: a cap, 0 = all that is usable."""
    weights = WORD * parameters / machine.devices
    memory = USABLE_MEMORY * (memory_bytes or machine.memory_bytes)
    ratio = machine.host_bytes_per_s / machine.memory_bytes_per_s
    return predict(memory - weights, weights, machine.devices, ratio)


def table() -> list[str]:
    """One line for each known machine and model, to print."""
    lines = [f"{'8 devices of':12} {'model':16} {'cap':>6} {'moved':>6} {'batch':>6} {'gain':>6}   predicted"]
    for name, model, cap in KNOWN:
        found = predict_on(MACHINES[name], PARAMETERS[model], cap)
        capped = f"{cap / 1e9:.0f} GB" if cap else "-"
        lines.append(
            f"{name:12} {model:16} {capped:>6} {found.moved_share:6.2f} {found.batch:5.2f}x {found.gain:5.2f}x"
        )
    return lines
