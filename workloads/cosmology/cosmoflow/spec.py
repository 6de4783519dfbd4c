"""What CosmoFlow is and what it costs: axes, parameters, analytic FLOP, bytes and memory, claims. Imports no torch."""

from __future__ import annotations

from saih.core import WHOLE, Axis, Claim, Cost, Operation, Parameter, Params, Rung, Value
from saih.errors import SaihError
from workloads.cosmology.cosmoflow.memory import MOMENTS_BYTES, MOMENTUM_BYTES, peak_bytes, sharded_peak_bytes
from workloads.cosmology.cosmoflow.networks import HEAD_CHANNELS, ConvNet, Network, conv_net, deepest, transformer
from workloads.cosmology.storages import DEFAULT_STORAGE, STORAGES

TITLE = "CosmoFlow: a 3D CNN that regresses cosmological parameters from dark-matter volumes (training)"
PAPER = (
    "SAIH: Du et al., JCST 39(2):384-400, 2024, arXiv:2212.03410; "
    "network: CosmoFlow, Mathuriya et al., SC18, arXiv:1808.04728, as in MLPerf HPC v1.0 and later"
)
CHECK = (
    "the loss falls on a fixed batch; on several ranks, or with other settings than the defaults, the gradients "
    "are those of one plain rank on all batches joined"
)
WORK_UNIT = "samples"

COARSEST_STAGES = 6
FINEST_PATCH, MOST_TOKENS = 8, 32_768
GENERATE_BYTES_PER_S = 40e6
"""Volumes grown and painted per second on one core, a careful figure for planning."""

