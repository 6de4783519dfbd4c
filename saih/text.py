"""Plans, workloads and claims as lines of plain text, with numbers a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from saih.analysis.numbers import si
from saih.core import Point
from saih.jobs import SweepFolder, status
from saih.plan import Plan
from saih.schedulers import State

PRUNED_SHOWN = 20
LOG_LINES = 3


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def labels(point: Point) -> str:
    """The rungs of a point: "data=64 model=w8"."""
    return " ".join(f"{axis}={label}" for axis, label in point.labels.items())


def plan_lines(plan: Plan, everything: bool) -> list[str]:
    """What will run and what was left out; all of it, or a headline and the first pruned cells."""
    cells = [item for item in plan.kept if item.point.repeat == 0]
    pruned = [item for item in plan.pruned if item.forecast.point.repeat == 0]
    lines = [
        f"{plan.name}: {len(plan.kept)} points ({len(cells)} cells x {plan.sweep.repeat} repeats), "
        f"predicted {duration(plan.seconds)} on site {plan.site.name}"
    ]
    for item in cells if everything else []:
        size = _size(item.cost.parameters, item.cost.flop, item.cost.device_bytes)
        lines.append(f"  {labels(item.point):28} {size}, predicted {si(item.step_s, 's')} a step")
    shown = pruned if everything else pruned[:PRUNED_SHOWN]
    lines += [f"  pruned {labels(item.forecast.point):21} {item.kind}: {item.reason}" for item in shown]
    if len(shown) < len(pruned):
        lines.append(f"  ... and {len(pruned) - len(shown)} more pruned cells; --dry-run lists them")
    return lines


def status_lines(folder: SweepFolder, running: Mapping[str, State], everything: bool) -> list[str]:
    """What the files and the scheduler say of a sweep; with `everything`, each failure with its reason."""
    counts = ", ".join(f"{count} {kind}" for kind, count in status(folder).items() if count)
    words = Counter(state.detail or state.phase for state in running.values())
    alive = "; jobs: " + ", ".join(f"{count} {word}" for word, count in sorted(words.items())) if words else ""
    lines = [f"{folder.path.name}: {counts or 'nothing planned'}{alive}"]
    for failure in folder.failures() if everything else []:
        rungs = labels(Point.from_json(failure["point"]))
        lines.append(f"  {rungs} repeat {failure['point']['repeat'] + 1}: {failure['kind']}: {failure['reason']}")
        lines += [f"    | {line}" for line in failure["log_tail"].splitlines()[-LOG_LINES:]]
    return lines


def workload_lines(told: Mapping[str, Any], site: str) -> list[str]:
    """A workload as `catalogue.describe` tells it."""
    lines = [f"{told['name']}: {told['title']}", told["paper"]]
    for axis in told["axes"]:
        lines += ["", f"axis {axis['name']}" + (f" ({axis['unit']})" if axis["unit"] else "")]
        lines += [f"  {rung['label']:>8}  {_rung_cost(rung, site)}" for rung in axis["rungs"]]
        if len(axis["usual"]) < len(axis["rungs"]):
            lines.append(f"  --axis {axis['name']} alone means {', '.join(axis['usual'])}; any others by name")
    lines += ["", "parameters (each is an axis too: --axis NAME=A,B)"]
    for parameter in told["parameters"]:
        choices = f" ({', '.join(map(str, parameter['choices']))})" if parameter["choices"] else ""
        unit = f" [{parameter['unit']}]" if parameter["unit"] else ""
        lines.append(f"  {parameter['name'] + '=' + str(parameter['default']):20} {parameter['help']}{unit}{choices}")
    return lines


def claim_lines(claim: Mapping[str, Any]) -> list[str]:
    """A claim as `analysis.claims` judged it."""
    interval = "[{:.3g}, {:.3g}]".format(*claim["interval"]) if claim["interval"] else "no interval"
    measured = f"measured {claim['measured']:.3g} {interval}" if claim["measured"] else "not measured"
    predicted = f", predicted {claim['predicted']:.3g}" if claim["predicted"] else ""
    bound = f", bound {claim['bound']:.3g}" if claim["bound"] else ""
    head = f"{claim['verdict'].upper():15}{claim['workload']} {claim['name']}"
    lines = [f"{head}: {measured}{predicted}{bound}, target {claim['target']:g}"]
    return lines + [f"{'':15}{word}: {claim[word]}" for word in ("paper", "why") if claim[word]]


def _size(parameters: float, flop: float, device_bytes: float) -> str:
    return f"{si(parameters)} parameters, {si(flop, 'FLOP')} a step, {si(device_bytes, 'B')}"


def _rung_cost(rung: Mapping[str, Any], site: str) -> str:
    if "error" in rung:
        return str(rung["error"])
    size = _size(rung["parameters"], rung["flop"], rung["device_bytes"])
    return f"{size}, predicted {si(rung['step_s'], 's')} a step on site {site}"
