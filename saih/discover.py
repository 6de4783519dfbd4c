"""Look at a machine and write down its site file, each line with where its value comes from."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from saih import schedulers, site, yamlfile
from saih.errors import SaihError, unknown

MEASURED, GUESS = "measured here", "a guess to check"
ASK_S = 30.0
"""How long a command may take to answer."""
SINFO_FORMAT = "%P|%a|%l|%D|%s|%X|%Y|%Z|%m|%G"
LONGEST_JOB_MINUTES = 120.0
DEFAULT_JOB_MINUTES = 60.0
GPU_QUERY = "nvidia-smi --query-gpu=name,memory.total --format=csv"


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind in a Slurm partition, as one line of sinfo has them."""

    partition: str
    is_default: bool
    is_up: bool
    minutes: float | None
    """The longest job; None where there is no limit."""
    nodes: int
    """How many there are, or may be in one job if that is fewer."""
    cores: int
    memory_gib: float
    gpus: int = 0
    gpu_type: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a site file: a key (`submit.partition` stands below `submit`), its value and its source.

    Without a value it is a comment that says what to fill in.
    """

    key: str
    value: Any
    source: str


@dataclass
class Discovery:
    """What was found on a machine."""

    name: str
    lines: list[Line] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    """Sentences for whoever asked."""
    to_do: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, source: str) -> None:
        self.lines.append(Line(key, value, source))

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return next(str(line.value) for line in self.lines if line.key == "device" and line.value)


def look(name: str | None, scheduler: str | None, partition: str | None) -> Discovery:
    """The site this machine is; SaihError where the scheduler or partition asked for is not here."""
    here = scheduler or find_scheduler()
    if here not in schedulers.names():
        raise unknown("scheduler", here, schedulers.names())
    cluster = slurm_setting(_ask("scontrol", "show", "config") if here == "slurm" else "", "ClusterName")
    found = Discovery(name or _plain(cluster or socket.gethostname().split(".")[0]))
    if not re.fullmatch(site.NAME, found.name):
        raise SaihError(f"site name {found.name!r} must have only letters, digits and . - _")
    found.add("description", f"{found.name}, as {socket.gethostname()} sees it", "for people")
    found.add("scheduler", here, "its commands answer here" if here != "local" else "no batch scheduler answers here")
    if here == "slurm":
        _describe_slurm(found, partition)
    else:
        if partition is not None:
            raise SaihError(f"--partition {partition}: only looked up in Slurm, and the scheduler here is {here}")
        _describe_this_machine(found, here)
    if found.device == "cpu":
        for variable, value in yamlfile.load(site.SHIPPED / "local.yaml", site.SiteFile).environment.items():
            found.add(f"environment.{variable}", value, "as in the site local, which says why")
    found.add("python", sys.executable, "the interpreter that runs saih; jobs must find it at the same place")
    return found


def find_scheduler() -> str:
    """Which scheduler answers here, or local for none; Flux first, which answers inside its own instances only."""
    for name in schedulers.names():
        question = schedulers.load(name).QUESTION
        if question and _ask(*question):
            return name
    return "local"


def _describe_slurm(found: Discovery, partition: str | None) -> None:
    told = _ask("sinfo", "--noheader", "--exact", f"--format={SINFO_FORMAT}")
    groups = parse_sinfo(told)
    if not groups:
        raise SaihError("sinfo lists no partition here; run saih site init where Slurm answers")
    group = choose(groups, partition)
    others = sorted({each.partition for each in groups} - {group.partition})
    kinds = sum(each.partition == group.partition for each in groups)
    found.found.append(f"Slurm: partition {group.partition} of {len(others) + 1}, {_nodes_in_words(group)}")
    mpi_types = parse_mpi_types(_ask("srun", "--mpi=list"))
    flavour = mpi_flavour(_mpiexec_version())
    found.found.append(f"MPI: {flavour or 'no mpiexec'} here; srun --mpi offers {', '.join(mpi_types) or 'nothing'}")
    found.add("launcher", "srun", f"{GUESS}: Slurm's own; torchrun, and mpiexec or openmpi with an MPI, go too")
    mpi = suitable_mpi(flavour, mpi_types)
    if mpi:
        found.add("mpi", mpi, f"{GUESS}: srun --mpi=list offers it, and it suits {flavour}")
    else:
        found.add("mpi", None, f"pmi2 or pmix, if ranks are to talk through an MPI; offered: {', '.join(mpi_types)}")
    some = f"; it has {kinds} kinds of nodes, these are the most numerous with GPUs" if kinds > 1 else ""
    found.add("nodes", group.nodes, f"asked of sinfo: nodes of partition {group.partition} for one job{some}")
    _add_devices(found, group.gpus, group.gpu_type, group.cores, f"asked of sinfo, partition {group.partition}")
    found.add("node_memory_gib", group.memory_gib, "asked of sinfo")
    longest = group.minutes or DEFAULT_JOB_MINUTES
    limit = "no limit" if group.minutes is None else f"{group.minutes:g}"
    found.add("job_minutes", min(longest, LONGEST_JOB_MINUTES), f"sinfo's limit is {limit}; shorter jobs start sooner")
    default = "; Slurm's default" if group.is_default else ""
    more = f"; there are also: {', '.join(others)}" if others else ""
    found.add("submit.partition", group.partition, f"asked of sinfo{default}{more}")
    _add_account(found)
    memory_limit = _memory_limit(group.partition)
    if memory_limit:
        found.add("submit.extra", ["--mem=0"], f"asked of scontrol: a job gets {memory_limit} else; 0 is all memory")


def _describe_this_machine(found: Discovery, scheduler: str) -> None:
    gpus = site.find_gpus()
    cores = len(os.sched_getaffinity(0))
    memory_gib = _rounded(site.memory_bytes() / site.GIB)
    flavour = mpi_flavour(_mpiexec_version())
    found.found.append(f"{scheduler}: {cores} cores, {memory_gib:g} GiB, {len(gpus)} GPUs; MPI: {flavour or 'none'}")
    found.add("launcher", "torchrun", f"{GUESS}: comes with torch; mpiexec or openmpi go where there is an MPI")
    if scheduler != "local":
        found.add("nodes", 1, f"{GUESS}: how many nodes one job may have")
        found.to_do.append("nodes, cores and memory are this machine's: state those of a compute node")
    if gpus:
        found.add("device", "cuda", f"{MEASURED}: nvidia-smi")
        found.add("device_name", gpus[0][0], f"{MEASURED}: nvidia-smi")
        found.add("gpus_per_node", len(gpus), f"{MEASURED}: nvidia-smi")
        found.add("device_memory_gib", _rounded(gpus[0][1] / site.GIB), f"{MEASURED}: nvidia-smi")
        found.add("threads_per_rank", max(1, cores // len(gpus)), f"{MEASURED}: cores over GPUs")
    else:
        _add_devices(found, 0, "", cores, MEASURED)
    found.add("node_memory_gib", memory_gib, MEASURED)
    found.add("job_minutes", DEFAULT_JOB_MINUTES, f"{GUESS}: the longest job")


def _add_devices(found: Discovery, gpus: int, gpu_type: str, cores: int, source: str) -> None:
    """GPUs where their memory is known; else the cores, and what to fill in."""
    part = gpu_name(gpu_type)
    stated = re.search(r"\b(\d+)GB\b", part)
    memory_gib = float(stated[1]) if stated else site.catalogue_memory_gib(part)
    if gpus and memory_gib:
        found.add("device", "cuda", f"{source}: gres gpu:{gpu_type}:{gpus}")
        found.add("device_name", part, f"from the gres; {GUESS}: {GPU_QUERY}")
        found.add("gpus_per_node", gpus, source)
        found.add("device_memory_gib", memory_gib, f"{GUESS}: from the name, or the least such a part has; {GPU_QUERY}")
        found.add("threads_per_rank", max(1, cores // gpus), f"{source}: {cores} cores over {gpus} GPUs")
        return
    if gpus:
        found.to_do.append(
            f"the {gpus} GPUs a node are of a type saih does not know ({gpu_type or 'the gres has no type'}): "
            "state their memory in the lines that say so; until then the processors are measured"
        )
        found.add("device", None, f"cuda, instead of cpu below, and so on with the next lines; {GPU_QUERY}")
        found.add("device_name", None, "the GPU's name as nvidia-smi has it")
        found.add("device_memory_gib", None, f"GiB; the gres {gpu_type or 'gpu'} does not tell")
        found.add("gpus_per_node", None, f"{gpus}; {source}")
        found.add("threads_per_rank", None, f"{max(1, cores // gpus)}; {cores} cores over {gpus} GPUs")
    found.add("device", "cpu", f"{source}: no GPU whose memory is known")
    found.add("gpus_per_node", cores, f"{source}: ranks a node, one a core")
    found.add("threads_per_rank", 1, "cores over ranks")


def _add_account(found: Discovery) -> None:
    accounts = sorted(set(_ask("sacctmgr", "-nP", "show", "associations", f"user={_user()}", "format=Account").split()))
    if len(accounts) == 1:
        found.add("submit.account", accounts[0], "asked of sacctmgr: your only one")
    else:
        known = f"one of {', '.join(accounts)}" if accounts else "sacctmgr tells none"
        found.add("submit.account", None, f"who pays, if sbatch asks for it: {known}")
    if len(accounts) > 1:
        found.to_do.append(f"name the account that pays: {known}")


def parse_sinfo(text: str) -> list[NodeGroup]:
    """Node groups from lines of `sinfo --format=SINFO_FORMAT`; lines of another form are skipped."""
    groups = []
    for line in text.splitlines():
        fields = [each.strip() for each in line.split("|")]
        numbers = [_leading(each) for each in fields[3:4] + fields[5:7] + fields[8:9]]
        if len(fields) != 10 or None in numbers:
            continue
        nodes, sockets, cores, megabytes = (number or 0 for number in numbers)
        most = _leading(fields[4].rpartition("-")[2])
        gpus, gpu_type = parse_gres(fields[9])
        groups.append(
            NodeGroup(
                partition=fields[0].removesuffix("*"),
                is_default=fields[0].endswith("*"),
                is_up=fields[1] == "up",
                minutes=parse_minutes(fields[2]),
                nodes=min(nodes, most) if most else nodes,
                cores=max(1, sockets * cores),
                memory_gib=_rounded(megabytes / 1024),
                gpus=gpus,
                gpu_type=gpu_type,
            )
        )
    return groups


def parse_gres(text: str) -> tuple[int, str]:
    """(count, type) of the GPUs in "gpu:a100:4(S:0-1),nvme:1"; the type is "" in "gpu:4"; (0, "") without GPUs.

    Several types on one node are no one device: the more numerous type counts.
    """
    found: list[tuple[int, str]] = []
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        words = part.strip().split(":")
        if words[0] == "gpu" and len(words) > 1 and words[-1].isdigit():
            found.append((int(words[-1]), ":".join(words[1:-1])))
    return max(found, default=(0, ""))


def parse_minutes(text: str) -> float | None:
    """Minutes of Slurm's "2-00:00:00", "1:00:00", "30:00"; None for "infinite" and what is no time."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(each or 0) for each in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60 or None


