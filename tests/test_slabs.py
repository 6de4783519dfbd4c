"""One universe on several ranks is the universe of one rank: transforms, particles, whole fields."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.slab_ranks import SIDE, findings
from workloads.cosmology.mesh import Mesh

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return {name: value for name, value in findings(Mesh(SIDE)).items() if value is not None}


@pytest.fixture(scope="module", params=[1, 2, 4])
def joined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What 1, 2 and 4 ranks find, each a process of its own."""
    folder = tmp_path_factory.mktemp("slabs")
    words = [sys.executable, "-m", "tests.slab_ranks", str(folder)]
    ranks = [subprocess.Popen([*words, str(rank), str(request.param)], cwd=ROOT) for rank in range(request.param)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * request.param
    with np.load(folder / "found.npz") as found:
        return {name: torch.from_numpy(value) for name, value in found.items()}


@pytest.mark.parametrize("name", ["field", "round_trip", "psi", "painted", "read"])
def test_slabs_hold_the_fields_of_the_whole(
    name: str, whole: dict[str, torch.Tensor], joined: dict[str, torch.Tensor]
) -> None:
    """To a few roundings of fp32, on numbers of order one to ten."""
    torch.testing.assert_close(joined[name], whole[name], rtol=1e-5, atol=1e-5 * whole[name].abs().max().item())


@pytest.mark.parametrize("name", ["lpt", "pm", "refined"])
def test_a_universe_in_slabs_is_the_universe_of_one_rank(
    name: str, whole: dict[str, torch.Tensor], joined: dict[str, torch.Tensor]
) -> None:
    """Counts are rounded, so a sum in another order may fall on the other side of a half: by one, and seldom."""
    difference = (joined[name].int() - whole[name].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert whole[name].float().var() > 100


def test_a_mesh_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed"):
        Mesh(SIDE, spread=True)
