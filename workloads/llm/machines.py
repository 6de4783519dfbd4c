"""What data sheets say of machines that papers used: for predictions and simulated time, never for a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from saih.errors import unknown

HOST_BYTES = 800e9
"""Of a host's memory, for keys and values that wait: the machine of arXiv 2605.23389."""
USABLE_MEMORY = 0.9
"""Of a device's memory, for weights, cache and activations (vLLM's default); the rest is the runtime's."""


@dataclass(frozen=True)
class Machine:
    """One device and its links; rates in each direction."""

    memory_bytes: float
    memory_bytes_per_s: float
    flop_per_s: float
    """Dense 16-bit."""
    host_bytes_per_s: float
    """To and from host memory, PCIe's raw rate."""
    peer_bytes_per_s: float
    """To and from another device; PCIe's where there is no NVLink."""
    devices: int = 8


MACHINES = {
    "rtx5090": Machine(32e9, 1792e9, 209e12, 64e9, 64e9),
    "l20": Machine(48e9, 864e9, 119.5e12, 32e9, 32e9),
    "h100": Machine(80e9, 3350e9, 989e12, 64e9, 450e9),
    "h200": Machine(141e9, 4800e9, 989e12, 64e9, 450e9),
}


def machine(name: str) -> Machine:
    """Raises SaihError with the valid names for one that is not here."""
    if name not in MACHINES:
        raise unknown("machine", name, MACHINES)
    return MACHINES[name]
