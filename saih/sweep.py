"""The sweep language: command-line words or a study file become a Sweep, and a Sweep becomes points."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from saih import workload, yamlfile
from saih.core import Axis, Parameter, Params, Point, Sweep, Value, axis_of
from saih.errors import SaihError, unknown
from saih.files import digest

DEFAULT_WORKLOAD = "cosmoflow"

LARGEST_GRID = 1_000_000
"""Points; a sweep that asks for more is a mistake, and would only fill the memory."""

Scalar = bool | int | float | str


class Part(BaseModel):
    """One grid of a study, with results and a report of its own."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    workload: str = ""
    axes: dict[str, list[Scalar] | None] = Field(
        default_factory=dict,
        description="write axes: {data: [32, 64], model: }, a list of rungs, or nothing for the usual ones",
    )
    set: dict[str, Scalar] = Field(
        default_factory=dict,
        description="write set: {width: 4, precision: bf16}, one value for each parameter; several make it an axis",
    )
    repeat: int | None = Field(default=None, gt=0)


class StudyFile(Part):
    """The keys of a study: the same words as on the command line. What stands beside `parts` holds for all of them."""

    parts: dict[str, Part] = Field(
        default_factory=dict, description="write parts: {NAME: {axes: ..., set: ...}}, a grid each"
    )
    seed: int = Field(default=0, ge=0)
    site: str | None = None
    time_budget: str | None = None


def read_study(path: Path) -> StudyFile:
    """The study in a YAML file; SaihError names the line of what does not fit."""
    study = yamlfile.load(path, StudyFile)
    if study.parts and study.axes:
        raise SaihError(f"{path}: a study has axes, or parts with axes, not both")
    return study


def grids(study: StudyFile, part: str | None, where: str) -> list[Part]:
    """The grids of a study: itself, or its parts, or the one part that is named; SaihError names the valid ones."""
    if part is not None and part not in study.parts:
        raise unknown("part", part, study.parts, where)
    chosen = list(study.parts.values()) if part is None else [study.parts[part]]
    whole = study.workload or DEFAULT_WORKLOAD
    return [
        Part(
            workload=each.workload or whole,
            axes=each.axes,
            set=study.set | each.set,
            repeat=each.repeat or study.repeat,
        )
        for each in chosen or [study]
    ]


def parse_axes(words: Sequence[str]) -> dict[str, list[Scalar] | None]:
    """`--axis data,model --axis gpus=1,2` -> axis name -> rung labels, None for its usual rungs."""
    axes: dict[str, list[Scalar] | None] = {}
    for word in words:
        name: str | None = None
        for part in word.split(","):
            if part.startswith("=") or (name is None and not part):
                raise SaihError(f"--axis {word}: an axis has no name; write --axis data,model or --axis data=32,64")
            if "=" in part:
                name, label = part.split("=", 1)
                _refuse_twice(name, axes)
                axes[name] = [label]
            elif name is not None:
                axes[name] = [*(axes[name] or []), part]
            else:
                _refuse_twice(part, axes)
                axes[part] = None
    return axes


def _refuse_twice(name: str, axes: Mapping[str, object]) -> None:
    if name in axes:
        raise SaihError(f"--axis {name} is given twice; write all its rungs in one: --axis {name}=A,B")


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """`--set width=2,precision=bf16` -> {"width": "2", "precision": "bf16"}."""
    settings = {}
    for part in ",".join(words).split(",") if words else []:
        name, sign, value = part.partition("=")
        if not sign or not name:
            raise SaihError(f"--set {part}: write --set NAME=VALUE,NAME=VALUE")
        if name in settings:
            raise SaihError(f"--set {part}: {name} is given twice")
        settings[name] = value
    return settings


