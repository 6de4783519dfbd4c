"""What each layer of a model that is fine-tuned takes on this device, and needs on any: what a plan is made from."""

from __future__ import annotations

import statistics
import time
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from workloads.llm.pac.batch import Batch
from workloads.llm.pac.clusters import CLUSTERS, LOCAL_BYTES_PER_S, MEMORY_BYTES, emulated_device
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

    On a cluster, rank 0 measures while the others wait, and every device is that much slower. Without one ("none"),
    ranks measure all at once, as they will run.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = settings.spec.layers
    seconds = torch.zeros(world, 2, count, dtype=torch.float64)
    needs = torch.zeros(count, len(fields(Layer)), dtype=torch.float64)
    if cluster == "none" or rank == 0:
        layers = _measured(settings, batch)
        seconds[rank] = torch.tensor([(each.forward_s, each.backward_s) for each in layers], dtype=torch.float64).T
        needs += torch.tensor([astuple(each.needs) for each in layers], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(seconds)
        dist.broadcast(needs, 0)
    devices = [
        Device(f"rank-{number}", tuple(forward_s), tuple(backward_s), MEMORY_BYTES, LOCAL_BYTES_PER_S)
        for number, (forward_s, backward_s) in enumerate(seconds.tolist())
    ]
    if cluster != "none":
        devices = [emulated_device(CLUSTERS[cluster], devices[0], number) for number in range(world)]
    return Profile(tuple(Layer(*row) for row in needs.tolist()), tuple(devices), len(batch), micro_batches)


@dataclass(frozen=True)
class _Measured:
    """One layer, a sample."""

    forward_s: float
    backward_s: float
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
    return _Measured(forward_s, backward_s, needs)


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
