"""What every workload and every scheduler must keep to, whoever adds it; and that adding one edits no other file."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from saih import jobs, launchers, schedulers, store, workload
from saih.analysis.cells import RATES
from saih.core import COMMON, FORMAT, PARTS, PHASES, WHOLE, Axis, Claim, Cost, Job, Parameter, Params, Point, axis_of
from saih.errors import SaihError
from saih.files import write_json
from saih.site import Site, Submission

ROOT = Path(__file__).parent.parent
WORKLOADS = list(workload.packages())
SCHEDULERS = schedulers.names()
METRICS = {"step_s", *RATES, *(f"share_{phase}" for phase in PHASES)}
LARGEST_GRID = 100


def specs(member: str) -> list[Any]:
    """One test case for each axis, claim or parameter of each workload."""
    cases = [(name, each) for name in WORKLOADS for each in getattr(workload.spec(name), member)]
    return [pytest.param(name, each, id=f"{name}-{each.name}") for name, each in cases]


def defaults(name: str) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in workload.parameters(workload.spec(name)).items()}


def ladder(name: str, axis: str) -> Axis:
    """An axis by name, or the ladder that a parameter with choices makes."""
    spec = workload.spec(name)
    known = {each.name: each for each in spec.AXES}
    return known[axis] if axis in known else axis_of(workload.parameters(spec)[axis], ())


def numbers(cost: Cost) -> dict[str, float]:
    apart = ("operations", "beside", "data_set")
    plain = {key: float(value) for key, value in dataclasses.asdict(cost).items() if key not in apart}
    for place, operation in enumerate((*cost.operations, *cost.beside)):
        plain |= {f"{key} of operation {place}": value for key, value in dataclasses.asdict(operation).items()}
    return plain


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_spec_defines_every_member(name: str) -> None:
    spec = workload.spec(name)
    for member in ("TITLE", "PAPER", "WORK_UNIT"):
        text = getattr(spec, member)
        assert isinstance(text, str)
        assert text
        assert "\n" not in text
    assert re.fullmatch(r"[a-z ]+s", spec.WORK_UNIT), "a plural: samples, tokens, bytes"
    for member, kind in {"PARAMETERS": Parameter, "AXES": Axis, "CLAIMS": Claim}.items():
        values = getattr(spec, member)
        assert isinstance(values, tuple)
        assert all(isinstance(value, kind) for value in values)
        assert max(Counter(value.name for value in values).values(), default=1) == 1, f"a name of {member} stands twice"
    assert spec.AXES
    assert callable(spec.cost)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_bench_defines_setup(name: str) -> None:
    """Read, not imported: a bench may need what only a job has."""
    source = importlib.util.find_spec(f"{workload.packages()[name]}.bench")
    assert source is not None
    assert source.origin is not None
    tree = ast.parse(Path(source.origin).read_text())
    setups = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "setup"]
    assert [[argument.arg for argument in node.args.args] for node in setups] == [["point", "context"]]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if workload.needs(workload.spec(name))])
def test_what_needs_a_package_is_a_value_of_a_parameter(name: str) -> None:
    known = workload.parameters(workload.spec(name))
    for parameter, values in workload.needs(workload.spec(name)).items():
        assert set(values) <= set(known[parameter].choices)


ABLATED = [name for name in WORKLOADS if getattr(workload.spec(name), "ABLATIONS", ())]


@pytest.mark.parametrize("name", ABLATED)
def test_what_can_be_taken_out_is_a_part_of_a_step_and_an_axis(name: str) -> None:
    parts = workload.spec(name).ABLATIONS  # type: ignore[attr-defined]
    assert set(parts) <= set(PARTS)
    assert [rung.label for rung in ladder(name, "ablation").rungs] == [
        WHOLE,
        *(part for part in PARTS if part in parts),
    ]


@pytest.mark.parametrize("name", ABLATED)
def test_every_part_can_be_taken_out_of_a_tiny_point(name: str, tmp_path: Path) -> None:
    """At the first rung of every axis, by one rank, as a job would: the whole step passes its check first."""
    spec = workload.spec(name)
    quick = {"seconds": 0.0, "steps": 2, "warmup": 1, "nodes": 1, "gpus": 1}
    tiny: dict[str, Any] = {key: value for axis in spec.AXES for key, value in axis.rungs[0].params.items()}
    for part in spec.ABLATIONS:  # type: ignore[attr-defined]
        point = Point(name, defaults(name) | tiny | quick | {"ablation": part})
        pack = {"points": [point.to_json()], "points_folder": str(tmp_path / "points"), "ranks": 1, "threads": 1}
        pack |= {"format": FORMAT, "name": "000", "device": "cpu", "data_folder": str(tmp_path / "data")}
        write_json(tmp_path / "pack.json", pack | {"rank_memory_bytes": None, "version": {}})
        started = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        subprocess.run([sys.executable, "-m", "saih.worker", str(tmp_path / "pack.json")], env=started, check=True)
        home = tmp_path / "points" / point.folder
        assert (home / "measurement.json").exists(), (home / "failure.json").read_text()


def test_a_name_belongs_to_one_workload() -> None:
    folders = Counter(path.parent.name for path in (ROOT / "workloads").rglob("spec.py"))
    assert max(folders.values()) == 1, f"only one workload can have each of these names: {folders}"


@pytest.mark.parametrize(("name", "parameter"), specs("PARAMETERS"))
def test_parameters_fit_themselves(name: str, parameter: Parameter) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", parameter.name)
    assert parameter.help
    assert parameter.name not in {common.name for common in COMMON}, "saih has a parameter of that name"
    for value in (parameter.default, *parameter.choices):
        assert type(parameter.parse(value)) is type(parameter.default)
        assert parameter.parse(value) == parameter.parse(str(value)) == value


@pytest.mark.parametrize(("name", "axis"), specs("AXES"))
def test_ladders_set_parameters_there_are_and_grow(name: str, axis: Axis) -> None:
    known = workload.parameters(workload.spec(name))
    assert re.fullmatch(r"[a-z][a-z0-9_]*", axis.name)
    assert len(axis.rungs) > 1
    labels = [rung.label for rung in axis.rungs]
    assert len(set(labels)) == len(labels)
    sizes = [rung.size for rung in axis.rungs]
    assert sizes == sorted(set(sizes)), "sizes increase from rung to rung"
    assert set(axis.usual) <= set(labels)
    for rung in axis.rungs:
        assert re.fullmatch(r"[^\s,=]+", rung.label), "a label can be typed: --axis name=label,label"
        assert rung.label not in ("first", "last"), "claims give these words a meaning"
        assert math.isfinite(rung.size)
        assert set(rung.params) == set(axis.rungs[0].params) != set()
        for key, value in rung.params.items():
            assert key in known, f"{key} is no parameter"
            assert known[key].parse(value) == value
            assert type(value) is type(known[key].default)


@pytest.mark.parametrize(("name", "axis"), specs("AXES"))
def test_every_rung_has_a_cost(name: str, axis: Axis) -> None:
    """With everything else at its default, on one rank or, where that makes no sense, on two."""
    spec = workload.spec(name)

    def cost_of(params: Params) -> Cost:
        try:
            return spec.cost(params)
        except SaihError:
            return spec.cost({**params, "gpus": 2})

    costs = [cost_of(defaults(name) | dict(rung.params)) for rung in axis.rungs]
    for rung, cost in zip(axis.rungs, costs, strict=True):
        for key, value in numbers(cost).items():
            assert math.isfinite(value), (rung.label, key)
            assert value >= 0, (rung.label, key)
        assert cost.work > 0
        assert cost.operations
        assert sum(operation.flop + operation.moved_bytes for operation in cost.operations) > 0
        assert all(operation.flop + operation.moved_bytes > 0 for operation in cost.operations)
        assert cost.device_bytes > 0
        assert isinstance(cost.parameters, int)
    if all(isinstance(value, (int, float)) and type(value) is not bool for value in axis.rungs[0].params.values()):
        held = [cost.device_bytes for cost in costs]
        assert held == sorted(held), "memory shrinks as the application grows"


@pytest.mark.parametrize("name", WORKLOADS)
def test_cost_is_a_pure_function_of_the_parameters(name: str) -> None:
    """Over the grid of all axes, drawn from where it is large; what has no sense raises SaihError and nothing else."""
    spec = workload.spec(name)
    grid = list(itertools.product(*(axis.rungs for axis in spec.AXES)))
    for rungs in random.Random(name).sample(grid, min(len(grid), LARGEST_GRID)):  # noqa: S311
        params = defaults(name)
        for rung in rungs:
            params |= rung.params
        read_only: Params = MappingProxyType(dict(params))
        backwards = dict(reversed(params.items()))
        try:
            cost = spec.cost(read_only)
        except SaihError as error:
            with pytest.raises(SaihError, match=re.escape(str(error))):
                spec.cost(backwards)
            continue
        assert cost == spec.cost(read_only) == spec.cost(backwards)
        assert backwards == params
        assert all(math.isfinite(value) and value >= 0 for value in numbers(cost).values())


@pytest.mark.parametrize(("name", "claim"), specs("CLAIMS"))
def test_claims_name_what_there_is(name: str, claim: Claim) -> None:
    assert claim.text
    assert claim.metric in METRICS or claim.metric.startswith("check_")
    assert claim.better in ("higher", "lower")
    assert claim.target > 0
    assert math.isfinite(claim.target)
    if claim.bound is not None:
        assert claim.bound >= claim.target if claim.better == "higher" else claim.bound <= claim.target
    assert claim.numerator
    if claim.denominator:
        assert claim.numerator.keys() == claim.denominator.keys(), "two cells that differ in the same axes"
    assert claim.numerator != claim.denominator
    assert not claim.where.keys() & claim.numerator.keys()
    spec = workload.spec(name)
    known = workload.parameters(spec)
    for side in (claim.numerator, claim.denominator, claim.where):
        for axis, label in side.items():
            if axis in known and axis not in {each.name for each in spec.AXES} and not known[axis].choices:
                assert str(known[axis].parse(label)) == label
            else:
                assert label in ("first", "last", *(rung.label for rung in ladder(name, axis).rungs))


@pytest.mark.parametrize("name", WORKLOADS)
def test_specs_do_not_load_torch(name: str) -> None:
    code = f"import sys; from saih import workload; workload.spec({name!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------- schedulers

HOSTILE = 'it\'s a "test" $HOME `id` \\ #1\n; touch oops; {{ x }} %s é'
ARGUMENTS = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps({"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}))
"""


