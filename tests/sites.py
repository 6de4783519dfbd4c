"""A site that is the same on every machine, for tests of planning."""

from __future__ import annotations

from typing import Any

from saih.site import Peak, Site


def cpu_site(**changes: Any) -> Site:
    """Two one-threaded CPU ranks, 100 GFLOP/s in fp32, 10 GB/s of memory."""
    stated: dict[str, Any] = {
        "name": "test",
        "scheduler": "local",
        "launcher": "torchrun",
        "device": "cpu",
        "nodes": 1,
        "gpus_per_node": 2,
        "threads_per_rank": 1,
        "node_memory_gib": 8.0,
        "device_memory_gib": 4.0,
        "peak": Peak(flop_per_s={"fp32": 1e11}, memory_bytes_per_s=1e10, source="made up"),
    }
    return Site.model_validate(stated | changes)
