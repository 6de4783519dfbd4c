"""Clusters of edge devices that ranks stand for: slower devices, on a link of a LAN. Emulated, every one. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workloads.llm.pac.planner import Device

MEMORY_BYTES = 4e9
"""Of a Jetson Nano."""
LOCAL_BYTES_PER_S = 3e9
"""Between ranks of one machine, where nothing is emulated: a figure for planning."""


@dataclass(frozen=True)
class Cluster:
    """What ranks emulate: devices that do so many FLOP a second, whatever the machine that emulates them can do."""

    emulated_flop_per_s: tuple[float, ...]
    """Of rank 0, 1, ... and from the start again."""
    emulated_bytes_per_s: float
    """Of each device's link, in each direction."""

    def device(self, rank: int, forward_flop: Sequence[float], backward_flop: Sequence[float]) -> Device:
        """The one that a rank stands for; FLOP a sample, of each layer."""
        flop_per_s = self.emulated_flop_per_s[rank % len(self.emulated_flop_per_s)]
        return Device(
            f"emulated-{rank}",
            tuple(flop / flop_per_s for flop in forward_flop),
            tuple(flop / flop_per_s for flop in backward_flop),
            MEMORY_BYTES,
            self.emulated_bytes_per_s,
        )


CLUSTERS = {
    "emulated-alike": Cluster((8e9,), 125e6),
    "emulated-mixed": Cluster((6e9, 12e9), 125e6),
    "emulated-slow-lan": Cluster((8e9,), 2.5e6),
}
"""So slow that two ranks, or four, are not held up by the two cores they share. 1 Gbit/s, and a poor 20 Mbit/s."""
