"""Fill a stage's weights: from a local Hugging Face checkpoint, or at random; only this rank's slices, ever."""

from __future__ import annotations

from pathlib import Path

from workloads.llm.model import Stage


def load(stage: Stage, folder: Path | str) -> int:
    """Read this stage's slices of a checkpoint folder (config.json, *.safetensors, an index if sharded).

    Returns the bytes read. Raises SaihError if a tensor is missing or has another shape than the spec says.
    Needs the safetensors package.
    """
    raise NotImplementedError


def random_init(stage: Stage, seed: int, std: float = 0.02) -> None:
    """Weights uniform with this deviation, norms 1, biases 0: the same model for any split and on any device.

    An element depends only on the seed, its tensor's name and its place there, so a rank makes its own slices alone.
    """
    raise NotImplementedError
