"""What a sweep was asked to do with everything resolved: enough to ask it again without the study or site file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from saih.core import Axis
from saih.report.grid import words


def in_full(sweep: Mapping[str, Any]) -> str:
    """The command line that asks for the same sweep, with nothing left to defaults or a study file."""
    line = ["saih", "sweep", str(sweep["workload"])]
    for axis in sweep["axes"]:
        line += ["--axis", f"{axis['name']}={','.join(rung['label'] for rung in axis['rungs'])}"]
    if sweep["overrides"]:
        line += ["--set", ",".join(f"{name}={value}" for name, value in sweep["overrides"].items())]
    line += ["--repeat", str(sweep["repeat"]), "--seed", str(sweep["seed"]), "--site", str(sweep["site"]["name"])]
    if sweep["time_budget_s"]:
        line += ["--time-budget", f"{sweep['time_budget_s']:.10g}"]
    return shlex.join(line)


def axis_rows(axes: Sequence[Axis]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Name and unit of each axis, and of each rung its label and the parameters it sets."""
    return [(axis.name, axis.unit, [(rung.label, words(rung.params)) for rung in axis.rungs]) for axis in axes]


def same_settings(points: pd.DataFrame) -> dict[str, str]:
    """The parameters that are the same at every point, with the value that defaults or settings gave them."""
    parameters = points[[name for name in points if name.startswith("param_")]]
    same = parameters.columns[parameters.nunique(dropna=False) == 1]
    return {name.removeprefix("param_"): str(parameters[name].iloc[0]) for name in same}


def site_file(sweep: Mapping[str, Any]) -> str:
    """The site as it was resolved, as the file that would say all of it; the file's name is the site's."""
    told = {key: value for key, value in sweep["site"].items() if key != "name"}
    return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000))
