"""The nouns: frozen values that planning, workers and analysis share. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from saih.errors import SaihError, unknown
from saih.files import digest

FORMAT = 1
"""Number of the layout of sweep.json, pack.json, measurement.json and the results file."""

PHASES = ("input", "transfer", "compute", "communication", "other", "checkpoint")

WHOLE = "none"
"""The rung of the axis `ablation` that leaves a step as it is."""
PARTS = ("input", "compute", "communication")
"""What an ablation can take out of a step: reading (the batch is in memory), computing, talking to other ranks."""
LOADS = ("load_readers", "load_hogs")
"""Parameters that put other work beside the timed steps of a node."""
EXPERIMENTS = ("ablation", *LOADS)
"""Parameters by which a step is disturbed on purpose, to learn what holds it back."""

Value = bool | int | float | str
Params = Mapping[str, Value]


@dataclass(frozen=True)
class Parameter:
    """One setting of a workload: its type is the type of its default."""

    name: str
    default: Value
    unit: str = ""
    help: str = ""
    choices: tuple[Value, ...] = ()
    minimum: float | None = None
    path: bool = False
    """Text that names a file or a folder: made absolute where it is given, for jobs may run elsewhere."""

    def parse(self, given: object, where: str = "") -> Value:
        """`given` (text, or a YAML scalar) as this parameter's type; SaihError names the valid choices."""
        place = f"{where}: " if where else ""
        kind = type(self.default)
        try:
            value = _convert(given, kind)
        except (ValueError, OverflowError):
            raise SaihError(f"{place}{self.name} must be {_KINDS[kind]}, not {given!r}") from None
        if self.choices and value not in self.choices:
            raise unknown(f"value of {self.name}", value, self.choices, where)
        if self.minimum is not None and not isinstance(value, str) and value < self.minimum:
            raise SaihError(f"{place}{self.name} must be at least {self.minimum:g}, not {value}")
        return str(Path(str(value)).absolute()) if self.path and value else value


_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


LARGEST = 2**63
"""Whole numbers stay below it: results files hold 64 bits."""


def _convert(given: object, kind: type) -> Value:
    if kind is bool:
        if isinstance(given, bool):
            return given
        if str(given).lower() in ("true", "false"):
            return str(given).lower() == "true"
        raise ValueError
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise ValueError
    if kind is int:
        if isinstance(given, float) or abs(int(given)) >= LARGEST:
            raise ValueError
        return int(given)
    if kind is float:
        if not math.isfinite(float(given)):
            raise ValueError
        return float(given)
    return str(given)


COMMON = (
    Parameter("nodes", 1, "nodes", "nodes of the allocation", minimum=1),
    Parameter(
        "gpus", 1, "per node", "devices used on each node, one rank each; CPU ranks on a site without GPUs", minimum=1
    ),
    Parameter("warmup", 2, "steps", "steps run before the clock counts", minimum=0),
    Parameter("steps", 5, "steps", "timed steps at the least", minimum=1),
    Parameter("seconds", 1.0, "s", "go on timing until this much time is measured ...", minimum=0),
    Parameter("max_steps", 50, "steps", "... or this many steps", minimum=1),
    Parameter("load_readers", 0, "processes", "that read files beside the timed steps, where data sets lie", minimum=0),
    Parameter("load_hogs", 0, "processes", "that compute beside the timed steps, a core each", minimum=0),
    Parameter("beside", False, "", "time GEMM and conv3d right before and after too: % of what they gave at that time"),
)
"""Parameters every workload has: the allocation, how long a point is measured, and beside what."""


@dataclass(frozen=True)
class Rung:
    """One step of a ladder: a label, the parameters it sets, and the size to plot it at."""

    label: str
    params: Params
    size: float


@dataclass(frozen=True)
class Axis:
    """A direction the application grows in: a name, a unit, and a ladder of rungs from small to large."""

    name: str
    unit: str
    rungs: tuple[Rung, ...]
    usual: tuple[str, ...] = ()
    """Labels of the rungs that the axis stands for where none are named; none: all of them."""
    named: bool = False
    """Rungs differ in kind: their sizes only number them."""

    def pick(self, labels: Sequence[object] = (), where: str = "") -> Axis:
        """This axis with only the rungs named, or its usual ones, in ladder order.

        Raises SaihError for a label that does not exist.
        """
        known = [rung.label for rung in self.rungs]
        wanted = [str(label) for label in labels or self.usual or known]
        for label in wanted:
            if label not in known:
                raise unknown(f"rung of axis {self.name}", label, known, where)
        rungs = tuple(rung for rung in self.rungs if rung.label in wanted)
        return Axis(self.name, self.unit, rungs, named=self.named)


