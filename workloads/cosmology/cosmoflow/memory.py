"""Peak memory of a training step, predicted from the units of a network. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from workloads.cosmology.cosmoflow.networks import Unit

WEIGHT_BYTES = GRADIENT_BYTES = 4
MOMENTUM_BYTES, MOMENTS_BYTES = 4, 8
"""What SGD with momentum and what AdamW keeps of each parameter, in fp32."""


def peak_bytes(
    units: Sequence[Unit],
    batch: float,
    checkpoint: bool = False,
    gradients_stand: bool = False,
    optimizer_bytes: int = MOMENTUM_BYTES,
) -> float:
    """Weights, optimizer, gradients, what backward keeps, and the worst moment of backward; of all units on one device.

    Backward goes through the units from the last to the first: each gives back what it kept and leaves gradients. With
    `checkpoint` units keep their inputs alone and are computed anew when backward reaches them. `gradients_stand` is
    for backends that hold the gradients' memory from step to step.
    """
    parameters = sum(unit.parameters for unit in units)
    held = sum(_held(unit, checkpoint) for unit in units) * batch
    gradients, peak = 0.0, 0.0
    for unit in reversed(units):
        anew = unit.kept_bytes if checkpoint else 0.0
        gradients += GRADIENT_BYTES * unit.parameters
        standing = GRADIENT_BYTES * parameters if gradients_stand else gradients
        peak = max(peak, standing + held + (anew + unit.backward_bytes) * batch)
        held -= _held(unit, checkpoint) * batch
    return (WEIGHT_BYTES + optimizer_bytes) * parameters + max(peak, GRADIENT_BYTES * parameters)


def sharded_peak_bytes(units: Sequence[Unit], batch: float, checkpoint: bool, ranks: int) -> float:
    """Of one rank under FSDP: its part of everything standing, and the whole weights and gradients of one unit or two.

    In backward a unit's weights are gathered ahead, while the one before it is still at work.
    """
    parameters = sum(unit.parameters for unit in units)
    held = sum(_held(unit, checkpoint) for unit in units) * batch
    peak, sharded = 0.0, 0.0
    for place in reversed(range(len(units))):
        unit, ahead = units[place], units[place - 1].parameters if place else 0
        anew = unit.kept_bytes if checkpoint else 0.0
        whole = GRADIENT_BYTES * (2 * unit.parameters + ahead)
        peak = max(peak, sharded + held + whole + (anew + unit.backward_bytes) * batch)
        sharded += GRADIENT_BYTES * unit.parameters / ranks
        held -= _held(unit, checkpoint) * batch
    return (WEIGHT_BYTES + MOMENTUM_BYTES) * parameters / ranks + peak


def _held(unit: Unit, checkpoint: bool) -> float:
    """Bytes from forward to backward, for one sample. A unit's input is what the one before it has put out and kept."""
    return unit.input_bytes if checkpoint else unit.kept_bytes