def site_for(scheduler: str, **changes: object) -> Site:
    known: dict[str, object] = {"name": "toy", "scheduler": scheduler, "launcher": "torchrun", "device": "cpu"}
    sizes = dict.fromkeys(("nodes", "gpus_per_node", "threads_per_rank", "node_memory_gib", "device_memory_gib"), 2)
    return Site.model_validate(known | sizes | changes)


def toy_job(folder: Path) -> Job:
    known = {parameter.name: parameter.default for parameter in COMMON}
    return Job(str(folder), folder.name, (Point("toy", known | {"gpus": 2}),), 1, 2, 90.0)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name is anything but a plain word, and a Python in it that tells what it was started with."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    python = folder / "python"
    python.write_text(ARGUMENTS)
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", str(python))
    return folder


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_defines_every_member(name: str) -> None:
    scheduler = schedulers.load(name)
    assert (Path(jobs.__file__).parent / "templates" / scheduler.TEMPLATE).is_file()
    assert scheduler.MAX_QUEUED >= 1
    assert 0 < scheduler.SHORTEST_PAUSE_S <= scheduler.LONGEST_PAUSE_S
    assert isinstance(scheduler.CANCEL_ON_INTERRUPT, bool)
    assert set(scheduler.SUBMIT) <= set(Submission.model_fields)
    assert scheduler.AGENTS in ("", *launchers.LAUNCHERS)
    assert all(isinstance(word, str) and word for word in (*scheduler.COMMANDS, *scheduler.QUESTION))
    assert set(scheduler.QUESTION[:1]) <= {*scheduler.COMMANDS, "sinfo"}
    site = dict.fromkeys(("partition", "account", "qos", "mpi", "launcher", "data"), "x")
    for symptom in scheduler.SYMPTOMS:
        assert symptom.text.format(**site, matched="", **re.compile(symptom.pattern).groupindex)
        assert symptom.advice
    assert all(re.compile(pattern) and advice for pattern, advice in scheduler.WAITS.items())
    assert all(callable(getattr(scheduler, member)) for member in ("submit", "find", "states", "cancel"))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if schedulers.load(name).SUBMIT])
