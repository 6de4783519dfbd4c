"""Writes results files as one HTML page that needs no network, and says everything without its script too."""

from __future__ import annotations

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saih.analysis import numbers
from saih.analysis.bottleneck import TIMED
from saih.analysis.ceilings import unit
from saih.report import (
    asked,
    bottlenecks,
    committed,
    contention,
    curves,
    front,
    gains,
    roofline,
    second_ranks,
    sides,
    spreads,
    tables,
    trade,
    trends,
)
from saih.report.downloads import downloads
from saih.report.environment import environment, write_page
from saih.report.grid import layout
from saih.report.results import Results, read, told_apart
from saih.report.summary import ceiling_intervals, chosen_ceilings, is_ceilings, plain, summarize

KERNELS = "kernels"
"""The part of the ceilings whose cells, environment and downloads their page has; of the others it has the rates."""
GAUGE_FACTOR = 8
"""The gauge of a claim shows this factor to both sides of its target."""
MOST_HEADLINES = 3
"""Gains of one workload on the front page."""
PARTS = (
    ("trade", "trade", "Quality over speed"),
    ("curves", "groups", "% of peak"),
    ("map", "maps", "Heat map"),
    ("trends", "has_trends", "Trends"),
    ("roofline", "roofline", "Roofline"),
    ("bottlenecks", "bottlenecks", "Bottlenecks"),
    ("phases", "has_phases", "Step time"),
    ("ranks", "ranks_over", "Ranks"),
    ("repeats", "repeats", "Raw repeats"),
    ("rates", "rates", "Rates"),
    ("scaling", "scaling", "Scaling"),
    ("claims", "axes", "Gains and claims"),
    ("checks", "check_rows", "Checks"),
    ("cells", "axes", "All cells"),
    ("troubles", "troubles", "Not measured"),
    ("environment", "axes", "Environment"),
    ("data", "axes", "Data"),
)
"""(id, the content it shows, what the table of contents calls it) of each part of a study."""


def write(
    results: Path | Sequence[Path],
    output: Path,
    ceilings: Mapping[str, Any] | None = None,
    commitments: Sequence[committed.Commitment] = (),
) -> Path:
    """Write the page of `results` to `output`, whole or not at all; SaihError where one cannot be read.

    The page of a part of the ceilings lists all of `ceilings`, the site's, where they are given. The same results make
    the same bytes.
    """
    paths = [results] if isinstance(results, Path) else list(results)
    return write_page(_render(told_apart([read(path) for path in paths]), ceilings, commitments), output)


def write_ceilings(parts: Mapping[str, Path], output: Path, ceilings: Mapping[str, Any]) -> Path:
    """Write one page of all `ceilings` of a site, from the results file of each part of its probe."""
    found = {name: read(path) for name, path in parts.items()}
    return write_page(_render([found[KERNELS]], ceilings, (), found), output)


def headline(results: Path) -> str:
    """The headline in a few lines of plain text, and how well the largest rung was predicted where it was held out."""
    found = read(results)
    return "\n".join([plain(summarize(found)), *([] if is_ceilings(found) else trends.held_out_lines(found))])


def _render(
    studies: Sequence[Results],
    ceilings: Mapping[str, Any] | None,
    commitments: Sequence[committed.Commitment],
    parts: Mapping[str, Results] | None = None,
) -> str:
    env = environment()
    env.globals |= {"half_percent": spreads.HALF_PERCENT, "gauge_factor": GAUGE_FACTOR}
    judgements = committed.judge(commitments, studies)
    workloads = _workloads(studies, ceilings, parts, env)
    return env.get_template("report/page.html.j2").render(
        title=_title(studies),
        several=len(studies) > 1,
        systems=(systems := _systems(studies, workloads, judgements)),
        dates=", ".join(dict.fromkeys(system.date for system in systems if system.date)),
        sides=sides.sides(studies),
        judgements=judgements,
        workloads=workloads,
        headlines=[(each, *_headlines(each["gains"])) for each in workloads],
        files=[one.path.name for one in studies],
        sheets={one.denominators["percent_of_datasheet"] for one in studies},
        devices={one.sweep["site"]["device"] for one in studies},
        ceiling_intervals=_merged(ceiling_intervals(one.sweep["ceilings"]) for one in studies),
    )


def _title(studies: Sequence[Results]) -> str:
    names = list(dict.fromkeys(one.system for one in studies))
    whose = f"of {names[0]} " if len(names) == 1 else ""
    systems = f": {numbers.plural(len(names), 'system')}" if len(names) > 1 else ""
    return f"How AI performance {whose}changes as the application grows{systems}"


