"""What a folder of universes is called: known to plans, which import no torch, and to those who fill it."""

from __future__ import annotations

VOXEL_MPC_H = 4.0
"""Side of a voxel where a recipe does not give its box, so the box grows with the mesh."""

GENERATOR_VERSION = 2
"""Raise it when the same recipe comes to give other bytes."""


def folder_name(mesh: int, channels: int, box_mpc_h: float, seed: int, fidelity: str, refine: int) -> str:
    """All that decides a universe's bytes besides its index; not how many there are, so that more take over fewer."""
    box = box_mpc_h or VOXEL_MPC_H * mesh
    name = f"universes-v{GENERATOR_VERSION}-mesh{mesh}-channels{channels}-box{box:g}-seed{seed}"
    return name + (f"-{fidelity}" if fidelity != "lpt" else "") + (f"-refine{refine}" if refine != 1 else "")
