"""What a variant should give of a trace on paper, from lengths, a step's model and the link: beside what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workloads.llm.costs import CostModel
from workloads.llm.pipemax.predictor import predict
from workloads.llm.pipemax.rotation import Policy
from workloads.llm.request import Request

ROTATIONS = 2000
"""Drawn for a mean."""


@dataclass(frozen=True)
class StageModel:
    """One stage: room for keys and values, time of a decode step, of a prompt's token, and tokens/s of the link."""

    kv_tokens: float
    model: CostModel
    prefill_s_per_token: float
    link_tokens_per_s: float


@dataclass(frozen=True)
class Expected:
    """Of a whole trace, its prompts too; batch: requests that run together."""

    tokens_per_s: float
    batch: float
    moved_share: float


def expect(requests: Sequence[Request], stage: StageModel, policy: Policy) -> Expected:
    """Batches always full and equally large, nothing waits: a bound from above.

    With the share f of a batch away, a batch has M / (slots (1 - f) + 2 f) tokens (see `predictor`). Prompts have a
    phase of their own, which lasts as long as their way to the host if that is longer. Without phases each is computed
    with the step of the batch it joins, which is late for it on every stage of a pipeline.
    """
    tokens = sum(each.max_new_tokens for each in requests)
    context = sum(each.max_new_tokens * (len(each.prompt) + each.max_new_tokens / 2) for each in requests) / tokens
    moved = _moved_share(context, stage, policy)
    held = stage.kv_tokens / (policy.slots * (1 - moved) + 2 * moved) if policy.slots > 1 else stage.kv_tokens
    batch = max(1.0, min(held / context, len(requests) / policy.slots))
    model = stage.model
    step_s = model.fixed_s + batch * (model.per_decode_s + model.per_context_token_s * context)
    if policy.stages > 1 and not policy.phases:
        joining_s = stage.prefill_s_per_token * _joining(requests, batch, policy.slots)
        return Expected(batch / _turn_s(step_s + joining_s, policy.stages), batch, moved)
    to_host_s = 1 / stage.link_tokens_per_s if policy.offload else 0.0
    per_token_s = max(stage.prefill_s_per_token, to_host_s)
    prompts_s = per_token_s * sum(len(each.prompt) for each in requests)
    return Expected(tokens / (tokens * step_s / batch + prompts_s), batch, moved)


def _joining(requests: Sequence[Request], batch: float, slots: int) -> NDArray[np.float64]:
    """Tokens of the prompts that join in each turn, drawn: one row a rotation.

    A request leaves after its output, and another one comes: batch / mean output of them join each turn, by chance.
    """
    rng = np.random.default_rng(0)
    prompts = np.array([len(each.prompt) for each in requests])
    leaving = batch * len(requests) / sum(each.max_new_tokens for each in requests)
    joining = rng.poisson(leaving, ROTATIONS * slots)
    turn = np.repeat(np.arange(len(joining)), joining)
    tokens = np.bincount(turn, rng.choice(prompts, len(turn)), len(joining))
    return tokens.reshape(ROTATIONS, slots).astype(np.float64)


def _turn_s(step_s: NDArray[np.float64], stages: int) -> float:
    """Mean time of a turn whose steps take so long: a batch is back after `stages` times its own, in order."""
    free_s, back_s = 0.0, [0.0] * step_s.shape[1]
    for rotation in step_s.tolist():
        for slot, took_s in enumerate(rotation):
            begin_s = max(free_s, back_s[slot])
            free_s, back_s[slot] = begin_s + took_s, begin_s + stages * took_s
    return free_s / step_s.size


def _moved_share(context: float, stage: StageModel, policy: Policy) -> float:
    """f: the fixed part of a step counts as weights, in tokens that would take as long to read.

    A fixed budget of the share p of the cache a step, f x = p M, whatever the step's time.
    """
    if not policy.offload or policy.slots < 3:
        return 0.0
    if policy.fixed_share:
        return policy.fixed_share * policy.slots / (1 + policy.fixed_share * (policy.slots - 2))
    tokens_per_s = 1 / max(stage.model.per_decode_s / context + stage.model.per_context_token_s, 1e-15)
    weights = stage.model.fixed_s * tokens_per_s
    return predict(stage.kv_tokens, weights, policy.slots, stage.link_tokens_per_s / tokens_per_s).moved_share
