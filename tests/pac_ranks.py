"""What the ranks of the PAC tests run. Started as processes of their own."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import zlib
from collections.abc import Sequence
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saih import workload
from saih.core import Context, Place, Point
from saih.errors import SaihError
from saih.timing import Unclocked
from workloads.llm.config import preset
from workloads.llm.pac.batch import Batch, joined_batches
from workloads.llm.pac.cache import open_cache
from workloads.llm.pac.collaborate import Collaboration
from workloads.llm.pac.pipeline import Pipeline
from workloads.llm.pac.planner import Latency, Plan, Stage
from workloads.llm.pac.redistribute import Shelf, redistribute, share_weights
from workloads.llm.pac.stages import Settings, SideTuned, Tuned, make
from workloads.llm.pac.tasks import synthetic
from workloads.llm.pac.training import FineTuning, Optimizer, Recipe

SPEC = preset("bert-tiny")
CLASSES = 3
LENS = (5, 1, 9, 4, 7, 2, 3, 8, 6, 1, 4)
"""Of a mini-batch; micro-batches of 4 leave a last one of 3."""
VARIANTS = ("pa", "lora", "full")


def settings_of(variant: str) -> Settings:
    return Settings(SPEC, variant, CLASSES, seed=5)


def batch_of(lens: Sequence[int] = LENS) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids_T = torch.randint(SPEC.vocab, (sum(lens),), generator=generator)
    labels_B = torch.randint(CLASSES, (len(lens),), generator=generator)
    return Batch(tuple(range(len(lens))), tuple(lens), ids_T, labels_B)


def plan_of(*stages: tuple[int, dict[int, int]]) -> Plan:
    """(layers, {rank: samples of a micro-batch}) of each stage."""
    ends = [0]
    for layers, _ in stages:
        ends.append(ends[-1] + layers)
    found = [
        Stage(range(a, b), tuple(shares), tuple(shares.values()))
        for (a, b), (_, shares) in zip(pairwise(ends), stages, strict=True)
    ]
    return Plan(tuple(found), Latency(0, 0, 0, 0))


PLANS = {
    "four stages": plan_of((1, {0: 4}), (1, {1: 4}), (1, {2: 4}), (1, {3: 4})),
    "two by two": plan_of((3, {2: 2, 0: 2}), (1, {1: 2, 3: 2})),
    "unequal": plan_of((1, {1: 3, 3: 1}), (3, {0: 1, 2: 3})),
    "one and three": plan_of((2, {3: 4}), (2, {0: 1, 1: 2, 2: 1})),
    "one idle": plan_of((2, {0: 4, 1: 0}), (2, {2: 3, 3: 1})),
    "data parallel": plan_of((4, {0: 1, 1: 1, 2: 1, 3: 1})),
}
CASES = {
    "pa": [(name, "1f1b") for name in PLANS] + [("four stages", "gpipe"), ("unequal", "gpipe")],
    "lora": [("two by two", "1f1b")],
    "full": [("four stages", "1f1b"), ("unequal", "1f1b"), ("data parallel", "1f1b")],
}
"""Plan and schedule of what is trained."""


def shaken(trained: dict[str, nn.Parameter]) -> None:
    """What trains no longer starts at zero, where gradients behind it would be zero too; the same on every rank."""
    with torch.no_grad():
        for name, parameter in trained.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def one_process(variant: str) -> tuple[float, dict[str, Tensor]]:
    """Loss of the mini-batch, and gradients by name."""
    stage, batch = make(settings_of(variant)), batch_of()
    shaken(stage.trained())
    meta = batch.meta(SPEC.causal)
    loss = stage.loss(stage(stage.start(batch.ids_T, meta), meta), batch, meta) / len(batch)
    loss.backward()
    return float(loss.detach()), {name: each.grad for name, each in stage.trained().items() if each.grad is not None}


def join(rank: int, folder: str, ranks: int, at_most_s: float = 120) -> None:
    """Ranks meet. One that takes longer from then on hangs: it tells where its threads are and exits with 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    faulthandler.dump_traceback_later(at_most_s, exit=True)


def grid(rank: int, folder: str) -> None:
    """Every plan with every variant and schedule: largest error of loss and gradients, bytes sent, taps recorded."""
    join(rank, folder, 4)
    found: dict[str, object] = {}
    for variant in VARIANTS:
        loss, gradients = one_process(variant)
        assert all(bool(each.any()) for each in gradients.values())
        for name, schedule in CASES[variant]:
            pipeline = Pipeline(settings_of(variant), PLANS[name], micro_batches=3, schedule=schedule)
            trained = pipeline.stage.trained() if pipeline.stage is not None else {}
            shaken(trained)
            error = abs(pipeline.step(batch_of()) - loss)
            for each, parameter in trained.items():
                if each in gradients:
                    assert parameter.grad is not None, each
                    error = max(error, float((parameter.grad - gradients[each]).abs().max()))
            found[f"{variant} {name} {schedule}"] = [error, pipeline.traffic_bytes, len(trained)]
            pipeline.close()
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- Epochs ------------------------------------------------------------------------------------------------------------

