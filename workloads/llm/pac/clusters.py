"""Clusters of edge devices that ranks stand for: slower devices, on a link of a LAN. Emulated, every one. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from workloads.llm.pac.planner import Device

MEMORY_BYTES = 4e9
"""Of a Jetson Nano."""
LOCAL_BYTES_PER_S = 3e9
"""Between ranks of one machine, where nothing is emulated: a figure for planning."""


@dataclass(frozen=True)
class Cluster:
    """What a rank emulates."""

    emulated_slowdowns: tuple[float, ...]
    """How many times slower than this machine's core: of rank 0, 1, ... and from the start again."""
    emulated_bytes_per_s: float
    """Of each device's link, in each direction."""

    def slowdown(self, rank: int) -> float:
        return self.emulated_slowdowns[rank % len(self.emulated_slowdowns)]


CLUSTERS = {
    "emulated-alike": Cluster((6.0,), 125e6),
    "emulated-mixed": Cluster((9.0, 4.5), 125e6),
    "emulated-slow-lan": Cluster((6.0,), 2.5e6),
}
"""So slow that two ranks, or four, are not held up by the two cores they share. 1 Gbit/s, and a poor 20 Mbit/s."""


def emulated_device(cluster: Cluster, here: Device, rank: int) -> Device:
    """The device that a rank stands for, from what layers take on this machine."""
    slowdown = cluster.slowdown(rank)
    return Device(
        f"emulated-{rank}",
        tuple(slowdown * seconds for seconds in here.forward_s),
        tuple(slowdown * seconds for seconds in here.backward_s),
        MEMORY_BYTES,
        cluster.emulated_bytes_per_s,
    )
