"""The variants as policies, each with one knob, and the search for the knob that gives the speed-up asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saih.core import Params
from saih.errors import SaihError
from workloads.video import peers
from workloads.video.adapters import Adapter
from workloads.video.caches import BLOCK, CFG, STEP, Fixed, spread
from workloads.video.kept import made_once
from workloads.video.loop import UNCOND, Loop, Policy, Request
from workloads.video.mixcache.policy import Always, MixCache, Repaired, Trigger
from workloads.video.mixcache.spec import MOST, TAIL, WARMUP

KINDS = {"step": (STEP,), "cfg": (CFG,), "block": (BLOCK,), "static-mix": (STEP, CFG, BLOCK)}
"""Variants that cache in a fixed rhythm -> what their cached steps reuse, in turn after each full step."""

TRIALS = 10
"""Of a search."""
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


def knob(params: Params, adapter: Adapter, branches: Sequence[str], calibrating: Callable[[Policy], object]) -> Knob:
    """The knob of a variant for requests of these branches.

    `calibrating` makes an uncached video under a policy that watches it.
    """
    variant, steps, forecast = str(params["variant"]), int(params["denoise_steps"]), bool(params["forecast"])
    if variant in KINDS:
        warmup, tail = max(2, round(WARMUP * steps)), max(1, round(TAIL * steps))
        most = (steps - warmup - tail) * (MOST - 1) // MOST
        rhythm = [kind for kind in KINDS[variant] if kind != CFG or UNCOND in branches]
        made = Repaired if params["repair"] else Fixed
        return Knob(lambda cached: made(spread(rhythm, round(cached), steps, warmup, tail), forecast), 0, most, True)
    if variant == "mixcache":
        trigger = Trigger if params["trigger"] else Always
        penalty = float(params["penalty"])
        kinds = (STEP, CFG, BLOCK) if params["granularity"] == "all" else (str(params["granularity"]),)
        repair = bool(params["repair"])
        return Knob(lambda value: MixCache(value, trigger(), kinds, forecast, penalty, repair=repair), 1e-4, 1.0)
    if variant == "magcache":
        watch = peers.MagnitudeRatios()
        calibrating(watch)
        return Knob(lambda value: peers.magcache(adapter, value, watch.ratios), 1e-3, 10.0)
    if variant == "teacache":
        changes = peers.OutputChanges()
        calibrating(changes)
        return Knob(lambda value: peers.TeaCache(value, changes.coefficients()), 1e-3, 100.0)
    if variant == "taylorseer":
        most = peers.taylorseer_cached(peers.TAYLORSEER_LONGEST, peers.TAYLORSEER_WARMUP, steps)

        def seer(cached: float) -> Policy:
            return peers.taylorseer(adapter, *peers.taylorseer_rhythm(round(cached), steps))

        return Knob(seer, 1, most, True)
    return {
        "cache-dit": Knob(lambda value: peers.CacheDit(adapter, value), 1e-3, 10.0),
        "easycache": Knob(peers.EasyCache, 1e-3, 100.0),
        "first-block-cache": Knob(lambda value: peers.first_block_cache(adapter, value), 1e-3, 10.0),
        "pab": Knob(lambda every: peers.pyramid_attention_broadcast(adapter, round(every)), 2, 8, True),
    }[variant]


def policy(params: Params, loop: Loop, requests: Sequence[Request], kept: Path) -> Policy:
    """The policy of these parameters. Its knob is searched on `requests` and kept in the file `kept`.

    Raises:
        SaihError: a fixed rhythm of that many cached steps does not fit.
    """
    if params["variant"] in ("none", "fewer-steps"):
        return Policy()
    one = knob(params, loop.models[0], requests[0].branches, lambda watch: loop.generate(requests[0], watch))
    value = float(params["threshold"])
    if not value:
        value = float(made_once(kept, lambda: search(one, loop, requests, float(params["speedup"]))))
    try:
        return one.make(value)
    except ValueError as mistake:
        raise SaihError(f"variant {params['variant']}: {mistake}") from None


def search(one: Knob, loop: Loop, requests: Sequence[Request], speedup: float) -> float:
    """The value whose counted work on `requests` is closest to a share 1 / `speedup` of all of it.

    Between two values that are known to do more and less, where the line through them says; else halfway. A knob in
    whole numbers sets a rhythm, which is the same for every request: one is enough.
    """
    requests = requests[:1] if one.whole else requests
    low, high = (one.low, one.high) if one.whole else (math.log(one.low), math.log(one.high))
    more = less = 0.0
    best, closest = one.low, math.inf
    for trial in range(TRIALS):
        share = (
            (more - 1) / (more - less) if more and less and trial % 3 else 0.5
        )  # now and then halfway, lest it crawl
        middle = low + min(max(share, 0.05), 0.95) * (high - low)
        value = round(middle) if one.whole else math.exp(middle)
        off = _work(one, value, loop, requests) * speedup
        if abs(off - 1) < closest:
            best, closest = value, abs(off - 1)
        if closest < CLOSE or (one.whole and high - low < 1):
            break
        if off > 1:
            low, more = middle, off
        else:
            high, less = middle, off
    return best


def _work(one: Knob, value: float, loop: Loop, requests: Sequence[Request]) -> float:
    """Counted work with that knob, as a share of all of it; mean over requests."""
    tried = one.make(value)
    done = sum(
        loop.generate(request, tried).forwards[0] / (request.steps * len(request.branches)) for request in requests
    )
    close(tried)
    return done / len(requests)


def close(policy: Policy) -> None:
    """Take a policy off the model, where it had put anything there."""
    if isinstance(policy, peers.HookedCache):
        policy.close()
