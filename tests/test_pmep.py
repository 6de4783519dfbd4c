"""Layers whose weights wait elsewhere: the same bits come out, memory is bounded, weights are never written back."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.llm import config, loader, prepack
from workloads.llm.attention import AttnMeta
from workloads.llm.energonai.overlap import copies_hide, offloaded_layers, predicted_step_s
from workloads.llm.energonai.pmep import Pmep
from workloads.llm.kv import EmulatedLink
from workloads.llm.model import Stage

LAYERS = 4
IDS = torch.arange(11) * 17 % 512


def made(dtype: torch.dtype = torch.float32, name: str = "gpt-tiny") -> Stage:
    stage = Stage(config.preset(name), dtype=dtype)
    loader.random_init(stage, 4)
    return stage


@torch.inference_mode()
def logits(stage: Stage) -> torch.Tensor:
    return stage(IDS, AttnMeta.packed([7, 4]))


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interval", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_same_bits_come_out(name: str, dtype: torch.dtype, interval: int, depth: int) -> None:
    stage = made(dtype, name)
    resident = logits(stage)
    pmep = Pmep(stage, interval, depth=depth)
    for _ in range(5):  # passes whose layers take turns in the buffers
        assert torch.equal(logits(stage), resident)
    pmep.close()
    assert torch.equal(logits(stage), resident)


def test_a_slow_link_is_waited_for() -> None:
    """Without the wait, a layer would compute with the weights of another."""
    stage = made()
    resident = logits(stage)
    pmep = Pmep(stage, 2, link=EmulatedLink(1e12, copy_s=0.02))
    began_s = time.perf_counter()
    for _ in range(3):
        assert torch.equal(logits(stage), resident)
    assert time.perf_counter() - began_s > 5 * 0.02, "six copies, all but the first one after the pass began"
    assert min(pmep.copies_s()) >= 0.02
    assert pmep.emulated
    pmep.close()


@pytest.mark.parametrize(("interval", "depth"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_memory_is_bounded_by_the_staging_buffers(interval: int, depth: int) -> None:
    stage = made()
    block = sum(parameter.nbytes for parameter in stage.layers["0"].parameters())
    pmep = Pmep(stage, interval, depth=depth)
    away = LAYERS // interval
    assert depth * block <= pmep.staging_bytes <= 1.02 * depth * block
    assert away * block <= pmep.stored_bytes <= 1.02 * away * block
    for _ in range(2):
        logits(stage)
    places = {
        parameter.data.untyped_storage().data_ptr(): parameter.data.untyped_storage().nbytes()
        for number in offloaded_layers(LAYERS, interval)
        for parameter in stage.layers[str(number)].parameters()
    }
    assert sum(places.values()) == pmep.staging_bytes, "offloaded layers have no memory but the buffers"
    pmep.close()


def test_weights_are_never_written_back() -> None:
    stage = made()
    resident = logits(stage)
    pmep = Pmep(stage, 2)
    before = [each.stored.clone() for each in pmep._weights]

    def scribble(module: torch.nn.Module, inputs: object, output: object) -> None:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))

    hook = stage.layers["1"].register_forward_hook(scribble, prepend=True)
    for _ in range(3):
        assert torch.equal(logits(stage), resident)
    hook.remove()
    assert all(torch.equal(each.stored, was) for each, was in zip(pmep._weights, before, strict=True))
    pmep.close()


@pytest.mark.parametrize("place", ["0", "1", "2", "3"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_pass_that_breaks_off_spoils_no_later_one(place: str, depth: int) -> None:
    stage = made()
    resident = logits(stage)
    pmep = Pmep(stage, 2, depth=depth)

    def fail(module: torch.nn.Module, inputs: object) -> None:
        raise RuntimeError("broken off")

    hook = stage.layers[place].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        logits(stage)
    hook.remove()
    for _ in range(3):
        assert torch.equal(logits(stage), resident)
    pmep.close()


@given(interval=st.integers(1, 6), groups=st.integers(2, 6), depth=st.integers(1, 3), copy_ms=st.integers(0, 40))
def test_the_predicted_time_follows_the_overlap_condition(interval: int, groups: int, depth: int, copy_ms: int) -> None:
    """Whole groups of k layers: the closed form of the steady state."""
    depth = min(depth, groups)
    found = predicted_step_s(interval * groups, interval, float(copy_ms), 4.0, depth)
    group = max(4.0 * interval, copy_ms + 4.0 if depth == 1 else float(copy_ms))
    assert found == pytest.approx(groups * group)
    if depth == 1:
        assert (found == pytest.approx(interval * groups * 4.0)) == copies_hide(interval, float(copy_ms), 4.0)


def test_layers_behind_the_last_offloaded_one_give_its_copy_more_time() -> None:
    assert list(offloaded_layers(7, 3)) == [2, 5]
    assert predicted_step_s(7, 3, 0.0, 1.0) == 7
    assert predicted_step_s(7, 3, 3.0, 1.0) == 8, "3 > 2 layers between; but 3 = 3 from the last round to the first"


def test_the_prediction_is_what_a_schedule_of_sleeps_takes() -> None:
    """Measured, with layers that sleep in place of compute; the link is slower than three layers."""
    stage, layer_s, copy_s = made(), 0.01, 0.05
    hooks = [each.register_forward_hook(lambda *words: time.sleep(layer_s)) for each in stage.layers.values()]
    times = {}
    for depth in (1, 2):
        pmep = Pmep(stage, 2, depth=depth, link=EmulatedLink(1e12, copy_s))
        for _ in range(2):
            logits(stage)
        began_s = time.perf_counter()
        for _ in range(3):
            logits(stage)
        times[depth] = (time.perf_counter() - began_s) / 3
        pmep.close()
        assert times[depth] >= 0.99 * predicted_step_s(LAYERS, 2, copy_s, layer_s, depth)
    for hook in hooks:
        hook.remove()


def test_what_cannot_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SaihError, match="interval=5 offloads no layer of 4; it must be from 1 to 4"):
        Pmep(made(), 5)
    with pytest.raises(SaihError, match="interval=0 offloads no layer"):
        Pmep(made(), 0)
    with pytest.raises(SaihError, match="at least one staging buffer"):
        Pmep(made(), 2, depth=0)
    with pytest.raises(SaihError, match=r"store 'disk'.*host.*peer:N"):
        Pmep(made(), 2, "disk")
    with pytest.raises(SaihError, match="a peer is another GPU, and the stage is on cpu"):
        Pmep(made(), 2, "peer:1")
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    prepacked = made()
    prepack.prepack(prepacked)
    with pytest.raises(SaihError, match="offload the stage or prepack it, not both"):
        Pmep(prepacked, 2)
    for count, message in (
        (1, "none: there is one GPU"),
        (2, "cannot access the memory of GPU 1"),
        (3, "peer:1, peer:2"),
    ):
        stage = made()
        stage.device = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: False)
        with pytest.raises(SaihError, match=message):
            Pmep(stage, 2, "peer:7" if count == 3 else "peer:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("depth", [1, 2])
def test_on_a_gpu_a_side_stream_fetches_from_pinned_memory(depth: int) -> None:
    stage = Stage(config.preset("gpt-mini"), device="cuda:0", attention="padded")
    loader.random_init(stage, 4)
    meta, ids = AttnMeta.packed([7, 4], device="cuda:0"), IDS.cuda()
    with torch.inference_mode():
        resident = stage(ids, meta)
        pmep = Pmep(stage, 2, depth=depth)
        assert not pmep.emulated
        for _ in range(5):
            assert torch.equal(stage(ids, meta), resident)
        assert all(seconds > 0 for seconds in pmep.copies_s())
        pmep.close()
        assert torch.equal(stage(ids, meta), resident)