EPOCHS, SAMPLES = 3, range(10, 34)
DATA = synthetic(40, 9, 0.75, SPEC.vocab, CLASSES, seed=2)


def recipe_of(rank: int, world: int) -> Recipe:
    return Recipe(batch=8, learning_rate=1e-2, seed=4, rank=rank, world=world)


def joined(epoch: int, world: int) -> list[Batch]:
    """The mini-batches of all ranks."""
    return [DATA.batch(samples) for samples in joined_batches(SAMPLES, 8, 4, epoch, world)]


def epochs_of_one_process(world: int, optimizer: Optimizer, stage: SideTuned | Tuned) -> list[float]:
    """Losses of all mini-batches, through the backbone every time."""
    losses = []
    for batch in chain(*(joined(epoch, world) for epoch in range(EPOCHS))):
        meta = batch.meta(SPEC.causal)
        loss = stage.loss(stage(stage.start(batch.ids_T, meta), meta), batch, meta) / len(batch)
        loss.backward()
        losses.append(optimizer.step(loss, Unclocked()))
    return losses


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Those of every step from now on, of all that trains in one row."""
    found: list[Tensor] = []

    def see(*_: object) -> None:
        found.append(torch.cat([cast(Tensor, each.grad).flatten().clone() for each in optimizer.trained.values()]))

    optimizer.adam.register_step_pre_hook(see)
    return found


def data_parallel(rank: int, folder: str) -> None:
    """All epochs on two ranks: the largest differences of losses and gradients of any step from one process."""
    join(rank, folder, 2)
    found = {}
    for variant in ("lora", "pa-cache"):
        cache = None
        if variant == "pa-cache":
            lens = {sample: len(DATA.ids[sample]) for sample in SAMPLES[rank::2]}
            cache = open_cache(None, "", lens, SPEC.layers + 1, SPEC.hidden, "fp32", "cpu")
        tuning = FineTuning(make(settings_of(variant)), DATA, SAMPLES, recipe_of(rank, 2), cache)
        gradients = gradients_of(tuning.optimizer)
        losses = [loss for _ in range(EPOCHS) for loss in tuning.epoch(Unclocked())]
        stage = make(settings_of(variant))
        optimizer = Optimizer(stage.trained(), 1e-2)
        wanted = gradients_of(optimizer)
        apart = zip(losses, epochs_of_one_process(2, optimizer, stage), strict=True)
        far = [float((a - b).abs().max()) for a, b in zip(gradients, wanted, strict=True)]
        found[variant] = [len(losses), max(abs(a - b) for a, b in apart), max(far)]
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def collaboration(rank: int, world: int, plan: Plan, folder: Path | None) -> Collaboration:
    mine = SAMPLES[rank::world]
    lens = {sample: len(DATA.ids[sample]) for sample in mine}
    path = folder / f"cache{rank}.h5" if folder else None
    cache = open_cache(path, "of this model", lens, SPEC.layers + 1, SPEC.hidden, "fp32", "cpu")
    recipe = recipe_of(rank, world)
    return Collaboration(settings_of("pa-cache"), DATA, SAMPLES, recipe, plan, cache, micro_batches=2, folder=folder)


def epochs(rank: int, folder: str) -> None:
    """All epochs on four ranks, twice: losses and weights against one process; what the second time gives."""
    join(rank, folder, 4)
    both = collaboration(rank, 4, PLANS["unequal"], None)
    stage = make(settings_of("pa-cache"))
    optimizer = Optimizer(stage.trained(), 1e-2)
    wanted, weights = epochs_of_one_process(4, optimizer, stage), optimizer.state()["trained"]
    found = []
    for _ in range(2):
        losses = [loss for _ in range(EPOCHS) for loss in both.epoch(Unclocked())]
        assert both.later is not None
        trained = both.later.optimizer.trained
        assert trained.keys() == weights.keys()
        far = max(float((trained[n].detach() - weights[n]).abs().max()) for n in weights if "qkv.bias" not in n)
        found.append([losses, max(abs(a - b) for a, b in zip(losses, wanted, strict=True)), far])
        exchange = both.done[0].exchange
        assert exchange is not None
        sent = exchange.sent_bytes
        both.reset()
    both.close()
    (Path(folder) / f"found{rank}.json").write_text(json.dumps([*found, sent]))
    dist.destroy_process_group()


def killed(rank: int, folder: str, who: int, at_epoch: int, at_step: int) -> None:
    """All epochs on two ranks, from what the folder has; in this mini-batch of this epoch rank `who` dies."""
    join(rank, folder, 2)
    both = collaboration(rank, 2, plan_of((2, {0: 4}), (2, {1: 4})), Path(folder))
    began, losses = both.epochs, list[float]()
    try:
        while both.epochs < EPOCHS:
            if (rank, both.epochs) == (who, at_epoch):
                dies(at_step)
            losses += both.epoch(Unclocked())
    except SaihError as error:
        (Path(folder) / f"told{rank}.json").write_text(json.dumps(str(error)))
        sys.stdout.flush()
        os._exit(3)  # threads may wait for the one that is gone
    if both.later is not None:
        torch.save(dict(both.later.optimizer.state()["trained"]), Path(folder) / f"weights{rank}.pt")
    (Path(folder) / f"losses{rank}.json").write_text(json.dumps([began, losses]))
    both.close()
    dist.destroy_process_group()


def dies(step: int) -> None:
    """This process at its next optimiser step but `step`."""
    whole, steps = torch.optim.AdamW.step, count()

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    torch.optim.AdamW.step = fatal  # type: ignore[method-assign]


JOINT = {
    "pa-cache pp": {"variant": "pa-cache", "layout": "pp"},
    "pa-cache gpipe": {"variant": "pa-cache", "layout": "pp", "schedule": "gpipe", "tier": "disk", "head": "lm"},
    "lora pp": {"variant": "lora", "layout": "pp"},
    "pa hybrid": {"variant": "pa", "layout": "hybrid"},
}
"""Whole runs by the workload's bench."""