VIEWS = 8
"""Sides from which a volume is looked at in validation, where it was in training: augment=symmetry."""
BACKENDS = ("ddp", "horovod", "fsdp", "spatial")
ABLATIONS = ("input", "compute", "communication")
"""`Training.ablate` says how each is taken out of a step."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

PLAIN: Params = {"precision": "fp32", "checkpoint": False, "layout": "channels-last", "execution": "eager"}

PARAMETERS = (
    Parameter("mesh", 64, "voxels per side", "side of a volume; a power of two", minimum=8),
    Parameter("channels", 4, "redshifts", "snapshots of the same universe in one sample", choices=(1, 2, 3, 4)),
    Parameter("family", "cosmoflow", "", "3D CNN, or vision transformer over patches", choices=("cosmoflow", "vit")),
    Parameter(
        "width",
        16,
        "channels",
        "cosmoflow: of the first convolution, doubled at every stage; vit: of a token",
        minimum=1,
    ),
    Parameter("depth", 1, "", "cosmoflow: convolutions in a stage; vit: blocks", minimum=1),
    Parameter("stages", 0, "", "cosmoflow: stages that end in pooling; 0 = down to 4^3, at most 6", minimum=0),
    Parameter(
        "patch",
        0,
        "voxels per side",
        "vit: of a patch; 0 = 8, or the least that gives 32,768 tokens at most",
        minimum=0,
    ),
    Parameter(
        "batch", 2, "samples", "samples per step: of each rank (weak scaling) or of all together (strong)", minimum=1
    ),
    Parameter("scaling", "weak", "", "what `batch` counts when there are several ranks", choices=("weak", "strong")),
    Parameter("samples", 8, "volumes", "volumes in the data set", minimum=1),
    Parameter(
        "dataset",
        "",
        "",
        "folder with MLPerf HPC's own files below train and validation; empty: universes made here",
        path=True,
    ),
    Parameter("storage", DEFAULT_STORAGE, "", "how universes made here lie on disk", choices=STORAGES),
    Parameter("input", "storage", "", "read ahead from storage, or kept in host memory", choices=("storage", "memory")),
    Parameter(
        "cache",
        "warm",
        "",
        "input=storage: read as it comes, from memory where the system kept it; or forgotten before it is read again",
        choices=("warm", "cold"),
    ),
    Parameter("readers", 4, "threads", "threads of each rank that read ahead", minimum=1),
    Parameter(
        "augment", "none", "", "symmetry: cube symmetries, and shifts of periodic boxes", choices=("none", "symmetry")
    ),
    Parameter(
        "train", "steps", "", "until-mae: first train to `target_mae`, or not be timed", choices=("steps", "until-mae")
    ),
    Parameter(
        "target_mae", 0.2, "", "mean absolute error of omega_m and sigma_8, scaled to [-1, 1]; 0: any", minimum=0
    ),
    Parameter("epochs", 16, "epochs", "at most, of train=until-mae", minimum=1),
    Parameter("validation", 128, "volumes", "of unseen universes, for train=until-mae", minimum=1),
    Parameter(
        "labels",
        "own",
        "",
        "what is learnt: own, of other universes, their mean alone",
        choices=("own", "shuffled", "mean"),
    ),
    Parameter(
        "backend",
        "ddp",
        "",
        "what several ranks share: samples (ddp; horovod: make horovod), weights too (fsdp), or each volume (spatial)",
        choices=BACKENDS,
    ),
    Parameter(
        "precision", "fp32", "", "arithmetic of the network; bf16 and fp16 are autocast, tf32 needs a GPU", PRECISIONS
    ),
    Parameter("checkpoint", False, "", "keep the inputs of stages alone and compute the rest anew in backward"),
    Parameter(
        "save", False, "", "each step ends with network and optimizer written to storage; a step of n costs 1/n of it"
    ),
    Parameter(
        "layout", "channels-last", "", "order of a volume's numbers in memory", choices=("channels-last", "contiguous")
    ),
    Parameter(
        "execution",
        "eager",
        "",
        "how kernels are launched; cuda-graph needs a GPU, and is written but not run on one yet",
        choices=("eager", "compile", "cuda-graph"),
    ),
    Parameter(
        "emulated_reader_bytes_per_s", 0.0, "bytes/s", "each rank reads no faster than this; 0: as it can", minimum=0
    ),
    Parameter(
        "emulated_link_bytes_per_s",
        0.0,
        "bytes/s",
        "gradients take no less than at this rate; 0: as they can",
        minimum=0,
    ),
    Parameter("emulated_slow_rank_s", 0.0, "s", "the last rank computes so much longer in each step", minimum=0),
)

SIZED_AT = 128
MODELS = {
    **{f"w{width}": ("cosmoflow", width, 1) for width in (2, 4, 8, 16, 32, 64)},
    **{f"w{width}x2": ("cosmoflow", width, 2) for width in (16, 64)},
    "vit-ti": ("vit", 192, 12),
    "vit-s": ("vit", 384, 12),
    "vit-b": ("vit", 768, 12),
    "vit-l": ("vit", 1024, 24),
    "vit-h": ("vit", 1280, 32),
}
"""Rung of the model axis -> family, width, depth. Transformers have the sizes known by these names (Dosovitskiy et al.,
arXiv:2010.11929), with heads of 64 channels throughout."""


def network(params: Params) -> Network:
    """The network of these parameters. Raises SaihError for volumes that cannot be pooled, or cut, that way."""
    mesh, channels, width, depth = (int(params[name]) for name in ("mesh", "channels", "width", "depth"))
    if mesh & (mesh - 1):
        raise SaihError(f"mesh {mesh} is not a power of two")
    if params["family"] == "vit":
        if width % HEAD_CHANNELS:
            raise SaihError(f"width {width}: a vit's is a multiple of {HEAD_CHANNELS}, the channels of a head")
        patch = int(params["patch"]) or _patch(mesh)
        if mesh % patch:
            raise SaihError(f"a volume of {mesh}^3 cannot be cut into patches of {patch}^3")
        return transformer(mesh, channels, width, patch, depth)
    stages = int(params["stages"]) or max(1, min(COARSEST_STAGES, deepest(mesh) - 2))
    if stages > deepest(mesh):
        raise SaihError(f"a volume of {mesh}^3 can be pooled {deepest(mesh)} times, not {stages}")
    return conv_net(mesh, channels, width, stages, depth)


def _patch(mesh: int) -> int:
    patch = FINEST_PATCH
    while (mesh // patch) ** 3 > MOST_TOKENS:
        patch *= 2
    return patch


def _ladder() -> tuple[Rung, ...]:
    """The models by what they cost on one and the same volume, so that one axis holds both families."""
    rungs = []
    for label, (family, width, depth) in MODELS.items():
        chosen: dict[str, Value] = {"family": family, "width": width, "depth": depth}
        size = network({"mesh": SIZED_AT, "channels": 4, "stages": 0, "patch": 0} | chosen).forward_flop / 1e9
        rungs.append(Rung(label, chosen, size))
    return tuple(sorted(rungs, key=lambda rung: rung.size))


AXES = (
    Axis("data", "voxels per side", tuple(Rung(str(n), {"mesh": n}, n) for n in (16, 32, 64, 128, 256, 512))),
    Axis("model", f"GFLOP forward for a volume of {SIZED_AT}^3", _ladder(), ("w2", "w4", "w8", "w16", "w32", "w64")),
)
"""The model axis alone grows one network in one way, its width, so that its trend is one curve; depth and transformers
have names. A larger volume takes a deeper network down to the same 4^3: `--set stages=2` holds the depth.
data=128, model=w32 is the MLPerf HPC network: 8,907,556 parameters, 68.86 GFLOP forward per sample, the lower end of
the range SAIH is reported to have covered; data=512, model=w64, 16.2 TFLOP, is its upper end."""

SMALLEST, LARGEST = {"data": "16", "model": "w2"}, {"data": "64", "model": "w64"}
"""Ends of the study's grid of data and model."""

