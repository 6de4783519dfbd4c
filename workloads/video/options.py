"""What planning knows of any video workload: shared parameters and ladders, sizes of models, cost. Without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

from saih.core import Axis, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.video import shapes

VIDEO = (
    Parameter("frames", 8, "latent frames", "of a video", minimum=1),
    Parameter("rows", 24, "latent rows", "of a video", minimum=2),
    Parameter("columns", 24, "latent columns", "of a video", minimum=2),
    Parameter("denoise_steps", 50, "steps", "of the uncached run", minimum=4),
    Parameter("guidance", 5.0, "", "scale of classifier-free guidance", minimum=0),
)
MEASURED = (
    Parameter("videos", 6, "videos", "prompts that quality is measured on", minimum=1),
    Parameter(
        "prompts", "", "", "a text file of prompts, one a line; needed for a checkpoint with a text encoder", path=True
    ),
    Parameter("lpips", "", "", "a file with LPIPS's weights, see the README; empty: LPIPS is not measured", path=True),
    Parameter("precision", "fp32", "", "of weights and arithmetic", choices=("fp32", "bf16")),
)

_GRIDS = ((8, 16, 16), (8, 24, 24), (8, 32, 32), (16, 48, 48), (20, 60, 104))
DATA = Axis(
    "data",
    "latent frames x rows x columns",
    tuple(
        Rung("x".join(map(str, grid)), dict(zip(("frames", "rows", "columns"), grid, strict=True)), prod(grid))
        for grid in _GRIDS
    ),
)
"""8x24x24 is the toy's own grid, 20x60x104 is 480p and 77 frames with Wan's VAE."""


def grid(params: Params) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a video."""
    return int(params["frames"]), int(params["rows"]), int(params["columns"])


def branches(params: Params, dit: shapes.DiT) -> int:
    """Forwards of a step: one more where guidance is above 1, unless the model takes it as an input."""
    return dit.branches if float(params["guidance"]) > 1 else 1


def folder(model: str) -> Path:
    """Where a model named in the parameters is: one of those shipped, or a folder itself."""
    weights = Path(__file__).parent / "toy" / "weights"
    shipped = {"toy": "large", "toy-small": "small", "toy-4step": "student"}
    return weights / shipped[model] if model in shipped else Path(model)


def shape(model: str, layers: int, width: int, family: str = "wan") -> shapes.DiT:
    """A transformer by name; layers, width and family are of random weights.

    Raises:
        SaihError: the name is no folder with a checkpoint.
    """
    if model in shapes.TOYS:
        return shapes.TOYS[model]
    if model == "random":
        return shapes.random(family, layers, width)
    described = Path(model) / "transformer" / "config.json"
    if not described.is_file():
        raise SaihError(
            f"model {model}: neither {', '.join(shapes.TOYS)} nor random, nor a folder with transformer/config.json"
        )
    return shapes.of_config(json.loads(described.read_text()))


def cost(params: Params, models: Sequence[tuple[shapes.DiT, float]], work: float, check_steps: float) -> Cost:
    """Of one request on one rank.

    Args:
        models: each with its forwards for a video.
        work: of a video in the workload's unit.

    Raises:
        SaihError: the grid is not a whole number of patches.
    """
    size, word, batch = grid(params), 2 if params["precision"] == "bf16" else 4, int(params.get("batch", 1))
    operations: list[Operation] = []
    for dit, forwards in models:
        if any(extent % step for extent, step in zip(size, dit.patch, strict=True)):
            raise SaihError(f"a grid of {size} is not a whole number of patches of {dit.patch}")
        kernels = int(3 * dit.layers * forwards)  # self-attention, cross-attention, feed-forward
        moved = forwards * word * (dit.parameters + 40.0 * batch * dit.layers * dit.tokens(size) * dit.width)
        if kernels:
            operations += [Operation(batch * forwards * dit.forward_flop(size) / kernels, moved / kernels)] * kernels
    activations = max(
        dit.tokens(size) * (12.0 * dit.width + dit.hidden) + 10.0 * prod(size) * dit.channels for dit, _ in models
    )
    parameters = sum(dit.parameters for dit, _ in models)
    return Cost(
        flop=batch * sum(forwards * dit.forward_flop(size) for dit, forwards in models),
        work=batch * work,
        operations=tuple(operations),
        parameters=parameters,
        device_bytes=word * (parameters + batch * activations),
        check_steps=check_steps,
    )
