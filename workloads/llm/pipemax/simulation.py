"""A whole trace through a variant in simulated time, on a machine of data sheets. Deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from saih.core import Params
from workloads.llm import trace
from workloads.llm.allocator import BlockAllocator
from workloads.llm.config import preset
from workloads.llm.machines import HOST_BYTES, machine
from workloads.llm.pipemax import spec
from workloads.llm.pipemax.expected import StageModel, expect
from workloads.llm.pipemax.predictor import predict
from workloads.llm.pipemax.rotation import Policy, Rotation
from workloads.llm.pipemax.simulated import SimulatedDevice
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.request import Request
from workloads.llm.trace_csv import TraceRow

MOST_REQUESTS = 4096
"""In a batch: memory decides, not this."""


def policy(variant: str, stages: int) -> Policy:
    """What a variant is. Tensor parallelism is one batch, and one stage; with offloading, three that take turns."""
    return {
        "tp": Policy(1, 1, phases=False),
        "tp-offload": Policy(3, 1, offload=True),
        "pp-resident": Policy(stages, stages, steal=False, phases=False),
        "td-pipe": Policy(stages, stages),
        "pipemax": Policy(stages, stages, offload=True),
        "pipemax-static": Policy(stages, stages, offload=True, fixed_share=spec.STATIC_SHARE),
    }[variant]


def rows(params: Params, seed: int) -> list[TraceRow]:
    """All there at the start; outputs cut at spec.LONGEST_NEW_TOKENS."""
    found = trace.synthetic(int(params["requests"]), math.inf, trace.LENGTHS[str(params["trace"])], seed)
    return [row._replace(new_tokens=min(row.new_tokens, spec.LONGEST_NEW_TOKENS)) for row in found]


def prefilled(requests: Sequence[Request]) -> None:
    """All but the last token of each prompt is computed before its first step, or with it: the device says when."""
    for request in requests:
        request.computed = len(request.prompt) - 1


def predicted_gain(params: Params) -> float:
    """Of decode throughput over resident batches, by the predictor."""
    stage, the = spec.stage(params), machine(str(params["machine"]))
    kv_bytes = stage.kv_blocks * spec.BLOCK_TOKENS * stage.kv_bytes_per_token
    ratio = the.host_bytes_per_s / the.memory_bytes_per_s
    return predict(kv_bytes, stage.weight_bytes, int(params["stages"]), ratio).gain


def figures(rotation: Rotation) -> dict[str, float]:
    """What the turns say, emulated or simulated."""
    turns = rotation.turns
    busy_s = sum(each.computed_s + each.beside.prompts_s for each in turns)
    errors = sorted(abs(each.predicted_s / each.computed_s - 1) for each in turns)
    activations_s = sorted(each.beside.activation_s for each in turns)
    return {
        "turns": float(len(turns)),
        "mean_batch": sum(each.requests for each in turns) / len(turns),
        "stalled_share": sum(each.stalled_s for each in turns) / busy_s,
        "bubble_share": sum(each.bubble_s for each in turns) / busy_s,
        "activation_share": sum(activations_s) / busy_s,
        "activation_p95_s": activations_s[int(0.95 * len(turns))],
        "fetched_blocks_per_turn": sum(each.fetched_blocks for each in turns) / len(turns),
        "single_turn_median_error": errors[len(errors) // 2],
        "single_turn_p95_error": errors[int(0.95 * len(errors))],
        "single_turn_worst_error": errors[-1],
    }


def run(params: Params, seed: int) -> dict[str, float]:
    """Figures of the trace in simulated time, and what is to be expected on paper."""
    stage, the = spec.stage(params), machine(str(params["machine"]))
    chosen = policy(str(params["variant"]), int(params["stages"]))
    block_bytes = int(spec.BLOCK_TOKENS * stage.kv_bytes_per_token)
    pool = HostPool(int(HOST_BYTES / int(params["stages"]) / block_bytes), spec.BLOCK_TOKENS)
    state = PooledState(BlockAllocator(stage.kv_blocks, spec.BLOCK_TOKENS), pool)
    copies = 1 if params["layout"] == "block_first" else preset(str(params["shape"])).layers // int(params["stages"])
    device = SimulatedDevice(
        state,
        stage.model,
        block_bytes,
        spec.EFFICIENCY["link"] * the.host_bytes_per_s,
        copies * spec.COPY_S,
        str(params["order"]),
        prefill_s_per_token=stage.prefill_s_per_token,
        phases=chosen.phases,
        offload=chosen.offload,
        row_bytes=spec.WORD["simulated"] * preset(str(params["shape"])).hidden if chosen.stages > 1 else 0.0,
    )
    requests = trace.to_requests(rows(params, seed))
    prefilled(requests)
    rotation = Rotation(state, chosen, device, stage.model, block_bytes, MOST_REQUESTS)
    rotation.serve(requests)
    tokens, took_s = sum(len(each.generated) for each in requests), device.now_s()
    on_paper = StageModel(
        stage.kv_blocks * spec.BLOCK_TOKENS,
        stage.model,
        stage.prefill_s_per_token,
        device.rate / stage.kv_bytes_per_token,
    )
    expected = expect(requests, on_paper, chosen)
    found = {name: value for name, value in figures(rotation).items() if not name.startswith("single_turn")}
    found |= {"tokens_per_s": tokens / took_s, "decode_tokens_per_s": tokens / (took_s - device.prefill_s)}
    return {f"simulated_{name}": value for name, value in found.items()} | {
        "predicted_simulated_tokens_per_s": expected.tokens_per_s,
        "predicted_simulated_mean_batch": expected.batch,
        "predicted_moved_share": expected.moved_share,
    }
