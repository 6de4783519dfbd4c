"""What EnergonAI promises and what a window of batches costs: hand-offs, rows, weights. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.config import PRESETS, ModelSpec, preset, split_layers
from workloads.llm.energonai import overlap, timeline, window
from workloads.llm.energonai.consistency import TICKETS
from workloads.llm.stepcost import Batch

TITLE = "EnergonAI: prefill of a transformer over tensor-parallel ranks and pipeline stages under one controller"
PAPER = "EnergonAI: Du, Liu, Fang, Li, Li, Lu, You, 2022, arXiv:2209.02341"
CHECK = (
    "every result is that of its own batch, and its logits are those of one process with the whole model; with "
    "weights put away they are the same bits; emulated stages hand on the right batches"
)
WORK_UNIT = "valid tokens"

MODELS = tuple(name for name in PRESETS if name.startswith("gpt-"))
ATTENTION = ("padded", "loop", "varlen", "auto")
WEIGHTS = ("resident", "cpu-offload", "peer")
WORD = {"fp32": 4, "bf16": 2}

ABLATIONS = ("communication",)
"""Sums over tensor-parallel ranks and activations from stage to stage; on one rank there are none."""

LINK_BYTES_PER_S = 3e9
"""From stage to stage through gloo on one machine, both ends waiting: a figure for planning."""
WEIGHTS_BYTES_PER_S = 1e10
"""Of weights fetched from host memory where no link is emulated: a figure for planning."""
RANDOM_WEIGHTS_PER_S = 5e7
"""Random weights made on one core: a figure for planning."""

PARAMETERS = (
    Parameter("model", "gpt-mini", "", "shape of the model, with random weights", choices=MODELS),
    Parameter("precision", "fp32", "", "arithmetic of the model", choices=("fp32", "bf16")),
    Parameter("batch", 16, "sequences", "sequences in a batch", minimum=1),
    Parameter("length", 128, "tokens", "length of the longest sequence of a batch", minimum=1),
    Parameter("valid", 0.5, "", "share of tokens in batch x length; the rest is padding", minimum=0),
    Parameter("batches", 1, "batches", "batches in a window; a step is a window", minimum=1),
    Parameter("rows", "packed", "", "what layers work on: padding too, or tokens alone", choices=("padded", "packed")),
    Parameter("attention", "padded", "", "attention kernel; padded fills up for attention alone", choices=ATTENTION),
    Parameter("tp", 0, "ranks", "tensor-parallel ranks of a stage; 0 = all there are", minimum=0),
    Parameter("pp", 1, "stages", "pipeline stages", minimum=1),
    Parameter("handoff", "nbpp", "", "how batches follow each other through the stages", choices=timeline.HANDOFFS),
    Parameter("buffer", 4, "batches", "nbpp: results a stage may keep, and the next take ahead", minimum=1),
    Parameter("emulated_stage_ms", 0.0, "ms", "stages sleep so long on average; 0 = compute", minimum=0),
    Parameter("emulated_durations", "uniform", "", "spread of the times of emulated batches", choices=window.DURATIONS),
    Parameter(
        "weights", "resident", "", "where layers put away wait: nowhere, on the host, on a peer", choices=WEIGHTS
    ),
    Parameter("offload_interval", 2, "layers", "every so manyth layer is put away", minimum=1),
    Parameter("staging", 1, "layers", "buffers on the device that layers put away are fetched into", minimum=1),
    Parameter("link_gb_per_s", 0.0, "GB/s", "cpu-offload on CPUs: emulated link; 0 = host memory's rate", minimum=0),
)

_VARIATION = {"uniform": "0", "random": "0.43", "bimodal": "1.5"}
"""Standard deviation over mean of the batches' times."""