def choose(groups: Sequence[NodeGroup], partition: str | None) -> NodeGroup:
    """The nodes to describe: of the partition asked for, else with GPUs, up, in the default partition, numerous."""
    named = [each for each in groups if partition in (None, each.partition)]
    if not named:
        raise unknown("partition", partition, dict.fromkeys(each.partition for each in groups))
    return max(named, key=lambda each: (each.is_up, each.gpus > 0, each.is_default, each.nodes))


def gpu_name(gres_type: str) -> str:
    """ "a100" or "nvidia_a100-sxm4-80gb" -> a name as nvidia-smi has it; "" for a slice of a GPU or no type."""
    words = [word for word in re.split(r"[-_: ]+", gres_type) if word.lower() not in ("nvidia", "tesla", "")]
    if not words or re.search(r"\d+g\.\d+gb", gres_type):
        return ""
    return " ".join(["NVIDIA", *(word.upper() for word in words)])


def slurm_setting(config: str, key: str) -> str:
    """A value from `scontrol show config`, "" where it is not there."""
    match = re.search(rf"^{re.escape(key)}\s*=\s*(.*?)\s*$", config, re.MULTILINE)
    return match[1] if match and match[1] != "(null)" else ""


def parse_mpi_types(text: str) -> list[str]:
    """Those of saih's PMI types that `srun --mpi=list` offers."""
    words = set(re.findall(r"[\w-]+", text.partition("specific")[0]))
    return [each for each in ("pmi2", "pmix") if each in words]


