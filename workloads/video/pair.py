"""Whether two checkpoints can work on one video: the same latents, conditions and schedule. Read from their configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saih.errors import SaihError

SHARED = {
    "transformer/config.json": (
        *("_class_name", "in_channels", "out_channels", "text_dim", "text_embed_dim", "pooled_projection_dim"),
        *("guidance_embeds", "use_rotary_positional_embeddings"),
    ),
    "vae/config.json": (),
    "text_encoder/config.json": (),
    "scheduler/scheduler_config.json": (),
}
"""File of a checkpoint folder -> keys that must be equal; none means all, but those that say where a file came from."""
ORIGIN = ("_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


def check(large: Path, small: Path) -> None:
    """Raises SaihError for two checkpoint folders of which one could not go on where the other stopped.

    Weights are not compared: two VAEs of one config are taken for the same one.
    """
    for name, keys in SHARED.items():
        ours, theirs = _config(large / name), _config(small / name)
        for key in keys or sorted({*ours, *theirs} - {*ORIGIN}):
            if ours.get(key) != theirs.get(key):
                raise SaihError(
                    f"{large} and {small} do not share latents, text and schedule: {name} has "
                    f"{key}={ours.get(key)} and {theirs.get(key)}"
                )
    if _words(large) != _words(small):
        raise SaihError(f"{large} and {small} do not share text: their tables of words differ")


def _config(path: Path) -> Mapping[str, Any]:
    """Empty where there is no such file: a toy has neither VAE nor text encoder."""
    content: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _words(folder: Path) -> bytes:
    path = folder / "words.safetensors"
    return path.read_bytes() if path.is_file() else b""
