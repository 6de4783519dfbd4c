"""PAC on ranks: hybrid pipelines against one process, the exchange of cached activations, and ranks that are lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import pac_ranks as ranks
from workloads.llm.pac import planner
from workloads.llm.pac.pipeline import slices_of
from workloads.llm.pac.stages import make


def run_ranks(target: Callable[..., None], count: int, folder: Path, *args: object) -> list[int | None]:
    """Exit codes of so many processes that run `target(rank, folder, *args)`; those that hang end themselves."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder), *args)) for rank in range(count)]
    for process in processes:
        process.start()
    ended_s = time.monotonic() + 300
    for process in processes:
        process.join(max(0.0, ended_s - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("grid")
    assert run_ranks(ranks.grid, 4, folder) == [0] * 4
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(4)]


CASES = [f"{variant} {name} {schedule}" for variant, cases in ranks.CASES.items() for name, schedule in cases]


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_the_loss_and_gradients_of_one_process(four_ranks: list[dict[str, Any]], case: str) -> None:
    assert max(found[case][0] for found in four_ranks) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_bytes_between_stages_are_those_on_paper(four_ranks: list[dict[str, Any]], case: str) -> None:
    """(h, a) or h of every token crosses each border once; da or dh comes back; 4 bytes each."""
    variant, name = case.split(" ", 1)[0], case.split(" ", 1)[1].rsplit(" ", 1)[0]
    sent = [found[case][1] for found in four_ranks]
    tokens, hidden = sum(ranks.LENS), ranks.SPEC.hidden
    side, borders = hidden // 8, len(ranks.PLANS[name].stages) - 1
    forward, backward = (hidden + side, side) if variant == "pa" else (hidden, hidden)
    assert sum(each["forward"] for each in sent) == 4 * borders * tokens * forward
    assert sum(each["backward"] for each in sent) == 4 * borders * tokens * backward


@pytest.mark.parametrize("name", ranks.PLANS)
def test_gradients_are_added_up_once_in_a_group_and_of_what_trains(four_ranks: list[dict[str, Any]], name: str) -> None:
    for stage in ranks.PLANS[name].stages:
        trained = make(ranks.settings_of("pa"), stage.layers).trained().values()
        nbytes = sum(parameter.nbytes for parameter in trained) if len(stage.active) > 1 else 0
        for rank in stage.devices:
            found = four_ranks[rank][f"pa {name} 1f1b"]
            assert found[1]["all_reduce"] == (nbytes if rank in stage.active else 0)
            assert found[2] == (len(trained) if rank in stage.active else 0)


@pytest.mark.parametrize("samples", range(5))
def test_slices_of_a_smaller_micro_batch_cover_it(samples: int) -> None:
    found = list(slices_of(planner.Stage(range(1), (2, 0, 1), (3, 0, 1)), samples).values())
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == samples
