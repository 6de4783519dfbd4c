"""The command line: one verb, one function. It alone prints, and turns a SaihError into one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from saih import __version__
from saih.errors import SaihError
from saih.verbs import accept, bundle, compare, export, project, verify

if TYPE_CHECKING:
    from saih.core import Sweep
    from saih.jobs import SweepFolder
    from saih.plan import Plan
    from saih.probe import Part
    from saih.site import Site

WATCH_S = 10.0
JOBS, RESULTS, REPORTS = Path("jobs"), Path("results"), Path("reports")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = int(options.verb(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read along, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 128 + signal.SIGPIPE
    except SaihError as error:
        print(f"saih: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        goes_on = options.verb in (sweep, generate, resume, probe, accept.accept)
        again = "; what was finished is kept, run the same command again" if goes_on else ""
        print(f"saih: {' '.join(f'{place}{error.strerror or error}{again}'.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("saih: stopped; what was measured is kept, the same command goes on with the rest", file=sys.stderr)
        return 130


def list_(options: argparse.Namespace) -> int:
    """Show workloads, or one workload's axes, rungs, units, parameter counts and predicted costs."""
    from saih import catalogue, text

    site = _site(options.site)
    rates = _stored_rates(site)
    told = [catalogue.describe(options.workload, site, rates)] if options.workload else catalogue.overview(site, rates)
    if options.json:
        import json

        print(json.dumps(told, indent=1))
    elif options.workload:
        print("\n".join(text.workload_lines(told[0], site.name)))
    else:
        print("\n".join(f"{one['name']:14}{one.get('title') or 'BROKEN: ' + one['error']}" for one in told))
        print("\nsaih list WORKLOAD shows its axes, rungs and what each rung costs")
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Plan a grid of points, run what fits and is not measured yet, gather it and write the report."""
    site, sweeps = _asked(options)
    _check_folders()
    one = _refine_one if options.refine else _sweep_one
    return max(one(asked, site, options) for asked in sweeps)


def generate(options: argparse.Namespace) -> int:
    """Make a data set and nothing else. What is there of it stays, so one that was stopped goes on."""
    import time

    from rich.console import Console

    from saih import dataset, drive, jobs, live, schedulers
    from saih import sweep as language

    site = _site(options.site)
    settings = language.parse_settings(options.set)
    data, plan = dataset.plan(options.workload or dataset.WORKLOAD, settings, options.seed or 0, site)
    _check_folders()
    if options.dry_run:
        return _dry_run(plan)
    before, ranks = data.there_bytes(), plan.kept[0].point.ranks
    words = f"{len(plan.kept)} piece{'s' if len(plan.kept) > 1 else ''} x {ranks} rank{'s' if ranks > 1 else ''}"
    print(f"{data.path}: {before / 1e6:.4g} MB of {data.whole_bytes / 1e6:.4g} MB are there; {words} on {site.name}")
    folder, began = jobs.SweepFolder(JOBS / plan.name), time.monotonic()
    with folder.lock():
        scheduler = schedulers.load(site.scheduler)
        scheduler.cancel(list(drive.live_jobs(folder, scheduler)))  # what they have finished is kept
        jobs.set_aside(folder)  # the files say what there is, not an earlier run
        jobs.prepare(plan, JOBS, ["saih", *sys.argv[1:]], None)
        with live.Filling(data, Console(stderr=True)) as view:
            drive.run(folder, plan, view)
    seconds, made = time.monotonic() - began, data.there_bytes() - before
    print(f"made     {made / 1e6:.4g} MB in {seconds:.3g} s, {made / 1e6 / seconds:.3g} MB/s with the start of the job")
    failures = folder.failures()
    print("".join(f"FAILED   {each['reason']}\n" for each in failures), end="")
    return 1 if failures else 0


def _sweep_one(asked: Sweep, site: Site, options: argparse.Namespace) -> int:
    ceilings = None
    plan = _plan(asked, site, None, options.fresh)
    if plan.kept:  # else there is no point in measuring ceilings first
        ceilings = _ceilings(site, options)
        plan = _plan(asked, site, ceilings, options.fresh)
    if options.dry_run:
        return _dry_run(plan)
    _print_plan(plan)
    folder = _drive(plan, options, ceilings, ["saih", *sys.argv[1:]])
    return _finish(folder, options.mixed)


def _refine_one(asked: Sweep, site: Site, options: argparse.Namespace) -> int:
    """Every other rung first, then cells and repeats where the surface bends or repeats disagree, until time is up."""
    import time
    from dataclasses import replace

    from saih import refine, store
    from saih import sweep as language
    from saih.analysis import cells
    from saih.analysis.ceilings import sweep_of

    if options.time_budget or options.dry_run:
        raise SaihError("--refine TIME is a time budget, and decides as it goes: leave --time-budget and --dry-run out")
    began_s, budget_s = time.monotonic(), language.parse_duration(options.refine, "--refine")
    ceilings = _ceilings(site, options)
    whole = replace(asked, repeat=max(asked.repeat, refine.MOST_REPEATS), time_budget_s=None)
    plan = _plan(whole, site, ceilings, options.fresh)
    plan = replace(plan, sweep=replace(asked, time_budget_s=budget_s))
    wanted = refine.start(plan, asked.repeat, budget_s - (time.monotonic() - began_s))
    before: dict[str, int] = {}
    _print_plan(refine.part(plan, wanted))
    while wanted != before:
        folder = _drive(refine.part(plan, wanted), options, ceilings, ["saih", *sys.argv[1:]])
        options.fresh = False  # what the first round set aside stays aside
        results = store.gather(folder, RESULTS, options.mixed)
        points, samples = store.load(results), store.load_samples(results)
        table = cells.per_cell(points, cells.job_steps(points, samples), sweep_of(points))
        spent_s, before = time.monotonic() - began_s, wanted
        wanted = refine.more(plan, wanted, table, budget_s - spent_s)
        print(
            f"refine: {spent_s:.0f} of {budget_s:.0f} s, {len(before)} cells, {sum(before.values())} points; next "
            f"{len(wanted) - len(before)} cells and {sum(1 for cell in before if wanted[cell] > before[cell])} repeats"
        )
    return _finish(folder, options.mixed)


def status(options: argparse.Namespace) -> int:
    """Show for each sweep, or one with its failures, what is measured, failed, missing and pruned, and what runs."""
    import time

    from saih import drive, jobs, schedulers, text

    while True:
        folders = [jobs.find(JOBS, options.sweep)] if options.sweep else jobs.all_sweeps(JOBS)
        busy = 0
        for folder in folders:
            try:
                running = drive.live_jobs(folder, schedulers.load(folder.site().scheduler))
                lines = text.status_lines(folder, running, everything=bool(options.sweep))
            except SaihError as error:  # of one sweep; the others have a state all the same
                if options.sweep:
                    raise
                running, lines = {}, [f"{folder.path.name}: {' '.join(str(error).split())}"]
            busy += len(running)
            print("\n".join(lines))
        if not folders:
            print("no sweep yet; start one with: saih sweep --axis data,model")
        if not options.watch or not busy:
            return 0
        time.sleep(WATCH_S)


def resume(options: argparse.Namespace) -> int:
    """Go on with a sweep as it was planned: follow its jobs, run what is missing, gather it and write the report."""
    from saih import jobs

    folder = jobs.find(JOBS, options.sweep)
    _check_folders()
    with folder.lock():
        _follow(folder, jobs.load_plan(folder))
    return _finish(folder, options.mixed)


def cancel(options: argparse.Namespace) -> int:
    """Stop the jobs of a sweep; what is measured stays."""
    from saih import drive, jobs, schedulers

    folder = jobs.find(JOBS, options.sweep)
    scheduler = schedulers.load(folder.site().scheduler)
    running = drive.live_jobs(folder, scheduler)
    scheduler.cancel(list(running))
    print(f"{folder.path.name}: {len(running)} job{'' if len(running) == 1 else 's'} cancelled")
    return 0


def gather(options: argparse.Namespace) -> int:
    """Collect a sweep's measurements into results/<sweep>.h5."""
    from saih import jobs, power, store

    log = power.read_log(options.power_meter, options.meter_scope) if options.power_meter else None
    print(store.gather(jobs.find(JOBS, options.sweep), RESULTS, options.mixed, log))
    return 0


