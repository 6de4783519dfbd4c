"""Which device holds which layers in epoch 1: the plan of a hybrid pipeline, chosen by a dynamic programme. No torch.

A reconstruction: the paper's planner is described, not published. It follows the recurrence of PipeDream (Narayanan et
al., SOSP 2019) as PAC and Asteroid (MobiCom 2024) put it, layers x devices x stages,

    W(j, n, s) = min over i < j, 1 <= m < n of max(W(i, n - m, s - 1), link(i), T(i+1..j, last m devices))

and scores plans by the latency of one mini-batch of M micro-batches under 1F1B,

    fill (forward of one) + (M - 1) x period + drain (backward of one) + the slowest group's all-reduce.

Two things differ, and make the choice exact. W alone keeps the shortest period for each s, which need not be the
shortest mini-batch; here a state keeps all its partial plans that none other beats in every term of the score. And the
recurrence goes from the last stage to the first, for how many micro-batches a stage keeps depends on the stages behind.

The plan space: consecutive stages of consecutive layers; devices sorted by speed, fastest first, and cut into as many
consecutive groups; inside a group a micro-batch is sliced sample by sample, each to the device that would end first, as
far as its memory goes. A device that gets no sample is idle and holds nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from saih.errors import SaihError
from workloads.llm.config import split_layers
from workloads.llm.pac.schedule import in_flight


@dataclass(frozen=True)
class Layer:
    """What a layer needs on any device; what is per sample grows with the samples of a slice."""

    weight_bytes: float
    """Backbone and side network."""
    trainable_bytes: float
    """Of gradients that a group adds up."""
    state_bytes: float
    """Gradients and the optimiser's state."""
    kept_bytes: float
    """Per sample between its forward and its backward."""
    forward_bytes: float
    """Per sample, handed to the next layer's stage: (h, a)."""
    backward_bytes: float
    """Per sample, handed back to this layer's stage by the next: da."""


@dataclass(frozen=True)
class Device:
    """How fast one device is, and what it has."""

    name: str
    forward_s: tuple[float, ...]
    """Seconds a sample, for each layer."""
    backward_s: tuple[float, ...]
    memory_bytes: float
    port_bytes_per_s: float
    """Of its link to all others, in each direction."""


