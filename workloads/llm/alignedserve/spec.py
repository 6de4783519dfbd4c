"""What AlignedServe promises and what decoding a pool of requests costs, by variant and kernel. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from saih.core import Axis, Claim, Cost, Need, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.config import PRESETS, ModelSpec, preset
from workloads.llm.costs import CostModel
from workloads.llm.machines import MACHINES, USABLE_MEMORY, Machine, machine
from workloads.llm.stepcost import Batch

TITLE = "AlignedServe: decoding in batches of like length out of a host pool, kept ready beside the running one"
PAPER = "AlignedServe: SIGMOD 2026, doi:10.1145/3802009, arXiv:2605.23389"
CHECK = (
    "every token is the most likely one after its prompt and the tokens before it, says a plain full forward "
    "pass; in simulated time, no request is lost"
)
WORK_UNIT = "tokens"

VARIANTS = ("fcfs", "aligned", "aligned-noprefetch", "sorted-oracle")
PEERS = ("hf-continuous",)
NEEDS = {"variant": {peer: Need("transformers", "pip install 'saih[peers]'") for peer in PEERS}}
KERNELS = ("padded", "ragged", "split-kv")
SHORT_SHARES = (70, 80, 90, 95)
MIXES = tuple(f"short-{share}" for share in SHORT_SHARES)
MEANS = {
    "sharegpt": (343.76, 237.20),
    "longbench": (2686.89, 101.78),
    "azure-conv": (1154.70, 211.13),
    "azure-code": (2047.85, 27.88),
}
"""Tokens of prompts and outputs, as in `workloads.llm.trace.LENGTHS`."""
TRACES = (*MEANS, *MIXES)
MIX_NEW_TOKENS = 237.20
LONGEST_NEW_TOKENS = 1024
"""Outputs are cut here: with a tail of many thousand tokens the last request, not the scheduler, decides the time."""
BLOCK_TOKENS = 16
WORD = {"simulated": 2, "real": 4}
MAX_REQUESTS = 256
POOLED = 9000
"""Requests that are in the pool at least when a decision of simulated time is timed."""
SIMULATED_REQUEST_S = 6e-4
"""To simulate a request on one core: a figure for planning."""
RANDOM_PER_S = 2e7

PARAMETERS = (
    Parameter(
        "time",
        "real",
        "",
        "decode really, or in simulated time on a machine of data sheets",
        choices=("real", "simulated"),
    ),
    Parameter(
        "variant",
        "aligned",
        "",
        "what decodes next, and whether it is prefetched; or the continuous batching of transformers",
        choices=VARIANTS + PEERS,
    ),
    Parameter(
        "attention", "padded", "", "filled up; one thread block a sequence; or keys cut into parts", choices=KERNELS
    ),
    Parameter("trace", "short-90", "", f"lengths: {', '.join(TRACES)}, or a CSV file, ours or Azure's"),
    Parameter("requests", 96, "requests", "of the trace", minimum=1),
    Parameter(
        "rate", 0.0, "requests/s", "simulated: arrivals, of a file too; 0 = all in the pool at the start", minimum=0
    ),
    Parameter("starvation_s", 0.0, "s", "aligned: who waits longer goes first; 0 = no bound", minimum=0),
    Parameter(
        "shape",
        "llama-tiny",
        "",
        "shape of the model, with random weights",
        choices=tuple(name for name, shape in PRESETS.items() if shape.causal),
    ),
    Parameter(
        "kv_tokens", 12288, "tokens", "KV budget of the device; simulated: 0 = what the machine has room for", minimum=0
    ),
    Parameter("shrink", 8, "", "real: lengths of prompts are divided by it", minimum=1),
    Parameter("new_tokens", 24, "tokens", "real: of a request on average", minimum=1),
    Parameter(
        "prompts",
        "computed",
        "",
        "real: computed before the clock starts, so that a step is decoding alone; or timed with it",
        choices=("computed", "timed"),
    ),
    Parameter(
        "stage",
        "auto",
        "",
        "real: where what runs next waits: a second GPU, a second buffer on the device; auto: the GPU if there is one",
        choices=("auto", "peer", "device"),
    ),
    Parameter("machine", "h100", "", "simulated: the device and its links", choices=tuple(MACHINES)),
)

STARVATION_S = 5.0
"""The bound that `policy=aligned-bounded` keeps. Our choice."""

AXES = (
    Axis("data", "requests", tuple(Rung(str(n), {"requests": n}, n) for n in (24, 96, 384, 1000, 10000))),
    Axis("short", "% of requests", tuple(Rung(str(s), {"trace": f"short-{s}"}, s) for s in SHORT_SHARES)),
    Axis("policy", "", tuple(
        Rung(label, {"variant": variant, "starvation_s": bound_s}, place)
        for place, (label, variant, bound_s) in enumerate((
            ("fcfs", "fcfs", 0.0),
            ("aligned", "aligned", 0.0),
            ("aligned-bounded", "aligned", STARVATION_S),
        ))
    ), named=True),
)  # fmt: skip

ALIGNED, FCFS = {"variant": "aligned"}, {"variant": "fcfs"}
_PAPER_SPEED = {
    "sharegpt": "up to 1.35x over DistServe (another digest: 1.98x)",
    "longbench": "up to 1.98x",
    "azure-conv": "up to 1.98x (Azure)",
    "azure-code": "up to 1.98x (Azure)",
    "short-70": "",
    "short-80": "",
    "short-90": "",
    "short-95": "1.32x over vLLM, 1.35x DistServe, 1.85x FastGen (OPT-2.7B)",
}
_PAPER_P99 = {
    "sharegpt": "1/1.65",
    "longbench": "1/2.1",
    "azure-conv": "1/7.4 (Azure)",
    "azure-code": "1/7.4 (Azure)",
    **dict.fromkeys(MIXES, "1/3.05 to 1/1.74"),
}
_TARGETS = {"padded": 1.3, "ragged": 1.0, "split-kv": 0.95}


def _real(kernel: str, target: float, paper: str) -> Claim:
    return Claim(
        f"{kernel}-over-fcfs",
        f"decode tokens/s of aligned over fcfs, {kernel} kernel",
        "work_per_s",
        ALIGNED,
        FCFS,
        target,
        where={"time": "real", "attention": kernel},
        paper=paper,
    )


def _simulated_speed(trace: str, kernel: str) -> Claim:
    return Claim(
        f"simulated-{trace}-{kernel}",
        f"decode tokens/s of aligned over fcfs, {trace}, {kernel} kernel (simulated time)",
        "check_simulated_tokens_per_s",
        ALIGNED,
        FCFS,
        _TARGETS[kernel],
        where={"trace": trace, "attention": kernel},
        paper=_PAPER_SPEED[trace],
    )


def _simulated_p99(trace: str, kernel: str) -> Claim:
    return Claim(
        f"simulated-{trace}-{kernel}-p99-tpot",
        f"P99 time per output token of aligned over fcfs, {trace}, {kernel} kernel (simulated time)",
        "check_simulated_tpot_p99_s",
        ALIGNED,
        FCFS,
        1.0,
        "lower",
        where={"trace": trace, "attention": kernel},
        paper=_PAPER_P99[trace],
    )


def _simulated_tpot_of(kind: str, percent: int, trace: str) -> Claim:
    """Of requests with short or with long prompts alone."""
    return Claim(
        f"simulated-{trace}-{kind}-p{percent}-tpot",
        f"P{percent} time per output token of {kind} requests, aligned over fcfs, {trace}, ragged (simulated time)",
        f"check_simulated_{kind}_tpot_p{percent}_s",
        ALIGNED,
        FCFS,
        1.0,
        "lower",
        where={"trace": trace, "attention": "ragged"},
    )


def _simulated_ttft(name: str, text: str, metric: str, over: str, target: float, paper: str) -> Claim:
    top = {"policy": "aligned" if over == "fcfs" else "aligned-bounded"}
    return Claim(
        f"simulated-ttft-{name}",
        f"{text} (simulated time)",
        f"check_simulated_{metric}",
        top,
        {"policy": over},
        target,
        "lower",
        paper=paper,
    )


CLAIMS = (
    _real("padded", 3.0, ""),
    _real("ragged", 1.0, "1.32x over vLLM at OPT-2.7B, 95 % short"),
    *(_simulated_speed(trace, kernel) for trace in _PAPER_SPEED for kernel in KERNELS),
    *(_simulated_p99(trace, kernel) for trace in _PAPER_P99 for kernel in KERNELS),
    *(
        _simulated_tpot_of(kind, percent, trace)
        for trace in ("azure-conv", "short-90")
        for kind in ("short", "long")
        for percent in (50, 99)
    ),
    Claim(
        "decisions",
        f"P95 of one decision, s, {POOLED} requests or more in the pool (measured on the host)",
        "check_host_decision_p95_s",
        ALIGNED,
        {},
        5e-3,
        "lower",
        paper="95 % of iterations under 5 ms",
    ),
    Claim(
        "simulated-prefetch",
        "decode tokens/s of aligned over aligned without prefetch (simulated time)",
        "check_simulated_tokens_per_s",
        ALIGNED,
        {"variant": "aligned-noprefetch"},
        1.0,
        paper="1.17x (Azure)",
    ),
    _simulated_ttft(
        "price", "mean TTFT of aligned over fcfs", "ttft_mean_s", "fcfs", 1.5, "+1.49 s ShareGPT, +2.54 s LongBench"
    ),
    _simulated_ttft("longest", "longest TTFT of aligned over fcfs", "ttft_max_s", "fcfs", 1.0, "~30 s longer"),
    _simulated_ttft(
        "bounded", "longest TTFT with the starvation bound over without", "ttft_max_s", "aligned", 1.0, "~30 s without"
    ),
    Claim(
        "over-hf-continuous",
        "tokens/s of a whole trace, prompts too, over the continuous batching of transformers, same cache",
        "work_per_s",
        ALIGNED,
        {"variant": "hf-continuous"},
        1.5,
        where={"time": "real"},
    ),
)


@dataclass(frozen=True)
class Mean:
    """A trace by its means, for planning: tokens of the mean prompt, of the longest, of the mean output."""

    prompt: float
    longest: float
    new: float


def mean(params: Params) -> Mean:
    """Raises SaihError for a trace that there is not."""
    trace, real = check_trace(str(params["trace"])), params["time"] == "real"
    prompt, longest, new = 1000.0, 8000.0, MIX_NEW_TOKENS
    if trace in MEANS:
        prompt, new = MEANS[trace]
    elif short := short_share(trace):
        prompt = short * 500 + (1 - short) * 4500
    shrink = int(params["shrink"]) if real else 1
    return Mean(prompt / shrink, longest / shrink, float(params["new_tokens"]) if real else new)


def check_trace(trace: str) -> str:
    """The name or path, if it can be one; raises SaihError otherwise."""
    if trace not in TRACES and not Path(trace).is_absolute():
        raise SaihError(f"trace={trace}: choose {', '.join(TRACES)}, or the absolute path of a CSV file")
    return trace


def short_share(trace: str) -> float:
    """Of a mix, as a fraction; 0 for another trace."""
    found = re.fullmatch(r"short-(\d+)", trace)
    return int(found[1]) / 100 if found else 0.0


def kv_blocks(params: Params) -> int:
    """Blocks of the device's KV cache. Raises SaihError where the machine has no room for the weights."""
    tokens = int(params["kv_tokens"])
    if not tokens:
        if params["time"] == "real":
            raise SaihError("time=real needs kv_tokens > 0")
        spec, the = preset(str(params["shape"])), machine(str(params["machine"]))
        free = USABLE_MEMORY * the.memory_bytes - WORD["simulated"] * stepcost.parameters(spec)
        tokens = int(free / stepcost.kv_bytes_per_token(spec, WORD["simulated"]))
    if tokens < BLOCK_TOKENS:
        raise SaihError(f"{params['shape']} leaves no room for a KV cache: {tokens} tokens")
    return tokens // BLOCK_TOKENS