def axis_of(parameter: Parameter, values: Sequence[object] = (), where: str = "") -> Axis:
    """Any parameter as an axis: one rung for each value, by default for each of its choices."""
    if not values and not parameter.choices:
        raise SaihError(
            f"{where or 'axis'}: {parameter.name} has no ladder of its own; name its values: {parameter.name}=A,B"
        )
    ladder = list(dict.fromkeys(parameter.parse(value, where) for value in values or parameter.choices))
    if parameter.choices:
        ladder.sort(key=parameter.choices.index)
    elif not isinstance(parameter.default, str):
        ladder.sort()
    rungs = [
        Rung(str(value), {parameter.name: value}, float(place if isinstance(value, str) else value))
        for place, value in enumerate(ladder)
    ]
    named = any(isinstance(value, str | bool) for value in ladder)
    return Axis(parameter.name, parameter.unit, tuple(rungs), named=named)


@dataclass(frozen=True)
class Operation:
    """One kernel of a step: FLOP (2 for each multiply-add) and bytes moved through device memory."""

    flop: float
    moved_bytes: float


@dataclass(frozen=True)
class Cost:
    """What a point costs, predicted from its parameters alone. Per rank and per step unless said otherwise."""

    flop: float
    work: float
    operations: tuple[Operation, ...] = ()
    emulated_s: float = 0.0
    """Seconds of a step that stand for what is not there: sleeps in place of compute, a link held to a rate."""
    beside: tuple[Operation, ...] = ()
    beside_s: float = 0.0
    """A second chain of the step, on a link, say: kernels of `operations` that it waits for, and seconds of its own.
    The two run beside each other, and the step takes as long as the longer one."""
    parameters: int = 0
    device_bytes: float = 0.0
    """Peak device memory."""
    input_bytes: float = 0.0
    message_bytes: float = 0.0
    """Bytes handed to collectives."""
    data_set: str = ""
    """Name of the files the point needs, shared by all ranks and by all points that name the same."""
    disk_bytes: float = 0.0
    """Their size."""
    setup_s: float = 0.0
    """Seconds to make them."""
    check_steps: float = 0.0
    """What the correctness check costs, in steps."""


