"""A workload whose points go wrong in every way a point can."""
