"""What each layer of a model that is fine-tuned takes on this device, and needs on any: what a plan is made from."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workloads.llm.pac.batch import Batch
from workloads.llm.pac.clusters import CLUSTERS, LOCAL_BYTES_PER_S, MEMORY_BYTES
from workloads.llm.pac.memory import Saved
from workloads.llm.pac.planner import Device, Layer, Profile
from workloads.llm.pac.stages import Flow, Settings, SideTuned, Tuned, make

RUNS = 7
"""Of a layer; the middle one counts, after one that does not."""
WORD = 4
STATE = 3
"""Gradients and two moments, in sizes of what trains."""


def profile(settings: Settings, batch: Batch, micro_batches: int, cluster: str) -> Profile:
    """Of this model on all ranks, with mini-batches of `micro_batches` like `batch`. All ranks call it.

    Without a cluster ("none") seconds are measured, by all ranks at once, as they will run. The devices of an emulated
    cluster take as long as the FLOP that torch counts take them.
    """
    layers = _measured(settings, batch)
    needs = tuple(each.needs for each in layers)
    if cluster != "none":
        flop = [each.forward_flop for each in layers], [each.backward_flop for each in layers]
        emulated = tuple(CLUSTERS[cluster].device(rank, *flop) for rank in range(_world()))
        return Profile(needs, emulated, len(batch), micro_batches)
    mine = torch.tensor([(each.forward_s, each.backward_s) for each in layers], dtype=torch.float64).T.contiguous()
    theirs = [mine]
    if _world() > 1:
        theirs = [torch.empty_like(mine) for _ in range(_world())]
        dist.all_gather(theirs, mine)
    devices = [
        Device(f"rank-{rank}", tuple(forward_s), tuple(backward_s), MEMORY_BYTES, LOCAL_BYTES_PER_S)
        for rank, (forward_s, backward_s) in enumerate(each.tolist() for each in theirs)
    ]
    return Profile(needs, tuple(devices), len(batch), micro_batches)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class _Measured:
    """One layer, a sample."""

    forward_s: float
    backward_s: float
    forward_flop: float
    backward_flop: float
    needs: Layer


def _measured(settings: Settings, batch: Batch) -> list[_Measured]:
    """The first layer with the embedding, the last with the head, and one between for all that are between."""
    count = settings.spec.layers
    different = sorted({0, min(1, count - 1), count - 1})
    found = {number: _measure(make(settings, range(number, number + 1)), batch) for number in different}
    return [found[number if number in (0, count - 1) else 1] for number in range(count)]


def _measure(stage: SideTuned | Tuned, batch: Batch) -> _Measured:
    runs = [_run(stage, batch) for _ in range(RUNS + 1)][1:]
    forward_s, backward_s = (statistics.median(each) / len(batch) for each in zip(*runs, strict=True))
    parameters, trained = list(stage.parameters()), list(stage.trained().values())
    trained_bytes = float(sum(each.nbytes for each in trained))
    settings, tokens = stage.settings, len(batch.ids_T) / len(batch)
    side = stage.ladder.side.hidden if isinstance(stage, SideTuned) else 0
    needs = Layer(
        weight_bytes=float(sum(each.nbytes for each in {*parameters, *trained})),
        trainable_bytes=trained_bytes,
        state_bytes=STATE * trained_bytes,
        kept_bytes=_kept_bytes(stage, batch) / len(batch),
        forward_bytes=WORD * tokens * (settings.spec.hidden + side),
        backward_bytes=WORD * tokens * (side or settings.spec.hidden),
    )
    forward_flop, backward_flop = _flop(stage, batch)
    return _Measured(forward_s, backward_s, forward_flop / len(batch), backward_flop / len(batch), needs)


def _run(stage: SideTuned | Tuned, batch: Batch) -> tuple[float, float]:
    """Seconds of a forward and of a backward."""
    entering = _entering(stage, batch)
    began_s = time.perf_counter()
    left = _forward(stage, batch, entering)
    forward_s = time.perf_counter() - began_s
    gradient = None if stage.last else torch.ones_like(left)
    began_s = time.perf_counter()
    left.backward(gradient)
    return forward_s, time.perf_counter() - began_s


def _flop(stage: SideTuned | Tuned, batch: Batch) -> tuple[int, int]:
    """Of a forward and of a backward."""
    entering = _entering(stage, batch)
    with FlopCounterMode(display=False) as forward:
        left = _forward(stage, batch, entering)
    with FlopCounterMode(display=False) as backward:
        left.backward(None if stage.last else torch.ones_like(left))
    return forward.get_total_flops(), backward.get_total_flops()


def _kept_bytes(stage: SideTuned | Tuned, batch: Batch) -> int:
    saved, entering = Saved(stage.parameters()), _entering(stage, batch)
    with saved.watch():
        _forward(stage, batch, entering)
    return saved.nbytes


def _entering(stage: SideTuned | Tuned, batch: Batch) -> Flow | None:
    """Random rows from a stage before, what carries a gradient ready for it."""
    if stage.first:
        return None
    rows, hidden = len(batch.ids_T), stage.settings.spec.hidden
    if isinstance(stage, SideTuned):
        return Flow(torch.randn(rows, hidden), torch.randn(rows, stage.ladder.side.hidden, requires_grad=True))
    return Flow(torch.randn(rows, hidden, requires_grad=True))


def _forward(stage: SideTuned | Tuned, batch: Batch, entering: Flow | None) -> Tensor:
    """What the backward begins at."""
    meta = batch.meta(stage.settings.spec.causal)
    flow: Flow = stage(stage.start(batch.ids_T, meta) if entering is None else entering, meta)
    if stage.last:
        return stage.loss(flow, batch, meta)
    return flow.h_TD if flow.a_TS is None else flow.a_TS
