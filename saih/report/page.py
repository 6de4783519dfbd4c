"""Writes a results file as one HTML page that needs no network and no script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saih import __version__
from saih.analysis import numbers
from saih.analysis.bottleneck import TIMED
from saih.analysis.ceilings import unit
from saih.analysis.scaling import scaling
from saih.files import write_atomic
from saih.report import asked, bottlenecks, contention, curves, roofline, second_ranks, tables, trade, trends
from saih.report.downloads import downloads
from saih.report.figures import draw
from saih.report.grid import layout
from saih.report.results import Results, read
from saih.report.summary import ceiling_intervals, chosen_ceilings, is_ceilings, plain, summarize

KERNELS = "kernels"
"""The part of the ceilings whose cells, environment and downloads their page has; of the others it has the rates."""
TEMPLATES = Path(__file__).parent.parent / "templates"


def write(results: Path, output: Path, ceilings: Mapping[str, Any] | None = None) -> Path:
    """Write the page of `results` to `output`, whole or not at all; SaihError where `results` cannot be read.

    The page of a part of the ceilings lists all of `ceilings`, the site's, where they are given.
    """
    text = _render(read(results), ceilings).encode()
    write_atomic(output, lambda file: file.write(text))
    return output


def write_ceilings(parts: Mapping[str, Path], output: Path, ceilings: Mapping[str, Any]) -> Path:
    """Write one page of all `ceilings` of a site, from the results file of each part of its probe."""
    found = {name: read(path) for name, path in parts.items()}
    text = _render(found[KERNELS], ceilings, found).encode()
    write_atomic(output, lambda file: file.write(text))
    return output


def write_extra_p(results: Path, output: Path) -> Path:
    """Write the measured step times as Extra-P reads them."""
    text = trends.extra_p(read(results)).encode()
    write_atomic(output, lambda file: file.write(text))
    return output


def headline(results: Path) -> str:
    """The headline in a few lines of plain text, and how well the largest rung was predicted where it was held out."""
    found = read(results)
    return "\n".join([plain(summarize(found)), *([] if is_ceilings(found) else trends.held_out_lines(found))])


def _render(results: Results, ceilings: Mapping[str, Any] | None, parts: Mapping[str, Results] | None = None) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"three": numbers.three, "plural": numbers.plural, "draw": lambda panel: Markup(draw(panel))}  # noqa: S704
    return env.get_template("report.html.j2").render(_content(results, ceilings, parts or {"": results}))


def _content(results: Results, ceilings: Mapping[str, Any] | None, parts: Mapping[str, Results]) -> dict[str, Any]:
    probing = is_ceilings(results)
    groups, groups_left = ([], "") if probing else curves.percent_curves(results)
    maps, maps_left = ([], "") if probing else tables.heat_maps(results)
    phases, phase_rows = tables.phase_rows(results)
    checks, check_rows = tables.check_rows(results)
    troubles, troubles_total = tables.troubles(results)
    plan = layout(results.problem_axes)
    return {
        "version": __version__,
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
        "ceiling_intervals": ceiling_intervals(results.sweep["ceilings"]),
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
        "scaling": _scaling(results),
        "trade": trade.section(results),
        "cells": tables.cell_rows(results),
        "intervals": sorted(results.measured["interval"].unique()),
        "troubles": troubles,
        "troubles_total": troubles_total,
        "environments": tables.environment_rows(results.environments),
        "downloads": downloads(results),
    }


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
    found = bottlenecks.judged(results)
    maps, left = bottlenecks.maps(results, found)
    slopes = contention.rows(results)
    if not found and not slopes:
        return None
    rows = bottlenecks.rows(results, found)
    return {
        "rows": rows,
        "maps": maps,
        "left": left,
        "slopes": slopes,
        "contention": contention.figure(results),
        "second_ranks": second_ranks.rows(results, found),
        "over_ranks": bottlenecks.over_ranks(results),
        "cache_rule": bottlenecks.cache_rule(results),
        "total": len(found),
        "parts": TIMED,
    }


def _scaling(results: Results) -> dict[str, Any] | None:
    """Speed-up and efficiency, or None where ranks do not vary."""
    if results.whole.empty:
        return None
    scaled = scaling(results.undisturbed, results.by_point)
    if scaled.empty:
        return None
    kinds = sorted(scaled["param_scaling"].unique()) if "param_scaling" in scaled else []
    groups, left = curves.scaling_curves(scaled)
    rows = tables.scaling_rows(results.axes, scaled)
    return {"kinds": kinds, "groups": groups, "left": left, "rows": rows, "total": len(scaled)}