AXES = (
    Axis(
        "data",
        "tokens of a padded batch",
        tuple(
            Rung(f"{batch}x{length}", {"batch": batch, "length": length}, batch * length)
            for batch, length in ((4, 64), (4, 128), (8, 128), (16, 128), (16, 256), (32, 512), (32, 2048))
        ),
    ),
    Axis(
        "model",
        "parameters",
        tuple(Rung(name, {"model": name}, stepcost.parameters(PRESETS[name])) for name in MODELS),
    ),
    Axis("valid", "% of tokens", tuple(Rung(str(v), {"valid": v / 100}, v) for v in (26, 48, 68, 100))),
    Axis(
        "variation",
        "coefficient of variation of emulated batches' times",
        tuple(
            Rung(size, {"emulated_durations": name, "emulated_stage_ms": 20.0}, float(size))
            for name, size in _VARIATION.items()
        ),
    ),
    Axis(
        "stages",
        "pipeline stages of one emulated model",
        tuple(Rung(str(pp), {"pp": pp, "gpus": pp, "emulated_stage_ms": 80.0 / pp}, pp) for pp in (1, 2, 4, 8)),
    ),
    Axis(
        "filled_up",
        "",
        (
            Rung("nothing", {"rows": "packed", "attention": "loop"}, 0),
            Rung("rows", {"rows": "padded", "attention": "padded"}, 1),
            Rung("rows-looped", {"rows": "padded", "attention": "loop"}, 2),
        ),
        named=True,
    ),
)
"""On the stages axis a batch takes 80 ms through the whole model, however many stages share it; on the variation axis
20 ms on each stage, on average. The filled_up axis has DRCE and the two systems without it: attention is one call for
all sequences, or one call each as that of packed rows is; which is faster depends on the machine."""

_DRCE = {"26": (2.5, 3.86), "48": (1.9, 2.09), "68": (1.3, 1.48)}
"""Target, and the FLOP of all rows over those of valid tokens in batches of 32 x 128: attention, which is quadratic,
makes it a little more than 1/valid."""
_PADDED = {"": ("rows", "one call for all"), "-looped": ("rows-looped", "one call each")}
_NBPP = {"uniform": 1.15, "random": 1.3, "bimodal": 1.8}


def _nbpp(durations: str, over: str, text: str, target: float) -> Claim:
    variation = _VARIATION[durations]
    return Claim(
        f"nbpp-over-{over}-{durations}",
        f"tokens/s {text}, batch times with coefficient of variation {variation} ({durations}; emulated compute)",
        "work_per_s",
        {"handoff": "nbpp"},
        {"handoff": over},
        target,
        where={"variation": variation},
    )


CLAIMS = (
    *(
        Claim(
            f"drce-{valid}{suffix}",
            f"valid tokens/s on tokens alone over filled-up rows (attention: {calls}), {valid} % valid; bound: FLOP",
            "work_per_s",
            {"filled_up": "nothing"},
            {"filled_up": filled},
            target,
            where={"valid": valid},
            bound=bound,
        )
        for suffix, (filled, calls) in _PADDED.items()
        for valid, (target, bound) in _DRCE.items()
    ),
    *(_nbpp(each, "rendezvous", "of non-blocking over rendezvous hand-off", least) for each, least in _NBPP.items()),
    *(
        _nbpp(each, "blocking", "of non-blocking hand-off over one batch at a time: never slower", 1.0)
        for each in _NBPP
    ),
    Claim(
        "pp-scalability",
        "tokens/s of non-blocking over rendezvous hand-off at 4 stages, random batch times (emulated compute)",
        "work_per_s",
        {"handoff": "nbpp"},
        {"handoff": "rendezvous"},
        target=1.1,
        where={"stages": "4"},
        paper="10 % better pipeline scalability than FasterTransformer",
    ),
    Claim(
        "pp-speed-up",
        "tokens/s of 4 stages over 1, non-blocking hand-off (emulated compute)",
        "work_per_s",
        {"stages": "4"},
        {"stages": "1"},
        target=3.0,
        where={"handoff": "nbpp"},
        bound=4.0,
    ),
    Claim(
        "tp-latency",
        "time of one batch on tokens alone over filled-up rows, 2 tensor-parallel ranks, half the tokens valid",
        "step_s",
        {"rows": "packed"},
        {"rows": "padded"},
        target=0.63,
        better="lower",
        where={"gpus": "2"},
        paper="37 % lower latency than FasterTransformer with tensor parallelism",
        bound=0.511,  # of FLOP at 16 x 128: attention fills up in both
    ),
    *(
        Claim(
            f"pmep-{name}",
            f"tokens/s with every 2nd layer's weights in host memory over all at hand, copies that {what} the layers "
            f"between (emulated link, {rate} GB/s); predicted for layers at the ceilings' speed, "
            "which leaves copies less room than there is: the check's predicted_slowdown is from layers as they run",
            "work_per_s",
            {"weights": "cpu-offload"},
            {"weights": "resident"},
            target,
            where={"link_gb_per_s": rate},
            paper="a model larger than its GPU at limited loss (peer memory)",
            bound=1.0,
        )
        for name, what, rate, target in (("hidden", "fit beside", "1.0", 0.9), ("exposed", "outlast", "0.2", 0.6))
    ),
)


