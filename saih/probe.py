"""The ceilings of a site: the `ceilings` workload swept part by part, kept with the results, refused elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saih.analysis.ceilings import mismatch
from saih.core import Value
from saih.errors import SaihError
from saih.files import read_json, write_json
from saih.launchers import MPI_LAUNCHERS, find_mpi
from saih.site import Site, cpu_name, find_gpus

WORKLOAD = "ceilings"
REPEAT = 3
MESSAGES = tuple(2**power for power in (3, 10, 16, 20, 22, 24, 26))
DENSE = ("gemm", "conv3d", "copy", "triad")
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
AT_ONCE = "kernels at once"
Axes = Mapping[str, Sequence[Value] | None]


@dataclass(frozen=True)
class Part:
    """One grid of the ceilings workload, with a results file of its own."""

    axes: Axes
    settings: Mapping[str, Value]
    time_budget_s: float
    launcher: str = ""
    """What starts its ranks; empty for what the site says."""


def parts(site: Site) -> dict[str, Part]:
    """What is swept on a site: host links where devices have one, collectives where there are several ranks."""
    quick: dict[str, Value] = {"seconds": 0.1, "steps": 3, "max_steps": 20}
    several = _several_ranks(site, quick)
    at_once = {name: part for name, part in several.items() if name == AT_ONCE}  # their rates give way to `kernels`
    found = at_once | {
        "kernels": Part({"kernel": DENSE, "size": None, "precision": PRECISIONS[site.device]}, quick, 40.0)
    }
    if site.device == "cuda":
        axes: Axes = {"kernel": ("upload", "download"), "pinned": (False, True), "size": (1024, 4096, 8192)}
        found["host link"] = Part(axes, quick, 30.0)
    found |= several
    axes = {"kernel": ("read", "write"), "pattern": None, "cache": None}
    found["storage"] = Part(axes, {"seconds": 0.2, "steps": 3, "warmup": 1, "max_steps": 20}, 60.0)
    found["launch and open"] = Part({"kernel": ("open", "launch")}, quick, 30.0)
    return found


def _several_ranks(site: Site, quick: Mapping[str, Value]) -> dict[str, Part]:
    """What ranks do at once on a node; what passes between those of a node, and between all those of several nodes."""
    found = {}
    if site.gpus_per_node > 1:
        gpus = [1, *_counts(site.gpus_per_node)]
        precisions = PRECISIONS[site.device]
        axes: Axes = {"kernel": ("conv3d", "copy"), "size": (1024, 4096), "precision": precisions, "gpus": gpus}
        found[AT_ONCE] = Part(axes, quick, 50.0)
        found |= _between(site, "gpus", site.gpus_per_node, quick, "")
    if site.nodes > 1:
        found |= _between(site, "nodes", site.nodes, {**quick, "gpus": site.gpus_per_node}, " over nodes")
    return found


def _between(site: Site, ranks: str, most: int, quick: Mapping[str, Value], where: str) -> dict[str, Part]:
    """Collectives over up to so many GPUs of a node, or nodes, by torch and by MPI where there is one; two of them."""
    axes: Axes = {"kernel": ("allreduce",), "message_bytes": MESSAGES, ranks: _counts(most)}
    found = {f"collectives{where}": Part(axes, quick, 60.0)}
    launcher = _mpi_launcher(site)
    if launcher:
        found[f"collectives{where} over MPI"] = Part({**axes, "transport": ("mpi",)}, quick, 30.0, launcher)
    two: dict[str, Value] = {**quick, "gpus": 1, ranks: 2}
    found[f"point to point{where}"] = Part({"kernel": ("pingpong",), "message_bytes": MESSAGES}, two, 30.0)
    return found


def _counts(most: int) -> list[Value]:
    """Powers of two from 2 on, and all there are: a node of 6 GPUs is used as 6, not as 4."""
    return [*(2**power for power in range(1, (most - 1).bit_length())), most]


def _mpi_launcher(site: Site) -> str:
    """What starts ranks that MPI knows; empty where there is no MPI, or no mpi4py."""
    if find_spec("mpi4py") is None:
        return ""
    if site.launcher in MPI_LAUNCHERS or (site.launcher == "srun" and site.mpi):
        return site.launcher
    return find_mpi() if site.scheduler == "local" else ""


def path_of(results: Path, site: Site) -> Path:
    """Where the ceilings of a site are kept."""
    return results / f"ceilings-{site.name}.json"


def save(results: Path, site: Site, ceilings: dict[str, Any], sources: Sequence[Path]) -> Path:
    """Keep the ceilings, with the results files they come from."""
    path = path_of(results, site)
    write_json(path, ceilings | {"site": site.name, "results": [source.name for source in sources]})
    return path


def load(results: Path, site: Site) -> tuple[dict[str, Any] | None, str]:
    """The stored ceilings of a site, or None and why: not probed yet, or probed on another machine or torch."""
    path = path_of(results, site)
    if not path.exists():
        return None, f"site {site.name} has not been probed"
    ceilings = read_json(path)
    if not isinstance(ceilings, dict) or not {"rates", "machine"} <= ceilings.keys():
        raise SaihError(f"{path}: not a file of ceilings; remove it and run: saih probe")
    difference = mismatch(ceilings, _here(site, ceilings)) if site.scheduler == "local" else ""
    if difference:
        return None, f"{path} was measured elsewhere: {difference}"
    return dict(ceilings), ""


def _gpu_here(site: Site) -> str:
    """The GPU's own name, whatever the site calls it."""
    found = find_gpus()
    return found[0][0] if found else site.device_name


def _here(site: Site, ceilings: dict[str, Any]) -> dict[str, Any]:
    """What planning can know of this machine without importing torch."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    stored = ceilings["machine"]
    same_torch = bool(torch) and str(stored.get("torch", "")).split("+")[0] == torch.split("+")[0]
    return {
        "processor": cpu_name(),
        "gpu": _gpu_here(site) if site.device == "cuda" else "",
        "torch": stored.get("torch") if same_torch else torch,
        "threads": site.threads_per_rank,
    }