def claims(options: argparse.Namespace) -> int:
    """Evaluate the claims of the workload: the paper's figure, the predicted and the measured ratio, the verdict."""
    from saih import text

    told = _claims_of(options.results)
    if options.json:
        import json

        print(json.dumps({"claims": told}, indent=1))
        return 0
    print("\n".join(line for claim in told for line in text.claim_lines(claim)))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the HTML page of one or many results files."""
    from saih.report import committed, page

    first, *others = options.results
    output = options.output or REPORTS / f"{'report' if others else first.stem}.html"
    commitments = committed.load(options.committed) if options.committed else ()
    print(page.write(options.results, output, commitments=commitments))
    if not others:
        print(page.headline(first))
    return 0


def probe(options: argparse.Namespace) -> int:
    """Measure what this site can do at best, and keep it for every later % of peak."""
    import time

    from saih.files import read_json
    from saih.report import page

    site = _site(options.site)
    _check_folders()
    began_s = time.monotonic()
    path, parts = _probe(site, options)
    print(f"ceilings {path}, measured in {time.monotonic() - began_s:.0f} s")
    print(f"report   {page.write_ceilings(parts, REPORTS / f'{path.stem}.html', read_json(path))}")
    return 0


def site(options: argparse.Namespace) -> int:
    """Write the site file of this machine (init), or try a site out with tiny jobs (check)."""
    return int(options.action(options))


def _site_init(options: argparse.Namespace) -> int:
    """Look at this machine and write its site file, each line with where its value comes from."""
    from saih import discover
    from saih import site as sites
    from saih.files import write_atomic

    found = discover.look(options.name, options.scheduler, options.partition)
    path = options.output or Path("sites") / f"{found.name}.yaml"
    if path.exists():
        raise SaihError(f"{path} exists; remove it first, or write elsewhere with -o FILE.yaml")
    text = discover.render(found)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, f"{sites.name_of(path)}.yaml")
        draft.write_text(text)
        sites.load(str(draft))  # what could not be used is not written
    write_atomic(path, lambda file: file.write(text.encode()))
    print("\n".join([*found.found, *(f"to do: {each}" for each in found.to_do)]))
    usual = path == Path("sites") / f"{found.name}.yaml"
    print(f"wrote {path}; read it, then: saih site check {found.name if usual else path}")
    return 0


def _site_check(options: argparse.Namespace) -> int:
    """Try a site out with one or two tiny jobs, and say in words what is wrong; exit status 1 if something is."""
    from saih import check

    chosen = _site(options.name)
    _check_folders()
    all_ok = True
    for finding in check.check(chosen, JOBS, options.wait):
        print(f"{'ok' if finding.ok else 'WRONG':6}{finding.text}", flush=True)
        all_ok = all_ok and finding.ok
        if not finding.ok:
            print(f"{'':6}try: {finding.advice}")
            if finding.log:
                print(f"{'':6}log: {finding.log}")
            print("".join(f"{'':6}| {line}\n" for line in finding.tail), end="", flush=True)
    if all_ok:
        print(f"all in order; now: saih sweep --axis data,model --site {options.name or chosen.name}")
    return 0 if all_ok else 1


def _asked(options: argparse.Namespace) -> tuple[Site, list[Sweep]]:
    """The site and the sweeps that the command line, or a study file and the command line over it, ask for."""
    from saih import sweep as language

    name, where = options.workload or language.DEFAULT_WORKLOAD, ""
    axes, settings = language.parse_axes(options.axis), language.parse_settings(options.set)
    study, grids = None, [language.Part(workload=name, axes=axes)]
    if name.endswith((".yaml", ".yml")):
        where = name
        study = language.read_study(Path(name))
        grids = language.grids(study, options.part, where)
        if axes and len(grids) > 1:
            raise SaihError(f"{where} has {len(grids)} parts; say whose axes --axis replaces: --part NAME")
    elif options.part:
        raise SaihError(f"--part {options.part}: only a study file has parts")
    site = _site(options.site or (study.site if study and study.site else "local"))
    budgets = {
        "--time-budget": options.time_budget,
        f"{where}: time_budget": study.time_budget if study else None,
        f"site {site.name}: time_budget": site.time_budget,
    }
    source, budget = next(((key, text) for key, text in budgets.items() if text is not None), ("", None))
    return site, [
        language.make_sweep(
            grid.workload,
            axes or grid.axes,
            grid.set | settings,
            where,
            repeat=options.repeat or grid.repeat or site.repeat,
            seed=options.seed if options.seed is not None else (study.seed if study else 0),
            site=site.name,
            time_budget_s=language.parse_duration(budget, source) if budget is not None else None,
        )
        for grid in grids
    ]


def _plan(asked: Sweep, site: Site, ceilings: dict[str, Any] | None, fresh: bool) -> Plan:
    """What to run: the grid asked for, and what an earlier, larger request has measured of it already."""
    from dataclasses import replace

    from saih import jobs
    from saih import plan as planning
    from saih import sweep as language

    grid = language.points(asked, site.defaults)
    name = language.sweep_name(asked, grid)
    folder = jobs.SweepFolder(JOBS / name)
    done: set[str] = set()
    if not fresh:
        grid = language.points(replace(asked, repeat=max(asked.repeat, folder.most_repeats())), site.defaults)
        done = {point.id for point in grid if folder.is_measured(point)}
        grid = [point for point in grid if point.repeat < asked.repeat or point.id in done]
    rates = ceilings["rates"] if ceilings else None
    return planning.make_plan(asked, name, grid, site, rates, Path(site.data_folder), done)


def _drive(plan: Plan, options: argparse.Namespace, ceilings: dict[str, Any] | None, command: list[str]) -> SweepFolder:
    """Run what is not measured yet, under the sweep's lock."""
    from saih import drive, jobs, schedulers

    folder = jobs.SweepFolder(JOBS / plan.name)
    with folder.lock():
        if options.fresh:
            scheduler = schedulers.load(plan.site.scheduler)
            scheduler.cancel(list(drive.live_jobs(folder, scheduler)))  # else they would go on filling the folder
            jobs.set_aside(folder)
        if not options.mixed:
            jobs.refuse_other_code(folder, plan, jobs.version_of(plan)["source"])
        folder = jobs.prepare(plan, JOBS, command, ceilings)
        _follow(folder, plan)
    return folder


