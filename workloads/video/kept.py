"""What a bench finds out once and then reads from disk: made here, by this code, from what its name was made of."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saih.files import write_atomic

PACKAGES = ("torch", "diffusers", "transformers", "cache-dit")
"""Whose arithmetic what is kept rests on."""


def kept_path(folder: Path, kind: str, *told: object) -> Path:
    """The JSON file in `folder` for what follows from `told` (plain data), this family's code, the packages that
    compute and the processor."""
    maker = _source_digest(), *(_version(package) for package in PACKAGES), _processor()
    name = hashlib.sha256(json.dumps([*maker, *told]).encode()).hexdigest()[:16]
    return folder / f"{kind}-{name}.json"


def made_once(path: Path, make: Callable[[], Any]) -> Any:
    """Plain data from `path`, or made and kept there."""
    if not path.exists():
        told = json.dumps(make()).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(told))
    return json.loads(path.read_text())


def digest(latents: Tensor) -> str:
    """Of the bits of a video."""
    return hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest()[:16]


def _version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The GPU's name where there is one, and the CPU's."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    cpu = next((line for line in lines if line.startswith("model name")), platform.machine())
    return f"{gpu} {cpu}"


def _source_digest() -> str:
    """Of this family's code: other code makes its own."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]
