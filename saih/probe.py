"""The ceilings of a site: swept once by the `ceilings` workload, kept with the results, refused for other machines."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saih.analysis.ceilings import mismatch
from saih.errors import SaihError
from saih.files import read_json, write_json
from saih.site import Site, cpu_name, find_gpus

WORKLOAD = "ceilings"
AXES: dict[str, list[bool | int | float | str] | None] = {"kernel": None, "size": None, "precision": ["fp32", "bf16"]}
SETTINGS = {"seconds": 0.1, "steps": 3, "max_steps": 20}
REPEAT = 3
TIME_BUDGET_S = 30.0


def path_of(results: Path, site: Site) -> Path:
    """Where the ceilings of a site are kept."""
    return results / f"ceilings-{site.name}.json"


def save(results: Path, site: Site, ceilings: dict[str, Any], source: Path) -> Path:
    """Keep the ceilings, with the results file they come from."""
    path = path_of(results, site)
    write_json(path, ceilings | {"site": site.name, "results": source.name})
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