@dataclass(frozen=True)
class Shape:
    """The parameters of a point, checked and worked out."""

    model: ModelSpec
    tp: int
    pp: int
    ranks: int
    lens: tuple[int, ...]
    """Tokens of each sequence, in no order."""
    padded: bool
    emulated: bool
    offloaded: range
    """Layers whose weights are fetched before they run (PMEP)."""

    @property
    def tokens(self) -> int:
        return sum(self.lens)

    @property
    def rows(self) -> int:
        """Rows that layers, sums and hand-offs work on."""
        return max(self.lens) * len(self.lens) if self.padded else self.tokens

    @property
    def layers(self) -> int:
        """Of the largest stage."""
        return len(split_layers(self.model.layers, self.pp)[0])


def shape(params: Params) -> Shape:
    """Raises SaihError for a combination that makes no sense."""
    model = preset(str(params["model"]))
    ranks, pp = int(params["nodes"]) * int(params["gpus"]), int(params["pp"])
    tp = int(params["tp"]) or max(1, ranks // pp)
    emulated = float(params["emulated_stage_ms"]) > 0
    if tp * pp != ranks:
        raise SaihError(f"tp={tp} x pp={pp} needs {tp * pp} ranks; nodes x gpus = {ranks}")
    if emulated and tp > 1:
        raise SaihError(f"emulated stages have one rank each, not tp={tp}; set pp={ranks}")
    if not emulated and params["emulated_durations"] != "uniform":
        raise SaihError("emulated_durations need emulated_stage_ms > 0: computed stages take the time they take")
    if not emulated and (model.heads % tp or model.ffn % tp):
        raise SaihError(f"{model.heads} heads and {model.ffn} MLP columns cannot be cut over tp={tp}")
    if not emulated:
        split_layers(model.layers, pp)
    if int(params["batches"]) >= TICKETS:
        raise SaihError(f"batches={params['batches']}: at most {TICKETS - 1}, for there are {TICKETS} tickets")
    if int(params["length"]) > model.max_positions:
        raise SaihError(f"length={params['length']}: {params['model']} has {model.max_positions} positions")
    if params["rows"] == "padded" and params["attention"] not in ("padded", "loop"):
        raise SaihError(f"rows=padded needs attention=padded or loop, not {params['attention']}")
    lens = window.lengths(int(params["batch"]), int(params["length"]), float(params["valid"]))
    padded, offloaded = params["rows"] == "padded", _offloaded(params, model.layers, ranks, emulated)
    return Shape(model, tp, pp, ranks, lens, padded, emulated, offloaded)


def _offloaded(params: Params, layers: int, ranks: int, emulated: bool) -> range:
    """The layers that PMEP puts away. Raises SaihError where it makes no sense."""
    weights = params["weights"]
    if weights == "resident":
        return range(0)
    if ranks > 1:
        raise SaihError(f"weights={weights} lets one device run a model larger than itself; ranks={ranks}, set gpus=1")
    if emulated:
        raise SaihError(f"emulated stages have no weights to put away: weights={weights} needs emulated_stage_ms=0")
    if weights == "peer" and params["link_gb_per_s"]:
        raise SaihError("link_gb_per_s emulates the link to host memory; a peer has a real one")
    return overlap.offloaded_layers(layers, int(params["offload_interval"]))


def cost(params: Params) -> Cost:
    """Of one window on one rank, its share of the whole where ranks share.

    `flop` and `work` are those of valid tokens, whatever is computed besides: more of them a second is what a user
    gets. `operations` are what one rank really executes, and waits for, until the window is through.
    """
    the = shape(params)
    batches, word = int(params["batches"]), WORD[str(params["precision"])]
    sent = the.rows * the.model.hidden * word if the.pp > 1 else 0
    buffered = sent * (1 + 2 * int(params["buffer"]))
    work = the.tokens * batches / the.ranks
    if the.emulated:
        activations = 4.0 * the.rows * the.model.hidden
        return Cost(
            flop=0.0,
            work=work,
            operations=(Operation(0.0, activations),),
            emulated_s=emulated_s(params, the),
            device_bytes=activations + buffered,
            message_bytes=batches * sent,
            check_steps=(the.pp + 2) / batches,
        )
    useful = stepcost.forward_flop(the.model, Batch.prefill(the.lens))
    in_turn = batches * the.pp if params["handoff"] == "blocking" else batches + the.pp - 1
    rows = Batch(_rows_of(the), (0,) * len(the.lens), len(the.lens))
    held = _parameters_of_stage(the)
    one_layer, edge = _operations(the, params, word)
    fetched, buffers = batches * len(the.offloaded), min(int(params["staging"]), len(the.offloaded))
    absent = (len(the.offloaded) - buffers) * stepcost.layer_parameters(the.model)
    sums = stepcost.tp_bytes(the.model, rows, word, the.tp) / the.pp
    return Cost(
        flop=useful * batches / the.ranks,
        work=work,
        operations=(*one_layer * the.layers, *edge) * in_turn,
        beside=tuple(one_layer) * fetched if buffers == 1 else (),  # the only buffer is the layer's until it has run
        beside_s=fetched * copy_s(params, the.model),
        parameters=stepcost.parameters(the.model),
        device_bytes=word * (held - absent) + stepcost.activation_bytes(the.model, rows, word, the.tp) + buffered,
        message_bytes=batches * (sums + sent),
        setup_s=held / RANDOM_WEIGHTS_PER_S,
        check_steps=1,
    )


def emulated_s(params: Params, the: Shape) -> float:
    """Seconds of a window whose stages sleep: the recurrence of its hand-off, with activations at LINK_BYTES_PER_S."""
    times_s = window.durations_s(
        str(params["emulated_durations"]), int(params["batches"]), 1e-3 * float(params["emulated_stage_ms"])
    )
    transfer_s = 4.0 * the.rows * the.model.hidden / LINK_BYTES_PER_S
    return timeline.window_s(str(params["handoff"]), times_s, the.pp, transfer_s, int(params["buffer"]))


def copy_s(params: Params, model: ModelSpec) -> float:
    """Seconds to fetch the weights of a layer."""
    layer_bytes = WORD[str(params["precision"])] * stepcost.layer_parameters(model)
    return layer_bytes / (1e9 * float(params["link_gb_per_s"]) or WEIGHTS_BYTES_PER_S)


def _rows_of(the: Shape) -> tuple[int, ...]:
    return (max(the.lens),) * len(the.lens) if the.padded else the.lens


def _attended(the: Shape, attention: str) -> Batch:
    """What the attention kernel computes: with `padded` as much as the longest sequence takes, for every sequence."""
    rows = (max(the.lens),) * len(the.lens) if attention == "padded" else _rows_of(the)
    return Batch.prefill(rows)


def _operations(the: Shape, params: Params, word: int) -> tuple[list[Operation], list[Operation]]:
    """Kernels of one batch on one rank, in order: of a layer, and of what is behind the last."""
    model, rows, tp = the.model, the.rows, the.tp
    q, kv, up = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.ffn

    def product(inputs: int, outputs: int, cut: int, batch_rows: int = rows) -> Operation:
        moved = inputs * outputs / tp + batch_rows * (inputs / (tp if cut == 0 else 1) + outputs / (tp if cut else 1))
        return Operation(2.0 * batch_rows * inputs * outputs / tp, word * moved)

    attended = _attended(the, str(params["attention"]))
    pairs_flop = stepcost.attention_flop(replace(model, layers=1), attended) / tp
    norms_and_sums = Operation(0.0, word * rows * 10.0 * model.hidden)
    layer = [
        norms_and_sums,
        product(model.hidden, q + 2 * kv, cut=1),
        Operation(pairs_flop, word * attended.rows * (2 * q + 2 * kv) / tp),
        product(q, model.hidden, cut=0),
        product(model.hidden, up, cut=1),
        Operation(0.0, word * rows * 2.0 * up / tp),  # activation
        product(up, model.hidden, cut=0),
    ]
    head = product(model.hidden, model.vocab, cut=1, batch_rows=len(the.lens))  # the embedding is a look-up
    return layer, [head]


def _parameters_of_stage(the: Shape) -> int:
    """Of the largest stage's share on one rank; embedding and head are counted on every stage, which has one."""
    edges = the.model.hidden * (math.ceil(the.model.vocab / the.tp) + the.model.table_rows)
    return the.layers * math.ceil(stepcost.layer_parameters(the.model) / the.tp) + edges