def _follow(folder: SweepFolder, plan: Plan) -> None:
    """Drive the jobs of a sweep with live progress on the terminal."""
    from rich.console import Console

    from saih import drive, live

    with live.Live(plan, Console(stderr=True)) as view:
        drive.run(folder, plan, view)


def _finish(folder: SweepFolder, mixed: bool) -> int:
    """Gather, report, and say in a few lines what came out."""
    from saih import jobs, store
    from saih.report import page

    counts = jobs.status(folder)
    results = store.gather(folder, RESULTS, mixed)
    written = page.write(results, REPORTS / f"{results.stem}.html")
    print(page.headline(results))
    print(f"points   {', '.join(f'{count} {kind}' for kind, count in counts.items() if count)}")
    print(f"results  {results}")
    print(f"report   {written}")
    return 1 if counts["failed"] else 0


def _dry_run(plan: Plan) -> int:
    """Show what would run, write its scripts, start nothing."""
    from saih import jobs
    from saih.plan import pack

    folder = jobs.SweepFolder(JOBS / plan.name)
    written = [
        jobs.write_job(job, folder, plan.site, jobs.version_of(plan))
        for job in pack(plan.kept, plan.site, folder.path / "dry-run")
    ]
    _print_plan(plan, everything=True)
    for script in written:
        print(f"script   {script}")
    print("dry run: nothing was started")
    return 0


