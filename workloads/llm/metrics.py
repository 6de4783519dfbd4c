"""What users of a server feel and what its owner pays for, from the times of requests and iterations."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from workloads.llm.request import Request
from workloads.llm.serve import Iteration


def ttft_s(requests: Iterable[Request]) -> NDArray[np.float64]:
    """Time to first token of each request that got one: from its arrival, so queueing counts."""
    return np.array([request.token_s[0] - request.arrival_s for request in requests if request.token_s])


def tpot_s(requests: Iterable[Request]) -> NDArray[np.float64]:
    """Time per output token of each request with at least two: mean gap between its tokens after the first."""
    times = (request.token_s for request in requests if len(request.token_s) > 1)
    return np.array([(each[-1] - each[0]) / (len(each) - 1) for each in times])


def tokens_per_s(requests: Iterable[Request]) -> float:
    """Generated tokens over the time from the first arrival to the last token; NaN without tokens."""
    served = [request for request in requests if request.token_s]
    if not served:
        return float("nan")
    elapsed_s = max(each.token_s[-1] for each in served) - min(each.arrival_s for each in served)
    return sum(len(each.token_s) for each in served) / elapsed_s


def mixed_share(iterations: Sequence[Iteration]) -> float:
    """Share of iterations that hold both prefill and decode tokens."""
    mixed = sum(1 for each in iterations if each.load.decodes and each.load.prefill_tokens)
    return mixed / len(iterations) if iterations else float("nan")


def bubble_s(requests: Iterable[Request], busy_s: Iterable[tuple[float, float]]) -> float:
    """Time a device idles while the server has requests; `busy_s` are its (start, end) of work."""
    present = [(each.arrival_s, each.token_s[-1]) for each in requests if each.token_s]
    working = list(busy_s)
    return _covered_s(present + working) - _covered_s(working)


def summary(requests: Sequence[Request], iterations: Sequence[Iteration]) -> dict[str, float]:
    """Every figure by name; latencies over all requests, then for each class that requests name.

    `idle_s` is the time without any batch in flight while requests are there. Bubbles of pipeline stages are
    `bubble_s` of each stage's own times.
    """
    figures = {
        "requests_served": float(sum(1 for each in requests if each.token_s)),
        "requests_refused": float(sum(1 for each in requests if each.refusal)),
        "preemptions": float(sum(each.preemptions for each in requests)),
        "tokens_per_s": tokens_per_s(requests),
        "mixed_iteration_share": mixed_share(iterations),
        "idle_s": bubble_s(requests, [(each.start_s, each.end_s) for each in iterations]),
    }
    for kind in ("", *sorted({each.kind for each in requests} - {""})):
        group = [each for each in requests if kind in ("", each.kind)]
        for name, values in (("ttft", ttft_s(group)), ("tpot", tpot_s(group))):
            for percent in (50, 99):
                value = float(np.percentile(values, percent)) if len(values) else float("nan")
                figures[f"{kind}_{name}_p{percent}_s".lstrip("_")] = value
    return figures


def _covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered_s, until_s = 0.0, -math.inf
    for start_s, end_s in sorted(intervals):
        covered_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return covered_s
