"""What a measurement was made on: processor, GPU, driver, versions, host, clocks, scheduler ids."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

MACHINE_KEYS = (
    "processor",
    "gpu",
    "gpu_driver",
    "torch",
    "cuda",
    "python",
    "kernel",
    "threads",
    "saih",
    "source",
)
"""Two measurements that differ in one of these do not belong in one trend."""

MEASURING = (
    *("core", "errors", "files", "workload", "launchers", "mpi", "timing", "lifeline", "load", "energy", "environment"),
    "worker",
)
"""Modules of saih that run inside a job."""

SCHEDULER_PREFIXES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "PBS_JOBID", "FLUX_JOB_ID")


def capture(device: str, version: dict[str, Any]) -> dict[str, Any]:
    """The environment of this process; `version` is what the submitting saih said of itself."""
    import torch

    cuda = device.startswith("cuda")
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "processor": _proc_field("/proc/cpuinfo", "model name") or platform.machine(),
        "processor_mhz": _number(_proc_field("/proc/cpuinfo", "cpu MHz")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": "cuda" if cuda else "cpu",
        "gpu": properties.name if properties else "",
        "gpu_memory_bytes": properties.total_memory if properties else None,
        "gpu_driver": _nvidia("driver_version", properties) if properties else "",
        "gpu_clock_max_mhz": _number(_nvidia("clocks.max.sm", properties)) if properties else None,
        "gpu_power_limit_w": _number(_nvidia("power.limit", properties)) if properties else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "host": socket.gethostname(),
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "scheduler_ids": {name: os.environ[name] for name in SCHEDULER_PREFIXES if name in os.environ},
        **version,
    }


def own_version(workload: Path) -> dict[str, Any]:
    """This saih: version, digest of the code that measures a workload, and of a git checkout its commit and dirty flag.

    `workload` is the folder with the code of its family.
    """
    from saih import __version__

    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "saih", "workloads") if commit else ""
    return {"saih": __version__, "source": source_digest(workload), "commit": commit or "", "dirty": bool(changes)}


def source_digest(workload: Path) -> str:
    """Digest of the Python a measurement depends on, the worker's side of saih and the workload's family; 16 digits."""
    own = Path(__file__).resolve().parent
    files = {f"saih/{name}.py": own / f"{name}.py" for name in MEASURING}
    files |= {str(path.relative_to(workload.parent)): path for path in sorted(workload.rglob("*.py"))}
    content = hashlib.sha256()
    for name, path in files.items():
        content.update(f"{name}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _git(root: Path, *words: str) -> str | None:
    tool = shutil.which("git")
    if tool is None:
        return None
    answer = subprocess.run([tool, "-C", str(root), *words], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _nvidia(field: str, properties: Any) -> str:
    """What nvidia-smi says of this very device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, f"--id=GPU-{properties.uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else ""


def _proc_field(path: str, field: str) -> str:
    source = Path(path)
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
