"""What PipeMax promises and what decoding in turns costs, by variant. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from saih.core import Axis, Claim, Cost, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.config import PRESETS, ModelSpec, preset
from workloads.llm.costs import CostModel
from workloads.llm.machines import MACHINES, USABLE_MEMORY, Machine, machine
from workloads.llm.stepcost import Batch

TITLE = "PipeMax: batches that rotate over pipeline stages, with the keys and values of waiting ones on the host"
PAPER = "PipeMax: Zhang, Wei, Jiang, Yan, Du, Chen, 2026, arXiv:2605.02189"
CHECK = "every token is the most likely one after its prompt and the tokens before it, says a plain full forward pass"
WORK_UNIT = "tokens"

VARIANTS = ("tp", "tp-offload", "pp-resident", "td-pipe", "pipemax", "pipemax-static")
PIPELINED = VARIANTS[2:]
TRACES = ("sharegpt", "longbench")
MEANS = {"sharegpt": (343.76, 237.20), "longbench": (2686.89, 101.78)}
LONGEST_NEW_TOKENS = 512
"""Outputs are cut here: else the last request decides the time."""
BLOCK_TOKENS = 16
WORD = {"simulated": 2, "emulated": 4}
STATIC_SHARE = 0.1
"""Of the device's blocks that pipemax-static fetches in a step; the paper tries 5 to 25 %."""
SIMULATED_REQUEST_S = 3e-3
RANDOM_PER_S = 2e7
PCIE_OVER_HBM = 64 / 1792
"""Of an RTX 5090."""

PARAMETERS = (
    Parameter(
        "time",
        "emulated",
        "",
        "emulated, real: stages of this machine with an emulated link, or with that of its GPU; simulated: on paper",
        choices=("emulated", "real", "simulated"),
    ),
    Parameter("variant", "pipemax", "", "who decodes next, and whether waiting batches leave", choices=VARIANTS),
    Parameter("machine", "rtx5090", "", "simulated: devices and links, 8 of them", choices=tuple(MACHINES)),
    Parameter(
        "shape",
        "llama-mini",
        "",
        "shape of the model, with random weights; on one rank: of one stage",
        choices=tuple(name for name, spec in PRESETS.items() if spec.causal),
    ),
    Parameter("layers", 0, "layers", "0 = the shape's; fewer make a stage of a large model", minimum=0),
    Parameter("stages", 8, "stages", "pipeline stages, and batches that take turns; so many ranks, or one", minimum=2),
    Parameter("trace", "sharegpt", "", "lengths with the means of a data set", choices=TRACES),
    Parameter("requests", 120, "requests", "of the trace, all there at the start", minimum=1),
    Parameter("shrink", 4, "", "emulated, real: lengths are divided by it", minimum=1),
    Parameter("kv_tokens", 4096, "tokens", "emulated, real: KV arena of the device", minimum=64),
    Parameter("memory_gb", 0.0, "GB", "simulated: cap of a device's memory; 0 = none", minimum=0),
    Parameter(
        "emulated_link",
        PCIE_OVER_HBM,
        "",
        "emulated: rate of the host link over this machine's memory copy; default as of an RTX 5090",
        minimum=0,
    ),
    Parameter("layout", "block_first", "", "of the KV arenas", choices=("block_first", "layer_first")),
    Parameter("order", "priority", "", "of transfers", choices=("priority", "fifo")),
)

AXES = (
    Axis("data", "requests", tuple(Rung(str(n), {"requests": n}, n) for n in (60, 120, 240, 1000, 10000))),
    Axis("model", "parameters", tuple(
        Rung(n, {"shape": n}, stepcost.parameters(PRESETS[n])) for n in ("llama-tiny", "llama-mini", "llama-70b")
    )),
)  # fmt: skip


def _over(name: str, text: str, over: str, target: float, paper: str = "", **where: str) -> Claim:
    """A claim of pipemax's decode throughput over another variant."""
    metric = "check_simulated_tokens_per_s" if "machine" in where else "work_per_s"
    return Claim(name, text, metric, {"variant": "pipemax"}, {"variant": over}, target, where=where, paper=paper)


