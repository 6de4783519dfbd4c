"""What the ranks of the CosmoFlow tests run, and how memory is traced. Started as processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saih import workload
from saih.core import Context, Place, Point, Value
from saih.timing import StepClock, Unclocked, run_steps
from workloads.cosmology.cosmoflow import bench, spec
from workloads.cosmology.cosmoflow.parallel import Parallel

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
SMALL: dict[str, Value] = {"mesh": 16, "width": 4, "samples": 8}
LESSON: dict[str, Value] = {
    "train": "until-mae",
    "target_mae": 0.0,
    "epochs": 2,
    "validation": 4,
    "augment": "symmetry",
}


def rank(place: int, world: int, folder: str, cases: Mapping[str, Mapping[str, Value]]) -> None:
    """Every case on this rank; rank 0 writes what came out to `folder`/told.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=place, world_size=world)
    told = {}
    for name, changes in cases.items():
        params = DEFAULTS | SMALL | {"gpus": world} | dict(changes)
        training = bench.setup(Point("cosmoflow", params), Context(Place(place, place, world), "cpu", folder))
        check = training.check()
        told[name] = {"passed": check.passed, "why": check.why} | dict(check.numbers)
        told[name] |= {"full_step_error": full_step_error(training), "updates_error": updates_error(training)}
        if name == "ddp":
            told[name]["unreduced_error"] = _unreduced_error(training)
        training.close()
    told["memory"] = {
        backend: _memory(place, world, folder, {"backend": backend}) for backend in ("ddp", "fsdp", "spatial")
    }
    told["learnt"] = [_learnt(place, world, folder, "spatial"), _learnt(0, 1, folder, "spatial")]
    if place == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def full_step_error(training: bench.Training) -> float:
    """The gradient of a whole step, head and all, beside that of the plain step on all batches joined."""
    training.parallel.network.eval()
    training.parallel.backward(training._own_loss(), Unclocked())
    shared = bench._flat(training.parallel.gradients())
    training.parallel.network.zero_grad()
    plain = Parallel(training._build().eval())
    readers = training.parallel.reader[1]
    for reader in range(readers):
        volumes, targets = whole_batch(training, reader)
        (torch.nn.functional.mse_loss(plain.model(volumes), targets) / readers).backward()
    wanted = bench._flat(plain.gradients())
    training.parallel.network.train()
    return float((shared - wanted).norm() / wanted.norm())


def updates_error(training: bench.Training) -> float:
    """The weights after two updates beside those of the plain network updated on the joined batches."""
    training.parallel.network.eval()
    plain = training._build().eval()
    optimizer, readers = bench._optimizer(plain), training.parallel.reader[1]
    before = bench._flat(plain.parameters())
    for _ in range(2):
        training._update(training._own_loss(), training.optimizer, training.scaler, Unclocked())
        optimizer.zero_grad()
        for reader in range(readers):
            volumes, targets = whole_batch(training, reader)
            (torch.nn.functional.mse_loss(plain(volumes), targets) / readers).backward()
        optimizer.step()
    wanted = bench._flat(plain.parameters())
    moved, error = wanted - before, bench._flat(training.parallel.weights()) - wanted
    return float(error.norm() / moved.norm())


def whole_batch(training: bench.Training, reader: int) -> tuple[Tensor, Tensor]:
    counts, targets = training._read(training.order.indices(0, reader))
    return training.standard(counts), targets


def peak_allocated(call: Callable[[], object]) -> int:
    """Peak bytes of the allocations that torch traces while `call` runs, over what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _unreduced_error(training: bench.Training) -> float:
    """What the check would say if the ranks forgot to reduce."""
    shared = training.parallel
    training.parallel = Parallel(training._build().eval())
    training.parallel.reader = shared.reader
    error = training._gradient_error()
    training.parallel = shared
    return error


def _learnt(place: int, world: int, folder: str, backend: str) -> float:
    """The validation error that a short lesson ends with."""
    params = DEFAULTS | SMALL | LESSON | {"gpus": world, "backend": backend}
    training = bench.setup(Point("cosmoflow", params), Context(Place(place, place, world), "cpu", folder))
    training.close()
    return training.learnt["mae"]


def _lined_up_step(training: bench.Training) -> None:
    dist.barrier()
    run_steps(training, StepClock("cpu"), 1)


def _memory(place: int, world: int, folder: str, changes: Mapping[str, Value]) -> tuple[float, float]:
    """(traced, predicted) peak bytes of a step whose weights and volumes both count.

    Of several steps the one that kept least: a rank that waits for a late one keeps what it sends for longer.
    """
    params = DEFAULTS | {"mesh": 32, "width": 32, "samples": 4, "gpus": world, "batch": 2} | dict(changes)
    training = bench.setup(Point("cosmoflow", params), Context(Place(place, place, world), "cpu", folder))
    run_steps(training, StepClock("cpu"), 2)
    whole = training.cost.parameters * (8 if changes["backend"] != "fsdp" else 8 / world)
    buckets = 0 if changes["backend"] == "fsdp" else 4 * training.cost.parameters  # DDP's, there from the start
    steps = [peak_allocated(lambda: _lined_up_step(training)) for _ in range(4)]
    traced = min(steps) + whole + buckets
    training.close()
    return float(traced), training.cost.device_bytes
