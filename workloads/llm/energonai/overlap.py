"""Which layers PMEP puts away, and when fetching them costs no time. Imports no torch."""

from __future__ import annotations

from collections import deque

from saih.errors import SaihError

PASSES = 4
"""Forward passes until a schedule repeats itself."""


def offloaded_layers(layers: int, interval: int) -> range:
    """Every `interval`-th layer of a stage: interval - 1, 2 interval - 1, ... Raises SaihError if there is none."""
    if not 1 <= interval <= layers:
        raise SaihError(f"interval={interval} offloads no layer of {layers}; it must be from 1 to {layers}")
    return range(interval - 1, layers, interval)


def copies_hide(interval: int, copy_s: float, layer_s: float) -> bool:
    """Whether one staging buffer is enough to wait for nothing: t_copy <= (k - 1) t_compute."""
    return copy_s <= (interval - 1) * layer_s


def predicted_step_s(layers: int, interval: int, copy_s: float, layer_s: float, depth: int = 1) -> float:
    """Time of one forward pass in a row of many, from the times of one layer's copy and one layer's compute.

    Copies follow each other on one link; the buffer of a layer is free for the next copy when that layer has run.
    """
    away = offloaded_layers(layers, interval)
    ready_s = deque(copy_s * (place + 1) for place in range(min(depth, len(away))))
    now_s = began_s = 0.0
    link_free_s = ready_s[-1]
    for _ in range(PASSES):
        began_s = now_s
        for layer in range(layers):
            if layer in away:
                now_s = max(now_s, ready_s.popleft())
            now_s += layer_s
            if layer in away:
                link_free_s = max(link_free_s, now_s) + copy_s
                ready_s.append(link_free_s)
    return now_s - began_s