def _emulated(kv_tokens: int) -> tuple[Claim, ...]:
    """Claims of the emulated link with a cache of so many tokens."""
    where, cache = {"time": "emulated", "kv_tokens": str(kv_tokens)}, f"(emulated link, cache of {kv_tokens} tokens)"
    return (
        _over(f"over-td-pipe-{kv_tokens}", f"tokens/s over td-pipe {cache}", "td-pipe", 1.15, "up to 1.42x", **where),
        _over(
            f"over-pp-resident-{kv_tokens}",
            f"tokens/s over pp-resident {cache}",
            "pp-resident",
            1.3,
            "up to 2.51x",
            **where,
        ),
        Claim(
            f"larger-batch-{kv_tokens}",
            f"requests in a batch over td-pipe {cache}",
            "check_mean_batch",
            {"variant": "pipemax"},
            {"variant": "td-pipe"},
            1.1,
            where=where,
        ),
        *(
            Claim(
                f"estimator-{which}-{kv_tokens}",
                f"{which} error of the estimator on batches of the run {cache}",
                f"check_estimator_{which}_error",
                {"variant": "pipemax"},
                {},
                most,
                "lower",
                where=where,
                paper=paper,
            )
            for which, most, paper in (("median", 0.05, "> 90 % within 5 %"), ("worst", 0.08, "below 8 %"))
        ),
    )


CLAIMS = (
    *_emulated(1024),
    *_emulated(2048),
    *(
        Claim(
            name,
            f"bytes/s of copying scattered blocks, pieces of {piece}, block-first over layer-first",
            metric,
            {"layout": "block_first"},
            {"layout": "layer_first"},
            1.0,
            paper="PCIe utilisation ~90 % over ~30 %",
        )
        for name, piece, metric in (
            ("block-first", "64 KB", "check_copy_bytes_per_s"),
            ("block-first-2kb", "2 KB", "check_copy_2kb_bytes_per_s"),
        )
    ),
    *(
        _over(
            f"simulated-{name}-{over}",
            f"tokens/s over {over} (simulated time), 8 of {name}",
            over,
            target,
            paper,
            machine=name,
        )
        for name in ("rtx5090", "l20")
        for over, (target, paper) in {
            "tp": (1.0, "up to 2.45x"),
            "pp-resident": (1.0, "up to 2.51x"),
            "td-pipe": (1.0, "up to 1.42x"),
        }.items()
    ),
    Claim(
        "order",
        "P95 of a step's wait for its activations (emulated link), urgent copies first over in order",
        "check_activation_p95_s",
        {"order": "priority"},
        {"order": "fifo"},
        0.5,
        "lower",
        where={"time": "emulated"},
    ),
    Claim(
        "simulated-order",
        "tokens/s of pipemax (simulated time), urgent copies first over in order",
        "check_simulated_tokens_per_s",
        {"order": "priority"},
        {"order": "fifo"},
        1.0,
    ),
    _over("simulated-static", "tokens/s over a fixed prefetch share (simulated time)", "pipemax-static", 1.0,
          "1.05x to 1.25x", machine="rtx5090"),
)  # fmt: skip

FIXED_S = 1e-3
"""Launches of a stage's step in simulated time. Our choice."""
EFFICIENCY = {"memory": 0.8, "link": 0.8, "decode": 0.7, "prefill": 0.5}
"""Of the data sheets' rates. Our choice, but for the link: the paper reports ~90 % for its layout."""
COPY_S = 5e-6
"""Of one asynchronous copy, whatever its size. Our choice."""
SUM_S = 30e-6
"""Latency of one sum over 8 devices without NVLink. Our choice."""


@dataclass(frozen=True)
class Stage:
    """One device of a machine, with its share of a model. Bytes and seconds are this device's."""

    weight_bytes: float
    kv_bytes_per_token: float
    kv_blocks: int
    model: CostModel
    prefill_s_per_token: float


