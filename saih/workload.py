"""Find a workload by name: a folder with spec.py and bench.py, here or in an installed package."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from saih.core import (
    COMMON,
    PARTS,
    WHOLE,
    Axis,
    Bench,
    Claim,
    Context,
    Cost,
    Need,
    Parameter,
    Params,
    Point,
    TradeOff,
    Value,
)
from saih.errors import SaihError, unknown

ENTRY_POINTS = "saih.workloads"


class Spec(Protocol):
    """What spec.py must define. It is planned with on login nodes: it imports nothing heavy, least of all torch.

    It may define TRADE_OFF besides, a `TradeOff`: what its report draws quality over speed-up from.
    CHECK, a str: what its check holds to be true before anything is timed, for the reports.
    ABLATIONS, those of `saih.core.PARTS` that its bench can take out of a step.
    And NEEDS, parameter -> value -> `Need`: points with a value whose package is not installed are pruned.
    """

    TITLE: str
    PAPER: str
    WORK_UNIT: str
    """What `Cost.work` and `Work.units` count, in the plural: "samples", "tokens", "bytes"."""
    PARAMETERS: tuple[Parameter, ...]
    AXES: tuple[Axis, ...]
    CLAIMS: tuple[Claim, ...]

    def cost(self, params: Params) -> Cost:
        """Analytic cost of one step; raises SaihError for a combination that makes no sense."""


class Maker(Protocol):
    """What spec.py defines besides where the workload makes a data set by itself, in pieces: see `saih generate`.

    It has the parameters `pieces` and `piece`, and its step makes what is missing of a piece below the data folder.
    """

    GENERATE: Params
    """Settings that make a data set."""

    def data_folder(self, params: Params, seed: int) -> str:
        """Folder of the data set below the site's data folder."""

    def there_bytes(self, params: Params, seed: int, root: Path) -> float:
        """How many of its bytes are there below the site's data folder `root`."""


class BenchModule(Protocol):
    """What bench.py must define. It is imported only inside a job."""

    def setup(self, point: Point, context: Context) -> Bench:
        """Make the point ready on this rank."""


@cache
def packages() -> Mapping[str, str]:
    """Workload name -> dotted package: folders under `workloads`, then the entry points of others."""
    found = dict(_folders("workloads"))
    for entry in entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry.value)
    return dict(sorted(found.items()))


def spec(name: str) -> Spec:
    """The spec of a workload; SaihError with the nearest names if there is none."""
    module = _module(name, "spec")
    missing = [member for member in (*Spec.__annotations__, "cost") if not hasattr(module, member)]
    if missing:
        raise SaihError(f"workload {name}: {module.__file__} must define {', '.join(missing)}")
    return cast(Spec, module)


def maker(name: str) -> Maker:
    """The spec of a workload that makes a data set by itself; SaihError with those that do."""
    found = spec(name)
    if not _makes_data(found):
        able = [each for each in packages() if _makes_data(_module(each, "spec"))]
        raise SaihError(f"workload {name} makes no data set by itself; those that do: {', '.join(able)}")
    return cast(Maker, found)


def _makes_data(module: object) -> bool:
    return hasattr(module, "GENERATE") and hasattr(module, "data_folder")


def bench(name: str) -> BenchModule:
    """The bench module of a workload; this is where torch gets imported."""
    return cast(BenchModule, _module(name, "bench"))


def family_folder(name: str) -> Path:
    """The folder with all code of a workload: below `workloads` its family's, elsewhere its own."""
    parts = _package(name).split(".")
    package = ".".join(parts[:2] if parts[0] == "workloads" else parts)
    source = importlib.util.find_spec(package)
    if source is None or not source.submodule_search_locations:
        raise SaihError(f"workload {name}: there is no package {package}")
    return Path(source.submodule_search_locations[0])


def parameters(workload: Spec) -> dict[str, Parameter]:
    """All parameters of a workload by name: its own, then the common ones; `ablation` where it knows any."""
    known = {parameter.name: parameter for parameter in (*workload.PARAMETERS, *COMMON)}
    parts = tuple(part for part in PARTS if part in getattr(workload, "ABLATIONS", ()))
    if parts:
        known["ablation"] = Parameter(
            "ablation", WHOLE, "", "part taken out of every timed step, for diagnosis", choices=(WHOLE, *parts)
        )
    return known


def trade_off(workload: Spec | None) -> TradeOff | None:
    """What a workload trades quality against, where it says so."""
    return getattr(workload, "TRADE_OFF", None)


def needs(workload: Spec) -> Mapping[str, Mapping[Value, Need]]:
    """Parameter -> value -> the package it needs, where a workload says so."""
    return getattr(workload, "NEEDS", {})


def lacking(workload: Spec, params: Params) -> str | None:
    """What a point needs that is not installed here, and the command that brings it."""
    for name, values in needs(workload).items():
        need = values.get(params[name])
        if need is not None and importlib.util.find_spec(need.package) is None:
            return f"{name}={params[name]} needs the {need.package} package: {need.install}"
    return None


def _package(name: str) -> str:
    if name not in packages():
        raise unknown("workload", name, packages())
    return packages()[name]


def _module(name: str, part: str) -> ModuleType:
    package = _package(name)
    try:
        return importlib.import_module(f"{package}.{part}")
    except MemoryError:  # the machine's fault, and known as such to the worker
        raise
    except Exception as error:  # whatever a workload does wrong, the others stay usable
        place = _culprit(error) or f"{package}.{part}"
        raise SaihError(
            f"workload {name}: {place}: cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _culprit(error: Exception) -> str:
    """FILE:LINE that failed to be imported; "" where no file was reached."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}"
    machinery = (__file__, importlib.__file__, "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(machinery)]
    return f"{frames[0].filename}:{frames[0].lineno}" if frames else ""


def _folders(root: str) -> list[tuple[str, str]]:
    source = importlib.util.find_spec(root)
    found = []
    for location in (source.submodule_search_locations or []) if source else []:
        for path in sorted(Path(location).glob("**/spec.py")):
            parts = path.parent.relative_to(location).parts
            if parts:  # a spec.py that stands in no folder has no name
                found.append((parts[-1], ".".join((root, *parts))))
    return found
