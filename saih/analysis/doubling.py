"""What twice the ranks would give on this machine, predicted from what kernels give on as many ranks at once.

That a part gets twice as fast is a hypothesis (`bottleneck.Share.gain_of_doubling`); a second rank can be tried.
It is no second machine: ranks of a node share caches, memory, power, at times a core. So computing is stretched by as
much as its operations are slower at the ceilings measured on so many ranks at once (roofline, Williams et al., 2009),
and what the ranks have to tell each other is added at the measured all-reduce; all else takes as long as it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saih.core import Cost, Params, Value

Ceilings = Mapping[str, Any]


def doubled(params: Params) -> dict[str, Value]:
    """The same with twice the ranks on each node."""
    return {**params, "gpus": 2 * int(params["gpus"])}


def gain_of_second_ranks(
    compute: float, step_s: float, precision: str, ceilings: Ceilings, ranks: int, costs: tuple[Cost, Cost]
) -> float | None:
    """Work a second with twice the `ranks` of a node over that with `ranks`; None where ceilings are not known.

    `compute` is the share of a step of `step_s` seconds that is spent computing; `costs` are those of one rank's step
    with `ranks` and with twice as many.
    """
    before, after = (_chain_s(cost, precision, ceilings, n) for cost, n in zip(costs, (ranks, 2 * ranks), strict=True))
    said = costs[1].message_bytes - costs[0].message_bytes
    bytes_per_s = ceilings["rates"].get("allreduce-torch")
    if not before or not after or (said > 0 and not bytes_per_s):
        return None
    said_s = said / bytes_per_s if said > 0 else 0.0
    stretched = 1 - compute + compute * after / before + said_s / step_s
    return float(2 * costs[1].work / costs[0].work / stretched)


def _chain_s(cost: Cost, precision: str, ceilings: Ceilings, ranks: int) -> float | None:
    """Operations one after the other, each at its tighter ceiling on so many ranks at once; None where unknown."""
    flop_per_s, bytes_per_s = (_at_once(name, ceilings, ranks) for name in (precision, "copy"))
    if not flop_per_s or not bytes_per_s:
        return None
    return sum(max(each.flop / flop_per_s, each.moved_bytes / bytes_per_s) for each in cost.operations)


def _at_once(name: str, ceilings: Ceilings, ranks: int) -> float | None:
    """The ceiling that each of so many ranks of a node has."""
    rate = ceilings["rates"].get(name)
    share = 1.0 if ranks == 1 else (ceilings.get("together") or {}).get(name, {}).get(str(ranks))
    return float(rate * share) if rate and share else None
