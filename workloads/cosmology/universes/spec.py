"""What making a universe is and what it costs: axes, parameters, passes over memory, claims. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

from saih.core import Axis, Claim, Cost, Need, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.cosmology.recipe import FIDELITIES, Recipe
from workloads.cosmology.storages import DEFAULT_STORAGE, LARGEST_CHUNK_BYTES, STORAGES

TITLE = "Universes: dark-matter volumes from a linear power spectrum, by 2LPT or a particle mesh (generation)"
PAPER = "2LPT: Scoccimarro, MNRAS 299, 1097, 1998; FastPM: Feng et al., MNRAS 463, 2273, 2016"
CHECK = (
    "counts have the mean they must have and, but for powerbox, on the longest waves the structure of their "
    "linear field; slabs give the voxels of one rank"
)
WORK_UNIT = "bytes"
NEEDS = {"engine": {name: Need(name, "pip install 'saih[generators]'") for name in ("pycola3", "powerbox")}}

WORD = {"fp32": 4, "fp64": 8}
REFINE = {1: 1, 8: 2, 27: 3}
"""Particles a voxel -> lattice points a voxel along each axis."""
STEPS = 10
TRANSFORMS = 13
"""Of 2LPT: 6 second derivatives and their source, 3 + 3 components of displacement; the noise needs none."""

PARAMETERS = (
    Parameter("mesh", 64, "voxels per side", "side of a universe", minimum=8),
    Parameter("channels", 4, "redshifts", "snapshots of a universe", choices=(1, 2, 3, 4)),
    Parameter("box_mpc_h", 0.0, "Mpc/h", "side of the box; 0: 4 Mpc/h a voxel", minimum=0),
    Parameter("fidelity", "lpt", "", "2LPT, or a particle mesh of 10 steps from it", choices=FIDELITIES),
    Parameter("particles", 1, "per voxel", "of the lattice, whose waves are as short as it allows", choices=(1, 8, 27)),
    Parameter("precision", "fp32", "", "of fields and particles; voxels are int16", choices=tuple(WORD)),
    Parameter(
        "engine",
        "saih",
        "",
        "what makes them: pip install 'saih[generators]' for peers",
        choices=("saih", "pycola3", "powerbox"),
    ),
    Parameter(
        "part",
        "all",
        "",
        "what a step does of it; displacements include their transforms",
        choices=("all", "noise", "transforms", "displacements", "painting"),
    ),
    Parameter(
        "spread",
        "universes",
        "",
        "each rank makes universes of its own, or all together each in slabs",
        choices=("universes", "slabs"),
    ),
    Parameter(
        "output",
        "memory",
        "",
        "a step makes one universe and drops it; or makes what is missing of a data set: saih generate",
        choices=("memory", "folder"),
    ),
    Parameter("samples", 8, "universes", "of the data set, with output=folder", minimum=1),
    Parameter("storage", DEFAULT_STORAGE, "", "how the data set lies on disk", choices=STORAGES),
    Parameter("pieces", 1, "", "that the data set is made in, each by a job", minimum=1),
    Parameter("piece", 0, "", "which of them", minimum=0),
)

GENERATE: Params = {"output": "folder", "warmup": 0, "steps": 1, "max_steps": 1, "seconds": 0.0}

AXES = (
    Axis(
        "data",
        "voxels per side",
        tuple(Rung(str(n), {"mesh": n}, n) for n in (16, 32, 64, 128, 256, 512, 1024, 2048)),
    ),
    Axis(
        "realisations",
        "universes",
        tuple(Rung(str(n), {**GENERATE, "samples": n}, n) for n in (12 * 4**step for step in range(9))),
    ),
)
"""Realisations are data sets on the disk: of 64^3 voxels and 4 channels, 25 MB to 1.65 TB."""

CLAIMS = (
    Claim(
        "over-pycola3",
        "bytes/s over COLA of pycola3 on the same initial displacements, as many steps, largest volume measured",
        "work_per_s",
        {"engine": "saih"},
        {"engine": "pycola3"},
        target=1.0,
        where={"data": "last"},
    ),
    Claim(
        "over-powerbox",
        "bytes/s over log-normal volumes of powerbox with the same power spectrum, largest volume measured",
        "work_per_s",
        {"engine": "saih"},
        {"engine": "powerbox"},
        target=1.0,
        where={"data": "last"},
    ),
    *(
        Claim(
            f"share-of-{part}",
            f"seconds of {text} over seconds of a universe of four channels",
            "step_s",
            {"part": part},
            {"part": "all"},
            target=target,
            better="lower",
            where={"data": "last"},
        )
        for part, text, target in (
            ("transforms", "its Fourier transforms", 0.5),
            ("displacements", "its displacements, with their transforms", 0.75),
            ("painting", "painting all channels", 0.5),
        )
    ),
    Claim(
        "painting-is-not-the-largest",
        "seconds of painting all channels over seconds of the displacements",
        "step_s",
        {"part": "painting"},
        {"part": "displacements"},
        target=1.0,
        better="lower",
        where={"data": "last"},
    ),
)


def recipe(params: Params, seed: int) -> Recipe:
    """What these parameters make."""
    return Recipe(
        int(params["mesh"]),
        int(params["channels"]),
        seed,
        int(params["samples"]),
        float(params["box_mpc_h"]),
        str(params["fidelity"]),
        REFINE[int(params["particles"])],
    )


def data_folder(params: Params, seed: int) -> str:
    """Where below a site's data folder `output=folder` goes: what `saih generate` looks after."""
    return recipe(params, seed).folder_name(str(params["storage"]))


