"""What text generation is and what it costs: axes, parameters, the batches of a trace, claims. Imports no torch."""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from saih.core import Axis, Claim, Cost, Need, Operation, Parameter, Params, Rung
from saih.errors import SaihError
from workloads.llm import config, stepcost
from workloads.llm.allocator import BlockAllocator
from workloads.llm.config import ModelSpec
from workloads.llm.request import Request
from workloads.llm.scheduler import BatchPlan, FirstComeFirstServed, ServerState
from workloads.llm.simulate import simulate
from workloads.llm.stepcost import Batch
from workloads.llm.trace_csv import TraceRow, read_csv

TITLE = "Text generation: prefill, decode and continuous batching, beside engines that people use"
PAPER = (
    "continuous batching: Orca, OSDI 2022; paged KV cache: vLLM, SOSP 2023; chunked prefill: Sarathi-Serve, OSDI 2024"
)
CHECK = "every token is the most likely one after its prompt and the tokens before it, says a plain full forward pass"
WORK_UNIT = "tokens"

ENGINES = ("saih", "hf-generate", "hf-continuous", "ctranslate2")
BATCHINGS = ("prompts", "outputs", "equal", "together")
BATCHED = ("hf-generate", "ctranslate2")
"""Engines whose batches are made before they run."""
TASKS = ("serve", "prefill", "decode")
ABLATIONS = ("compute",)
"""Of engine=saih: every logit is zero, and what is left is scheduling, batching and choosing."""
NEEDS = {
    "engine": {
        "hf-generate": Need("transformers", "pip install 'saih[peers]'"),
        "hf-continuous": Need("transformers", "pip install 'saih[peers]'"),
        "ctranslate2": Need("ctranslate2", "pip install 'saih[peers]'"),
    }
}
WORD = {"fp32": 4, "bf16": 2}
LARGEST_BLOCK = 512
RANDOM_PER_S = 2e7
"""Random weights made per second on one core, once for the engine and once for the check."""
PEER_SETUP_S = 8.0
"""To import a peer and to give it its weights, on one core; a careful figure for planning."""
CAUSAL = tuple(name for name, spec in config.PRESETS.items() if spec.causal)

PARAMETERS = (
    Parameter("shape", "llama-mini", "", "shape of the model, with random weights", choices=CAUSAL),
    Parameter("checkpoint", "", "", "folder of a Hugging Face checkpoint to load instead of `shape`", path=True),
    Parameter("engine", "saih", "", "what generates; all have the same weights and requests", choices=ENGINES),
    Parameter("task", "serve", "", "serve a trace; or one prefill, or one decode step, by itself", choices=TASKS),
    Parameter("precision", "fp32", "", "of weights, activations and cache", choices=tuple(WORD)),
    Parameter("requests", 16, "requests", "of the trace", minimum=1),
    Parameter("prompt_tokens", 128, "tokens", "of each request, or on average", minimum=1),
    Parameter("new_tokens", 48, "tokens", "of each request, or on average", minimum=1),
    Parameter(
        "lengths",
        "even",
        "",
        "even: all alike; mixed: evenly spread from a quarter of the average to 7/4",
        choices=("even", "mixed"),
    ),
    Parameter(
        "trace",
        "",
        "",
        "CSV file with lengths, ours or Azure's, instead of the four above",
        path=True,
    ),
    Parameter(
        "rate_per_s",
        0.0,
        "requests/s",
        "that come: at random, or as in the trace file, faster or slower; 0: all there at the start",
        minimum=0,
    ),
    Parameter(
        "batching",
        "prompts",
        "",
        "hf-generate and ctranslate2 batch requests of like prompts, like outputs, equal prompts, or all together",
        choices=BATCHINGS,
    ),
    Parameter("max_requests", 16, "requests", "most in one batch", minimum=1),
    Parameter("max_tokens", 4096, "tokens", "most in one batch; a longer prompt is prefilled in chunks", minimum=1),
    Parameter("block_size", 0, "tokens", "of the KV cache; 0: one block a request on CPUs, 16 on GPUs", minimum=0),
    Parameter(
        "matrices",
        "prepacked",
        "",
        "saih on CPUs: laid out for oneDNN, or as torch has them",
        choices=("prepacked", "plain"),
    ),
)