FIXED_S = 4e-3
"""Launches and sampling of an iteration in simulated time, beside reading the weights. Our choice."""
EFFICIENCY = 0.8
"""Of the data sheet's bandwidth that reading weights and keys gets. Our choice."""
IMBALANCE_S, IMBALANCE_TOKENS, IMBALANCED = 21.73e-3 - 13.49e-3, 4096, 4
"""arXiv 2605.23389: what an iteration of 64 short requests takes longer with 4 of them at 4096 tokens."""


def kernel_model(spec: ModelSpec, the: Machine, kernel: str) -> CostModel:
    """Iterations of a kernel on a machine: a b + c sum + g max + d, from data sheets.

    g of the ragged kernel is what the paper's example takes beyond the bytes of the long requests' keys. It is 0 for
    split keys, and for the padded kernel too, whose sum counts every request as the longest (`seen`).
    """
    rate = EFFICIENCY * the.memory_bytes_per_s
    per_token_s = stepcost.kv_bytes_per_token(spec, WORD["simulated"]) / rate
    beyond_s = max(0.0, IMBALANCE_S - IMBALANCED * IMBALANCE_TOKENS * per_token_s)
    return CostModel(
        fixed_s=FIXED_S + WORD["simulated"] * stepcost.parameters(spec) / rate,
        per_decode_s=2 * stepcost.parameters(spec) / the.flop_per_s,
        per_context_token_s=per_token_s,
        per_longest_token_s=beyond_s / IMBALANCE_TOKENS if kernel == "ragged" else 0.0,
    )