def _merged(many: Any) -> dict[str, str]:
    return {key: value for each in many for key, value in each.items()}


def _by_workload(studies: Sequence[Results]) -> dict[str, list[Results]]:
    found: dict[str, list[Results]] = {}
    for one in studies:
        found.setdefault(str(one.sweep["workload"]), []).append(one)
    return found


def _workloads(
    studies: Sequence[Results],
    ceilings: Mapping[str, Any] | None,
    parts: Mapping[str, Results] | None,
    env: jinja2.Environment,
) -> list[dict[str, Any]]:
    """Each workload with its studies, rendered in the order in which their figures are numbered."""
    template, told, number = env.get_template("report/study.html.j2"), [], itertools.count(1)
    for place, (name, mine) in enumerate(_by_workload(studies).items(), 1):
        sections = []
        for one in mine:
            prefix = f"s{next(number)}-" if len(studies) > 1 else ""
            content = _content(one, ceilings, parts or {"": one}, len(mine) > 1)
            shown = [(f"{prefix}{anchor}", text) for anchor, key, text in PARTS if content[key]]
            level = 4 if len(mine) > 1 else 3
            html = Markup(template.render(content, prefix=prefix, level=level))  # noqa: S704 (escaped by the template)
            sections.append({"prefix": prefix, "name": one.path.stem, "parts": shown, "html": html})
        told.append(
            {
                "name": name,
                "title": mine[0].title,
                "anchor": f"workload-{place}",
                "studies": sections,
                "check": mine[0].check,
                "gains": [_gain(each) for each in gains.best(mine) if each.claim["points"]],
            }
        )
    return told


def _systems(
    studies: Sequence[Results], workloads: Sequence[Mapping[str, Any]], judgements: Sequence[committed.Judgement]
) -> list[front.System]:
    anchors = {workload["name"]: workload["anchor"] for workload in workloads}
    found: dict[str, list[Results]] = {}
    for one in studies:
        found.setdefault(one.system, []).append(one)
    told = []
    for name, mine in found.items():
        summaries = [summarize(one) for one in mine]
        days = sorted(day for each in summaries for day in each.date.split(" to ") if day)
        rows = []
        for workload, same in _by_workload(mine).items():
            verdicts = [each.verdict for each in judgements if (each.system, each.workload) == (name, workload)]
            rows.append(front.row(same, anchors[workload], Counter(verdicts)))
        machine = ", ".join(dict.fromkeys(each.machine for each in summaries))
        told.append(front.System(name, machine, " to ".join(dict.fromkeys(days[:1] + days[-1:])), rows))
    return told


def _content(
    results: Results, ceilings: Mapping[str, Any] | None, parts: Mapping[str, Results], several: bool
) -> dict[str, Any]:
    """What the template of a study wants; `several` files are about its workload."""
    probing = is_ceilings(results)
    groups, groups_left = ([], "") if probing else curves.percent_curves(results)
    maps, maps_left = ([], "") if probing else tables.heat_maps(results)
    phases, phase_rows = tables.phase_rows(results)
    checks, check_rows = tables.check_rows(results)
    troubles, troubles_total = tables.troubles(results)
    repeats, repeats_total = spreads.repeats(results)
    ranks_over, by_host = spreads.ranks(results)
    plan = layout(results.problem_axes)
    found = {
        "results": results,
        "sweep": results.sweep,
        "command": shlex.join(results.sweep["command"]),
        "in_full": asked.in_full(results.sweep),
        "asked_axes": asked.axis_rows(results.axes),
        "same_settings": asked.same_settings(results.points),
        "site_file": asked.site_file(results.sweep),
        "of": results.denominators,
        "sheet": results.denominators["percent_of_datasheet"],
        "on_cpu": results.memory == "host_peak_bytes",
        "axes": results.axes,
        "across": plan.across,
        "down": plan.lines,
        "summary": summarize(results),
        "groups": groups,
        "groups_left": groups_left,
        "maps": maps,
        "maps_left": maps_left,
        "map_of": tables.main_percentage(results),
        "phases": phases,
        "phase_rows": phase_rows,
        "checks": checks,
        "check_rows": check_rows,
        "rates": _rates(results, ceilings, parts) if probing else None,
        "shapes": [] if probing else trends.shapes(results),
        "trends": [] if probing else trends.trends(results),
        "roofline": None if probing else roofline.rooflines(results),
        "bottlenecks": None if probing else _bottlenecks(results),
        "repeats": repeats,
        "repeats_total": repeats_total,
        "ranks_over": ranks_over,
        "by_host": by_host,
        "scaling": _scaling(results),
        "trade": trade.section(results),
        "cells": tables.cell_rows(results),
        "intervals": sorted(results.measured["interval"].unique()),
        "gains": [_gain(gains.gain(claim, results)) for claim in results.claims if claim["points"] or not several],
        "gains_elsewhere": [claim["name"] for claim in results.claims if several and not claim["points"]],
        "checks_failed": int((results.points["kind"] == "check-failed").sum()),
        "troubles": troubles,
        "troubles_total": troubles_total,
        "environments": tables.environment_rows(results.environments),
        "downloads": downloads(results),
    }
    return found | {
        "has_trends": bool(found["shapes"] or found["trends"]),
        "has_phases": bool(phase_rows and not probing),
    }


