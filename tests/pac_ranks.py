"""What the ranks of the PAC tests run. Started as processes of their own."""

from __future__ import annotations

import faulthandler
import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.llm.config import preset
from workloads.llm.pac.batch import Batch
from workloads.llm.pac.pipeline import Pipeline
from workloads.llm.pac.planner import Latency, Plan, Stage
from workloads.llm.pac.stages import Settings, make

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
