"""A site: one YAML file that says how a machine is used and what its parts promise."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from saih import yamlfile
from saih.core import Value
from saih.errors import SaihError, unknown

SHIPPED = Path(__file__).parent / "sites"
GIB = 2**30
NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"

Positive = Annotated[float, Field(gt=0)]
Word = Annotated[str, Field(pattern=r"^\S+$")]
"""Text for a line of a job script that the scheduler reads: no spaces, no line breaks."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""A name that a shell can export."""


class Peak(BaseModel):
    """What a part promises: FLOP/s by precision and memory bytes/s, of one device, with the source of the figures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flop_per_s: Mapping[str, Positive] = Field(default_factory=dict)
    memory_bytes_per_s: Positive | None = None
    host_link_bytes_per_s: Positive | None = None
    """One way, between the host's memory and the device's."""
    source: str = ""


class Submission(BaseModel):
    """What a batch scheduler is asked for besides nodes, ranks and time."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gres: Word | None = None
    dependency: Word | None = None
    """Jobs to wait for, as the scheduler spells it: "afterok:1234"."""
    exclusive: bool = False
    extra: tuple[Word, ...] = ()
    """Further options, each as the scheduler spells it: "--mail-type=END"."""


class Common(BaseModel):
    """What a site file says and a site keeps as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    description: str = ""
    scheduler: str = "local"
    launcher: str = "torchrun"
    mpi: Literal["", "pmi2", "pmix"] = ""
    """How srun introduces ranks to an MPI library; empty leaves it to Slurm's default."""
    mpiexec: str = ""
    """What launchers mpiexec and openmpi start on the nodes: a path, or a word; empty for the one saih finds here."""
    nodes: int = Field(default=1, gt=0)
    job_minutes: Positive = 60.0
    max_queued: int | None = Field(default=None, gt=0)
    time_budget: str | None = None
    repeat: int = Field(default=1, gt=0)
    data_folder: str = "data"
    submit: Submission = Submission()
    container: tuple[str, ...] = ()
    """Words before the worker's command: ["apptainer", "exec", "--nv", "image.sif"]."""
    python: str = ""
    """The interpreter of the workers; empty for the one saih runs in."""
    environment: Mapping[Variable, str] = Field(default_factory=dict)
    setup: tuple[str, ...] = ()
    defaults: Mapping[str, Value] = Field(default_factory=dict)


class Site(Common):
    """One machine, as planning and the job scripts see it. A "device" is a GPU, or one CPU rank with its threads."""

    name: str = Field(pattern=f"^{NAME}$")
    device: Literal["cpu", "cuda"]
    device_name: str = ""
    gpus_per_node: int = Field(gt=0)
    threads_per_rank: int = Field(gt=0)
    node_memory_gib: Positive
    device_memory_gib: Positive
    peak: Peak = Peak()


