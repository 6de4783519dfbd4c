"""What a window of batches is made of: lengths of sequences, and times of emulated stages. Imports no torch."""

from __future__ import annotations

import itertools
import random

from saih.errors import SaihError

DURATIONS = ("uniform", "random", "bimodal")
RANDOM_RANGE = (0.25, 1.75)
"""Shortest and longest batch, in means."""
SHORT, LONG, LONG_SHARE = 0.25, 4.0, 0.2
"""The two batches of a bimodal window, in means: one in five takes sixteen times as long as the others."""


def lengths(batch: int, longest: int, valid: float) -> tuple[int, ...]:
    """Tokens of each sequence, ascending: `valid` of the batch * longest that padding makes of them, at least one full.

    They are the quantiles of longest * u^k for u uniform in (0, 1), whose mean is longest / (1 + k): at valid = 0.5
    every length is as likely, below it most sequences are short.
    Raises SaihError where no such lengths exist.
    """
    total = round(valid * batch * longest)
    if not longest + batch - 1 <= total <= batch * longest:
        least = (longest + batch - 1) / (batch * longest)
        raise SaihError(
            f"valid={valid:g} is impossible for {batch} sequences of up to {longest} tokens, one of them full: "
            f"between {least:.3g} and 1"
        )
    power = (1 - valid) / valid
    found = [max(1, round(longest * ((place + 0.5) / batch) ** power)) for place in range(batch)]
    found[-1] = longest
    for place in itertools.cycle(range(batch - 2, -1, -1)):
        missing = total - sum(found)
        if not missing:
            break
        found[place] = min(longest, max(1, found[place] + (1 if missing > 0 else -1)))
    return tuple(sorted(found))


def shuffled_lengths(batch: int, longest: int, valid: float, seed: int, number: int) -> tuple[int, ...]:
    """The lengths of one batch of a window: always the same ones, in an order of its own."""
    found = list(lengths(batch, longest, valid))
    random.Random(f"{seed} lengths {number}").shuffle(found)  # noqa: S311
    return tuple(found)


def durations_s(kind: str, batches: int, mean_s: float) -> tuple[float, ...]:
    """Seconds that every stage takes for each batch: always the same ones, in an order that looks random."""
    if kind == "uniform":
        return (mean_s,) * batches
    if kind == "random":
        low, high = RANDOM_RANGE
        found = [mean_s * (low + (high - low) * (place + 0.5) / batches) for place in range(batches)]
    else:
        long = round(LONG_SHARE * batches)
        found = [mean_s * LONG] * long + [mean_s * SHORT] * (batches - long)
    random.Random(f"{kind} durations").shuffle(found)  # noqa: S311
    return tuple(found)
