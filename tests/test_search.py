"""Architecture search: every candidate costs what was allowed, the best is told first, and one that learns wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih.core import Value
from saih.errors import SaihError
from workloads.cosmology.cosmoflow import search, spec

BASE: dict[str, Value] = {each.name: each.default for each in spec.PARAMETERS} | {"mesh": 8}


@pytest.fixture
def optuna(require_package: Callable[[str, str], None]) -> None:
    require_package("optuna", "pip install 'saih[search]'")


def universes(samples: int, seed: int) -> search.Universes:
    """Volumes whose mean is the target: a network that trains at all learns it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(samples, 4, generator=generator) * 2 - 1
    noise = torch.randn(samples, 4, 8, 8, 8, generator=generator)
    return search.Universes(targets[:, :, None, None, None] + 0.1 * noise, targets)


@given(
    budget=st.floats(1e5, 1e11),
    depth=st.integers(1, 4),
    family=st.sampled_from(["cosmoflow", "vit"]),
)
def test_the_width_is_the_largest_within_the_budget(budget: float, depth: int, family: str) -> None:
    base = {**BASE, "family": family, "depth": depth}
    width, step = search.widest(base, budget), 64 if family == "vit" else 1
    if width:
        assert spec.network({**base, "width": width}).forward_flop <= budget
    if width < search.WIDEST:
        assert spec.network({**base, "width": width + step}).forward_flop > budget


def test_training_learns_what_can_be_learnt() -> None:
    torch.set_num_threads(1)
    params = {**BASE, "width": 8}
    untrained = search.train(params, 1e-9, 1, universes(64, 0), universes(16, 1))
    assert search.train(params, 3e-3, 60, universes(64, 0), universes(16, 1)) < 0.5 * untrained


@pytest.mark.usefixtures("optuna")
def test_candidates_are_within_the_budget_and_the_best_comes_first() -> None:
    torch.set_num_threads(1)
    run = [
        search.search(BASE, ["cosmoflow", "vit"], 2e6, 6, 5, universes(32, 0), universes(8, 1), seed=3)
        for _ in range(2)
    ]
    assert run[0] == run[1], "the same seed, the same search"
    assert all(each.forward_flop <= 2e6 for each in run[0])
    assert [each.mae for each in run[0]] == sorted(each.mae for each in run[0])
    assert len({each.params["family"] for each in run[0]}) == 2


@pytest.mark.usefixtures("optuna")
def test_a_budget_for_nothing_is_refused() -> None:
    with pytest.raises(SaihError, match="no architecture"):
        search.search(BASE, ["vit"], 1e3, 2, 1, universes(8, 0), universes(8, 1))


@pytest.mark.usefixtures("optuna")
def test_the_command_prints_candidates_beside_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), "--mesh", "8", "--samples", "8", "--trials", "2", "--steps", "2", "--gflop", "0.005"]
    assert search.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicting the mean: MAE")
    assert "of the ladder" in lines[1]
    assert "--set family=cosmoflow" in lines[2]


def test_without_optuna_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert search.main([str(tmp_path)]) == 2
    assert "pip install 'saih[search]'" in capsys.readouterr().err
