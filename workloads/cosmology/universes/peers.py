"""Other people's generators beside ours: one universe at z = 0 each, as int16 counts of the same mean.

pycola3 0.0.7 (COLA, arXiv:1301.0322) takes its initial displacements from our 2LPT: its own 2LPT imports its modules by
names that they do not have. powerbox 1.0 draws log-normal fields.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saih.errors import SaihError
from workloads.cosmology import particles, power, universe
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.particlemesh import FIRST_SCALE_FACTOR, STEPS
from workloads.cosmology.power import Cosmology
from workloads.cosmology.universe import counted


def pycola3(cosmology: Cosmology, mesh: Mesh, box_mpc_h: float, seed: int) -> Tensor:
    """COLA from the scale factor our particle mesh begins at, in as many steps, on a force mesh of the same side."""
    evolve: Callable[..., tuple[Any, ...]] = _with_plain_numbers(_package("pycola3.evolve")).evolve
    psi = universe.displacements(
        mesh, universe.linear_modes(partial(power.linear_power, cosmology), mesh, box_mpc_h, seed)
    )
    voxel = box_mpc_h / mesh.side
    second_today = float(power.growth(cosmology, np.zeros(1))[1][0])
    found = evolve(
        voxel,
        *psi[0].mul_(voxel).numpy(),
        *psi[1].mul_(voxel * second_today).numpy(),
        covers_full_box=True,
        ngrid_x=mesh.side,
        ngrid_y=mesh.side,
        ngrid_z=mesh.side,
        gridcellsize=voxel,
        Om=cosmology.omega_m,
        Ol=1 - cosmology.omega_m,
        a_initial=FIRST_SCALE_FACTOR,
        a_final=1.0,
        n_steps=STEPS,
        verbose=False,
    )
    positions = torch.from_numpy(np.stack(found[:3])).flatten(1).div_(voxel)
    return counted(particles.paint(mesh, particles.pieces(mesh, positions)))[..., None]


def _with_plain_numbers(module: Any) -> Any:
    """pycola3's module, made for NumPy 1: there a float64 number leaves float32 arrays alone. Python's does."""
    if not isinstance(module.interpolate, SimpleNamespace):
        interp1d = module.interpolate.interp1d
        module.interpolate = SimpleNamespace(interp1d=lambda *given, **named: _plain(interp1d(*given, **named)))
        for name in ("growth_2lpt", "d_growth2", "_q_factor", "_vel_coef", "_displ_coef"):
            setattr(module, name, _plain(getattr(module, name)))
    return module


def _plain(function: Callable[..., Any]) -> Callable[..., float]:
    return lambda *given: float(function(*given))


def powerbox(cosmology: Cosmology, mesh: Mesh, box_mpc_h: float, seed: int) -> Tensor:
    """A log-normal field whose power is the linear one; fp64, as the library has it, on as many threads as torch."""
    with warnings.catch_warnings():  # of modes that no log-normal field can have, a thousandth of the power
        warnings.simplefilter("ignore", UserWarning)
        contrast = (
            _package("powerbox")
            .LogNormalPowerBox(
                shape=(mesh.side,) * 3,
                size=(box_mpc_h,) * 3,
                pk=partial(power.linear_power, cosmology),
                seed=seed,
                nthreads=torch.get_num_threads(),
            )
            .delta_x()
        )
    return counted(torch.from_numpy(contrast).add_(1))[..., None]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise SaihError(
            f"engine={package} needs {package} ({error}); install it with: pip install 'saih[generators]'"
        ) from None
