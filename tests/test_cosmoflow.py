"""CosmoFlow: the published constants, FLOP and memory against torch, and a check that catches wrong programs."""

from __future__ import annotations

import functools
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saih import workload
from saih.core import PHASES, Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import StepClock, Unclocked, run_steps
from tests.cosmoflow_ranks import peak_allocated
from workloads.cosmology.cosmoflow import bench, spec
from workloads.cosmology.cosmoflow.model import build, from_counts

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
    assert sum(each.numel() for each in build(network).parameters()) == 8_907_556


def test_the_smallest_network_has_thousands_of_parameters() -> None:
    tiny = spec.network(params(mesh=16, width=1, stages=4))
    assert tiny.parameters == sum(each.numel() for each in build(tiny).parameters()) == 10_925


def test_the_top_of_the_ladder_is_the_reported_range() -> None:
    top = spec.network(params(**rung("data", "512"), **rung("model", "w64")))
    assert top.forward_flop == pytest.approx(16.2e12, rel=0.01)


@pytest.mark.parametrize("data", [each.label for each in spec.AXES[0].rungs])
@pytest.mark.parametrize("model", [each.label for each in spec.AXES[1].rungs])
def test_parameters_and_flop_equal_torchs_own_count(data: str, model: str) -> None:
    """On meta tensors: the counter needs shapes alone, so the 16 TFLOP rung costs nothing."""
    chosen = params(**rung("data", data), **rung("model", model))
    with torch.device("meta"):
        network = build(spec.network(chosen))
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
    network = build(spec.network(params(mesh=16, width=4, depth=2))).eval()
    layers = [
        nn.Sequential(stage.convs[0], nn.LeakyReLU(0.3), stage.convs[1], nn.LeakyReLU(0.3), nn.MaxPool3d(2))  # type: ignore[index, union-attr]
        for stage in network.stages
    ]
    volumes = torch.randn(2, 4, 16, 16, 16)
    expected = 1.2 * torch.tanh(network.head(nn.Sequential(*layers)(volumes)))
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
    before = {name: value.clone() for name, value in training.parallel.network.state_dict().items()}
    check = training.check()
    assert check.passed, check.why
    assert check.numbers["loss_last"] < check.numbers["loss_first"]
    for name, value in training.parallel.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(each.grad is None for each in training.parallel.network.parameters())


