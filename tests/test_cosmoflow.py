"""CosmoFlow: the published constants, FLOP and memory against torch, and a check that catches wrong programs."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saih import workload
from saih.core import Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import StepClock, Unclocked, run_steps
from workloads.cosmology.cosmoflow import bench, spec
from workloads.cosmology.cosmoflow.model import CosmoFlow, from_counts
from workloads.cosmology.cosmoflow.parallel import Alone

BASE = {"mesh": 128, "width": 32}
DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}


def params(**changes: Value) -> dict[str, Value]:
    return DEFAULTS | changes


def rung(axis: str, label: str) -> dict[str, Value]:
    (ladder,) = (each for each in spec.AXES if each.name == axis)
    return dict(ladder.pick([label]).rungs[0].params)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> bench.Training:
    torch.set_num_threads(1)
    point = Point("cosmoflow", params(mesh=16, width=4, samples=4), seed=3)
    return bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path_factory.mktemp("data"))))


def test_the_base_rung_is_the_published_network() -> None:
    base = params(**rung("data", "128"), **rung("model", "w32"))
    network = spec.network(base)
    assert network.parameters == 8_907_556
    assert network.forward_flop == pytest.approx(68.86e9, rel=1e-4)
    assert network.training_flop == pytest.approx(192.1e9, rel=1e-3)
    assert spec.sample_bytes(base) == 16_777_216
    assert sum(each.numel() for each in CosmoFlow(network).parameters()) == 8_907_556


def test_the_top_of_the_ladder_is_the_reported_range() -> None:
    top = spec.network(params(**rung("data", "512"), **rung("model", "w64")))
    assert top.forward_flop == pytest.approx(16.2e12, rel=0.01)


@pytest.mark.parametrize("data", [each.label for each in spec.AXES[0].rungs])
@pytest.mark.parametrize("model", [each.label for each in spec.AXES[1].rungs])
def test_parameters_and_flop_equal_torchs_own_count(data: str, model: str) -> None:
    """On meta tensors: the counter needs shapes alone, so the 16 TFLOP rung costs nothing."""
    chosen = params(**rung("data", data), **rung("model", model))
    with torch.device("meta"):
        network = CosmoFlow(spec.network(chosen))
        volumes = torch.empty(spec.batch_per_rank(chosen), 4, *[int(chosen["mesh"])] * 3)
        with FlopCounterMode(display=False) as counter:
            network(volumes).sum().backward()
    cost = spec.cost(chosen)
    assert counter.get_total_flops() == cost.flop
    assert sum(each.numel() for each in network.parameters()) == cost.parameters
    assert sum(operation.flop for operation in cost.operations) == pytest.approx(
        cost.flop + 4 * cost.parameters, rel=0.01
    )


def test_pooling_before_the_activation_is_the_same_function() -> None:
    """The order in the MLPerf HPC code is convolution, activation, pooling."""
    torch.manual_seed(0)
    network = CosmoFlow(spec.network(params(mesh=16, width=4))).eval()
    reference = nn.Sequential(
        *(nn.Sequential(stage.conv, nn.LeakyReLU(0.3), nn.MaxPool3d(2)) for stage in network.stages)  # type: ignore[union-attr]
    )
    volumes = torch.randn(2, 4, 16, 16, 16)
    expected = 1.2 * network.head(reference(volumes))
    torch.testing.assert_close(network(volumes), expected, rtol=0, atol=0)
    gradient, other = (
        torch.autograd.grad(output.sum(), list(network.parameters())) for output in (network(volumes), expected)
    )
    for mine, theirs in zip(gradient, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_counts_become_log_density_in_channels_last_memory() -> None:
    counts = torch.randint(0, 300, (2, 8, 8, 8, 4), dtype=torch.int16)
    volumes = from_counts(counts, 64)
    assert volumes.shape == (2, 4, 8, 8, 8)
    assert volumes.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(volumes[1, 2, 3, 4, 5], torch.log1p(counts[1, 3, 4, 5, 2].float() / 64))


def test_the_check_passes_and_leaves_no_trace(training: bench.Training) -> None:
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    check = training.check()
    assert check.passed, check.why
    assert check.numbers["loss_last"] < check.numbers["loss_first"]
    for name, value in training.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(each.grad is None for each in training.network.parameters())


def test_the_check_fails_when_the_loss_cannot_fall(training: bench.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_optimizer", lambda network: torch.optim.SGD(network.parameters(), lr=0.0))
    check = training.check()
    assert not check.passed
    assert "does not fall" in check.why


def test_the_check_fails_on_a_number_that_is_not_finite(training: bench.Training) -> None:
    weight = training.network.head[1].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    check = training.check()
    with torch.no_grad():
        weight.copy_(kept)
    assert not check.passed
    assert "not finite" in check.why


def test_steps_train_and_count_their_work(training: bench.Training) -> None:
    before = training.network.head[-2].weight.detach().clone()
    samples = run_steps(training, StepClock("cpu"), 2)
    assert not torch.equal(before, training.network.head[-2].weight)
    assert [work.units for work in samples.work] == [2, 2]
    assert samples.work[0].flop == training.cost.flop
    assert all(phases[0] > 0 and phases[2] > 0 and phases[3] == 0 for phases in samples.phase_s)


def test_memory_and_storage_give_the_same_steps(tmp_path: Path) -> None:
    """The same losses step by step, in every layout; another order of samples gives others."""

    def losses(**changes: Value) -> list[float]:
        point = Point("cosmoflow", params(mesh=16, width=4, samples=6, **changes))
        training = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
        training.network.eval()
        told = [float(training._loss(training.network, *training._next(Unclocked()))) for _ in range(5)]
        training.close()
        return told

    expected = losses(input="memory")
    assert len(set(expected)) == 5
    assert losses(input="storage") == losses(storage="npy") == losses(storage="hdf5-gzip", readers=1) == expected
    augmented = losses(augment="symmetry")
    assert losses(augment="symmetry", input="memory") == augmented != expected


def test_it_trains_on_files_of_mlperf(tmp_path: Path) -> None:
    for subset in ("train", "validation"):
        (tmp_path / subset).mkdir()
        with h5py.File(tmp_path / subset / "univ.hdf5", "w") as file:
            file["full"] = np.random.default_rng(0).integers(0, 9, (32, 32, 32, 4)).astype("<i2")
            file["unitPar"] = np.array([0.5, -0.5, 0.1, 0.0])
    chosen = params(
        mesh=16, width=4, samples=8, dataset=str(tmp_path), train="until-mae", epochs=1, validation=4, target_mae=0.0
    )
    assert spec.cost(chosen).disk_bytes == 0
    training = bench.setup(Point("cosmoflow", chosen), Context(Place(0, 0, 1), "cpu", str(tmp_path / "unused")))
    assert training.check().numbers["mae"] > 0
    training.close()
    with pytest.raises(SaihError, match="holds 8 volumes of 16\\^3, fewer than samples=9"):
        bench.setup(Point("cosmoflow", chosen | {"samples": 9}), Context(Place(0, 0, 1), "cpu", ""))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_give_the_gradients_of_one_on_the_joined_batch(precision: str, tmp_path: Path) -> None:
    errors = _on_two_ranks(precision, tmp_path, _honest)
    assert errors == pytest.approx([errors[0]] * 2)
    assert errors[0] < bench.TOLERANCE[precision]


def test_the_gradient_check_catches_ranks_that_do_not_reduce(tmp_path: Path) -> None:
    assert min(_on_two_ranks("fp32", tmp_path, _without_reduction)) > 0.01


def _honest(training: bench.Training) -> float:
    check = training.check()
    assert check.passed, check.why
    return check.numbers["gradient_error"]


def _without_reduction(training: bench.Training) -> float:
    training.parallel = Alone(training.network)
    training.network.eval()
    return training._gradient_error()


def _on_two_ranks(precision: str, folder: Path, judge: object) -> list[float]:
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (precision, str(folder), judge, answers), nprocs=2)
    return [answers.get() for _ in range(2)]


def _rank(rank: int, precision: str, folder: str, judge: object, answers: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    point = Point("cosmoflow", params(mesh=16, width=4, samples=4, gpus=2, precision=precision))
    answers.put(judge(bench.setup(point, Context(Place(rank, rank, 2), "cpu", folder))))  # type: ignore[operator, attr-defined]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": 48}, "not a power of two"),
        ({"mesh": 16, "stages": 5}, "can be pooled 4 times"),
        ({"scaling": "strong", "batch": 3, "gpus": 2}, "cannot be shared by 2 ranks"),
        ({"labels": "shuffled"}, "set train=until-mae"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes: dict[str, Value], words: str) -> None:
    with pytest.raises(SaihError, match=words):
        spec.cost(params(**changes))


def test_strong_scaling_shares_the_batch_out() -> None:
    assert spec.cost(params(scaling="strong", batch=4, gpus=2)).work == 2
    assert spec.cost(params(scaling="weak", batch=4, gpus=2)).work == 4


@pytest.mark.parametrize("changes", [{"mesh": 32, "width": 16}, {"mesh": 64, "width": 8}])
def test_predicted_memory_is_what_a_step_allocates(changes: dict[str, Value], tmp_path: Path) -> None:
    """Against the allocations torch itself traces, within a third: enough to prune by."""
    chosen = params(**changes, samples=2)
    training = bench.setup(Point("cosmoflow", chosen), Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    run_steps(training, StepClock("cpu"), 1)  # momentum buffers exist from here on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_steps(training, StepClock("cpu"), 1)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    standing = 8 * training.cost.parameters  # weights and momentum, allocated before
    assert peak + standing == pytest.approx(training.cost.device_bytes, rel=0.33)