def mpi_flavour(version: str) -> str:
    """MPICH, Intel MPI, Open MPI or Cray MPICH, from what `mpiexec --version` prints; "" for anything else."""
    for pattern, flavour in {
        r"Open ?MPI|OpenRTE|PRRTE": "Open MPI",
        r"Intel\(R\) MPI": "Intel MPI",
        r"PALS|cray": "Cray MPICH",
        r"HYDRA|MPICH": "MPICH",
    }.items():
        if re.search(pattern, version, re.IGNORECASE):
            return flavour
    return ""


def suitable_mpi(flavour: str, offered: Sequence[str]) -> str:
    """What srun --mpi is told for ranks of that MPI: Open MPI takes PMIx, MPICH and its kin PMI-2."""
    wanted = "pmix" if flavour == "Open MPI" else "pmi2"
    return wanted if flavour and wanted in offered else ""


def render(found: Discovery) -> str:
    """The site file: YAML, each value with its source as a comment."""
    head = [
        f"# Site {found.name}, written by saih site init. Behind each value stands where it comes from.",
        "# Then: saih site check " + found.name,
    ]
    top = [line for line in found.lines if "." not in line.key]
    blocks = dict.fromkeys(line.key.partition(".")[0] for line in found.lines if "." in line.key)
    body = [_yaml_line(line.key, line) for line in top]
    for block in blocks:
        inside = [line for line in found.lines if line.key.startswith(f"{block}.")]
        is_empty = all(line.value is None for line in inside)
        body.append(f"# {block}:" if is_empty else f"{block}:")
        body += [_yaml_line("  " + line.key.partition(".")[2], line) for line in inside]
    return "\n".join([*head, *body]) + "\n"