CLAIMS = (
    Claim(
        "range-over-data-and-model",
        "share of the conv3d timed beside: largest volume and network over the smallest",
        "percent_of_conv3d",
        LARGEST,
        SMALLEST,
        target=8.0,
        paper="5.2 % -> 59.6 % of peak as data and model grow together",
    ),
    Claim(
        "best-cell-of-conv3d",
        "% of the conv3d timed beside, a whole training step of the widest network with two convolutions a stage",
        "percent_of_conv3d",
        {"data": "32", "model": "w64x2"},
        {},
        target=80.0,
    ),
    Claim(
        "best-cell-of-gemm",
        "% of the GEMM timed beside, same cell",
        "percent_of_gemm",
        {"data": "32", "model": "w64x2"},
        {},
        target=60.0,
    ),
    Claim(
        "transformer-of-gemm",
        "% of the GEMM timed beside, a training step of the vision transformer at the largest volume",
        "percent_of_gemm",
        {"data": "64", "model": "vit-ti"},
        {},
        target=60.0,
    ),
    Claim(
        "slow-convolution-cliff",
        "FLOP/s at batch 2 over batch 1 on one thread, where torch leaves oneDNN for its slow_conv3d",
        "flop_per_s",
        {"batch": "2"},
        {"batch": "1"},
        target=2.0,
    ),
    Claim(
        "percent-of-peak-rises-with-data",
        "% of peak at the largest volume over the smallest, same width; the network deepens with the volume",
        "percent_of_peak",
        {"data": "last"},
        {"data": "first"},
        target=1.0,
        paper="5.2 % -> 59.6 % of peak as data and model grow together",
    ),
    Claim(
        "percent-of-peak-rises-with-model",
        "% of peak of the widest network over the narrowest, same volume",
        "percent_of_peak",
        {"model": "last"},
        {"model": "first"},
        target=1.0,
        paper="5.2 % -> 59.6 % of peak as data and model grow together",
    ),
    Claim(
        "two-ranks-efficiency",
        "samples/s of each of two ranks over samples/s of one rank alone, largest network and volume measured",
        "work_per_s_per_rank",
        {"gpus": "2"},
        {"gpus": "1"},
        target=0.75,
        where={"data": "last", "model": "last"},
    ),
    Claim(
        "storage-keeps-up",
        "samples/s of training from storage over training from host memory",
        "work_per_s",
        {"input": "storage"},
        {"input": "memory"},
        target=0.95,
    ),
    *(
        Claim(
            f"learns-{name.replace('_', '-')}",
            f"error on {name} of predicting the mean over error after training; universes of unseen seeds",
            f"check_mae_{name}",
            {"labels": "mean"},
            {"labels": "own"},
            target=3.0,
        )
        for name in ("omega_m", "sigma_8")
    ),
    Claim(
        "n-s-leaves-little-trace",
        "the same for n_s: in boxes of 128 to 256 Mpc/h it leaves little trace, and misses what the others must reach",
        "check_mae_n_s",
        {"labels": "mean"},
        {"labels": "own"},
        target=3.0,
        better="lower",
    ),
    *(
        Claim(
            f"shuffled-labels-teach-nothing-of-{name.replace('_', '-')}",
            f"error on {name} of predicting the mean over error after training on the labels of other universes",
            f"check_mae_{name}",
            {"labels": "mean"},
            {"labels": "shuffled"},
            target=1.1,
            better="lower",
        )
        for name in ("omega_m", "sigma_8")
    ),
)