def test_what_a_site_asks_of_its_scheduler_stands_in_the_script(name: str, tmp_path: Path) -> None:
    """Each key that the scheduler has a notion of, in the part of the script that it reads."""
    fields = [each for each in schedulers.load(name).SUBMIT if each not in ("exclusive", "extra")]
    asked = {each: f"x{each}:1" for each in fields} | {"exclusive": True, "extra": ("--first=1", "--second=2")}
    text = jobs.render(toy_job(tmp_path / "000"), "sweep", site_for(name, submit=asked))
    plain = jobs.render(toy_job(tmp_path / "000"), "sweep", site_for(name))
    added = [line for line in text.splitlines() if line not in plain.splitlines()]
    assert all(re.match(r"#(SBATCH|PBS| flux:)", line) for line in added)
    for value in [*(f"x{each}:1" for each in fields), "--first=1", "--second=2", "excl"]:
        assert sum(value in line for line in added) == 1, value


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scripts_quote_everything(name: str, hostile: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # what a batch scheduler's node list tells
    variables = {"PLAIN": "1", "HOSTILE": HOSTILE} | meeting
    site = site_for(name, environment=variables, setup=("export FROM_SETUP=yes", '[ -z "$NOT_THERE" ]'))
    job = toy_job(hostile / "jobs" / "a b" / "000")
    text = jobs.render(job, f"sweep {HOSTILE}", site)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    words = shlex.split(text, comments=True)
    assert str(hostile) in words
    worker = ["-m", "saih.worker", str(Path(job.folder, "pack.json"))]
    expected = launchers.command(site.launcher, job, site.mpi, [sys.executable], worker)
    start = words.index(expected[0])
    assert words[start : start + len(expected)] == expected
    assert text.startswith("#!")
    assert re.search(r"^set -eu", text, re.MULTILINE)
    assert text.endswith("\n")

    Path(job.folder).mkdir(parents=True)
    script = hostile / "job.sh"
    script.write_text(text)
    left_behind = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "7")  # by a profile
    granted = os.environ | left_behind
    granted["TMPDIR"] = str(hostile)  # the lock of local jobs: nobody else's job is waited for
    words = ["bash", str(script)]
    done = subprocess.run(words, cwd="/", env=granted, capture_output=True, text=True, check=True)
    log = Path(job.folder, "log.txt")  # some scripts open their log themselves
    seen = json.loads(done.stdout or log.read_text())
    assert seen["words"] == expected[1:]
    assert seen["folder"] == str(hostile)
    assert seen["environment"]["HOSTILE"] == HOSTILE
    assert seen["environment"]["PLAIN"] == "1"
    assert seen["environment"]["FROM_SETUP"] == "yes"
    assert seen["environment"]["OMP_NUM_THREADS"] == "2"
    assert "7" not in {seen["environment"].get(each) for each in left_behind}
    assert not [path for path in (hostile / "oops", Path("/oops")) if path.exists()]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unset_variable_is_a_mistake_in_all_but_the_set_up_lines(name: str, tmp_path: Path) -> None:
    """What modules and conda bring along looks at variables like PS1, which a job does not have."""
    text = jobs.render(toy_job(tmp_path), "sweep", site_for(name, setup=('case "$PS1" in esac',)))
    for line, status in {'case "$PS1" in esac': 0, "set -u": 1}.items():
        upto = text[: text.rindex(f"\n{line}\n") + len(line) + 1].replace("\nexec >>", "\n: >>")
        done = subprocess.run(
            ["bash"], input=f'{upto}\n: "$PS1"\n', env={}, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_set_up_line_that_fails_ends_the_job(name: str, hostile: Path) -> None:
    text = jobs.render(toy_job(hostile / "000"), "sweep", site_for(name, setup=("false",)))
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("flux", "pbs", "slurm")])
def test_a_job_nobody_knows_has_ended(name: str, tmp_path: Path) -> None:
    """Batch schedulers have to be asked for that: their own tests do."""
    scheduler = schedulers.load(name)
    ids = [str(tmp_path / "000"), "999999999", HOSTILE]
    states = scheduler.states(ids)
    assert {key: state.phase for key, state in states.items()} == dict.fromkeys(ids, "ended")
    assert scheduler.states([]) == {}
    scheduler.cancel(ids)
    scheduler.cancel([])
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing behind"