AXES = (
    Axis(
        "engine",
        "",
        tuple(
            Rung(label, {"batching": "prompts", "matrices": "prepacked"} | settings, place)
            for place, (label, settings) in enumerate(
                {
                    "saih": {"engine": "saih"},
                    "saih-plain": {"engine": "saih", "matrices": "plain"},
                    "hf-generate": {"engine": "hf-generate"},
                    "hf-generate-outputs": {"engine": "hf-generate", "batching": "outputs"},
                    "hf-generate-together": {"engine": "hf-generate", "batching": "together"},
                    "hf-continuous": {"engine": "hf-continuous"},
                    "ctranslate2": {"engine": "ctranslate2"},
                    "ctranslate2-equal": {"engine": "ctranslate2", "batching": "equal"},
                }.items()
            )
        ),
        named=True,
    ),
    Axis(
        "data",
        "requests x prompt tokens",
        tuple(
            Rung(
                f"{requests}x{prompt}",
                {"requests": requests, "prompt_tokens": prompt, "max_requests": max(16, min(requests, 64))},
                requests * prompt,
            )
            for requests, prompt in ((1, 128), (4, 128), (16, 128), (16, 512), (64, 512), (256, 1024))
        ),
    ),
    Axis(
        "model",
        "parameters",
        tuple(
            Rung(name, {"shape": name}, stepcost.parameters(config.PRESETS[name]))
            for name in sorted(CAUSAL, key=lambda name: stepcost.parameters(config.PRESETS[name]))
        ),
    ),
)


_HF = {
    "hf-generate": "generate of transformers, batches of like prompts",
    "hf-generate-outputs": "generate of transformers, batches of like outputs",
    "hf-generate-together": "generate of transformers, all requests in one batch",
    "hf-continuous": "continuous batching of transformers",
}
_CTRANSLATE2 = {
    "ctranslate2": "CTranslate2, batches of like prompts",
    "ctranslate2-equal": "CTranslate2, equal prompts only in a batch",
}


def _over(ours: str, peer: str, text: str) -> Claim:
    name = f"over-{peer}" if ours == "saih" else f"plain-over-{peer}"
    return Claim(name, text, "work_per_s", {"engine": ours}, {"engine": peer}, 1.0)


CLAIMS = (
    *(_over("saih", peer, f"tokens/s over {text}, same trace") for peer, text in (_HF | _CTRANSLATE2).items()),
    *(
        _over("saih-plain", peer, f"tokens/s over {text}, both with torch's own products: the engine alone")
        for peer, text in _HF.items()
    ),
    Claim(
        "prepacking-pays-serving",
        "tokens/s of a whole trace with matrices laid out for oneDNN over torch's own products",
        "work_per_s",
        {"engine": "saih"},
        {"engine": "saih-plain"},
        target=1.0,
    ),
    Claim(
        "prepacking-pays",
        "tokens/s with matrices laid out for oneDNN over torch's own products",
        "work_per_s",
        {"matrices": "prepacked"},
        {"matrices": "plain"},
        target=1.0,
    ),
)


def model(params: Params) -> ModelSpec:
    """The shape of the model. Raises SaihError for a checkpoint that cannot be read or does not generate."""
    folder = str(params["checkpoint"])
    spec = config.from_hf(folder) if folder else config.preset(str(params["shape"]))
    if not spec.causal:
        raise SaihError(f"{folder}: a {spec.family} model does not generate text")
    return spec


def rows(params: Params, seed: int) -> list[TraceRow]:
    """The trace: lengths, for prefill and decode all even, and arrivals at `rate_per_s` on average."""
    if params["trace"]:
        return _at_rate(read_csv(Path(str(params["trace"]))), float(params["rate_per_s"]))
    prompts, outputs = (_lengths(params, name, seed) for name in ("prompt_tokens", "new_tokens"))
    gaps = random.Random(f"{seed} arrivals")  # noqa: S311
    arrivals = accumulate([0.0, *(gaps.expovariate(1.0) for _ in prompts[1:])])
    return _at_rate(
        [TraceRow(*row) for row in zip(arrivals, prompts, outputs, strict=True)], float(params["rate_per_s"])
    )


def _at_rate(trace: list[TraceRow], rate_per_s: float) -> list[TraceRow]:
    """The same gaps in proportion, so many requests a second on average; all at the start for 0."""
    last_s = trace[-1].arrival_s
    scale = (len(trace) - 1) / rate_per_s / last_s if rate_per_s and last_s else 0.0
    return [row._replace(arrival_s=row.arrival_s * scale) for row in trace]


def _lengths(params: Params, name: str, seed: int) -> list[int]:
    """All alike; or evenly spaced from a quarter of the average to 7/4 of it, in random order."""
    count, mean = int(params["requests"]), int(params[name])
    reach = 3 * mean // 4 if params["lengths"] == "mixed" and count > 1 else 0
    lengths = [mean - reach + round(2 * reach * place / max(1, count - 1)) for place in range(count)]
    random.Random(f"{seed} {name}").shuffle(lengths)  # noqa: S311
    return lengths


def block_size(params: Params, trace: tuple[TraceRow, ...] | list[TraceRow], device: str) -> int:
    """On a CPU a power of two that holds the longest request, so that its keys are read in one piece."""
    if params["block_size"]:
        return int(params["block_size"])
    longest = max(row.prompt_tokens + row.new_tokens for row in trace)
    return 16 if device != "cpu" else min(LARGEST_BLOCK, 1 << (longest - 1).bit_length())


