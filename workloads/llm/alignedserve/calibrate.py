"""What one token of the longest request costs all others: decode steps of many shapes, timed, and a model fitted."""

from __future__ import annotations

from workloads.llm.calibrate import decode_samples
from workloads.llm.costmodel import TERMS, Fit, fit
from workloads.llm.worker import Worker

DECODE_TERMS = tuple(term for term in TERMS if term != "per_prefill_token_s")
PADDED_TERMS = tuple(term for term in DECODE_TERMS if term != "per_longest_token_s")
REPEATS = 3


def fit_kernel(worker: Worker) -> tuple[Fit, Fit]:
    """T = a b + c sum + g max + d, and T = a b + c b max + d, which is what a padded kernel does."""
    shapes = _shapes(worker.kv.blocks * worker.kv.block_size, worker.stage.spec.max_positions)
    loads, step_s = decode_samples(worker, shapes, REPEATS)
    padded = [load._replace(context_tokens=load.decodes * load.longest_tokens) for load in loads]
    return fit(loads, step_s, DECODE_TERMS), fit(padded, step_s, PADDED_TERMS)


def _shapes(room: int, max_positions: int) -> list[list[int]]:
    """Requests' lengths: few and many, alike and with one or four long ones among them, within cache and model."""
    found = []
    for short in (32, 128, 512):
        for long in (short, 256, 1024, 4096):
            found += [[long] * longs + [short] * (count - longs) for count in (4, 8, 16, 32, 64) for longs in (1, 4)]
    return [each for each in found if sum(each) + 32 * len(each) <= room and max(each) <= max_positions]


def numbers(fitted: Fit) -> dict[str, float]:
    """The model as numbers of a check, microseconds each, and how far it is off."""
    model: dict[str, float] = {
        "fit_fixed_us": fitted.model.fixed_s,
        "fit_a_us_per_request": fitted.model.per_decode_s,
        "fit_c_us_per_token": fitted.model.per_context_token_s,
        "fit_g_us_per_longest_token": fitted.model.per_longest_token_s,
    }
    return {name: 1e6 * seconds for name, seconds in model.items()} | {
        "fit_median_error": fitted.median_error,
        "fit_worst_error": fitted.worst_error,
    }