def test_unknown_schedulers_and_launchers_come_with_those_there_are() -> None:
    with pytest.raises(SaihError, match=r"unknown scheduler 'lokal'; did you mean local\? valid: .*local"):
        schedulers.load("lokal")
    with pytest.raises(
        SaihError, match=r"unknown launcher 'torch-run'; did you mean torchrun or horovodrun\? valid: .*torchrun"
    ):
        launchers.command("torch-run", toy_job(Path("000")), "", ["python"], [])


# ------------------------------------------------------------------------------- one more of each, without an edit

TOY_SPEC = '''"""A workload that adds numbers. Imports no torch."""

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung

TITLE = "Toy: adds numbers"
PAPER = "none"
WORK_UNIT = "numbers"
PARAMETERS = (
    Parameter("count", 10, "numbers", "how many numbers are added", minimum=1),
    Parameter("variant", "loop", "", "how they are added", choices=("loop", "formula")),
)
AXES = (Axis("data", "numbers", tuple(Rung(str(n), {"count": n}, n) for n in (10, 100))),)
CLAIMS = (
    Claim("formula-is-faster", "over a loop", "step_s", {"variant": "formula"}, {"variant": "loop"}, 1.0, "lower"),
)


def cost(params: Params) -> Cost:
    count = int(params["count"])
    return Cost(count, count, (Operation(count, 8.0 * count),), device_bytes=8.0 * count)
'''
TOY_BENCH = '''"""Adds numbers."""

from saih.core import Check, Work


def setup(point, context):
    return Toy(int(point.params["count"]), point.params["variant"])


class Toy:
    def __init__(self, count, variant):
        self.count, self.variant = count, variant

    def total(self):
        return sum(range(self.count)) if self.variant == "loop" else self.count * (self.count - 1) // 2

    def check(self):
        return Check(self.total() * 2 == self.count * (self.count - 1))

    def step(self, clock):
        clock.enter("compute")
        self.total()
        return Work(self.count, self.count)

    def close(self):
        pass
'''
TOY_SCHEDULER = '''"""No queue at all: a job runs while it is submitted."""

import subprocess

from saih.schedulers import State

TEMPLATE = "local.sh.j2"
SUBMIT = ()
COMMANDS = ("bash",)
QUESTION = ()
SYMPTOMS = ()
WAITS = {}
AGENTS = ""
MAX_QUEUED = 2
SHORTEST_PAUSE_S = LONGEST_PAUSE_S = 0.1
CANCEL_ON_INTERRUPT = True


def find(home):
    return None


def submit(script):
    with open(script.parent / "log.txt", "ab") as log:
        subprocess.run(["bash", str(script)], stdout=log, stderr=log, check=False)
    (script.parent / "ran-by-toy").touch()
    return f"toy-{script.parent.name}"


def states(ids):
    return {each: State("ended") for each in ids}


def cancel(ids):
    pass
'''
TOY_SITE = "scheduler: toy\ndevice: cpu\ngpus_per_node: 1\nthreads_per_rank: 1\nnode_memory_gib: 4\n"


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def python(folder: Path, *words: str) -> str:
    """What a Python that finds `folder` first says; it must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_workload_is_one_folder_and_a_scheduler_one_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("saih", "workloads"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    before = snapshot(copy)
    added = {
        "workloads/family/toy/spec.py": TOY_SPEC,
        "workloads/family/toy/bench.py": TOY_BENCH,
        "saih/schedulers/toy.py": TOY_SCHEDULER,
        "sites/here.yaml": TOY_SITE,
    }
    write(copy, added)
    write(copy, {"tests/__init__.py": "", "tests/test_contract.py": Path(__file__).read_text()})
    chosen = ["-k", "toy and not without and not one_folder", "-p", "no:cacheprovider", "--no-header"]
    told = python(copy, "-m", "pytest", "tests/test_contract.py", "-v", *chosen)
    for case in ("ladders_set_parameters_there_are_and_grow[toy-data]", "scripts_quote_everything[toy]"):
        assert f"test_{case} PASSED" in told

    sweep = "sweep toy --site here --axis data --axis variant --set seconds=0,steps=3 --repeat 2 --no-probe"
    python(copy, "-m", "saih.cli", *sweep.split())
    [results] = (copy / "results").glob("*.h5")
    points = store.load(results)
    assert len(points) == 2 * 2 * 2
    assert set(points["status"]) == {"measured"}
    assert list(copy.glob("jobs/*/jobs/000/ran-by-toy"))
    judged = json.loads(python(copy, "-m", "saih.cli", "claims", str(results), "--json"))
    assert [claim["name"] for claim in judged["claims"]] == ["formula-is-faster"]
    assert {name: text for name, text in snapshot(copy).items() if name in before} == before, "another file was edited"


def test_a_workload_can_live_in_a_package_of_its_own(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "acme/__init__.py": "",
            "acme/adds/spec.py": TOY_SPEC,
            "acme/adds/bench.py": TOY_BENCH,
            "acme-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n",
            "acme-1.0.dist-info/entry_points.txt": "[saih.workloads]\nadds = acme.adds\n",
        },
    )
    names = [one["name"] for one in json.loads(python(tmp_path, "-m", "saih.cli", "list", "--json"))]
    assert set(names) >= {"adds", "ceilings", "cosmoflow"}
    told = python(tmp_path, "-m", "saih.cli", "sweep", "adds", "--axis=data", "--repeat=1", "--no-probe", "--dry-run")
    assert "2 points (2 cells x 1 repeats)" in told


def test_a_package_that_is_broken_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "acme/adds/spec.py": "import a_library_that_is_not_there\n",
            "acme-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n",
            "acme-1.0.dist-info/entry_points.txt": "[saih.workloads]\nadds = acme.adds\nempty = acme.nothing\n",
        },
    )
    code = """
