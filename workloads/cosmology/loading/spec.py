"""What loading is and what it reads: parameters, bytes, claims. Imports no torch."""

from __future__ import annotations

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.cosmology.storages import DEFAULT_STORAGE, STORAGES, volumes_per_shard

TITLE = "Loading: training volumes read from storage in random order, beside plain reading of the same files"
PAPER = "SAIH: Du et al., JCST 39(2):384-400, 2024, arXiv:2212.03410: training keeps reading from the file system"
CHECK = "the bytes that arrive add up as those of the files do; what is to be cold comes from storage"
WORK_UNIT = "bytes"

GENERATE_BYTES_PER_S = 40e6

PARAMETERS = (
    Parameter("mesh", 64, "voxels per side", "side of a volume", minimum=8),
    Parameter("channels", 4, "redshifts", "snapshots of the same universe in one volume", choices=(1, 2, 3, 4)),
    Parameter("shards", 1, "files", "read in a step, each of 32 MiB or one volume", minimum=1),
    Parameter("batch", 4, "volumes", "handed over at a time", minimum=1),
    Parameter("readers", 4, "", "threads of the loader; processes of the DataLoader", minimum=1),
    Parameter("storage", DEFAULT_STORAGE, "", "how the volumes lie on disk", choices=STORAGES),
    Parameter(
        "variant",
        "loader",
        "",
        "what training reads with; torch's DataLoader; the files from end to end through the page cache, or past it",
        choices=("loader", "dataloader", "buffered", "direct"),
    ),
    Parameter("cache", "cold", "", "cold: the system has forgotten the files", choices=("cold", "warm")),
)

AXES = (Axis("data", "voxels per side", tuple(Rung(str(n), {"mesh": n}, n) for n in (16, 32, 64, 128, 256, 512))),)

CLAIMS = tuple(
    Claim(
        f"loader-over-{other}",
        f"bytes/s of the loader, volumes in random order, over {text}",
        "work_per_s",
        {"variant": "loader"},
        {"variant": other},
        target=target,
    )
    for other, text, target in (
        ("buffered", "reading the same files from end to end through the page cache", 0.9),
        ("direct", "reading them past the page cache (O_DIRECT)", 0.6),
        ("dataloader", "a torch DataLoader of as many processes, over the same volumes", 1.0),
    )
)


def parts(params: Params) -> int:
    """Steps at most, each with files of its own: what a step has read, no other one reads."""
    return int(params["warmup"]) + max(int(params["steps"]), int(params["max_steps"]))


def step_volumes(params: Params) -> int:
    """Volumes read in one step."""
    return int(params["shards"]) * volumes_per_shard(_volume_bytes(params))


def cost(params: Params) -> Cost:
    """Of one step on one rank: no FLOP, and every byte written to memory once.

    Raises:
        SaihError: the variant cannot read this storage.
    """
    if params["variant"] in ("buffered", "direct") and params["storage"] not in ("hdf5", "npy"):
        raise SaihError(f"variant={params['variant']} reads volumes as they lie, so storage must be hdf5 or npy")
    read = step_volumes(params) * _volume_bytes(params)
    data = parts(params) * read
    return Cost(
        flop=0.0,
        work=read,
        operations=(Operation(0.0, read),),
        device_bytes=5.0 * int(params["batch"]) * _volume_bytes(params),
        input_bytes=read,
        data_set=f"{params['mesh']}^3 x {params['channels']}, {data / 1e6:.6g} MB in {params['storage']}",
        disk_bytes=data,
        setup_s=data / GENERATE_BYTES_PER_S,
        check_steps=3 + parts(params),
    )


def _volume_bytes(params: Params) -> int:
    return 2 * int(params["channels"]) * int(params["mesh"]) ** 3
