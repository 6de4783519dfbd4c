"""A mini-batch through stages on groups of ranks, hybrid data and pipeline parallel, with 1F1B or GPipe.

Between stages go h and a (parallel adapters) or h alone, and back comes the gradient of what carries one: da, reduction
times narrower, or dh. Inside a stage every rank works on its slice of each micro-batch, and gradients are added up once
for each mini-batch. T rows, D hidden, S width of the ladder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Clock
from saih.errors import SaihError
from saih.timing import Unclocked
from workloads.llm.handoff import ahead
from workloads.llm.pac import planner
from workloads.llm.pac.batch import Batch
from workloads.llm.pac.channel import Channel, EmulatedPort, sleep_until
from workloads.llm.pac.schedule import operations
from workloads.llm.pac.stages import Flow, Settings, SideTuned, Tuned, make

Recorder = Callable[[Batch, list[Tensor]], None]


@dataclass(frozen=True)
class EmulatedDevice:
    """A slower device: an operation ends when its profile says, or when it is done if that is later."""

    profile: planner.Device

    def hold(self, kind: str, layers: range, samples: int, began_s: float) -> None:
        """Until "forward" or "backward" of these layers on so many samples, which began then, has ended there."""
        seconds = self.profile.forward_s if kind == "forward" else self.profile.backward_s
        sleep_until(began_s + samples * sum(seconds[layer] for layer in layers))


@dataclass
class _Kept:
    """A slice of a micro-batch between its forward and its backward."""

    entered: Tensor | None = None
    """What carries the gradient to the stage before; None on the first."""
    left: Tensor | None = None
    """What carries the gradient from the stage behind; on the last stage the loss. None if the slice is empty."""
    loss: float = 0.0


class Pipeline:
    """This rank's part of a plan. All ranks of the default group make one together; ranks are the plan's devices."""

    def __init__(
        self,
        settings: Settings,
        plan: planner.Plan,
        *,
        micro_batches: int,
        schedule: str = "1f1b",
        emulated_device: EmulatedDevice | None = None,
        emulated_port: EmulatedPort | None = None,
        record: Recorder | None = None,
    ) -> None:
        """`micro_batches`: the most of a mini-batch. `record` gets every slice and what its layers put out.

        Raises SaihError unless the plan has as many devices as there are ranks, and for a model whose tied head would
        train on another stage than its embedding.
        """
        ranks = sum(len(stage.devices) for stage in plan.stages)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != world:
            raise SaihError(f"the plan is for {ranks} devices, there are {world} ranks")
        if (
            len(plan.stages) > 1
            and settings.variant.startswith("full")
            and settings.classes == 0
            and settings.spec.tied
        ):
            raise SaihError("full fine-tuning of a tied language-modelling head needs one stage: layout=single or dp")
        self.plan, self.schedule, self.record = plan, schedule, record
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device, self.port = emulated_device, emulated_port
        self.place = next(place for place, stage in enumerate(plan.stages) if self.rank in stage.devices)
        self.mine = plan.stages[self.place]
        self.stage = make(settings, self.mine.layers) if self.rank in self.mine.active else None
        self.hidden = settings.spec.hidden
        self.reduced_bytes = 0
        self._open(micro_batches)
        if isinstance(self.stage, SideTuned):
            self.stage.record = record is not None
            self.side = self.stage.ladder.side.hidden
        else:
            self.side = 0

    def step(self, batch: Batch, clock: Clock | None = None) -> float:
        """Gradients of the mean loss over a mini-batch, in `.grad` of what trains here; the loss, on every rank.

        Raises RuntimeError if a rank is gone.
        """
        clock = clock or Unclocked()
        parts = self._parts(batch)
        loss = torch.zeros((), dtype=torch.float64)
        if self.stage is not None:
            loss += self._run(self.stage, parts, len(batch), clock)
        clock.enter("communication")
        self._add_up()
        if dist.is_initialized():
            dist.all_reduce(loss)
        clock.enter("other")
        return float(loss)

    def close(self) -> None:
        """Until all messages were taken; ends threads and groups."""
        for channel in self.channels.values():
            channel.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    @property
    def traffic_bytes(self) -> dict[str, int]:
        """Sent by this rank so far: "forward" and "backward" between stages; "all_reduce", given to it."""
        sent = {kind: channel.sent_bytes for kind, channel in self.channels.items()}
        return {"forward": 0, "backward": 0} | sent | {"all_reduce": self.reduced_bytes}

    def _open(self, depth: int) -> None:
        """Groups of every stage, by all ranks in the same order; a direction between stages has one of its own."""
        self.channels: dict[str, Channel] = {}
        self.group: dist.ProcessGroup | None = None
        if len(self.plan.stages) > 1:
            for kind in ("forward", "backward"):
                self.channels[kind] = Channel(dist.new_group(backend="gloo"), depth, self.port)
        for stage in self.plan.stages:
            if len(stage.active) > 1:
                group = dist.new_group(list(stage.active))
                if self.rank in stage.active:
                    self.group = group

    # -- One mini-batch ------------------------------------------------------------------------------------------------

    def _run(self, stage: SideTuned | Tuned, parts: Sequence[Batch], samples: int, clock: Clock) -> float:
        """All operations of this stage in the order of the schedule; my part of the loss."""
        arriving = {kind: self._arriving(kind, parts) for kind in ("forward", "backward")}
        kept: dict[int, _Kept] = {}
        loss = 0.0
        for kind, number in operations(self.schedule, self.place, len(self.plan.stages), len(parts)):
            clock.enter("communication")
            x = next(arriving[kind])
            clock.enter("compute")
            began_s = time.perf_counter()
            mine = self._slice(parts[number])
            if kind == "forward":
                kept[number], x = self._forward(stage, mine, x, samples)
                loss += kept[number].loss
            else:
                x = self._backward(kept.pop(number), x)
            if self.device is not None:
                self.device.hold(kind, self.mine.layers, len(mine), began_s)
            if x is not None:
                self._hand_over(kind, parts[number], x)
        return loss

    def _forward(
        self, stage: SideTuned | Tuned, mine: Batch, x: Tensor | None, samples: int
    ) -> tuple[_Kept, Tensor | None]:
        """`x`: what the stage before sent, if there is one; returns what goes to the stage behind, if there is one.

        The loss is my part of the mean over the mini-batch's samples.
        """
        if not len(mine):
            return _Kept(), None
        meta = mine.meta(stage.settings.spec.causal)
        flow, entered = (stage.start(mine.ids_T, meta), None) if x is None else self._entering(x)
        flow = stage(flow, meta)
        if self.record is not None and isinstance(stage, SideTuned):
            self.record(mine, stage.take_taps())
        if stage.last:
            loss = stage.loss(flow, mine, meta) / samples
            return _Kept(entered, loss, float(loss.detach())), None
        if flow.a_TS is None:
            return _Kept(entered, flow.h_TD), flow.h_TD.detach()
        return _Kept(entered, flow.a_TS), torch.cat([flow.h_TD, flow.a_TS], 1).detach()

    def _entering(self, x: Tensor) -> tuple[Flow, Tensor]:
        """Flow of the stage before, and the part of it that a gradient goes back through."""
        if not self.side:
            entered = x.requires_grad_()
            return Flow(entered), entered
        entered = x[:, self.hidden :].contiguous().requires_grad_()
        return Flow(x[:, : self.hidden].contiguous(), entered), entered

    def _backward(self, kept: _Kept, gradient: Tensor | None) -> Tensor | None:
        """`gradient`: da [T, S] or dh [T, D] of the stage behind, if any; returns that for the stage before."""
        if kept.left is not None:
            kept.left.backward(gradient)
        return None if kept.entered is None else kept.entered.grad

    def _add_up(self) -> None:
        """Gradients of all ranks of this stage, in one message."""
        if self.group is None or self.stage is None:
            return
        began_s = time.perf_counter()
        trained = list(self.stage.trained().values())
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        self.reduced_bytes += flat.nbytes
        if self.port is not None:
            self.port.all_reduce(flat.nbytes, len(self.mine.active), began_s)

    # -- Messages ------------------------------------------------------------------------------------------------------

    def _parts(self, batch: Batch) -> list[Batch]:
        """Its micro-batches; the last may be smaller."""
        size = sum(self.mine.samples)
        return [batch.part(begin, min(begin + size, len(batch))) for begin in range(0, len(batch), size)]

    def _slice(self, part: Batch) -> Batch:
        return part.part(*slices_of(self.mine, len(part))[self.rank])

    def _arriving(self, kind: str, parts: Sequence[Batch]) -> Iterator[Tensor | None]:
        """For each micro-batch what the neighbours send, in rows of my slice, taken as it comes; None without any."""
        place = self._neighbour(kind, -1)
        return repeat(None) if place is None else ahead(self._received(kind, place, parts), len(parts))

    def _received(self, kind: str, place: int, parts: Sequence[Batch]) -> Iterator[Tensor]:
        width = self.hidden + self.side if kind == "forward" else self.side or self.hidden
        for part in parts:
            x = torch.empty(sum(self._slice(part).lens), width)
            for rank, rows in self._shared(part, place):
                self.channels[kind].receive(rank, x[rows])
            yield x

    def _neighbour(self, kind: str, towards: int) -> int | None:
        """The stage that rows of this kind go to (1) or come from (-1)."""
        place = self.place + (towards if kind == "forward" else -towards)
        return place if 0 <= place < len(self.plan.stages) else None

    def _hand_over(self, kind: str, part: Batch, x: Tensor) -> None:
        """Rows of my slice, each to the rank that works on its sample."""
        place = self._neighbour(kind, 1)
        for rank, rows in self._shared(part, place) if place is not None else ():
            self.channels[kind].send(rank, x[rows])

    def _shared(self, part: Batch, place: int) -> Iterator[tuple[int, slice]]:
        """Ranks of another stage that work on samples of my slice, and the rows of my slice which those are."""
        start, stop = slices_of(self.mine, len(part))[self.rank]
        for rank, (begin, end) in slices_of(self.plan.stages[place], len(part)).items():
            first, last = max(start, begin), min(stop, end)
            if first < last:
                skipped = sum(part.lens[start:first])
                yield rank, slice(skipped, skipped + sum(part.lens[first:last]))


def slices_of(stage: planner.Stage, samples: int) -> dict[int, tuple[int, int]]:
    """Rank -> the samples [start, stop) of a micro-batch that it works on, in proportion where it is a smaller one."""
    whole, found, before = sum(stage.samples), {}, 0
    for rank, count in zip(stage.devices, stage.samples, strict=True):
        found[rank] = (before * samples // whole, (before + count) * samples // whole)
        before += count
    return found