def cost(params: Params) -> Cost:
    """Of one step. Real: all requests of the pool decoded. Simulated: one decision over the whole pool; the simulation
    itself is part of the check."""
    spec, the, blocks = preset(str(params["shape"])), mean(params), kv_blocks(params)
    if int(params["nodes"]) * int(params["gpus"]) > 1:
        raise SaihError("alignedserve decodes on one rank; prefill and the stage are beside it, or simulated")
    if params["variant"] in PEERS and (params["time"] != "real" or params["prompts"] != "timed"):
        raise SaihError(f"variant={params['variant']} computes prompts itself: set time=real and prompts=timed")
    if params["variant"] != "aligned" and params["starvation_s"]:
        raise SaihError(f"starvation_s is for variant=aligned, not {params['variant']}")
    if params["stage"] == "peer" and (
        params["time"] == "simulated" or params["variant"] in (*PEERS, "aligned-noprefetch")
    ):
        raise SaihError("stage=peer is for time=real and a variant that prefetches")
    requests, word = int(params["requests"]), WORD[str(params["time"])]
    kv = blocks * BLOCK_TOKENS * stepcost.kv_bytes_per_token(spec, word)
    if params["time"] == "simulated":
        return Cost(
            flop=0.0,
            work=float(min(requests, MAX_REQUESTS)),
            operations=(Operation(0.0, 1e4 + 1e2 * requests),),
            device_bytes=2e4 * requests,
            setup_s=SIMULATED_REQUEST_S * requests,
        )
    if the.longest + 5 * the.new > spec.max_positions:
        raise SaihError(f"{the.longest:.0f} tokens exceed {params['shape']}'s {spec.max_positions} positions")
    context = the.prompt + the.new / 2
    batch = max(1, min(requests, MAX_REQUESTS, int(blocks * BLOCK_TOKENS / context)))
    iterations = -(-requests * int(the.new) // batch)
    seen = the.longest if params["attention"] == "padded" and params["variant"] == "fcfs" else context
    flop = stepcost.forward_flop(spec, Batch.decode((int(context),) * batch))
    moved = stepcost.step_bytes(spec, Batch.decode((int(seen),) * batch), word)
    parts = 2 * spec.layers + 1
    pool = requests * (the.prompt + the.new) * stepcost.kv_bytes_per_token(spec, word)
    operations = (Operation(flop / parts, moved / parts),) * (parts * iterations)
    prompts_flop = 0.0
    if params["prompts"] == "timed":
        prompt_flop = stepcost.forward_flop(spec, Batch.prefill((int(the.prompt),)))
        prompts_flop = float(requests * prompt_flop)
        operations += (Operation(prompt_flop / parts, 0.0),) * (parts * requests)
    return Cost(
        flop=float(flop) * requests * the.new / batch + prompts_flop,
        work=requests * the.new,
        operations=operations,
        parameters=stepcost.parameters(spec),
        device_bytes=word * stepcost.parameters(spec) + 2 * kv + pool + 8.0 * batch * the.longest * 1e3,
        setup_s=stepcost.parameters(spec) / RANDOM_PER_S + requests * 0.02,
        check_steps=2,
    )