@dataclass(frozen=True)
class Profile:
    """What a plan is made for: layers, devices, and a mini-batch of `micro_batches` x `micro_batch` samples."""

    layers: tuple[Layer, ...]
    devices: tuple[Device, ...]
    micro_batch: int
    micro_batches: int

    def __post_init__(self) -> None:
        if not self.layers or not self.devices or self.micro_batch < 1 or self.micro_batches < 1:
            raise SaihError("a plan needs at least one layer, device, sample and micro-batch")
        for device in self.devices:
            if not len(device.forward_s) == len(device.backward_s) == len(self.layers):
                raise SaihError(f"{device.name}: {len(device.forward_s)} layers profiled, there are {len(self.layers)}")

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Devices, fastest first."""
        seconds = [sum(device.forward_s) + sum(device.backward_s) for device in self.devices]
        return tuple(sorted(range(len(seconds)), key=seconds.__getitem__))


@dataclass(frozen=True)
class Stage:
    """Layers on a group of devices, and how they share each micro-batch."""

    layers: range
    devices: tuple[int, ...]
    """Their numbers in the profile: the ranks."""
    samples: tuple[int, ...]
    """Of each micro-batch, on each of these devices; 0 = idle."""

    @property
    def active(self) -> tuple[int, ...]:
        """The devices that hold these layers."""
        return tuple(device for device, samples in zip(self.devices, self.samples, strict=True) if samples)


@dataclass(frozen=True)
class Latency:
    """Predicted seconds of one mini-batch."""

    fill_s: float
    steady_s: float
    drain_s: float
    reduce_s: float

    @property
    def step_s(self) -> float:
        return self.fill_s + self.steady_s + self.drain_s + self.reduce_s


@dataclass(frozen=True)
class Plan:
    """Stages from the first to the last, and what a mini-batch is predicted to take."""

    stages: tuple[Stage, ...]
    latency: Latency

    def describe(self, profile: Profile) -> str:
        """One line for people: stages, devices with their samples, predicted seconds."""
        stages = []
        for stage in self.stages:
            names = [f"{profile.devices[d].name}:{n}" for d, n in zip(stage.devices, stage.samples, strict=True)]
            stages.append(f"layers {stage.layers.start}-{stage.layers.stop - 1} on {' + '.join(names)}")
        the = self.latency
        parts = f"fill {the.fill_s:.3g} + steady {the.steady_s:.3g} + drain {the.drain_s:.3g}"
        return f"{' | '.join(stages)}; predicted {the.step_s:.3g} s = {parts} + all-reduce {the.reduce_s:.3g}"


def all_reduce_s(nbytes: float, devices: int, bytes_per_s: float) -> float:
    """Of a ring: each port sends and receives 2 (n - 1) / n of the bytes."""
    return 2 * (devices - 1) / devices * nbytes / bytes_per_s


def best_plan(profile: Profile) -> Plan:
    """The plan with the shortest predicted mini-batch. Raises SaihError with the limit if none fits in memory."""
    plans = [partial.plan(profile) for partial in _Search(profile).whole()]
    if not plans:
        raise SaihError(_why_nothing_fits(profile))
    return min(plans, key=lambda plan: plan.latency.step_s)


def data_parallel(profile: Profile) -> Plan:
    """All devices in one stage. Raises SaihError where the model does not fit."""
    return plan_of(profile, [range(len(profile.layers))], [len(profile.devices)])


def pipeline_parallel(profile: Profile) -> Plan:
    """One device a stage, layers cut as well as can be. Raises SaihError where no cut fits."""
    devices = len(profile.devices)
    if devices > len(profile.layers):
        raise SaihError(f"a pipeline of {devices} devices needs as many layers, there are {len(profile.layers)}")
    plans = [partial.plan(profile) for partial in _Search(profile, group=1).whole() if len(partial.stages) == devices]
    if not plans:
        raise SaihError(_why_nothing_fits(profile))
    return min(plans, key=lambda plan: plan.latency.step_s)


def even_split(profile: Profile) -> Plan:
    """One device a stage, as many layers on each, whatever its speed. Raises SaihError where a stage does not fit."""
    cuts = split_layers(len(profile.layers), len(profile.devices))
    return plan_of(profile, cuts, [1] * len(profile.devices))


BASELINES: Mapping[str, Callable[[Profile], Plan]] = {
    "dp": data_parallel,
    "pp": pipeline_parallel,
    "even": even_split,
}
"""What a plan is compared with. All are in the plan space, so that none is faster."""


def plan_of(profile: Profile, cuts: Sequence[range], groups: Sequence[int]) -> Plan:
    """The plan with these layers and so many devices in each stage, fastest first.

    Raises SaihError naming the first stage (from the last one on) that does not fit.
    """
    costs, end = _Costs(profile), len(profile.devices)
    partial: _Partial | None = None
    for behind, (layers, count) in enumerate(zip(reversed(cuts), reversed(groups), strict=True)):
        group = range(end - count, end)
        costed = costs.stage(layers, group, behind)
        if costed is None:
            raise SaihError(costs.too_large(layers, group, behind))
        partial, end = _Partial.before(profile, costed, partial), end - count
    if partial is None:
        raise SaihError("a plan needs at least one stage")
    return partial.plan(profile)


# -- The dynamic programme ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Costed:
    """A stage and its own terms of the score."""

    stage: Stage
    forward_s: float
    backward_s: float
    port_s: float
    """Its busiest port, for each micro-batch."""
    s_per_byte: float
    """Of its slowest port, for a message of so many bytes a sample."""
    reduce_s: float


@dataclass(frozen=True)
class _Partial:
    """The last stages of a plan."""

    stages: tuple[Stage, ...]
    s_per_byte: float
    """Of the first of these stages."""
    fill_s: float
    drain_s: float
    period_s: float
    """From micro-batch to micro-batch."""
    reduce_s: float

    @classmethod
    def before(cls, profile: Profile, first: _Costed, rest: _Partial | None) -> _Partial:
        """One more stage in front."""
        fill_s, drain_s, period_s, reduce_s = first.forward_s, first.backward_s, 0.0, first.reduce_s
        stages: tuple[Stage, ...] = (first.stage,)
        if rest is not None:
            layer = profile.layers[first.stage.layers.stop - 1]
            s_per_byte = max(first.s_per_byte, rest.s_per_byte)
            fill_s += layer.forward_bytes * s_per_byte + rest.fill_s
            drain_s += layer.backward_bytes * s_per_byte + rest.drain_s
            period_s, reduce_s, stages = rest.period_s, max(reduce_s, rest.reduce_s), (*stages, *rest.stages)
        kept = in_flight("1f1b", len(stages) - 1, profile.micro_batches)
        around_s = (fill_s + drain_s) / kept if kept < profile.micro_batches else 0.0
        period_s = max(period_s, first.forward_s + first.backward_s, first.port_s, around_s)
        return cls(stages, first.s_per_byte, fill_s, drain_s, period_s, reduce_s)

    @property
    def terms(self) -> tuple[float, ...]:
        """Whatever is put in front, a partial plan that is no larger in any of them has no larger a latency."""
        return self.period_s, self.fill_s + self.drain_s, self.reduce_s, self.s_per_byte

    def plan(self, profile: Profile) -> Plan:
        steady_s = (profile.micro_batches - 1) * self.period_s
        return Plan(self.stages, Latency(self.fill_s, steady_s, self.drain_s, self.reduce_s))


class _Costs:
    """Terms and memory of stages; devices are counted from the fastest."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.devices = [profile.devices[number] for number in profile.order]
        self._forward_s = [_sums(device.forward_s) for device in self.devices]
        self._backward_s = [_sums(device.backward_s) for device in self.devices]
        self._fixed_bytes = _sums([layer.weight_bytes + layer.state_bytes for layer in profile.layers])
        self._kept_bytes = _sums([layer.kept_bytes for layer in profile.layers])
        self._trainable_bytes = _sums([layer.trainable_bytes for layer in profile.layers])

    def stage(self, layers: range, group: range, behind: int) -> _Costed | None:
        """These layers on these devices, with so many stages behind; None where they do not fit."""
        forward_s = [_over(self._forward_s[device], layers) for device in group]
        backward_s = [_over(self._backward_s[device], layers) for device in group]
        room = [self._room(layers, device, behind) for device in group]
        sample_s = [f + b for f, b in zip(forward_s, backward_s, strict=True)]
        samples = slices(self.profile.micro_batch, sample_s, room)
        if samples is None:
            return None
        stage = Stage(layers, tuple(self.profile.order[device] for device in group), samples)
        s_per_byte = max(n / self.devices[d].port_bytes_per_s for n, d in zip(samples, group, strict=True))
        slowest_port = min(self.profile.devices[device].port_bytes_per_s for device in stage.active)
        trainable_bytes = _over(self._trainable_bytes, layers)
        return _Costed(
            stage,
            max(n * s for n, s in zip(samples, forward_s, strict=True)),
            max(n * s for n, s in zip(samples, backward_s, strict=True)),
            self._port_bytes(layers) * s_per_byte,
            s_per_byte,
            all_reduce_s(trainable_bytes, len(stage.active), slowest_port),
        )

    def needed_bytes(self, layers: range, samples: int, behind: int) -> float:
        """On a device with so many samples of each micro-batch."""
        kept = in_flight("1f1b", behind, self.profile.micro_batches) * samples
        return _over(self._fixed_bytes, layers) + kept * _over(self._kept_bytes, layers)

    def too_large(self, layers: range, group: range, behind: int) -> str:
        """Why these layers do not fit there."""
        fixed, one = self.needed_bytes(layers, 0, behind), self.needed_bytes(layers, 1, behind)
        there = ", ".join(f"{self.devices[d].name} {_mib(self.devices[d].memory_bytes)}" for d in group)
        return (
            f"layers {layers.start} to {layers.stop - 1} with {behind} stages behind do not fit: memory: "
            f"{_mib(fixed)} and {_mib(one - fixed)} for each of {self.profile.micro_batch} samples; there are {there}"
        )

    def _room(self, layers: range, device: int, behind: int) -> int:
        """Samples of a micro-batch that this device's memory has room for."""
        fixed = _over(self._fixed_bytes, layers)
        per_sample = self.needed_bytes(layers, 1, behind) - fixed
        free = self.devices[device].memory_bytes - fixed
        if free < 0:
            return 0
        return int(min(self.profile.micro_batch, free / per_sample)) if per_sample else self.profile.micro_batch

    def _port_bytes(self, layers: range) -> float:
        """Per sample of a micro-batch, in the busier direction: (h, a) in and da out, (h, a) out and da in."""
        before = self.profile.layers[layers.start - 1] if layers.start else None
        after = self.profile.layers[layers.stop - 1] if layers.stop < len(self.profile.layers) else None
        sent = (before.backward_bytes if before else 0.0) + (after.forward_bytes if after else 0.0)
        taken = (before.forward_bytes if before else 0.0) + (after.backward_bytes if after else 0.0)
        return max(sent, taken)


