"""What a measurement was made on: processor, GPU, driver, versions, host, clocks, scheduler ids."""

from __future__ import annotations

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
    "commit",
    "dirty",
)
"""Two measurements that differ in one of these do not belong in one trend."""

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
        "gpu_driver": _nvidia("driver_version") if cuda else "",
        "gpu_clock_mhz": _number(_nvidia("clocks.sm")) if cuda else None,
        "gpu_power_limit_w": _number(_nvidia("power.limit")) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "host": socket.gethostname(),
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "scheduler_ids": {name: os.environ[name] for name in SCHEDULER_PREFIXES if name in os.environ},
        **version,
    }


def own_version() -> dict[str, Any]:
    """This saih: version, and commit and dirty flag where it runs from a git checkout."""
    from saih import __version__

    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    dirty = (
        bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", "saih", "workloads"))
        if commit
        else False
    )
    return {"saih": __version__, "commit": commit or "", "dirty": dirty}


def _git(root: Path, *words: str) -> str | None:
    tool = shutil.which("git")
    if tool is None:
        return None
    answer = subprocess.run([tool, "-C", str(root), *words], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _nvidia(field: str) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
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