def there_bytes(params: Params, seed: int, root: Path) -> float:
    """Bytes of that data set that are there."""
    return recipe(params, seed).there_bytes(root, str(params["storage"]))


def shares(params: Params) -> list[tuple[int, int]]:
    """Of a piece of the data set: (rank, world) of each rank in its making. Ranks that share a universe are one."""
    ranks = 1 if params["spread"] == "slabs" else int(params["nodes"]) * int(params["gpus"])
    piece, pieces = int(params["piece"]), int(params["pieces"])
    return [(piece * ranks + rank, pieces * ranks) for rank in range(ranks)]


def cost(params: Params) -> Cost:
    """One step of one rank. Raises SaihError for a combination that makes no sense."""
    _refuse(params)
    ranks = int(params["nodes"]) * int(params["gpus"])
    share = ranks if params["spread"] == "slabs" else 1
    voxels = int(params["mesh"]) ** 3 / share
    lattice, word = voxels * int(params["particles"]), WORD[str(params["precision"])]
    operations = _operations(params, lattice, word)
    made, universes, disk = recipe(params, 0), 1.0, 0.0
    if params["output"] == "folder":
        own = [sum(len(made.shard(number)) for number in made.share(*each)) for each in shares(params)]
        universes, disk = float(max(own)), float(sum(own) * made.sample_bytes)
    held = (45 if params["fidelity"] == "lpt" else 90) * lattice * word / 4 + 2 * voxels * int(params["channels"])
    held += 2 * made.sample_bytes if disk and share > 1 else 0  # the first rank joins the slabs
    crossing = 8.0 * lattice * TRANSFORMS if share > 1 else 0.0
    return Cost(
        flop=sum(operation.flop for operation in operations) * universes,
        work=voxels * 2 * int(params["channels"]) * universes,
        operations=tuple(Operation(each.flop * universes, each.moved_bytes * universes) for each in operations),
        device_bytes=held,
        message_bytes=crossing * universes,
        disk_bytes=disk,
        data_set=_piece_name(params) if disk else "",
        check_steps=0 if disk else 2,
    )


def _refuse(params: Params) -> None:
    mesh, ranks = int(params["mesh"]), int(params["nodes"]) * int(params["gpus"])
    engine, fidelity, folder = params["engine"], params["fidelity"], params["output"] == "folder"
    alone = {"pycola3": "pm", "powerbox": "lpt"}
    if engine in alone and fidelity != alone[str(engine)]:
        raise SaihError(f"engine={engine} is compared with fidelity={alone[str(engine)]}, not {fidelity}")
    if engine != "saih" and (
        params["particles"] != 1 or params["channels"] != 1 or params["precision"] != "fp32" or folder
    ):
        raise SaihError(f"engine={engine} makes one channel, one particle a voxel, in fp32, in memory: channels=1")
    if params["part"] != "all" and (engine != "saih" or fidelity != "lpt" or folder or params["spread"] == "slabs"):
        raise SaihError("a part is one of engine=saih, fidelity=lpt, spread=universes, output=memory")
    if params["spread"] == "slabs" and mesh % ranks:
        raise SaihError(f"a mesh of {mesh} planes cannot be shared evenly by {ranks} ranks")
    if params["spread"] == "slabs" and engine != "saih":
        raise SaihError(f"engine={engine} does not make a universe in slabs")
    if folder and params["precision"] != "fp32":
        raise SaihError("a data set is made in fp32")
    if folder and (int(params["steps"]), int(params["warmup"]), int(params["max_steps"])) != (1, 0, 1):
        raise SaihError("output=folder makes a data set in one step: --set warmup=0,steps=1,max_steps=1")
    if int(params["piece"]) >= int(params["pieces"]):
        raise SaihError(f"piece {params['piece']} is not among {params['pieces']}, which are counted from 0")
    volume_bytes = recipe(params, 0).sample_bytes
    if folder and params["storage"] != "npy" and volume_bytes > LARGEST_CHUNK_BYTES:
        raise SaihError(
            f"a universe of {volume_bytes / 1e9:.3g} GB is larger than an HDF5 chunk can be, 4.29 GB; use storage=npy"
        )


def _piece_name(params: Params) -> str:
    return f"{params['samples']} of {data_folder(params, 0)}, piece {params['piece']} of {params['pieces']}"


def _operations(params: Params, lattice: float, word: int) -> list[Operation]:
    """Kernels of one universe in order; the bytes are those of passes over arrays, torch's temporaries among them."""
    transform = Operation(2.5 * lattice * math.log2(lattice), 12 * word * lattice)
    derivative = Operation(6 * lattice, 4 * word * lattice)
    painting = Operation(60 * lattice, 60 * word * lattice)
    reading = Operation(120 * lattice, 120 * word * lattice)
    noise = [Operation(10 * lattice, 8 * word * lattice)]
    transforms, derivatives = [transform] * TRANSFORMS, [derivative] * TRANSFORMS
    channels = [painting] * int(params["channels"])
    parts = {
        "noise": noise,
        "transforms": transforms,
        "displacements": transforms + derivatives,
        "painting": channels,
        "all": noise + transforms + derivatives + channels,
    }
    forces = [painting, reading, *[transform] * 4, *[derivative] * 4]
    steps = forces * (STEPS + 1 + int(params["channels"])) if params["fidelity"] == "pm" else []
    return parts[str(params["part"])] + steps