class SiteFile(Common):
    """The keys of a site file. What is left out is looked up on the machine saih runs on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_name: str | None = None
    gpus_per_node: int | None = Field(default=None, gt=0)
    threads_per_rank: int | None = Field(default=None, gt=0)
    node_memory_gib: Positive | None = None
    device_memory_gib: Positive | None = None
    peak: Peak | None = None


def names() -> list[str]:
    """Names of the sites that `--site NAME` finds: ./sites/*.yaml, then those shipped with saih."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def load(name: str) -> Site:
    """The site of that name or file, with all that its file leaves out filled in from this machine."""
    path = _find(name)
    own_name = name_of(path)
    file = yamlfile.load(path, SiteFile)
    gpus = find_gpus() if file.device != "cpu" else []
    device: Literal["cpu", "cuda"] = "cuda" if file.device == "cuda" or gpus else "cpu"
    if device == "cuda" and not gpus and (file.gpus_per_node is None or file.device_memory_gib is None):
        raise SaihError(f"{path}: no GPU is visible here, so gpus_per_node and device_memory_gib must be stated")
    if file.scheduler == "local" and file.nodes > 1:
        raise SaihError(f"{path}: scheduler local has this one machine, not {file.nodes} nodes; name a batch scheduler")
    cores = len(os.sched_getaffinity(0))
    per_node = file.gpus_per_node or (len(gpus) if device == "cuda" else cores)
    threads = file.threads_per_rank or max(1, cores // per_node)
    memory_gib = file.node_memory_gib or memory_bytes() / GIB
    part = file.device_name or (gpus[0][0] if gpus else cpu_name() if device == "cpu" else "this GPU")
    return Site(
        name=own_name,
        device=device,
        device_name=part,
        gpus_per_node=per_node,
        threads_per_rank=threads,
        node_memory_gib=memory_gib,
        device_memory_gib=file.device_memory_gib or (gpus[0][1] / GIB if device == "cuda" else memory_gib / per_node),
        peak=file.peak or (catalogue_peak(part) if device == "cuda" else nominal_cpu_peak(threads)),
        **{key: getattr(file, key) for key in Common.model_fields},
    )


def name_of(path: Path) -> str:
    """The name of the site in a file; SaihError where it is no plain word."""
    if not re.fullmatch(NAME, path.stem):
        raise SaihError(f"{path}: a site's name has only letters, digits and . - _; rename the file")
    return path.stem


def find_gpus() -> list[tuple[str, float]]:
    """(name, memory bytes) of each NVIDIA GPU this process may use; none where nvidia-smi is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [] if visible is None else [f"--id={visible}"]
    if visible in ("", "-1"):
        return []
    query = [tool, *chosen, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SaihError(
            f"nvidia-smi fails here ({(answer.stderr or answer.stdout).strip().splitlines()[:1]}); "
            "set CUDA_VISIBLE_DEVICES= to measure the processor instead"
        )
    lines = answer.stdout.splitlines()
    pairs = (line.rsplit(",", 1) for line in lines if "," in line)
    return [(name.strip(), float(mebibytes) * 2**20) for name, mebibytes in pairs if mebibytes.strip().isdigit()]


def memory_bytes() -> float:
    """Host memory this process may use: the machine's, or the least limit of its control groups."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in _limit_files() if path.is_file()]
    return float(min([total, *(int(limit) for limit in limits if limit.isdigit())]))


def _limit_files() -> list[Path]:
    """memory.max (cgroup v2) and memory.limit_in_bytes (v1) of this process's groups and those above them."""
    own = Path("/proc/self/cgroup")
    files = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = (
                ("/sys/fs/cgroup", "memory.max")
                if not controllers
                else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            )
            path = Path(group)
            files += [Path(f"{root}{each}", name) for each in (path, *path.parents)]
    return files


def cpu_name() -> str:
    """The processor's model name."""
    return _cpuinfo().get("model name", platform.machine())


def nominal_cpu_peak(threads: int) -> Peak:
    """Peak of `threads` cores: SIMD width x 2 FMA units x the clock the operating system reports, no boost.

    Processors come in too many variants for a catalogue; a site file can state the data sheet's figure instead.
    """
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    clock = _clock_hz(info)
    family = (info.get("vendor_id", ""), int(info.get("cpu family", "0")))
    if clock is None or not flags & {"avx2", "avx512f"}:
        return Peak(source="unknown processor")
    full_width = "avx512f" in flags and family != ("AuthenticAMD", 25)  # Zen 4 splits 512-bit operations in two
    fp32 = 64 if full_width else 32
    cycles = {"fp32": fp32}
    if "amx_bf16" in flags:
        cycles["bf16"] = 2048
    elif "avx512_bf16" in flags:
        cycles["bf16"] = 2 * fp32
    source = f"nominal: {threads} core x {clock / 1e9:.2f} GHz (no boost) x {fp32} fp32 FLOP a cycle"
    return Peak(flop_per_s={name: threads * clock * flop for name, flop in cycles.items()}, source=source)


def catalogue_peak(part: str) -> Peak:
    """Data-sheet peak of a GPU by its name, from parts.yaml; empty where it is not listed."""
    entry = _catalogue_entry(part)
    if entry is None:
        return Peak(source=f"{part} is not in the catalogue; state peak in the site file")
    return Peak.model_validate({key: value for key, value in entry.items() if key != "memory_gib"})


def catalogue_memory_gib(part: str) -> float | None:
    """The least memory a GPU of that name is sold with, from parts.yaml; None where it is not listed."""
    entry = _catalogue_entry(part)
    return float(entry["memory_gib"]) if entry else None


def _catalogue_entry(part: str) -> dict[str, Any] | None:
    words = part.lower().replace("-", " ").split()
    parts = _catalogue().items()
    return next((entry for key, entry in parts if all(word in words for word in key.lower().split())), None)


@cache
def _catalogue() -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((SHIPPED.parent / "parts.yaml").read_text()))


@cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n", 1)[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _clock_hz(info: Mapping[str, str]) -> float | None:
    stated = Path("/sys/devices/system/cpu/cpu0/cpufreq/base_frequency")
    if stated.exists():
        return float(stated.read_text()) * 1e3
    return float(info["cpu MHz"]) * 1e6 if "cpu MHz" in info else None


def _folders() -> list[Path]:
    return [Path("sites"), SHIPPED]


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise SaihError(f"site file {name} does not exist")
        return path
    for folder in _folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise unknown("site", name, names())
