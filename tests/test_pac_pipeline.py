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

NOBODY = -1


def run_ranks(target: Callable[..., None], count: int, folder: Path, *args: object) -> list[int | None]:
    """Exit codes of so many processes that run `target(rank, folder, *args)`; those that hang end themselves.

    They are forked off a process that has imported torch and computed nothing.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pac_ranks"])
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


# -- Epochs ------------------------------------------------------------------------------------------------------------


def test_data_parallel_ranks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """The same mini-batches, halved: losses and summed gradients of all steps, those from the cache among them."""
    assert run_ranks(ranks.data_parallel, 2, tmp_path) == [0] * 2
    for rank in range(2):
        for steps, loss, gradient in json.loads((tmp_path / f"found{rank}.json").read_text()).values():
            assert steps == 9
            assert loss < 1e-5
            assert gradient < 1e-5


def test_epochs_on_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    """Losses of every mini-batch and the weights at the end; a second run after `reset` gives the same bits.

    Attention does not depend on the bias of keys: its gradient is rounding alone, which AdamW makes large.
    """
    assert run_ranks(ranks.epochs, 4, tmp_path) == [0] * 4
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(4)]
    for first, second, _ in found:
        assert first[1] < 1e-6
        assert first[2] < 1e-5
        assert second == first
    assert all(first == found[0][0] for first, _, _ in found)


def test_activations_arrive_bit_for_bit_and_weights_everywhere(tmp_path: Path) -> None:
    assert run_ranks(ranks.exchange, 4, tmp_path) == [0] * 4
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(4)]
    points, odd = [2, 2, 1, 1], {2: 0, 3: 1}
    for rank, (sent, shared, values) in enumerate(found):
        held = [sample for sample in ranks.SAMPLES if odd.get(rank, sample % 2) == sample % 2]
        tokens = sum(len(ranks.DATA.ids[sample]) for sample in held if ranks.owner(sample) != rank)
        assert sent == 4 * ranks.SPEC.hidden * points[rank] * tokens
        assert values == pytest.approx({"x": 0.1, "y": 0.2, "z": 1.2})
        assert shared == [2, 1, 0, 0][rank] * 6 * 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(ranks.killed, 2, folder, NOBODY, 0, 0) == [0, 0]
    return folder


@pytest.mark.parametrize(("who", "epoch", "step"), [(1, 0, 1), (0, 2, 1)])
def test_a_run_that_lost_a_rank_says_so_and_goes_on(
    undisturbed: Path, tmp_path: Path, who: int, epoch: int, step: int
) -> None:
    """Phase 1 starts over; phase 2 goes on behind the last epoch; the weights are those of a run that lost nobody."""
    codes = run_ranks(ranks.killed, 2, tmp_path, who, epoch, step)
    assert codes[who] == -9
    assert codes[1 - who] == 3
    told = json.loads((tmp_path / f"told{1 - who}.json").read_text())
    kept = f"{epoch} finished epochs and the activations cached for them are kept"
    assert told == f"rank {who} was lost in epoch {epoch + 1}; {kept}"
    (tmp_path / "meet").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache*.h5")}
    assert len(stamps) == (2 if epoch else 0)
    assert run_ranks(ranks.killed, 2, tmp_path, NOBODY, 0, 0) == [0, 0]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    for rank in range(2):
        began, losses = json.loads((tmp_path / f"losses{rank}.json").read_text())
        _, wanted = json.loads((undisturbed / f"losses{rank}.json").read_text())
        assert began == epoch
        assert losses == wanted[-len(losses) :]
        after = torch.load(tmp_path / f"weights{rank}.pt", weights_only=True)
        same = torch.load(undisturbed / f"weights{rank}.pt", weights_only=True)
        assert after.keys() == same.keys()
        assert all(torch.equal(after[name], same[name]) for name in after)