def ranks_of(params: Params) -> int:
    """Ranks of the allocation."""
    return int(params["nodes"]) * int(params["gpus"])


def batch_per_rank(params: Params) -> int:
    """Samples in one rank's step; with backend=spatial all ranks hold a slab of each of them.

    Raises:
        SaihError: a strong-scaling batch cannot be shared out evenly.
    """
    batch, ranks = int(params["batch"]), ranks_of(params)
    if params["scaling"] == "weak" or params["backend"] == "spatial":
        return batch
    if batch % ranks:
        raise SaihError(
            f"a batch of {batch} samples cannot be shared by {ranks} ranks; strong scaling needs a multiple"
        )
    return batch // ranks


def sample_bytes(params: Params) -> int:
    """int16 counts of one volume."""
    return 2 * int(params["channels"]) * int(params["mesh"]) ** 3


def learns(params: Params) -> bool:
    """Whether it is trained to a quality before it is timed."""
    return params["train"] == "until-mae"


def disk_bytes(params: Params) -> int:
    """Volumes to be made; files of others are there already."""
    volumes = int(params["samples"]) + (int(params["validation"]) if learns(params) else 0)
    return 0 if params["dataset"] else sample_bytes(params) * volumes


def steps_per_epoch(params: Params) -> int:
    """Steps in which all ranks together see every volume once, but for a rest smaller than a step."""
    return max(1, int(params["samples"]) // _together(params))


def _together(params: Params) -> int:
    """Volumes that all ranks take in a step."""
    return batch_per_rank(params) * (1 if params["backend"] == "spatial" else ranks_of(params))


def lesson_steps(params: Params) -> int:
    """Steps of training before anything is timed, at most; validation has forward passes only, a third of a step."""
    if not learns(params) or params["labels"] == "mean":
        return 0
    validation = -(-int(params["validation"]) // (3 * _together(params)))
    validation *= VIEWS if params["augment"] == "symmetry" else 1
    epochs = int(params["epochs"])
    return epochs * steps_per_epoch(params) + validation * (epochs if params["target_mae"] else 1)


def cost(params: Params) -> Cost:
    """One training step of one rank. Raises SaihError for parameters that do not go together."""
    net, batch, ranks = network(params), batch_per_rank(params), ranks_of(params)
    refuse(params, net, ranks)
    slabs = ranks if params["backend"] == "spatial" else 1
    word = 2 if params["precision"] in ("bf16", "fp16") else 4
    data = disk_bytes(params)
    saved = 8.0 * net.parameters if params["save"] else 0.0  # weights and momentum
    return Cost(
        flop=net.training_flop * batch / slabs,
        work=batch / slabs,
        operations=tuple(_operations(net, batch, word, slabs, bool(params["checkpoint"]))),
        emulated_s=_emulated_s(params, batch * sample_bytes(params), 4.0 * net.parameters if ranks > 1 else 0.0),
        parameters=net.parameters,
        device_bytes=_memory(net, batch, word, params),
        input_bytes=batch * sample_bytes(params),
        message_bytes=4.0 * net.parameters if ranks > 1 else 0.0,
        disk_bytes=data + saved,
        data_set=f"{params['mesh']}^3 x {params['channels']}, {data / 1e6:.6g} MB in {params['storage']}",
        setup_s=data / GENERATE_BYTES_PER_S,
        check_steps=4 + (0 if ranks == 1 and is_plain(params) else 1 + min(ranks, 8)) + lesson_steps(params),
    )


def _emulated_s(params: Params, read_bytes: float, message_bytes: float) -> float:
    """Seconds a step waits for parts that stand for slower ones. Reading ahead hides some of the first."""
    reader, link = (float(params[f"emulated_{part}_bytes_per_s"]) for part in ("reader", "link"))
    waits = (read_bytes / reader if reader else 0.0, message_bytes / link if link else 0.0)
    return sum(waits) + float(params["emulated_slow_rank_s"])


def is_plain(params: Params) -> bool:
    """Whether one rank's step is the one that all others are compared with."""
    return all(params[name] == value for name, value in PLAIN.items())


def refuse(params: Params, net: Network, ranks: int) -> None:
    """Raises SaihError for parameters that do not go together."""
    backend, execution = str(params["backend"]), str(params["execution"])
    part = str(params.get("ablation", WHOLE))
    if part in ("compute", "communication"):
        if backend in ("fsdp", "spatial") and ranks > 1:
            raise SaihError(
                f"backend={backend} computes with what ranks send: ablation={part} goes with ddp or horovod"
            )
        if part == "compute" and execution != "eager":
            raise SaihError(f"ablation=compute replaces kernels one by one: execution=eager, not {execution}")
    if params["input"] == "memory" and params["emulated_reader_bytes_per_s"]:
        raise SaihError("input=memory reads nothing: emulated_reader_bytes_per_s goes with input=storage")
    if params["labels"] != "own" and not learns(params):
        raise SaihError(f"labels={params['labels']} is about what is learnt: set train=until-mae as well")
    if learns(params) and params["precision"] == "fp16":
        raise SaihError("train=until-mae clips gradients, which fp16 has scaled: precision=fp32, tf32 or bf16")
    if backend == "fsdp" and ranks > 1:
        if learns(params):
            raise SaihError("train=until-mae needs whole weights on every rank: backend=ddp, horovod or spatial")
        if params["precision"] == "fp16":
            raise SaihError("backend=fsdp does not scale fp16 gradients across its parts: precision=fp32, tf32 or bf16")
    if backend == "spatial" and ranks > 1:
        if not isinstance(net, ConvNet):
            raise SaihError("backend=spatial shares out convolutions; family=vit goes with ddp, horovod or fsdp")
        if net.coarsest % ranks:
            raise SaihError(
                f"backend=spatial: {ranks} ranks cannot share the {net.coarsest} planes that the last stage leaves; "
                "fewer ranks or stages"
            )
    if execution == "cuda-graph" and (params["checkpoint"] or (ranks > 1 and backend != "ddp")):
        raise SaihError("execution=cuda-graph goes with one rank or backend=ddp, and without checkpoint")


def _operations(net: Network, batch: int, word: int, slabs: int, checkpoint: bool) -> list[Operation]:
    """Kernels of a step in order, those of the optimizer last."""
    found = [Operation(each.flop / slabs, each.moved_bytes / slabs) for each in net.operations(batch, word, checkpoint)]
    return [*found, Operation(4.0 * net.parameters, 20.0 * net.parameters)]  # SGD with momentum, fp32


def _memory(net: Network, batch: int, word: int, params: Params) -> float:
    """Peak bytes of one rank: counts and what the network sees of them, and the step itself."""
    ranks, backend = ranks_of(params), str(params["backend"])
    samples = batch / ranks if backend == "spatial" else batch
    units, checkpoint = net.units(word), bool(params["checkpoint"])
    volumes = (2 * batch + word * samples) * int(params["mesh"]) ** 3 * int(params["channels"])
    if backend == "fsdp" and ranks > 1:
        return volumes + sharded_peak_bytes(units, samples, checkpoint, ranks)
    if backend == "spatial" and isinstance(net, ConvNet):  # the input of each convolution again, with borrowed planes
        volumes += samples * sum(word * conv.inputs * conv.side**2 * (conv.side + 2 * ranks) for conv in net.convs)
    stand = ranks > 1 and backend in ("ddp", "spatial")
    optimizer_bytes = MOMENTS_BYTES if learns(params) else MOMENTUM_BYTES
    return volumes + peak_bytes(units, samples, checkpoint, stand, optimizer_bytes)