class _Search:
    """W, from the last stage to the first: state (layers from here on, devices from here on, stages)."""

    def __init__(self, profile: Profile, group: int | None = None) -> None:
        """`group`: the most devices of a stage."""
        self.costs, self.layers, self.devices = _Costs(profile), len(profile.layers), len(profile.devices)
        self.group = group or self.devices

    def whole(self) -> Iterator[_Partial]:
        """The plans of all layers on all devices that may be the best, for each number of stages."""
        ends: dict[tuple[int, int], list[_Partial | None]] = {(self.layers, self.devices): [None]}
        for behind in range(min(self.layers, self.devices)):
            found: dict[tuple[int, int], list[_Partial]] = {}
            for (layer_end, device_end), rests in ends.items():
                for layer, device in self._starts(layer_end, device_end):
                    costed = self.costs.stage(range(layer, layer_end), range(device, device_end), behind)
                    if costed is not None:
                        grown = [_Partial.before(self.costs.profile, costed, rest) for rest in rests]
                        found.setdefault((layer, device), []).extend(grown)
            ends = {state: list(_unbeaten(partials)) for state, partials in found.items()}
            yield from (partial for partial in ends.get((0, 0), []) if partial is not None)

    def _starts(self, layer_end: int, device_end: int) -> Iterator[tuple[int, int]]:
        return itertools.product(range(layer_end), range(max(0, device_end - self.group), device_end))


