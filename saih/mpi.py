"""The MPI communicator of a job, held against what its launcher says."""

from __future__ import annotations

from typing import Any

from saih import launchers
from saih.errors import SaihError


def communicator() -> Any:
    """mpi4py's COMM_WORLD.

    An MPI library that does not understand its launcher makes every process rank 0 of 1, without a word.

    Raises:
        SaihError: mpi4py finds no MPI, or MPI counts other ranks than the launcher started.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SaihError(f"mpi4py finds no MPI here ({error}); get one with: pip install mpich") from None
    comm = MPI.COMM_WORLD
    place = launchers.find_place()
    if place and (comm.rank, comm.size) != (place.rank, place.world):
        raise SaihError(
            f"MPI calls rank {place.rank} of {place.world} rank {comm.rank} of {comm.size}: "
            "it does not know the launcher. "
            "Take mpiexec of the same MPI, or srun with the mpi (pmi2, pmix) that this MPI speaks"
        )
    return comm
