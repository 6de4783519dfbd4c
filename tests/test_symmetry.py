"""Symmetries of the cube: 48 of them, a group, and no power spectrum can tell."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workloads.cosmology.symmetry import CUBE, Symmetry, draw

torch.set_num_threads(1)

MESH = 4
NUMBERED = torch.arange(2 * MESH**3 * 3, dtype=torch.int16).view(2, MESH, MESH, MESH, 3)
"""Every voxel is another number, so a result tells what was done."""

symmetries = st.builds(
    Symmetry,
    st.permutations(range(3)).map(tuple),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.integers(0, MESH - 1)] * 3),
)


def picture(volumes: Tensor) -> bytes:
    return volumes.numpy().tobytes()


def test_there_are_48_and_they_form_a_group() -> None:
    pictures = {picture(each.apply(NUMBERED)) for each in CUBE}
    assert len(pictures) == len(CUBE) == 48
    for first, second in itertools.product(CUBE, repeat=2):
        assert picture(second.apply(first.apply(NUMBERED))) in pictures


def test_half_of_them_are_rotations() -> None:
    """Determinants of the matrices that they are, by where three unit steps go."""
    determinants = []
    for each in CUBE:
        matrix = np.zeros((3, 3))
        for axis in range(3):
            matrix[axis, each.order[axis]] = -1 if each.mirrored[each.order[axis]] else 1
        determinants.append(round(np.linalg.det(matrix)))
    assert (determinants.count(1), determinants.count(-1)) == (24, 24)


@given(symmetries)
def test_voxels_move_and_samples_and_channels_stay(symmetry: Symmetry) -> None:
    moved = symmetry.apply(NUMBERED)
    assert moved.shape == NUMBERED.shape
    assert moved.is_contiguous()
    for sample, channel in itertools.product(range(2), range(3)):
        expected = NUMBERED[sample, ..., channel].flatten().sort().values
        assert torch.equal(moved[sample, ..., channel].flatten().sort().values, expected)


@settings(max_examples=5)
@given(symmetries)
def test_every_symmetry_can_be_undone(symmetry: Symmetry) -> None:
    moved = symmetry.apply(NUMBERED)
    shifts = itertools.product(range(MESH), repeat=3)
    back = (Symmetry(cube.order, cube.mirrored, shift) for shift in shifts for cube in CUBE)
    assert any(torch.equal(each.apply(moved), NUMBERED) for each in back)


def test_a_symmetry_does_what_it_says() -> None:
    field = NUMBERED[:1]
    done = Symmetry((2, 0, 1), (True, False, False), (1, 0, 0)).apply(field)
    for x, y, z in itertools.product(range(MESH), repeat=3):
        old = {2: x, 0: y, 1: z}  # new axis i runs along old axis order[i]
        shifted = (MESH - 1 - old[0] - 1) % MESH
        assert torch.equal(done[0, x, y, z], field[0, shifted, old[1], old[2]])


@pytest.mark.parametrize("periodic", [True, False])
def test_power_spectra_stay(periodic: bool) -> None:
    """By squared mode number, in float64. Neighbours stay neighbours, so correlations of any order stay too."""
    torch.manual_seed(0)
    field = torch.randn(1, 16, 16, 16, 1).double()
    before = power(field)
    for step in range(20):
        np.testing.assert_allclose(power(draw(1, step, 0, 16, periodic).apply(field)), before, rtol=1e-9)
    assert not np.allclose(power(torch.randn(1, 16, 16, 16, 1).double()), before, rtol=0.1)


def power(field: Tensor) -> np.ndarray:
    modes = torch.fft.fftn(field[0, ..., 0]).abs().square().numpy().ravel()
    frequency = np.fft.fftfreq(16, 1 / 16)
    squared = sum(np.meshgrid(*[frequency**2] * 3, indexing="ij")).ravel().astype(int)
    return np.asarray(np.bincount(squared, modes)[np.bincount(squared) > 0])


def test_drawing_depends_on_seed_step_and_rank_alone() -> None:
    drawn = [draw(3, step, rank, 64, True) for step in range(50) for rank in range(2)]
    assert drawn == [draw(3, step, rank, 64, True) for step in range(50) for rank in range(2)]
    assert len(set(drawn)) == 100
    assert drawn != [draw(4, step, rank, 64, True) for step in range(50) for rank in range(2)]


def test_all_are_drawn_and_only_periodic_boxes_are_shifted() -> None:
    drawn = [draw(0, step, 0, 64, False) for step in range(1000)]
    assert set(drawn) == set(CUBE)
    shifts = np.array([draw(0, step, 0, 64, True).shift for step in range(1000)])
    assert shifts.min() == 0
    assert shifts.max() == 63