def joint(rank: int, folder: str) -> None:
    """Each of them on two ranks: numbers and notes of its check, losses of the check and of two steps."""
    join(rank, folder, 2)
    found = {}
    for name, changes in JOINT.items():
        tiny = {"model": "gpt-tiny", "gpus": 2, "span": "whole", "samples": 16, "length": 12, "micro_batches": 2}
        known = workload.parameters(workload.spec("pac"))
        point = Point("pac", {each.name: each.default for each in known.values()} | tiny | changes)
        bench: Any = workload.bench("pac").setup(point, Context(Place(rank, rank, 2), "cpu", folder, f"{folder}/kept"))
        check = bench.check()
        assert check.passed, check.why
        losses = []
        for _ in range(2):
            assert bench.step(Unclocked()).units == 3 * 16 / 2
            losses.append([each.losses for each in bench.together.done])
        ids, stages = bench.data.ids, bench.plan.stages
        points = [len(stage.layers) + (stage.layers.start == 0) for stage in stages]
        tokens = [sum(len(ids[sample]) for sample in bench.samples[other::2]) for other in (1, 0)]
        expected = sum(4 * SPEC.hidden * p * t for p, t in zip(points, tokens, strict=False))
        found[name] = [dict(check.numbers) | {"expected_bytes": expected}, check.notes, losses]
        bench.close()
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def exchange(rank: int, folder: str) -> None:
    """Known numbers on shelves of three stages, the last of two ranks: what arrives, bit for bit, and what was sent."""
    join(rank, folder, 4)
    layers = (range(1, 3), range(1), range(3, 4), range(3, 4))[rank]  # rank 1 has the first
    shelf, arrived = Shelf(layers), dict[int, list[Tensor]]()
    for sample in SAMPLES:
        if rank < 2 or sample % 2 == rank % 2:
            batch = DATA.batch([sample])
            points = range(layers.start + 1 if layers.start else 0, layers.stop + 1)
            shelf.put(batch, [numbers(sample, point) for point in points])
    done = redistribute(shelf, owner, SAMPLES, SPEC.layers + 1, SPEC.hidden, arrived.__setitem__)
    assert sorted(arrived) == [sample for sample in SAMPLES if owner(sample) == rank]
    for sample, points_found in arrived.items():
        for point, rows_TD in enumerate(points_found):
            assert torch.equal(rows_TD, numbers(sample, point)), (sample, point)
    assert not shelf.held
    everything = {name: torch.zeros(2, 3) for name in ("x", "y", "z")}
    mine = {"x": torch.full((2, 3), rank + 0.1), "yz"[rank % 2]: torch.full((2, 3), rank + 0.2)}
    shared = share_weights(mine, everything)
    values = {name: float(each[1, 2]) for name, each in everything.items()}
    (Path(folder) / f"found{rank}.json").write_text(json.dumps([done.sent_bytes, shared, values]))
    dist.destroy_process_group()


def owner(sample: int) -> int:
    return sample % 3  # rank 3 gets nothing


def numbers(sample: int, point: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * sample + point)
    return torch.randn((len(DATA.ids[sample]), SPEC.hidden), generator=generator)
