"""Traces drawn from a seed: when requests come, how long they are, and what their prompts say."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from saih.errors import SaihError, unknown
from workloads.llm.request import GREEDY, Request, Sampling
from workloads.llm.trace_csv import TraceRow

Lengths = Callable[[np.random.Generator, int], NDArray[np.int64]]
"""Draws so many lengths in tokens, each at least 1."""

LONG_FROM_TOKENS = 1000
"""A prompt this long is reported as "long", a shorter one as "short" (as in arXiv 2605.23389)."""


def constant(tokens: int) -> Lengths:
    """Always the same length."""
    return lambda rng, count: np.full(count, tokens, dtype=np.int64)


def uniform(shortest: int, longest: int) -> Lengths:
    """Every length from `shortest` to `longest`, both included, equally likely."""
    return lambda rng, count: rng.integers(shortest, longest, count, endpoint=True)


def lognormal(mean: float, sigma: float = 1.0) -> Lengths:
    """Lognormal with this mean; `sigma` is the standard deviation of the logarithm.

    Published traces are described by their means alone, so the default of `sigma` is our choice.
    """
    mu = math.log(mean) - sigma**2 / 2
    return lambda rng, count: np.maximum(1, np.rint(rng.lognormal(mu, sigma, count))).astype(np.int64)


def mix(short: Lengths, long: Lengths, short_share: float) -> Lengths:
    """Exactly this share of `short` (to the nearest request), the rest `long`, in random order."""

    def draw(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        shorts = round(short_share * count)
        return rng.permutation(np.concatenate([short(rng, shorts), long(rng, count - shorts)]))

    return draw


def bimodal(short_tokens: int, long_tokens: int, short_share: float) -> Lengths:
    """Two lengths and nothing between."""
    return mix(constant(short_tokens), constant(long_tokens), short_share)


LENGTHS: dict[str, tuple[Lengths, Lengths]] = {
    "sharegpt": (lognormal(343.76), lognormal(237.20)),
    "longbench": (lognormal(2686.89), lognormal(101.78)),
    "azure-conv": (lognormal(1154.70, 0.99), lognormal(211.13, 0.86)),
    "azure-code": (lognormal(2047.85, 1.36), lognormal(27.88, 0.85)),
}
"""Prompt and output lengths: means that arXiv 2605.02189 gives for these data sets; for Azure, means and sigma of its
AzureLLMInferenceTrace_conv.csv (19366 requests) and _code.csv (8819), whose prompts end at 14050 and 7437 tokens."""


def short_long(short_share: float, new_tokens: Lengths) -> tuple[Lengths, Lengths]:
    """Prompts below 1k and of 1k to 8k tokens, as in arXiv 2605.23389; uniform within each is our choice."""
    long = uniform(LONG_FROM_TOKENS, 8 * LONG_FROM_TOKENS)
    return mix(uniform(1, LONG_FROM_TOKENS - 1), long, short_share), new_tokens


def synthetic(
    count: int, rate_per_s: float, lengths: tuple[Lengths, Lengths], seed: int, arrivals: str = "poisson"
) -> list[TraceRow]:
    """`count` requests with (prompt, output) `lengths`; all at time 0 where the rate is infinite.

    Arrivals are "poisson" or "constant". Each column has its own random stream: another rate changes no length.
    """
    times, prompts, outputs = (np.random.default_rng([seed, column]) for column in range(3))
    if not rate_per_s > 0:
        raise SaihError(f"a trace needs a rate above 0 requests/s, got {rate_per_s}")
    if arrivals == "poisson":
        arrival_s = np.cumsum(times.exponential(1 / rate_per_s, count))
    elif arrivals == "constant":
        arrival_s = np.arange(count) / rate_per_s
    else:
        raise unknown("kind of arrivals", arrivals, ("poisson", "constant"))
    columns = (arrival_s.tolist(), lengths[0](prompts, count).tolist(), lengths[1](outputs, count).tolist())
    return [TraceRow(*row) for row in zip(*columns, strict=True)]


def to_requests(
    trace: Sequence[TraceRow], vocabulary: int | None = None, seed: int = 0, sampling: Sampling = GREEDY
) -> list[Request]:
    """Requests numbered in order, with random prompts; without a vocabulary, for simulated time, with lengths only."""
    requests = []
    for number, row in enumerate(trace):
        prompt: Sequence[int] = range(row.prompt_tokens)
        if vocabulary is not None:
            prompt = np.random.default_rng([seed, number]).integers(vocabulary, size=row.prompt_tokens).tolist()
        kind = "long" if row.prompt_tokens >= LONG_FROM_TOKENS else "short"
        requests.append(Request(number, prompt, row.new_tokens, row.arrival_s, kind, sampling))
    return requests