def parse_duration(text: str, where: str = "time budget") -> float:
    """Seconds in "90", "90s", "10m" or "2h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    if not match:
        raise SaihError(f"{where} {text!r}: write a number of seconds, or 90s, 10m, 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def make_sweep(
    name: str,
    axes: Mapping[str, Sequence[Scalar] | None],
    settings: Mapping[str, Scalar],
    where: str = "",
    **rest: object,
) -> Sweep:
    """A Sweep whose axes, rungs and settings all exist; SaihError names the nearest valid ones."""
    if name not in workload.packages():
        raise unknown("workload", name, workload.packages(), where)
    spec = workload.spec(name)
    known = workload.parameters(spec)
    place = f"{where}: " if where else ""
    ladders = {axis.name: axis for axis in spec.AXES}
    chosen = []
    for axis, labels in axes.items():
        if labels is not None and not labels:
            raise SaihError(f"{place}axis {axis} has no rungs; name some, or nothing for its usual ones")
        if axis in ladders:
            chosen.append(ladders[axis].pick(labels or (), where))
        elif axis in known:
            chosen.append(axis_of(known[axis], labels or (), where))
        else:
            raise unknown("axis", axis, [*ladders, *known], where)
    if not chosen:
        raise SaihError(f"{place}a sweep needs an axis; {name} has: {', '.join([*ladders, *known])}")
    overrides: dict[str, Value] = {}
    for key, value in settings.items():
        if key not in known:
            raise unknown("parameter", key, known, where)
        overrides[key] = known[key].parse(value, where)
    _refuse_double(chosen, overrides, place)
    return replace(Sweep(name, tuple(chosen), overrides), **rest)  # type: ignore[arg-type]


def points(sweep: Sweep, site_defaults: Params) -> list[Point]:
    """Every point of the full grid, repeats outermost, so that the repeats of a cell are spread over the whole run.

    Raises SaihError for a grid of more than `LARGEST_GRID` points, and for defaults of the site that no workload knows.
    """
    count = math.prod(len(axis.rungs) for axis in sweep.axes) * sweep.repeat
    if count > LARGEST_GRID:
        sizes = " x ".join(f"{axis.name} {len(axis.rungs)}" for axis in sweep.axes)
        raise SaihError(
            f"this sweep has {count:,} points ({sizes} x {sweep.repeat} repeats), more than {LARGEST_GRID:,}; "
            "name fewer rungs or repeats"
        )
    known = workload.parameters(workload.spec(sweep.workload))
    _refuse_unknown(site_defaults, known, f"site {sweep.site}: defaults")
    base: dict[str, Value] = {name: parameter.default for name, parameter in known.items()}
    base |= {
        name: known[name].parse(value, f"site {sweep.site}: defaults")
        for name, value in site_defaults.items()
        if name in known
    }
    base |= sweep.overrides
    cells = []
    for rungs in itertools.product(*(axis.rungs for axis in sweep.axes)):
        params = dict(base)
        for rung in rungs:
            params |= rung.params
        labels = {axis.name: rung.label for axis, rung in zip(sweep.axes, rungs, strict=True)}
        cells.append((params, labels))
    return [
        Point(sweep.workload, params, labels, repeat, sweep.seed)
        for repeat in range(sweep.repeat)
        for params, labels in cells
    ]


def sweep_name(sweep: Sweep, grid: Sequence[Point]) -> str:
    """Workload, axes, and a hash of the cells: the same command on the same site is the same sweep."""
    content = digest({"site": sweep.site, "cells": [point.cell for point in grid if point.repeat == 0]})
    return "-".join([sweep.workload, *(axis.name for axis in sweep.axes), content[:8]])


def _refuse_unknown(defaults: Params, known: Mapping[str, Parameter], where: str) -> None:
    """A default may be for another workload, but some workload must know it."""
    strange = [name for name in defaults if name not in known]
    if not strange:
        return
    everything = dict.fromkeys(known)
    for name in workload.packages():
        with contextlib.suppress(SaihError, AttributeError, TypeError):  # one that is broken has no say here
            everything |= dict.fromkeys(workload.parameters(workload.spec(name)))
    for name in strange:
        if name not in everything:
            raise unknown("parameter", name, everything, where)


def _refuse_double(axes: Sequence[Axis], overrides: Params, place: str) -> None:
    """Two rungs, or a rung and an override, must not set the same parameter."""
    setters: dict[str, str] = {}
    for axis in axes:
        for name in {name for rung in axis.rungs for name in rung.params}:
            if name in setters:
                raise SaihError(f"{place}axes {setters[name]} and {axis.name} both set {name}; sweep one of them")
            setters[name] = axis.name
    for name in overrides:
        if name in setters:
            raise SaihError(f"{place}--set {name}: axis {setters[name]} already sets {name}; leave one of them out")