from saih import workload
from saih.errors import SaihError
for name in ("adds", "empty"):
    try:
        workload.spec(name)
    except SaihError as error:
        print(error)
"""
    broken, empty = python(tmp_path, "-c", code).splitlines()
    place = f"{tmp_path}/acme/adds/spec.py:1"
    assert broken.startswith(f"workload adds: {place}: cannot be imported (ModuleNotFoundError: No module named 'a_lib")
    assert empty.startswith("workload empty: acme.nothing.spec: cannot be imported (ModuleNotFoundError")


BROKEN = {
    "syntax": ("x = (\n", 1, "SyntaxError: "),
    "division": ("\nx = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
    "outside": ("import json\njson.loads('{')\n", 2, "JSONDecodeError: "),
    "lines": ("raise AssertionError('two\\nlines')\n", 1, "AssertionError: two lines"),
    "costs": (
        TOY_SPEC.replace("return Cost(", "return 1 / 0 * Cost("),
        None,
        "its spec is broken (ZeroDivisionError: ",
    ),
    "parameters": (
        TOY_SPEC.replace("PARAMETERS = (", "PARAMETERS = (3,"),
        None,
        "its spec is broken (AttributeError: ",
    ),
    "title": (TOY_SPEC.replace("TITLE", "TITEL"), None, "must define TITLE"),
}
"""Name -> spec.py, the line that fails if it cannot be imported, what is said of it."""


def test_a_workload_that_is_broken_spoils_no_other(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "workloads", tmp_path / "workloads", ignore=shutil.ignore_patterns("__pycache__"))
    write(tmp_path, {f"workloads/family/{name}/spec.py": text for name, (text, _, _) in BROKEN.items()})
    write(tmp_path, {"workloads/spec.py": "a file that is in no workload's folder\n"})
    lines = dict(
        each.split(maxsplit=1) for each in python(tmp_path, "-m", "saih.cli", "list").splitlines() if " " in each
    )
    told = {one["name"]: one for one in json.loads(python(tmp_path, "-m", "saih.cli", "list", "--json"))}
    assert told.keys() >= {"ceilings", "cosmoflow", *BROKEN}
    assert lines["cosmoflow"] == told["cosmoflow"]["title"]
    for name, (_, line, message) in BROKEN.items():
        place = f"{tmp_path}/workloads/family/{name}/spec.py" + (f":{line}" if line else "")
        for text in (lines[name], told[name]["error"]):
            assert place in text
            assert message in text


@pytest.mark.parametrize("name", ["division", "costs"])
def test_a_workload_that_is_broken_is_a_mistake_where_it_is_asked_for(tmp_path: Path, name: str) -> None:
    text, _, message = BROKEN[name]
    shutil.copytree(ROOT / "workloads", tmp_path / "workloads", ignore=shutil.ignore_patterns("__pycache__"))
    write(tmp_path, {"workloads/family/broken/spec.py": text})
    done = subprocess.run(
        [sys.executable, "-m", "saih.cli", "list", "broken"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("saih: workload broken: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_spec_that_lacks_a_member_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "acme/adds/spec.py": TOY_SPEC.replace("WORK_UNIT", "WORK").replace("def cost", "def price"),
            "acme-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n",
            "acme-1.0.dist-info/entry_points.txt": "[saih.workloads]\nadds = acme.adds\n",
        },
    )
    code = "from saih import workload\ntry:\n workload.spec('adds')\nexcept Exception as error:\n print(error)"
    assert python(tmp_path, "-c", code).rstrip().endswith("spec.py must define WORK_UNIT, cost")