def blocks(params: Params, trace: list[TraceRow], size: int) -> int:
    """Cache blocks that let the longest requests run together."""
    counts = sorted(-(-(row.prompt_tokens + row.new_tokens) // size) for row in trace)
    return sum(counts[-int(params["max_requests"]) :])


def scheduler(params: Params) -> FirstComeFirstServed:
    """Of the engine, and of the plan."""
    return FirstComeFirstServed(int(params["max_tokens"]), int(params["max_requests"]))


def batches(params: Params, seed: int = 0) -> list[Batch]:
    """Every batch of a step of this task: for a trace, those that the scheduler decides on if all are there at once."""
    spec, trace = model(params), rows(params, seed)
    if params["task"] == "prefill":
        return [Batch.prefill([row.prompt_tokens for row in trace])]
    if params["task"] == "decode":
        return [Batch.decode([row.prompt_tokens for row in trace])]
    found: list[Batch] = []

    def note(plan: BatchPlan) -> float:
        contexts = tuple(request.computed for request in plan.requests)
        found.append(Batch(tuple(plan.tokens), contexts, len(plan.sampled())))
        return 1.0

    size = block_size(params, trace, "cpu")
    state = ServerState(BlockAllocator(blocks(params, trace, size), size), spec.max_positions)
    requests = [Request(number, range(row.prompt_tokens), row.new_tokens) for number, row in enumerate(trace)]
    simulate(requests, scheduler(params), state, note)
    _refuse(requests)
    return found


def _refuse(requests: list[Request]) -> None:
    """Every request counts in a comparison: one that cannot be served is a mistake."""
    for request in requests:
        if request.refusal:
            raise SaihError(request.refusal)


def cost(params: Params) -> Cost:
    """Of one step: a whole trace, one prefill of all requests, or one decode step of all. Work is generated tokens,
    or the prompt's in a prefill. Every engine is charged the same model FLOP."""
    return _cost(tuple(sorted(params.items())))


@lru_cache(maxsize=64)
def _cost(items: tuple[tuple[str, bool | int | float | str], ...]) -> Cost:
    params = dict(items)
    _check(params)
    spec, word, found = model(params), WORD[str(params["precision"])], batches(params)
    trace = rows(params, 0)
    weights = stepcost.parameters(spec) * word
    size = block_size(params, trace, "cpu")  # a GPU's are smaller: no more memory, the same batches
    cache = blocks(params, trace, size) * size * stepcost.kv_bytes_per_token(spec, word)
    busiest = max(found, key=lambda batch: batch.rows)
    new = sum(batch.head_rows for batch in found)
    return Cost(
        flop=float(sum(stepcost.forward_flop(spec, batch) for batch in found)),
        work=float(busiest.rows if params["task"] == "prefill" else new),
        operations=tuple(each for batch in found for each in _operations(spec, batch, word)),
        beside_s=trace[-1].arrival_s,
        parameters=stepcost.parameters(spec),
        device_bytes=3.0 * weights + cache + 2 * stepcost.activation_bytes(spec, busiest, word),
        setup_s=PEER_SETUP_S * (params["engine"] != "saih") + 2 * stepcost.parameters(spec) / RANDOM_PER_S,
        check_steps=3,
    )


def _check(params: Params) -> None:
    if int(params["nodes"]) * int(params["gpus"]) > 1:
        raise SaihError("generation runs on one rank; energonai cuts a model over several")
    if params["batching"] != "prompts" and params["engine"] not in BATCHED:
        raise SaihError(f"batching={params['batching']} is for engine={' and '.join(BATCHED)}")
    if params["rate_per_s"] and (params["engine"] != "saih" or params["task"] != "serve"):
        raise SaihError("rate_per_s is for engine=saih and task=serve: the others are given all requests at once")
    if params["engine"] != "saih":
        if params["task"] != "serve":
            raise SaihError(f"{params['engine']} serves whole traces only: a {params['task']} by itself is saih's")
        if params["matrices"] != "prepacked":
            raise SaihError(f"matrices={params['matrices']} is for engine=saih; {params['engine']} has its own")
    if params["task"] != "serve" and (params["trace"] or params["lengths"] != "even"):
        raise SaihError(f"task={params['task']} takes requests of one length: no trace, lengths=even")
    longest, spec = max(row.prompt_tokens + row.new_tokens for row in rows(params, 0)), model(params)
    if longest > spec.max_positions:
        raise SaihError(f"a request of {longest} tokens exceeds the model's {spec.max_positions} positions")


def _operations(spec: ModelSpec, batch: Batch, word: int) -> list[Operation]:
    """Two halves of every layer, attention and MLP, and the head: the FLOP and bytes of a batch in equal parts."""
    parts = 2 * spec.layers + 1
    flop, moved = stepcost.forward_flop(spec, batch), stepcost.step_bytes(spec, batch, word)
    return [Operation(flop / parts, moved / parts)] * parts
