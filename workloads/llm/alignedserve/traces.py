"""The requests of a point: lengths of published means, mixes of short and long, or a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from saih.core import Params
from workloads.llm import trace
from workloads.llm.alignedserve import spec
from workloads.llm.request import Request
from workloads.llm.trace_csv import TraceRow, read_csv


def rows(params: Params, seed: int) -> list[TraceRow]:
    """As they are published; outputs cut at spec.LONGEST_NEW_TOKENS."""
    name, count = spec.check_trace(str(params["trace"])), int(params["requests"])
    if name not in spec.TRACES:
        found = _at_rate(read_csv(Path(name), count), float(params["rate"]))
    else:
        short = spec.short_share(name)
        lengths = trace.short_long(short, trace.lognormal(spec.MIX_NEW_TOKENS)) if short else trace.LENGTHS[name]
        found = trace.synthetic(count, float(params["rate"]) or math.inf, lengths, seed)
    return [row._replace(new_tokens=min(row.new_tokens, spec.LONGEST_NEW_TOKENS)) for row in found]


def _at_rate(rows: Sequence[TraceRow], rate_per_s: float) -> list[TraceRow]:
    """Gaps as in the file, shorter or longer by one factor so that so many come a second; all at once at rate 0."""
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    scale = (len(rows) - 1) / span_s / rate_per_s if rate_per_s and span_s else 0.0
    return [row._replace(arrival_s=scale * (row.arrival_s - rows[0].arrival_s)) for row in rows]


def requests_of(params: Params, seed: int, vocabulary: int | None = None) -> list[Request]:
    """With a vocabulary, for real time: prompts shorter by `shrink`, outputs of `new_tokens` on average, all there."""
    found = rows(params, seed)
    kinds = [each.kind for each in trace.to_requests(found)]
    if vocabulary is not None:
        shrink = int(params["shrink"])
        smaller = int(params["new_tokens"]) * len(found) / sum(row.new_tokens for row in found)
        found = [
            TraceRow(0.0, max(2, row.prompt_tokens // shrink), max(1, round(smaller * row.new_tokens))) for row in found
        ]
    requests = trace.to_requests(found, vocabulary, seed)
    for request, kind in zip(requests, kinds, strict=True):
        request.kind = kind
    return requests
