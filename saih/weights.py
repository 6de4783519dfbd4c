"""What a comparison needs besides results: weights, target problems, nodes owned, prices; from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from saih import yamlfile
from saih.errors import unknown


class SystemFacts(BaseModel):
    """What no measurement tells of a system."""

    model_config = ConfigDict(extra="forbid")

    nodes: int | None = Field(default=None, gt=0)
    """It has in all, or would have as offered."""
    price: float | None = Field(default=None, gt=0)


class Application(BaseModel):
    """How much a workload counts, and at which problem."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    weight: float = Field(default=1.0, gt=0)
    work: float | None = Field(default=None, gt=0)
    """Units of work of the time metric; None: those of one step."""
    cell: dict[str, str] = Field(
        default_factory=dict, description="write cell: {data: 128, model: w16}, a rung of each axis"
    )
    """The target problem; without it all equal points count alike."""
    larger: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="write larger: {SYSTEM: {data: 256}}, the rungs that differ from cell"
    )
    """The larger problem that a system ran instead."""


class Weights(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    reference: str | None = None
    currency: str = ""
    systems: dict[str, SystemFacts] = Field(
        default_factory=dict, description="write systems: {NAME: {nodes: 100, price: 1.0e+6}}"
    )
    applications: dict[str, Application] = Field(
        default_factory=dict, description="write applications: {WORKLOAD: {weight: 2}}"
    )


def read(path: Path, systems: Sequence[str], workloads: Sequence[str]) -> Weights:
    """The file; SaihError for what does not fit, or for systems and workloads that are not compared."""
    found = yamlfile.load(path, Weights)
    for name in [*([found.reference] if found.reference else []), *found.systems]:
        if name not in systems:
            raise unknown("system", name, systems, str(path))
    for name, application in found.applications.items():
        if name not in workloads:
            raise unknown("application", name, workloads, str(path))
        for system in application.larger:
            if system not in systems:
                raise unknown("system", system, systems, f"{path}: applications.{name}.larger")
    return found