def _headlines(told: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int, int]:
    """The first few gains whose paper states a figure, measured ones before the rest; how many more, how many fail."""
    known = sorted((each for each in told if each["claim"]["paper"]), key=lambda each: front.ORDER.index(each["kind"]))
    more = known[MOST_HEADLINES:]
    return known[:MOST_HEADLINES], len(more), sum(each["claim"]["verdict"] == "fails" for each in more)


def _gain(found: gains.Gain) -> dict[str, Any]:
    """A claim as the templates want it."""
    claim = found.claim
    return {"claim": claim, "kind": found.kind, "checked": found.checked, "gauge": _gauge(claim, found.kind)}


def _gauge(claim: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Where the measured ratio and its interval stand around the target, 0 to 100 from worse to better; or None."""
    if not claim["measured"] or not claim["interval"] or min(claim["measured"], claim["target"]) <= 0:
        return None
    sign = 1 if claim["better"] == "higher" else -1

    def place(value: float) -> float:
        powers = math.log(value / claim["target"]) / math.log(GAUGE_FACTOR) if value > 0 else -1.0
        return 50 + 50 * max(-1.0, min(1.0, sign * powers))

    low, high = sorted(map(place, claim["interval"]))
    return {"at": place(claim["measured"]), "low": low, "high": high, "hollow": kind != "measured"}


def _rates(results: Results, ceilings: Mapping[str, Any] | None, parts: Mapping[str, Results]) -> dict[str, Any]:
    found = ceilings or chosen_ceilings(results)
    intervals = ceiling_intervals(found)
    chosen = [
        (name, numbers.si(rate, unit(name)), intervals.get(name, ""), found["sources"][name])
        for name, rate in found["rates"].items()
    ]
    told = [
        {
            "name": name,
            "axes": part.axes,
            "group": curves.rate_curves(part, f"rate-{number}"),
            "rows": tables.rate_rows(part),
            "counts": tables.counts(part),
            "file": part.path.name,
        }
        for number, (name, part) in enumerate(parts.items())
    ]
    return {"chosen": chosen, "at_once": _at_once(found), "parts": told}


def _at_once(ceilings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(ceiling, ranks, % of it that each of so many ranks of a node has) where that was measured."""
    known = ceilings.get("together") or {}
    return [(name, ranks, numbers.three(100 * share)) for name, each in known.items() for ranks, share in each.items()]


def _bottlenecks(results: Results) -> dict[str, Any] | None:
    """Verdicts and what they rest on, or None where nothing was measured."""
    maps, left = bottlenecks.maps(results)
    slopes = contention.rows(results)
    if not results.verdicts and not slopes:
        return None
    return {
        "rows": bottlenecks.rows(results),
        "maps": maps,
        "left": left,
        "slopes": slopes,
        "contention": contention.figure(results),
        "second_ranks": second_ranks.rows(results, results.verdicts),
        "cache_rule": bottlenecks.cache_rule(results),
        "total": len(results.verdicts),
        "parts": TIMED,
    }


def _scaling(results: Results) -> dict[str, Any] | None:
    """Speed-up and efficiency, or None where ranks do not vary."""
    scaled = results.scaled
    if scaled.empty:
        return None
    kinds_of_scaling = sorted(scaled["param_scaling"].unique()) if "param_scaling" in scaled else []
    groups, left = curves.scaling_curves(scaled)
    rows = tables.scaling_rows(results.axes, scaled)
    return {"kinds": kinds_of_scaling, "groups": groups, "left": left, "rows": rows, "total": len(scaled)}