@dataclass(frozen=True)
class Point:
    """One combination of parameters of one workload, one repeat of it. Its id is a hash of its content."""

    workload: str
    params: Params
    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis name -> rung label, for people; not part of the identity."""
    repeat: int = 0
    seed: int = 0

    @cached_property
    def cell(self) -> str:
        """Identity without the repeat: points of one cell are repeats of each other."""
        return digest({"workload": self.workload, "params": dict(self.params), "seed": self.seed})[:16]

    @cached_property
    def id(self) -> str:
        """Identity: 16 hexadecimal digits."""
        return digest({"cell": self.cell, "repeat": self.repeat})[:16]

    @cached_property
    def folder(self) -> str:
        """Name of the point's folder: labels a person recognises, then the id."""
        words = [f"{axis}={label}" for axis, label in self.labels.items()] + [f"r{self.repeat}"]
        readable = re.sub(r"[^A-Za-z0-9=._-]", "-", "_".join(words)).lstrip("-.=")
        return f"{readable[:80]}_{self.id[:8]}"

    @property
    def nodes(self) -> int:
        return int(self.params["nodes"])

    @property
    def gpus(self) -> int:
        """Ranks on each node."""
        return int(self.params["gpus"])

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def timed_steps(self, step_s: float) -> int:
        """How many steps are timed when one takes `step_s`: enough for `seconds`, within [`steps`, `max_steps`]."""
        fewest, most = int(self.params["steps"]), int(self.params["max_steps"])
        wanted = float(self.params["seconds"]) / step_s if step_s > 0 else most
        return max(fewest, math.ceil(min(most, wanted)))

    def to_json(self) -> dict[str, Any]:
        return (
            {"id": self.id, "cell": self.cell}
            | asdict(self)
            | {"params": dict(self.params), "labels": dict(self.labels)}
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Point:
        return cls(value["workload"], value["params"], value["labels"], value["repeat"], value["seed"])


@dataclass(frozen=True)
class Sweep:
    """A workload, the axes that vary (full grid), what is set besides, and how often each point repeats."""

    workload: str
    axes: tuple[Axis, ...]
    overrides: Params = field(default_factory=dict)
    repeat: int = 1
    seed: int = 0
    site: str = "local"
    time_budget_s: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job."""

    rank: int
    local_rank: int
    world: int


@dataclass(frozen=True)
class Job:
    """A pack of points that share an allocation, and the folder its script, log and events live in."""

    folder: str
    name: str
    points: tuple[Point, ...]
    nodes: int
    gpus: int
    time_limit_s: float
    excluded_nodes: tuple[str, ...] = ()
    """Nodes that failed under these points before."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Work:
    """What one step did on one rank: units of work, model FLOP, bytes moved through device memory."""

    units: float
    flop: float = 0.0
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Check:
    """The verdict on correctness, with the numbers it rests on."""

    passed: bool
    numbers: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    notes: tuple[str, ...] = ()
    """What was seen on the way that explains the speed, in words; each is printed once, with the cells it holds for."""


@dataclass(frozen=True)
class Claim:
    """What a workload promises, in one line of data: `metric` at `numerator` over `metric` at `denominator`.

    Without a denominator it is about `metric` at `numerator` itself.

    The metric is `step_s`, a rate, `share_<phase>` of the time, or `check_<name>` for a number of `Check.numbers`:
    quality, say, or counted work.
    A number `predicted_<metric>`, without the metric's own `check_`, is the workload's prediction of it at a point; the
    ratio of two stands beside the measured one. Where there is none, the plan's stands there, if it has one. Numbers
    `simulated_<name>` are the same in every repeat: one repeat decides.

    `numerator`, `denominator` and `where` map an axis to a rung label; "first" and "last" mean the smallest and the
    largest rung measured. All other labels of the two cells are equal; over such pairs the geometric mean is taken.
    The claim holds when the whole 95 % interval of the ratio is on the better side of `target`.
    """

    name: str
    text: str
    metric: str
    numerator: Mapping[str, str]
    denominator: Mapping[str, str]
    target: float
    better: Literal["higher", "lower"] = "higher"
    where: Mapping[str, str] = field(default_factory=dict)
    paper: str = ""
    """The paper's figure in its own words; empty where it states none."""
    bound: float | None = None
    """What the ratio would be if the technique had no cost of its own, whatever the machine; None where it depends."""


@dataclass(frozen=True)
class TradeOff:
    """What a technique gives up for its speed: drawn as quality over speed-up, a line for each series of points.

    Names are those of `Check.numbers`. A point without the quality, such as an uncached run, is not drawn.
    """

    quality: str
    label: str
    """Of the quality, with its unit."""
    speedup: str
    """Counted work of the plain run over the point's."""
    gain: str
    """Work that the reference needs for the same quality over the point's: below 1 the technique is worth nothing."""
    along: str
    """The axis that a line runs along; all others tell lines apart."""
    axis: str = "variant"
    baseline: str = "none"
    """Rung of `axis` that measured speed-ups are over."""
    reference: str = "fewer-steps"
    """Rung of `axis` that every other one has to beat."""


@dataclass(frozen=True)
class Need:
    """A package that a value of a parameter needs, beside those that saih requires."""

    package: str
    """As it is imported."""
    install: str
    """The command that brings it."""


class Clock(Protocol):
    """What a workload sees of the clock: it says which phase begins now, saih does the timing."""

    def enter(self, phase: str) -> None:
        """From here on time counts as `phase`, one of PHASES."""


class Bench(Protocol):
    """A point made ready to run on one rank: what `bench.setup(point, context)` returns.

    One whose spec names ABLATIONS has `ablate(part)` besides: called after the check and before the first step, it
    takes one of PARTS out of every step that follows, whose results are then worthless and whose time is the evidence.
    """

    def check(self) -> Check:
        """Run before timing; must leave the state as `setup` made it."""

    def step(self, clock: Clock) -> Work:
        """One step, all of it; returns what was done."""

    def close(self) -> None:
        """Let go of memory and files."""


@dataclass(frozen=True)
class Context:
    """What a rank knows of its place when it sets up a point."""

    place: Place
    device: str
    """A torch device: "cpu" or "cuda:0"."""
    data_folder: str
    """Where data sets live; shared by all ranks."""
    kept_folder: str = ""
    """Of this point alone, to be made: what an interrupted point keeps for its next try. --fresh sets it aside."""