def stage(params: Params) -> Stage:
    """In simulated time. Tensor parallel devices have the same share, and sum twice a layer.

    Raises SaihError where the weights leave no room.
    """
    the, spec = machine(str(params["machine"])), preset(str(params["shape"]))
    word, devices = WORD["simulated"], int(params["stages"])
    weights = word * stepcost.parameters(spec) / devices
    per_token = stepcost.kv_bytes_per_token(spec, word) / devices
    memory = USABLE_MEMORY * (1e9 * float(params["memory_gb"]) or the.memory_bytes)
    blocks = int((memory - weights) / per_token / BLOCK_TOKENS)
    if blocks < devices:
        raise SaihError(f"{devices} {params['machine']} have no room for {params['shape']} and a KV cache")
    rate = EFFICIENCY["memory"] * the.memory_bytes_per_s
    flop_s = 2 * stepcost.parameters(spec) / devices / the.flop_per_s
    fixed_s, per_decode_s = FIXED_S + weights / rate, flop_s / EFFICIENCY["decode"]
    per_prefill_s = flop_s / EFFICIENCY["prefill"]
    if str(params["variant"]) not in PIPELINED:
        sums_s, per_row_s = _sums(the, spec, devices)
        fixed_s, per_decode_s, per_prefill_s = fixed_s + sums_s, per_decode_s + per_row_s, per_prefill_s + per_row_s
    return Stage(weights, per_token, blocks, CostModel(fixed_s, per_decode_s, per_token / rate), per_prefill_s)


def _sums(the: Machine, spec: ModelSpec, devices: int) -> tuple[float, float]:
    """(seconds of latency, seconds a row) of two ring sums a layer over the devices' links."""
    rate = EFFICIENCY["link"] * the.peer_bytes_per_s
    row_bytes = 2 * (devices - 1) / devices * spec.hidden * WORD["simulated"]
    return 2 * spec.layers * SUM_S, 2 * spec.layers * row_bytes / rate


def model(params: Params) -> ModelSpec:
    """With as many layers as asked for."""
    shape, layers = preset(str(params["shape"])), int(params["layers"])
    return replace(shape, layers=layers) if layers else shape


def cost(params: Params) -> Cost:
    """Of one step. All requests decoded; simulated: one prediction, for the simulation is part of the check.

    Bytes are those of a CPU's words; a GPU has half of them.
    """
    spec, requests = model(params), int(params["requests"])
    ranks, stages = int(params["nodes"]) * int(params["gpus"]), int(params["stages"])
    if params["time"] == "simulated":
        if ranks > 1:
            raise SaihError("time=simulated needs one rank")
        stage(params)
        return Cost(
            flop=0.0,
            work=1.0,
            operations=(Operation(0.0, 1e5),),
            device_bytes=2e4 * requests,
            setup_s=SIMULATED_REQUEST_S * requests,
        )
    if params["variant"] not in PIPELINED:
        raise SaihError(f"variant={params['variant']} needs several devices: it is simulated only (time=simulated)")
    if ranks not in (1, stages):
        raise SaihError(f"stages={stages} need {stages} ranks, or 1 that stands for all; there are {ranks}")
    if spec.layers < ranks:
        raise SaihError(f"{params['shape']} has {spec.layers} layers: too few for {ranks} stages")
    if not params["emulated_link"]:
        raise SaihError("emulated_link must be above 0")
    word, shrink = WORD["emulated"], int(params["shrink"])
    prompt, new = (mean / shrink for mean in MEANS[str(params["trace"])])
    per_token = stepcost.kv_bytes_per_token(spec, word)
    context = prompt + new / 2
    batch = max(1.0, min(requests, int(params["kv_tokens"]) / context) / stages)
    steps = int(requests * new / batch) + 1
    one = Batch.decode((int(context),) * round(batch))
    parts = 2 * -(-spec.layers // ranks) + 1
    flop = steps * stepcost.forward_flop(spec, one) / ranks / parts
    moved = steps * stepcost.step_bytes(spec, one, word) / ranks / parts
    pool = requests * (prompt + new) * per_token
    return Cost(
        flop=flop * parts,
        work=requests * new / ranks,
        operations=(Operation(flop, moved),) * parts,
        parameters=stepcost.parameters(spec),
        device_bytes=3.0 * word * stepcost.parameters(spec) + (int(params["kv_tokens"]) * per_token + 2 * pool) / ranks,
        setup_s=2 * stepcost.parameters(spec) / RANDOM_PER_S + 0.02 * requests,
        check_steps=2,
    )
