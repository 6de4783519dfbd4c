"""What CosmoFlow is and what it costs: axes, parameters, analytic FLOP, bytes and memory, claims. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.cosmology.storages import DEFAULT_STORAGE, STORAGES

TITLE = "CosmoFlow: a 3D CNN that regresses cosmological parameters from dark-matter volumes (training)"
PAPER = (
    "SAIH: Du et al., JCST 39(2):384-400, 2024, arXiv:2212.03410; "
    "network: CosmoFlow, Mathuriya et al., SC18, arXiv:1808.04728, as in MLPerf HPC v1.0 and later"
)
WORK_UNIT = "samples"

TARGETS = 4
KERNEL_VOXELS = 27
COARSEST_STAGES = 6
GENERATE_BYTES_PER_S = 40e6
"""Volumes grown and painted per second on one core, a careful figure for planning."""

BACKENDS = ("ddp", "horovod")
ABLATIONS = ("input", "compute", "communication")
"""`Training.ablate` says how each is taken out of a step."""

PARAMETERS = (
    Parameter("mesh", 64, "voxels per side", "side of a volume; a power of two", minimum=8),
    Parameter("channels", 4, "redshifts", "snapshots of the same universe in one sample", choices=(1, 2, 3, 4)),
    Parameter("width", 16, "channels", "output channels of the first convolution; doubled at every stage", minimum=1),
    Parameter("stages", 0, "", "convolution + pooling stages; 0 = down to 4^3, at most 6", minimum=0),
    Parameter(
        "batch", 2, "samples", "samples per step: of each rank (weak scaling) or of all together (strong)", minimum=1
    ),
    Parameter("scaling", "weak", "", "what `batch` counts when there are several ranks", choices=("weak", "strong")),
    Parameter("samples", 8, "volumes", "volumes in the data set", minimum=1),
    Parameter(
        "dataset", "", "", "folder with MLPerf HPC's own files below train and validation; empty: universes made here"
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
        "backend", "ddp", "", "what averages the gradients of several ranks; horovod: make horovod", choices=BACKENDS
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
    Parameter("precision", "fp32", "", "arithmetic of the network; bf16 is autocast", choices=("fp32", "bf16")),
)

AXES = (
    Axis("data", "voxels per side", tuple(Rung(str(n), {"mesh": n}, n) for n in (16, 32, 64, 128, 256, 512))),
    Axis("model", "channels of the first layer", tuple(Rung(f"w{w}", {"width": w}, w) for w in (4, 8, 16, 32, 64))),
)
"""A larger volume takes a deeper network down to the same 4^3: `--set stages=2` holds the depth.
data=128, model=w32 is the MLPerf HPC network: 8,907,556 parameters, 68.86 GFLOP forward per sample.
data=512, model=w64 is 16.2 TFLOP forward per sample, the top of the range SAIH is reported to have reached."""

CLAIMS = (
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
        "samples/s of training from storage, cold, over training from host memory",
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
        "n-s-leaves-next-to-no-trace",
        "the same for n_s: in boxes of 128 to 256 Mpc/h it can hardly be told, by this network or another",
        "check_mae_n_s",
        {"labels": "mean"},
        {"labels": "own"},
        target=1.5,
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


@dataclass(frozen=True)
class Conv:
    """One stage: a 3x3x3 convolution over side^3 voxels, then pooling to (side/2)^3."""

    side: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return KERNEL_VOXELS * self.inputs * self.outputs + self.outputs

    @property
    def flop(self) -> float:
        """Forward FLOP of one sample, 2 for each multiply-add."""
        return 2.0 * KERNEL_VOXELS * self.inputs * self.outputs * self.side**3


@dataclass(frozen=True)
class Network:
    """The layers that a set of parameters stands for."""

    convs: tuple[Conv, ...]
    dense: tuple[tuple[int, int], ...]
    """(inputs, outputs) of each fully connected layer."""

    @property
    def parameters(self) -> int:
        return sum(conv.parameters for conv in self.convs) + sum(i * o + o for i, o in self.dense)

    @property
    def forward_flop(self) -> float:
        """Per sample."""
        return sum(conv.flop for conv in self.convs) + sum(2.0 * i * o for i, o in self.dense)

    @property
    def training_flop(self) -> float:
        """Per sample: forward, and both gradients of every layer but the first, which has no input gradient."""
        return 3 * self.forward_flop - self.convs[0].flop


def network(params: Params) -> Network:
    """The network of these parameters. Raises SaihError if the volume cannot be pooled that often."""
    mesh, width = int(params["mesh"]), int(params["width"])
    if mesh & (mesh - 1):
        raise SaihError(f"mesh {mesh} is not a power of two")
    deepest = int(math.log2(mesh))
    stages = int(params["stages"]) or max(1, min(COARSEST_STAGES, deepest - 2))
    if stages > deepest:
        raise SaihError(f"a volume of {mesh}^3 can be pooled {deepest} times, not {stages}")
    widths = [int(params["channels"]), *(width * 2**stage for stage in range(stages))]
    convs = tuple(Conv(mesh >> stage, widths[stage], widths[stage + 1]) for stage in range(stages))
    flat = widths[-1] * (mesh >> stages) ** 3
    return Network(convs, ((flat, 128), (128, 64), (64, TARGETS)))


def batch_per_rank(params: Params) -> int:
    """Samples in one rank's step. Raises SaihError if a strong-scaling batch cannot be shared out evenly."""
    batch, ranks = int(params["batch"]), int(params["nodes"]) * int(params["gpus"])
    if params["scaling"] == "weak":
        return batch
    if batch % ranks:
        raise SaihError(
            f"a batch of {batch} samples cannot be shared by {ranks} ranks; strong scaling needs a multiple"
        )
    return batch // ranks