def _yaml_line(key: str, line: Line) -> str:
    source = "".join(letter if letter.isprintable() else "?" for letter in line.source)
    if line.value is None:
        return f"# {key}:   # fill in: {source}"
    return f"{key}: {quoted(line.value)}   # {source}"


def quoted(value: object) -> str:
    """A value as YAML on one line, whatever characters it has."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]


def _nodes_in_words(group: NodeGroup) -> str:
    gpus = f", {group.gpus} GPUs ({group.gpu_type or 'no type'})" if group.gpus else ""
    limit = "no time limit" if group.minutes is None else f"at most {group.minutes:g} min"
    return f"{group.nodes} nodes with {group.cores} cores, {group.memory_gib:g} GiB{gpus}, {limit}"


def _memory_limit(partition: str) -> str:
    """What a job of this partition gets where it does not say: "DefMemPerCPU=2000 MB"; "" for all memory."""
    told = _ask("scontrol", "show", "partition", partition, "--oneliner") + " ".join(
        line.replace(" ", "") for line in _ask("scontrol", "show", "config").splitlines()
    )
    match = re.search(r"\b(DefMemPer(?:CPU|Node|GPU))=(\d+)", told)
    return f"{match[1]}={match[2]} MB" if match and int(match[2]) else ""


def _mpiexec_version() -> str:
    beside = Path(sys.executable).parent / "mpiexec"
    return _ask(str(beside) if beside.exists() else "mpiexec", "--version")


def _ask(*words: str) -> str:
    """What a command prints; "" where it is missing, fails or does not answer in time."""
    if shutil.which(words[0]) is None:
        return ""
    environment: Mapping[str, str] = os.environ | {"SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=ASK_S, env=environment, errors="replace"
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    told = answer.stdout or (answer.stderr if "--mpi=list" in words else "")
    return told if answer.returncode == 0 else ""


def _leading(text: str) -> int | None:
    """4000 of "4000+" """
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def _rounded(gib: float) -> float:
    return int(gib * 10) / 10


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "here"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
