"""What a bench finds out once and then reads from disk: made by this very code from what its name was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from saih.files import write_atomic


def kept_path(folder: Path, kind: str, *told: object) -> Path:
    """The JSON file in `folder` for what follows from `told` (plain data) and from this family's code."""
    name = hashlib.sha256(json.dumps([_source_digest(), *told]).encode()).hexdigest()[:16]
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


def _source_digest() -> str:
    """Of this family's code: other code makes its own."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]