def _probe(site: Site, options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """Sweep the ceilings workload, part by part; the ceilings file, and each part's results file."""
    from saih import probe as probing
    from saih.analysis.ceilings import merged

    found, sources = [], {}
    for name, part in probing.parts(site).items():
        sources[name], ceilings = _probe_part(part, site, options)
        found += [ceilings] if ceilings else []
    if not found:
        raise SaihError(f"no ceiling could be measured on site {site.name}; see: saih report {sources['kernels']}")
    return probing.save(RESULTS, site, merged(found), list(sources.values())), sources


def _probe_part(part: Part, site: Site, options: argparse.Namespace) -> tuple[Path, dict[str, Any] | None]:
    """Results file and ceilings of one part; no ceilings where nothing could be measured."""
    from saih import probe as probing
    from saih import store
    from saih import sweep as language
    from saih.analysis import cells
    from saih.analysis.ceilings import find_ceilings

    asked = language.make_sweep(
        probing.WORKLOAD,
        part.axes,
        part.settings,
        repeat=probing.REPEAT,
        site=site.name,
        time_budget_s=part.time_budget_s,
    )
    launched = site.model_copy(update={"launcher": part.launcher}) if part.launcher else site
    plan = _plan(asked, launched, None, fresh=True)
    folder = _drive(plan, options, None, ["saih", "probe", "--site", site.name])
    results = store.gather(folder, RESULTS, options.mixed)
    points, samples = store.load(results), store.load_samples(results)
    table = cells.per_cell(points, cells.job_steps(points, samples), points.attrs["sweep"])
    if not (table["status"] == "measured").any():
        return results, None
    return results, find_ceilings(table, points.attrs["environments"][0])


def _ceilings(site: Site, options: argparse.Namespace) -> dict[str, Any] | None:
    """The site's stored ceilings; measured now where they are missing and the site is this machine."""
    from saih import probe as probing

    ceilings, why = probing.load(RESULTS, site)
    if ceilings is None and not options.no_probe and not options.dry_run and options.workload != probing.WORKLOAD:
        print(f"{why}: measuring its ceilings first", file=sys.stderr)
        fresh = argparse.Namespace(fresh=True, mixed=False)
        _probe(site, fresh)
        ceilings, why = probing.load(RESULTS, site)
    return ceilings


def _stored_rates(site: Site) -> dict[str, float] | None:
    from saih import probe as probing

    ceilings, _ = probing.load(RESULTS, site)
    return ceilings["rates"] if ceilings else None


def _claims_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Each claim of the workloads in these files, judged where it can be; where it cannot be in any, once, with why."""
    judged: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in paths:
        for claim in _claims_in(path):
            judged.setdefault((claim["workload"], claim["name"]), []).append(claim)
    told = []
    for tries in judged.values():
        told += [claim for claim in tries if claim["pairs"]] or tries[:1]
    return told


def _claims_in(path: Path) -> list[dict[str, Any]]:
    from saih import store, workload
    from saih.analysis import cells
    from saih.analysis import claims as judging
    from saih.analysis.ceilings import sweep_of

    points, samples = store.load(path), store.load_samples(path)
    sweep = sweep_of(points)
    measured = cells.per_point(points, cells.job_steps(points, samples), sweep)
    return judging.evaluate_all(workload.spec(sweep["workload"]).CLAIMS, points, measured, sweep["workload"])


def _site(name: str | None) -> Site:
    from saih import site

    return site.load(name or "local")


def _check_folders() -> None:
    """Refuse before measuring what could not be kept afterwards."""
    import tempfile

    for folder in (JOBS, RESULTS, REPORTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise SaihError(
                f"{folder.absolute()}: cannot be written ({error.strerror}); saih keeps its files there"
            ) from None


def _print_plan(plan: Plan, everything: bool = False) -> None:
    from saih import text

    print("\n".join(text.plan_lines(plan, everything)))
    if not plan.kept:
        raise SaihError("no point of this sweep fits; the lines above say why")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"saih: {message}; see: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="saih",
        description="Measure how AI performance on this machine changes as the application grows, "
        "and what holds it back.",
        epilog="Start with: saih sweep --axis data,model",
    )
    parser.add_argument("--version", action="version", version=f"saih {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    listing = _verb(verbs, "list", list_)
    listing.add_argument("workload", nargs="?", metavar="WORKLOAD")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.add_argument("--site", metavar="NAME|FILE", help="predict for this site (default: local)")

    sweeping = _verb(verbs, "sweep", sweep)
    sweeping.add_argument("workload", nargs="?", metavar="WORKLOAD|STUDY.yaml", help="default: cosmoflow")
    sweeping.add_argument(
        "--axis", action="append", default=[], metavar="A,B=1,2", help="axes to vary; A=x,y picks rungs"
    )
    sweeping.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,...", help="set other parameters")
    sweeping.add_argument("--part", metavar="NAME", help="one part of a study (default: all, one after the other)")
    sweeping.add_argument("--repeat", type=_positive, metavar="N", help="repeats of every point (default: the site's)")
    sweeping.add_argument("--seed", type=_natural, metavar="N", help="seed of data and weights (default: 0)")
    sweeping.add_argument("--site", metavar="NAME|FILE", help="where to run (default: local)")
    sweeping.add_argument(
        "--time-budget", metavar="TIME", help="leave out the points that would take longer: 90s, 10m, 2h"
    )
    sweeping.add_argument(
        "--refine",
        metavar="TIME",
        help="spend this much time where it tells most: every other rung, then where the surface bends or repeats "
        "disagree",
    )
    sweeping.add_argument(
        "--dry-run", action="store_true", help="show points, pruned points and scripts; start nothing"
    )
    sweeping.add_argument(
        "--fresh", action="store_true", help="set earlier measurements of this sweep aside and start over"
    )
    sweeping.add_argument("--no-probe", action="store_true", help="do not measure missing ceilings first")
    _mixed(sweeping)

    making = _verb(verbs, "generate", generate)
    making.add_argument("workload", nargs="?", metavar="WORKLOAD", help="what makes it (default: universes)")
    making.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,...", help="mesh, samples, gpus, ...")
    making.add_argument("--seed", type=_natural, metavar="N", help="the family of universes (default: 0)")
    making.add_argument("--site", metavar="NAME|FILE", help="where to make it (default: local)")
    making.add_argument("--dry-run", action="store_true", help="show pieces and scripts; start nothing")

    statuses = _verb(verbs, "status", status)
    statuses.add_argument("sweep", nargs="?", metavar="SWEEP")
    statuses.add_argument("--watch", action="store_true", help="again and again, until no job runs")

    resuming = _verb(verbs, "resume", resume)
    resuming.add_argument("sweep", metavar="SWEEP")
    _mixed(resuming)

    cancelling = _verb(verbs, "cancel", cancel)
    cancelling.add_argument("sweep", metavar="SWEEP")

    gathering = _verb(verbs, "gather", gather)
    gathering.add_argument("sweep", metavar="SWEEP")
    gathering.add_argument(
        "--power-meter", type=Path, metavar="FILE.csv", help="a meter's samples: columns timestamp and watts"
    )
    gathering.add_argument(
        "--meter-scope", default="node", metavar="SCOPE", help="what hangs on it: device, package, node, rack (node)"
    )
    _mixed(gathering)

    judging = _verb(verbs, "claims", claims)
    judging.add_argument("results", type=Path, nargs="+", metavar="RESULTS.h5")
    judging.add_argument("--json", action="store_true", help="machine-readable")

    reporting = _verb(verbs, "report", report)
    reporting.add_argument("results", type=Path, nargs="+", metavar="RESULTS.h5")
    reporting.add_argument("-o", "--output", type=Path, metavar="FILE.html")
    reporting.add_argument(
        "--committed", type=Path, metavar="FILE.yaml", help="values that were committed to, to be judged on the page"
    )

    probing = _verb(verbs, "probe", probe)
    probing.add_argument("--site", metavar="NAME|FILE", help="which site (default: local)")
    probing.set_defaults(fresh=True, mixed=False)

    for module in (compare, project, accept, bundle, verify, export):
        name = module.__name__.rpartition(".")[2]
        module.arguments(_verb(verbs, name, getattr(module, name)))

    actions = _verb(verbs, "site", site).add_subparsers(required=True, metavar="init|check")
    finding = _verb(actions, "init", _site_init)
    finding.add_argument("name", nargs="?", metavar="NAME", help="default: the cluster's name, or the host's")
    finding.add_argument("--scheduler", metavar="NAME", help="take this one: slurm, local, ... (default: who answers)")
    finding.add_argument("--partition", metavar="NAME", help="describe these nodes (default: those with GPUs)")
    finding.add_argument("-o", "--output", type=Path, metavar="FILE.yaml", help="default: sites/NAME.yaml")
    finding.set_defaults(verb=site, action=_site_init)
    trying = _verb(actions, "check", _site_check)
    trying.add_argument("name", nargs="?", metavar="NAME|FILE", help="which site (default: local)")
    trying.add_argument("--wait", type=_positive, default=120, metavar="S", help="longest wait in the queue (120)")
    trying.set_defaults(verb=site, action=_site_check)
    return parser


def _verb(verbs: Any, name: str, function: Any) -> argparse.ArgumentParser:
    about = function.__doc__  # argparse fills in %(names)s in the one, and not in the other
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about.replace("%", "%%"), description=about)
    parser.set_defaults(verb=function)
    return parser


def _mixed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixed", action="store_true", help="accept measurements from different machines or versions")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.strip().removeprefix("-").isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
