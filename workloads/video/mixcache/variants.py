"""The variants as policies, each with one knob, and the search for the knob that gives the speed-up asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saih.core import Params
from saih.errors import SaihError
from saih.files import write_atomic
from workloads.video import peers
from workloads.video.adapters import Adapter
from workloads.video.caches import BLOCK, CFG, STEP, Fixed, spread
from workloads.video.loop import Loop, Policy, Request
from workloads.video.mixcache.policy import Always, MixCache, Trigger
from workloads.video.mixcache.spec import MOST, TAIL, WARMUP

KINDS = {"step": (STEP,), "cfg": (CFG,), "block": (BLOCK,), "static-mix": (STEP, CFG, BLOCK)}
"""Variants that cache in a fixed rhythm -> what their cached steps reuse, in turn after each full step."""

TRIALS = 10
"""Of a bisection: the knob comes to within a factor of 1.01 of its range's logarithm."""
CLOSE = 0.01
"""Relative distance from the speed-up asked for at which the search ends."""


@dataclass(frozen=True)
class Knob:
    """What sets how much a variant reuses: more with a larger value, between `low` and `high`."""

    make: Callable[[float], Policy]
    low: float
    high: float
    whole: bool = False


def plain_steps(params: Params) -> int:
    """Steps of the plain loop: all of them, or the `fewer-steps` of the speed-up."""
    steps = int(params["denoise_steps"])
    if params["variant"] != "fewer-steps":
        return steps
    return round(float(params["threshold"])) or max(1, round(steps / float(params["speedup"])))


def knob(params: Params, adapter: Adapter, calibrating: Callable[[Policy], object]) -> Knob:
    """The knob of a variant. `calibrating` makes an uncached video under a policy that watches it."""
    variant, steps, forecast = str(params["variant"]), int(params["denoise_steps"]), bool(params["forecast"])
    if variant in KINDS:
        warmup, tail = max(2, round(WARMUP * steps)), max(1, round(TAIL * steps))
        most = (steps - warmup - tail) * (MOST - 1) // MOST
        kinds = [kind for kind in KINDS[variant] if kind != CFG or not adapter.embedded_guidance]
        return Knob(lambda cached: Fixed(spread(kinds, round(cached), steps, warmup, tail), forecast), 0, most, True)
    if variant == "mixcache":
        trigger = Trigger if params["trigger"] else Always
        penalty = float(params["penalty"])
        kinds = (STEP, CFG, BLOCK) if params["granularity"] == "all" else (str(params["granularity"]),)
        return Knob(lambda value: MixCache(value, trigger(), kinds, forecast, penalty), 1e-5, 10.0)
    if variant == "magcache":
        watch = peers.MagnitudeRatios()
        calibrating(watch)
        return Knob(lambda value: peers.magcache(adapter, value, watch.ratios), 1e-3, 10.0)
    return {
        "teacache": Knob(peers.TeaCache, 1e-3, 100.0),
        "easycache": Knob(peers.EasyCache, 1e-3, 100.0),
        "first-block-cache": Knob(lambda value: peers.first_block_cache(adapter, value), 1e-3, 10.0),
        "pab": Knob(lambda every: peers.pyramid_attention_broadcast(adapter, round(every)), 2, 8, True),
        "taylorseer": Knob(lambda every: peers.taylorseer(adapter, round(every)), 2, 8, True),
    }[variant]


def policy(params: Params, loop: Loop, request: Request, kept: Path) -> Policy:
    """The policy of these parameters. Its knob is searched on `request` and kept in the file `kept`.

    Raises:
        SaihError: a fixed rhythm of that many cached steps does not fit.
    """
    if params["variant"] in ("none", "fewer-steps"):
        return Policy()
    one = knob(params, loop.models[0], lambda watch: loop.generate(request, watch))
    value = float(params["threshold"])
    if not value and kept.exists():
        value = float(json.loads(kept.read_text())["value"])
    elif not value:
        value = search(one, loop, request, float(params["speedup"]))
        write_atomic(kept, lambda file: file.write(json.dumps({"value": value}).encode()))
    try:
        return one.make(value)
    except ValueError as mistake:
        raise SaihError(f"variant {params['variant']}: {mistake}") from None


def search(one: Knob, loop: Loop, request: Request, speedup: float) -> float:
    """The value whose counted work on `request` is closest to a share 1 / `speedup` of all of it, by bisection."""
    full = request.steps * len(request.branches)
    low, high = (one.low, one.high) if one.whole else (math.log(one.low), math.log(one.high))
    best, closest = one.low, math.inf
    for _ in range(TRIALS):
        middle = (low + high) / 2
        value = round(middle) if one.whole else math.exp(middle)
        trial = one.make(value)
        work = loop.generate(request, trial).forwards[0] / full
        close(trial)
        if abs(work * speedup - 1) < closest:
            best, closest = value, abs(work * speedup - 1)
        if closest < CLOSE or (one.whole and high - low < 1):
            break
        low, high = (middle, high) if work * speedup > 1 else (low, middle)
    return best


def close(policy: Policy) -> None:
    """Take a policy off the model, where it had put anything there."""
    if isinstance(policy, peers.DiffusersCache):
        policy.close()
