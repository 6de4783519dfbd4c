"""Ranks that share samples, weights or volumes train as one rank does: gradients, updates, and memory as predicted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from saih.core import Value
from tests import cosmoflow_ranks
from workloads.cosmology.cosmoflow import bench

CASES: dict[int, dict[str, dict[str, Value]]] = {
    2: {
        "ddp": {},
        "ddp-bf16": {"precision": "bf16"},
        "fsdp": {"backend": "fsdp"},
        "ddp-save": {"save": True},
        "fsdp-save": {"backend": "fsdp", "save": True},
        "fsdp-vit": {"backend": "fsdp", "family": "vit", "width": 64, "depth": 2},
        "spatial": {"backend": "spatial"},
        "spatial-contiguous": {"backend": "spatial", "layout": "contiguous", "batch": 1},
    },
    4: {
        "spatial": {"backend": "spatial", "depth": 2},  # one plane a rank before the last pooling's gather
        "spatial-checkpoint": {"backend": "spatial", "checkpoint": True},
        "fsdp-checkpoint": {"backend": "fsdp", "checkpoint": True},
    },
}


@pytest.fixture(scope="module", params=CASES, ids=lambda world: f"{world}-ranks")
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(cosmoflow_ranks.rank, (world, str(folder), CASES[world]), nprocs=world)
    return world, json.loads((folder / "told.json").read_text())


def test_the_check_passes(told: tuple[int, dict[str, Any]]) -> None:
    world, found = told
    for name in CASES[world]:
        assert found[name]["passed"], (name, found[name]["why"])


def test_gradients_and_updates_are_those_of_one_rank(told: tuple[int, dict[str, Any]]) -> None:
    world, found = told
    for name, changes in CASES[world].items():
        tolerance = bench.TOLERANCE[str(changes.get("precision", "fp32"))]
        assert found[name]["full_step_error"] < tolerance, name
        assert found[name]["updates_error"] < tolerance, name


def test_the_check_catches_ranks_that_do_not_reduce(told: tuple[int, dict[str, Any]]) -> None:
    for each in CASES[told[0]]:
        assert told[1][each].get("unreduced_error", 1.0) > 0.01


def test_ranks_that_share_volumes_learn_what_one_rank_does(told: tuple[int, dict[str, Any]]) -> None:
    together, alone = told[1]["learnt"]
    assert together == pytest.approx(alone, rel=1e-3)


def test_predicted_memory_is_what_a_step_of_a_rank_allocates(told: tuple[int, dict[str, Any]]) -> None:
    for backend, (traced, predicted) in told[1]["memory"].items():
        assert predicted == pytest.approx(traced, rel=0.15), backend
