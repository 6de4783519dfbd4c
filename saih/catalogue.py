"""What `saih list` shows: workloads, their axes and rungs, and what each rung costs."""

from __future__ import annotations

from typing import Any

from saih import workload
from saih.core import Params
from saih.errors import SaihError
from saih.plan import predict_step_s, rates
from saih.site import Site


def names() -> list[str]:
    """Names of all workloads."""
    return list(workload.packages())


def overview(site: Site, ceilings: dict[str, float] | None) -> list[dict[str, Any]]:
    """Every workload as `describe` tells it; one that is broken as its name and `error`."""
    told = []
    for name in names():
        try:
            told.append(describe(name, site, ceilings))
        except SaihError as error:
            told.append({"name": name, "error": str(error)})
    return told


def describe(name: str, site: Site, ceilings: dict[str, float] | None) -> dict[str, Any]:
    """A workload as plain data; each rung with its cost while everything else is at its default.

    Raises SaihError for a workload that does not exist, cannot be imported, or whose spec cannot be worked with.
    """
    spec = workload.spec(name)
    try:
        return _describe(name, spec, site, ceilings)
    except SaihError:
        raise
    except Exception as error:  # whatever a spec does wrong, the others can still be listed
        file = getattr(spec, "__file__", name)
        raise SaihError(f"workload {name}: {file}: its spec is broken ({type(error).__name__}: {error})") from error


def _describe(name: str, spec: workload.Spec, site: Site, ceilings: dict[str, float] | None) -> dict[str, Any]:
    known = workload.parameters(spec)
    defaults = {key: parameter.default for key, parameter in known.items()}
    return {
        "name": name,
        "title": spec.TITLE,
        "paper": spec.PAPER,
        "work_unit": spec.WORK_UNIT,
        "axes": [
            {
                "name": axis.name,
                "unit": axis.unit,
                "usual": [rung.label for rung in axis.pick().rungs],
                "rungs": [
                    {"label": rung.label, "size": rung.size, "params": dict(rung.params)}
                    | _cost(name, defaults | dict(rung.params), site, ceilings)
                    for rung in axis.rungs
                ],
            }
            for axis in spec.AXES
        ],
        "parameters": [
            {
                "name": each.name,
                "default": each.default,
                "unit": each.unit,
                "help": each.help,
                "choices": list(each.choices),
            }
            for each in known.values()
        ],
    }


def _cost(name: str, params: Params, site: Site, ceilings: dict[str, float] | None) -> dict[str, Any]:
    try:
        cost = workload.spec(name).cost(params)
    except SaihError as error:
        return {"error": str(error)}
    return {
        "parameters": cost.parameters,
        "flop": cost.flop,
        "work": cost.work,
        "device_bytes": cost.device_bytes,
        "disk_bytes": cost.disk_bytes,
        "step_s": predict_step_s(cost, rates(site, str(params.get("precision", "fp32")), ceilings)),
    }