def test_the_check_fails_when_the_loss_cannot_fall(training: bench.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_optimizer", lambda network: torch.optim.SGD(network.parameters(), lr=0.0))
    check = training.check()
    assert not check.passed
    assert "does not fall" in check.why


def test_the_check_fails_on_a_number_that_is_not_finite(training: bench.Training) -> None:
    weight = training.parallel.network.head[1].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    check = training.check()
    with torch.no_grad():
        weight.copy_(kept)
    assert not check.passed
    assert "not finite" in check.why


def test_steps_train_and_count_their_work(training: bench.Training) -> None:
    before = training.parallel.network.head[-1].weight.detach().clone()
    samples = run_steps(training, StepClock("cpu"), 2)
    assert not torch.equal(before, training.parallel.network.head[-1].weight)
    assert [work.units for work in samples.work] == [2, 2]
    assert samples.work[0].flop == training.cost.flop
    assert all(phases[0] > 0 and phases[2] > 0 and phases[3] == 0 for phases in samples.phase_s)


def test_a_checkpoint_has_what_is_in_memory_and_counts_as_one(tmp_path: Path) -> None:
    point = Point("cosmoflow", params(mesh=16, width=2, samples=4, save=True))
    saving = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
    assert saving.check().passed
    samples = run_steps(saving, StepClock("cpu"), 2)
    assert all(step[PHASES.index("checkpoint")] > 0 for step in samples.phase_s)
    assert saving.checkpoint is not None
    written = torch.load(saving.checkpoint.path, weights_only=True)
    for name, weight in saving.parallel.network.state_dict().items():
        assert torch.equal(written["network"][name], weight)
    moments = [each["momentum_buffer"] for each in written["optimizer"]["state"].values()]
    assert sum(moment.numel() for moment in moments) == spec.cost(point.params).parameters
    assert saving.checkpoint.path.stat().st_size == pytest.approx(8 * spec.cost(point.params).parameters, rel=0.2)
    with torch.no_grad():
        next(saving.parallel.network.parameters()).add_(1.0)
    assert not saving.checkpoint.is_what_is_in_memory()
    path = saving.checkpoint.path
    saving.close()
    assert not path.exists()


def test_memory_and_storage_give_the_same_steps(tmp_path: Path) -> None:
    """The same losses step by step, in every layout; another order of samples gives others."""

    def losses(**changes: Value) -> list[float]:
        point = Point("cosmoflow", params(mesh=16, width=4, samples=6, **changes))
        training = bench.setup(point, Context(Place(0, 0, 1), "cpu", str(tmp_path)))
        network = training.parallel.network.eval()
        told = [float(training._loss(network, *training._next(Unclocked()))) for _ in range(5)]
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


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "contiguous"},
        {"checkpoint": True, "depth": 2},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"family": "vit", "width": 64, "depth": 2, "checkpoint": True},
        {"family": "vit", "width": 64, "depth": 2, "precision": "bf16"},
    ],
)
def test_a_technique_gives_the_gradients_of_the_plain_step(changes: dict[str, Value], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ready = _alone(tmp_path, **changes)
    check = ready.check()
    assert check.passed, check.why
    assert "gradient_error" in check.numbers
    run_steps(ready, StepClock("cpu"), 1)


def test_the_check_catches_other_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = _alone(tmp_path, checkpoint=True)
    stage = ready.parallel.network.stages[1]
    monkeypatch.setattr(stage, "forward", lambda x: type(stage).forward(stage, x) * 1.01)
    check = ready.check()
    assert not check.passed
    assert "differ from those of the plain step" in check.why


def test_a_compiled_step_gives_the_gradients_of_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by torch.compile, run by torch's own kernels: Inductor's take a minute to build."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    check = _alone(tmp_path, mesh=8, width=2, stages=1, execution="compile").check()
    assert check.passed, check.why


@pytest.mark.parametrize(
    ("changes", "words"), [({"execution": "cuda-graph"}, "needs a GPU"), ({"precision": "tf32"}, "needs a GPU")]
)
def test_what_only_a_gpu_can_do_is_refused_elsewhere(changes: dict[str, Value], words: str, tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=words):
        _alone(tmp_path, **changes)


def test_the_slow_convolution_is_named(tmp_path: Path) -> None:
    """torch leaves oneDNN at batch 1 on one thread; the kernel's name is the evidence."""
    torch.set_num_threads(1)
    (note,) = _alone(tmp_path, batch=1).check().notes
    assert "slow_conv3d" in note
    assert _alone(tmp_path, batch=2).check().notes == ()


def _alone(folder: Path, **changes: Value) -> bench.Training:
    point = Point("cosmoflow", params(**{"mesh": 16, "width": 4, "samples": 4} | changes))
    return bench.setup(point, Context(Place(0, 0, 1), "cpu", str(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": 48}, "not a power of two"),
        ({"mesh": 16, "stages": 5}, "can be pooled 4 times"),
        ({"scaling": "strong", "batch": 3, "gpus": 2}, "cannot be shared by 2 ranks"),
        ({"labels": "shuffled"}, "set train=until-mae"),
        ({"family": "vit", "width": 100}, "a multiple of 64"),
        ({"family": "vit", "width": 64, "mesh": 16, "patch": 5}, "patches of 5"),
        ({"family": "vit", "width": 64, "backend": "spatial", "gpus": 2}, "shares out convolutions"),
        ({"mesh": 16, "backend": "spatial", "gpus": 8}, "cannot share the 4 planes"),
        ({"checkpoint": True, "execution": "cuda-graph"}, "without checkpoint"),
        ({"train": "until-mae", "precision": "fp16"}, "clips gradients, which fp16 has scaled"),
        ({"train": "until-mae", "backend": "fsdp", "gpus": 2}, "needs whole weights on every rank"),
        ({"precision": "fp16", "backend": "fsdp", "gpus": 2}, "does not scale fp16 gradients"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes: dict[str, Value], words: str) -> None:
    with pytest.raises(SaihError, match=words):
        spec.cost(params(**changes))


def test_strong_scaling_shares_the_batch_out() -> None:
    assert spec.cost(params(scaling="strong", batch=4, gpus=2)).work == 2
    assert spec.cost(params(scaling="weak", batch=4, gpus=2)).work == 4


def test_a_slab_is_an_equal_part_of_the_work() -> None:
    whole, slab = (spec.cost(params(gpus=4, backend=backend)) for backend in ("ddp", "spatial"))
    assert (slab.flop, slab.work) == (whole.flop / 4, whole.work / 4)
    assert slab.device_bytes < whole.device_bytes / 2


def test_patches_grow_where_tokens_would_be_too_many() -> None:
    tokens = [spec.network(params(family="vit", width=64, mesh=mesh)).tokens for mesh in (16, 64, 256, 512)]  # type: ignore[union-attr]
    assert tokens == [8, 512, 32768, 32768]


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": 32, "width": 16},
        {"mesh": 64, "width": 8},
        {"mesh": 32, "width": 16, "depth": 2},
        {"mesh": 64, "width": 8, "stages": 5, "checkpoint": True},
        {"mesh": 32, "width": 16, "precision": "bf16"},
        {"mesh": 64, "family": "vit", "width": 192, "depth": 4},
        {"mesh": 64, "family": "vit", "width": 192, "depth": 4, "checkpoint": True},
        {"mesh": 64, "family": "vit", "width": 192, "depth": 4, "precision": "bf16"},
    ],
)
def test_predicted_memory_is_what_a_step_allocates(changes: dict[str, Value], tmp_path: Path) -> None:
    """Against the allocations torch itself traces, within 15 %."""
    ready = _alone(tmp_path, **changes)
    run_steps(ready, StepClock("cpu"), 1)  # momentum buffers exist from here on
    standing = 8 * ready.cost.parameters  # weights and momentum, allocated before
    peak = peak_allocated(lambda: run_steps(ready, StepClock("cpu"), 1)) + standing
    assert ready.cost.device_bytes == pytest.approx(peak, rel=0.15)
