"""Training to a quality: it learns what is there to learn, nothing from shuffled labels, and the target is a gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from saih import workload
from saih.core import Check, Context, Place, Point, Value
from saih.timing import StepClock, run_steps
from workloads.cosmology.cosmoflow import bench, learning, spec
from workloads.cosmology.cosmoflow.data import Shuffled, Standard
from workloads.cosmology.loader import Order
from workloads.cosmology.volumes import Volumes, Voxels

SMALL = {"mesh": 16, "width": 2, "samples": 64, "batch": 8, "train": "until-mae", "validation": 32, "epochs": 20}
DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}


class Amounts(Volumes):
    """Volumes of one count each: the count tells the first two targets, and nothing tells the others."""

    shape = (8, 8, 8, 4)
    periodic, mean_count = True, 1.0

    def __init__(self, samples: int, seed: int) -> None:
        self.truth = torch.rand(samples, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def __len__(self) -> int:
        return len(self.truth)

    def read_into(self, index: int, target: Voxels) -> None:
        first, second = self.truth[index, :2].tolist()
        target[...] = round(1000 + 900 * first)
        target[..., 1] = round(1000 + 900 * second)

    def targets(self, indices: Sequence[int]) -> Tensor:
        return self.truth[list(indices)]

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []


def trained(volumes: Volumes, folder: Path, **changes: Value) -> bench.Training:
    """A network trained on `volumes`, and validated on amounts it has not seen."""
    torch.set_num_threads(1)
    point = Point("cosmoflow", DEFAULTS | SMALL | {"mesh": 8} | changes)
    training = bench.Training(point, Context(Place(0, 0, 1), "cpu", str(folder)), volumes)
    training.learn(Amounts(32, seed=9))
    training.close()
    return training


def test_it_learns_what_is_there_and_no_more(tmp_path: Path) -> None:
    learnt = trained(Amounts(64, seed=1), tmp_path, target_mae=0.0).learnt
    chance = learning.predict_the_mean(Amounts(64, seed=1), Amounts(32, seed=9))
    assert chance["mae_omega_m"] == pytest.approx(0.5, abs=0.15)
    assert learnt["mae_judged"] < chance["mae_judged"] / 3
    assert learnt["mae_h"] > 0.8 * chance["mae_h"]
    assert learnt["epochs"] == 20
    assert "samples_to_target" not in learnt, "there is none"


def test_samples_to_a_target_are_those_that_were_read(tmp_path: Path) -> None:
    learnt = trained(Amounts(64, seed=1), tmp_path, target_mae=0.3, batch=24).learnt
    assert 1 <= learnt["epochs"] < 20
    assert learnt["samples_to_target"] == learnt["epochs"] * 2 * 24  # 64 are two steps of 24, and a rest


def test_shuffled_labels_teach_nothing(tmp_path: Path) -> None:
    volumes = Amounts(256, seed=1)  # of 64, shuffled ones and their own can be alike by chance
    learnt = trained(Shuffled(volumes, seed=0), tmp_path, target_mae=0.0, samples=256, epochs=5).learnt
    chance = learning.predict_the_mean(volumes, Amounts(32, seed=9))
    assert learnt["mae_judged"] > 0.8 * chance["mae_judged"]


def test_shuffled_labels_are_those_of_others() -> None:
    volumes = Amounts(64, seed=1)
    shuffled = Shuffled(volumes, seed=0)
    assert torch.equal(shuffled.read([3]), volumes.read([3]))
    everything = range(64)
    given, true = shuffled.targets(everything), volumes.targets(everything)
    assert (given != true).any(1).sum() > 50
    assert torch.equal(given.sort(0).values, true.sort(0).values)


def test_the_target_ends_training_and_is_a_gate(tmp_path: Path) -> None:
    easy = trained(Amounts(64, seed=1), tmp_path, target_mae=0.3)
    assert easy.learnt["epochs"] < 20
    assert easy.learnt["mae_judged"] <= 0.3
    check = easy.check()
    assert check.passed, check.why
    assert check.numbers["mae_judged"] == easy.learnt["mae_judged"]

    missed = trained(Amounts(64, seed=1), tmp_path, target_mae=1e-3, epochs=1).check()
    assert not missed.passed
    assert missed.why.startswith("target_mae=0.001 is not reached: ")


def test_the_step_that_has_learnt_is_the_one_that_is_timed(tmp_path: Path) -> None:
    training = bench.setup(
        Point("cosmoflow", DEFAULTS | SMALL | {"epochs": 1, "target_mae": 0.0}),
        Context(Place(0, 0, 1), "cpu", str(tmp_path)),
    )
    assert isinstance(training.optimizer, torch.optim.AdamW)
    assert [work.units for work in run_steps(training, StepClock("cpu"), 2).work] == [8, 8]
    training.close()


def test_the_check_compares_with_the_plain_step_of_what_has_learnt(tmp_path: Path) -> None:
    check = trained(Amounts(64, seed=1), tmp_path, epochs=2, target_mae=0.0, checkpoint=True).check()
    assert check.passed, check.why
    assert check.numbers["gradient_error"] < bench.TOLERANCE["fp32"]


def test_predicting_the_mean_needs_no_training(tmp_path: Path) -> None:
    training = bench.setup(
        Point("cosmoflow", DEFAULTS | SMALL | {"labels": "mean"}), Context(Place(0, 0, 1), "cpu", str(tmp_path))
    )
    check: Check = training.check()
    training.close()
    assert check.passed
    assert 0.3 < check.numbers["mae_sigma_8"] < 0.7
    assert spec.lesson_steps(DEFAULTS | SMALL | {"labels": "mean"}) == 0
    assert spec.lesson_steps(DEFAULTS | SMALL) == 20 * (64 / 8 + 2)  # 4 batches of validation are two steps at most


def test_validation_is_the_mean_error_whatever_the_batches() -> None:
    volumes = Amounts(7, seed=2)
    numbers = learning.validate(lambda counts: torch.zeros(len(counts), 4), volumes, 3, (0, 1), "cpu")
    expected = volumes.truth.abs().mean(0).tolist()
    assert [numbers[f"mae_{name}"] for name in ("omega_m", "sigma_8", "n_s", "h")] == pytest.approx(expected)
    assert numbers["mae"] == pytest.approx(sum(expected) / 4)
    assert numbers["mae_judged"] == pytest.approx((expected[0] + expected[1]) / 2)


def test_readers_share_validation(tmp_path: Path) -> None:
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_validating, (str(tmp_path), answers), nprocs=2)
    both = [answers.get() for _ in range(2)]
    alone = learning.validate(lambda counts: counts[:, 0, 0, 0].float(), Amounts(8, seed=2), 3, (0, 1), "cpu")
    assert both == [pytest.approx(alone)] * 2


def _validating(rank: int, folder: str, answers: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    volumes = Amounts(9, seed=2)  # the odd one is left out
    volumes.truth = Amounts(8, seed=2).truth
    told = learning.validate(lambda counts: counts[:, 0, 0, 0].float(), volumes, 3, (rank, 2), "cpu")
    answers.put(told)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def test_inputs_have_mean_zero_and_scatter_one(tmp_path: Path) -> None:
    volumes = Amounts(64, seed=1)
    inputs = Standard(volumes, "cpu")(volumes.read(range(64)))
    assert inputs.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(inputs.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3, 4)), torch.ones(4), atol=1e-3, rtol=0)


def test_repeats_have_orders_and_weights_of_their_own(tmp_path: Path) -> None:
    first, second = (
        bench.Training(
            Point("cosmoflow", DEFAULTS | SMALL | {"mesh": 8}, repeat=repeat),
            Context(Place(0, 0, 1), "cpu", str(tmp_path)),
            Amounts(64, seed=1),
        )
        for repeat in (0, 1)
    )
    assert first.order == Order(64, 8, 0)
    assert first.order.indices(0) != second.order.indices(0)
    pairs = zip(first.parallel.weights(), second.parallel.weights(), strict=True)
    assert all(not torch.equal(one, other) for one, other in pairs)
    first.close()
    second.close()


@pytest.mark.parametrize(("augment", "sides"), [("none", 1), ("symmetry", 8)])
def test_who_has_learnt_from_all_sides_is_judged_by_the_mean_of_several(
    augment: str, sides: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trained(Amounts(64, seed=1), tmp_path, target_mae=0.0, epochs=1, augment=augment)
    counts = torch.randint(2000, (2, 8, 8, 8, 4), dtype=torch.int16)
    asked: list[Tensor] = []
    monkeypatch.setattr(training, "_predict", lambda model, view: asked.append(view) or view[:, :2, 0, 0, 0].float())
    judged = training._judge(counts)
    assert len(asked) == sides
    assert torch.equal(judged, torch.stack([view[:, :2, 0, 0, 0].float() for view in asked]).mean(0))
    for view in asked:
        assert torch.equal(view.flatten(1).sort(1).values, counts.flatten(1).sort(1).values), "the same voxels"
    assert len({view.numpy().tobytes() for view in asked}) == sides