def slices(samples: int, sample_s: Sequence[float], room: Sequence[int]) -> tuple[int, ...] | None:
    """How many samples each device takes so that the last one ends first; None if there is no room for all.

    Each sample goes to the device that would end it first, which is optimal as all samples of a device take as long.
    """
    taken = [0] * len(sample_s)
    for _ in range(samples):
        free = [device for device in range(len(taken)) if taken[device] < room[device]]
        if not free:
            return None
        taken[min(free, key=lambda device: (taken[device] + 1) * sample_s[device])] += 1
    return tuple(taken)


def _unbeaten(partials: Sequence[_Partial]) -> Iterator[_Partial]:
    """Those that no other one equals or beats in every term."""
    kept: list[tuple[float, ...]] = []
    for partial in sorted(partials, key=lambda each: each.terms):
        terms = partial.terms
        if not any(all(a <= b for a, b in zip(other, terms, strict=True)) for other in kept):
            kept.append(terms)
            yield partial


def _why_nothing_fits(profile: Profile) -> str:
    """The tightest limit that can be named."""
    costs = _Costs(profile)
    largest = max(costs.devices, key=lambda device: device.memory_bytes)
    for number in range(len(profile.layers)):
        needed = costs.needed_bytes(range(number, number + 1), 1, 0)
        if needed > largest.memory_bytes:
            return (
                f"no plan fits: memory: layer {number} alone with one sample needs {_mib(needed)}; "
                f"the largest device, {largest.name}, has {_mib(largest.memory_bytes)}"
            )
    needed = sum(layer.weight_bytes + layer.state_bytes for layer in profile.layers)
    there = sum(device.memory_bytes for device in costs.devices)
    return (
        f"no plan fits: memory: {len(profile.layers)} layers need {_mib(needed)}, activations in flight not counted; "
        f"{len(costs.devices)} devices have {_mib(there)} together"
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def _sums(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values, initial=0.0))


def _over(sums: Sequence[float], layers: range) -> float:
    return sums[layers.stop] - sums[layers.start]