def sample_bytes(params: Params) -> int:
    """int16 counts of one volume."""
    return 2 * int(params["channels"]) * int(params["mesh"]) ** 3


def disk_bytes(params: Params) -> int:
    """Volumes to be made; files of others are there already."""
    volumes = int(params["samples"]) + (int(params["validation"]) if params["train"] == "until-mae" else 0)
    return 0 if params["dataset"] else sample_bytes(params) * volumes


def steps_per_epoch(params: Params) -> int:
    """Steps in which all ranks together see every volume once, but for a rest smaller than a step."""
    together = batch_per_rank(params) * int(params["nodes"]) * int(params["gpus"])
    return max(1, int(params["samples"]) // together)


def lesson_steps(params: Params) -> int:
    """Steps of training before anything is timed, at most."""
    learns = params["train"] == "until-mae" and params["labels"] != "mean"
    return int(params["epochs"]) * steps_per_epoch(params) if learns else 0


def cost(params: Params) -> Cost:
    """One training step of one rank."""
    if params["labels"] != "own" and params["train"] == "steps":
        raise SaihError(f"labels={params['labels']} is about what is learnt: set train=until-mae as well")
    net, batch = network(params), batch_per_rank(params)
    word = 2 if params["precision"] == "bf16" else 4
    ranks = int(params["nodes"]) * int(params["gpus"])
    data = disk_bytes(params)
    ranks_checked = min(ranks, 8) if ranks > 1 else 0
    return Cost(
        flop=net.training_flop * batch,
        work=batch,
        operations=tuple(_operations(net, batch, word)),
        emulated_s=_emulated_s(params, batch * sample_bytes(params), 4.0 * net.parameters if ranks > 1 else 0.0),
        parameters=net.parameters,
        device_bytes=_memory(net, batch, word, params),
        input_bytes=batch * sample_bytes(params),
        message_bytes=4.0 * net.parameters if ranks > 1 else 0.0,
        disk_bytes=data,
        data_set=f"{params['mesh']}^3 x {params['channels']}, {data / 1e6:.6g} MB in {params['storage']}",
        setup_s=data / GENERATE_BYTES_PER_S,
        check_steps=4 + ranks_checked + lesson_steps(params),
    )


def _emulated_s(params: Params, read_bytes: float, message_bytes: float) -> float:
    """Seconds a step waits for parts that stand for slower ones. Reading ahead hides some of the first."""
    reader, link = (float(params[f"emulated_{part}_bytes_per_s"]) for part in ("reader", "link"))
    waits = (read_bytes / reader if reader else 0.0, message_bytes / link if link else 0.0)
    return sum(waits) + float(params["emulated_slow_rank_s"])


def _operations(net: Network, batch: int, word: int) -> list[Operation]:
    """Kernels of a step in order: convolutions and pooling forward and backward, dense layers, optimizer."""
    operations = []
    for place, conv in enumerate(net.convs):
        voxels = batch * conv.side**3
        flop, moved = conv.flop * batch, word * voxels * (conv.inputs + conv.outputs) + word * conv.parameters
        pooled = word * voxels * conv.outputs
        operations += [Operation(flop, moved)] * (3 if place else 2)  # forward, weight gradient, input gradient
        operations += [
            Operation(0.0, 1.5 * pooled),
            Operation(0.0, 2.5 * pooled),
        ]  # pooling; its gradient, zeroed first
        operations += [Operation(0.0, pooled / 4)] * 2  # leaky ReLU of the pooled volume, and its gradient
    for inputs, outputs in net.dense:
        moved = word * (inputs * outputs + batch * (inputs + outputs))
        operations += [Operation(2.0 * batch * inputs * outputs, moved)] * 3
    return [*operations, Operation(4.0 * net.parameters, 20.0 * net.parameters)]  # SGD with momentum, fp32


def _memory(net: Network, batch: int, word: int, params: Params) -> float:
    """Peak bytes: weights, gradients and momentum; what backward keeps; the two largest gradients alive at once."""
    kept = 0.0
    for conv in net.convs:
        voxels = batch * conv.side**3
        kept += voxels * conv.outputs * (word + (word + 8) / 8)  # output, pooled output, int64 positions of the maxima
    largest = max(batch * conv.side**3 * conv.outputs * word for conv in net.convs)
    inputs = batch * int(params["mesh"]) ** 3 * int(params["channels"]) * (2 + 4 + (word if word != 4 else 0))
    optimizer = 8.0 if params["train"] == "until-mae" else 4.0  # Adam's two moments, or momentum
    return (8.0 + optimizer) * net.parameters + kept + 2 * largest + inputs
