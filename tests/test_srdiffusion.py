"""SRDiffusion: who takes which step and what it costs, the switch on given signals, pairs that do not fit."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saih import workload
from saih.core import Check, Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.tiny_video import FAMILIES, STEPS, Tiny, wan, wan_model
from workloads.video import checkpoint, pair
from workloads.video.adapters import adapt
from workloads.video.caches import STEP, relative_change
from workloads.video.loop import Loop, Policy, Request, Step
from workloads.video.srdiffusion import bench, spec
from workloads.video.srdiffusion.policy import RENDER, SKETCH, EveryOther, SelfDifference, SketchRender, Switch
from workloads.video.toy import agree

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
SMALL: dict[str, Value] = {"denoise_steps": 10, "videos": 2, "rows": 8, "columns": 8, "frames": 4, "switch_step": 4}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def params(**changes: Value) -> dict[str, Value]:
    return DEFAULTS | changes


def two_models(steps: int = STEPS) -> tuple[Loop, Request]:
    tiny = wan()
    request = Request(tiny.request.noise, tiny.request.conditions, tiny.request.guidance, steps)
    return Loop([tiny.adapter, adapt(wan_model(seed=5, layers=2))], tiny.loop.scheduler), request


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_same_model_twice_is_that_model_bit_for_bit(family: str, order: tuple[int, int]) -> None:
    tiny: Tiny = FAMILIES[family]()
    twice = Loop([tiny.adapter, tiny.adapter], tiny.loop.scheduler)
    alone = tiny.loop.generate(tiny.request).latents
    for switch in range(STEPS + 1):
        assert torch.equal(twice.generate(tiny.request, SketchRender(Switch(switch), order)).latents, alone)


@pytest.mark.parametrize("switch", range(STEPS + 1))
def test_work_of_each_model_is_its_steps(switch: int) -> None:
    loop, request = two_models()
    result = loop.generate(request, SketchRender(Switch(switch)))
    assert result.forwards == (2.0 * switch, 2.0 * (STEPS - switch))
    assert result.actions == (SKETCH,) * switch + (RENDER,) * (STEPS - switch)
    assert loop.generate(request, SketchRender(Switch(switch), (1, 0))).forwards == result.forwards[::-1]


def test_the_small_model_starts_from_what_the_large_one_left() -> None:
    loop, request = two_models()
    sketch = bench.Sketch()
    loop.generate(request, sketch)
    resumed = Request(sketch.latents[2], request.conditions, request.guidance, request.steps)
    rendered = loop.generate(resumed, SketchRender(Switch(0)), start=2).latents
    assert torch.equal(rendered, loop.generate(request, SketchRender(Switch(2))).latents)


def switched_after(changes: list[float], **settings: float) -> int:
    """Steps taken before the switch, when predictions keep changing by d = these values."""
    switch = SelfDifference(**settings)  # type: ignore[arg-type]
    switch.reset()
    prediction = torch.ones(1, dtype=torch.float64)
    for change in changes:
        if switch.due:
            break
        switch.observe(prediction)
        prediction = prediction * (1 + math.atanh(change))
    return switch.taken


FALLING = [0.5, 0.4, 0.3, 0.2, 0.195, 0.19, 0.185, 0.18, 0.175]


def test_it_switches_once_the_change_falls_by_little() -> None:
    assert switched_after(FALLING, threshold=0.01, earliest=1, latest=30) == 6
    assert switched_after(FALLING, threshold=0.15, earliest=1, latest=30) == 3


def test_a_mean_over_two_falls_is_not_misled_by_a_change_that_falls_by_turns() -> None:
    by_turns = [0.5, 0.495, 0.4, 0.395, 0.3, 0.295, 0.29, 0.285]
    assert switched_after(by_turns, threshold=0.02, earliest=1, latest=30) == 3
    assert switched_after(by_turns, threshold=0.02, earliest=1, latest=30, falls=2) == 8, "0.05 but for the last"


def test_it_does_not_switch_before_the_earliest_or_after_the_latest_step() -> None:
    assert switched_after(FALLING, threshold=0.01, earliest=8, latest=30) == 8
    assert switched_after(FALLING, threshold=0.01, earliest=1, latest=5) == 5


def test_a_change_that_rises_or_stays_is_no_reason_to_switch() -> None:
    rising = [0.1 + 0.001 * step for step in range(20)]
    assert switched_after(rising, threshold=0.01, earliest=1, latest=15) == 15
    assert switched_after([0.0] * 20, threshold=0.01, earliest=1, latest=15) == 15


@given(
    st.lists(st.floats(0, 0.5), min_size=30, max_size=30),
    st.floats(0.001, 0.2),
    st.integers(1, 20),
    st.integers(0, 9),
    st.integers(1, 3),
)
def test_the_rule_is_its_formula(changes: list[float], threshold: float, earliest: int, more: int, falls: int) -> None:
    """Written out: after t steps the changes of steps 2 .. t are known, and the first and last of some are compared."""
    latest = earliest + more
    values = [1.0]
    for change in changes:
        values.append(values[-1] * (1 + math.atanh(change)))
    d = [math.tanh(abs(now - before) / before) for before, now in itertools.pairwise(values)]
    expected = next(
        taken
        for taken in range(latest + 1)
        if taken == latest
        or (taken >= max(2 + falls, earliest) and 0 < (d[taken - 2 - falls] - d[taken - 2]) / falls < threshold)
    )
    switch = SelfDifference(threshold, earliest, latest, falls)
    switch.reset()
    while not switch.due:
        switch.observe(torch.tensor([values[switch.taken]], dtype=torch.float64))
    assert switch.taken == expected


def test_steps_are_counted_and_compared_not_forwards() -> None:
    """Two branches a step: signals are of guided predictions a step apart, and the latest switch is in steps."""
    loop, request = two_models(steps=8)
    guided: list[Tensor] = []

    class Watch(Policy):
        def velocity(self, step: Step) -> Tensor:
            guided.append(super().velocity(step))
            return guided[-1]

    loop.generate(request, Watch())
    result = loop.generate(request, SketchRender(SelfDifference(threshold=0.0, earliest=1, latest=5)))
    assert result.forwards == (2.0 * 5, 2.0 * 3)
    expected = [math.tanh(relative_change(guided[step], guided[step - 1])) for step in range(1, 5)]
    assert math.isnan(result.signals[0])
    assert list(result.signals[1:5]) == expected


def test_a_second_request_begins_anew() -> None:
    loop, request = two_models(steps=8)
    policy = SketchRender(SelfDifference(0.05, 2, 6), render=EveryOther())
    first, second = (loop.generate(request, policy) for _ in range(2))
    assert first.actions == second.actions
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize(("switch", "actions"), [(0, "rrsrsrsr"), (3, "rrsrr"), (5, "rrr"), (7, "r"), (8, "")])
def test_the_cache_of_the_second_stage_starts_there_and_ends_full(switch: int, actions: str) -> None:
    loop, request = two_models(steps=8)
    result = loop.generate(request, SketchRender(Switch(switch), render=EveryOther()))
    words = {"r": RENDER, "s": STEP}
    assert result.actions[switch:] == tuple(words[letter] for letter in actions)
    assert result.forwards == (2.0 * switch, 2.0 * actions.count("r"))
    assert (result.cache_bytes > 0) == bool(actions)


def measured(folder: Path, **changes: Value) -> tuple[Check, bench.SharedDenoising]:
    ready = bench.setup(Point("srdiffusion", params(**SMALL | changes)), Context(Place(0, 0, 1), "cpu", str(folder)))
    return ready.check(), ready


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("srdiffusion")


@pytest.mark.parametrize("variant", spec.VARIANTS)
def test_work_and_gain_of_every_variant_are_the_formulas(variant: str, data: Path) -> None:
    check, ready = measured(data, variant=variant)
    assert check.passed, check.why
    numbers, share = check.numbers, spec.small_share(params(**SMALL))
    work = ready.step(Unclocked())
    assert numbers["small_share"] == pytest.approx(share)
    assert work.flop == pytest.approx(work.units * ready.forward_flop[0])
    if variant == "fewer-steps":
        assert abs(numbers["forwards"] - 2 * (4 + 6 * share)) <= 1
        return
    f = {"large": 1, "small": 0, "fixed-switch": 0.4, "reversed": 0.4}.get(variant, numbers["switch_step"] / 10)
    assert numbers["predicted_gain"] == pytest.approx(1 / (f + (1 - f) * share))
    if variant == "srdiffusion+cache":
        assert numbers["reused_steps"] > 0
        assert numbers["work_gain"] > numbers["predicted_gain"]
    else:
        assert numbers["work_gain"] == pytest.approx(numbers["predicted_gain"])
    if variant == "large":
        assert numbers["ssim"] == 1
    if variant == "fixed-switch":
        assert spec.cost(ready.params).flop == pytest.approx(work.flop)


def test_a_switch_is_judged_by_the_earliest_fixed_one_that_is_alike(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that always comes at the same step is a fixed one: the best of them has a gain of 1, a later one less, and an
    earlier one none at all."""
    fixed = {step: measured(data, variant="fixed-switch", switch_step=step)[0].numbers for step in range(1, 7)}
    likeness = {step: numbers["ssim"] for step, numbers in fixed.items()}
    assert likeness[1] < likeness[6]
    monkeypatch.setattr(spec, "LIKENESS", likeness[4])
    best = min(step for step in fixed if likeness[step] >= likeness[4])
    for step in (best - 1, best, 6):
        always, ready = measured(data, variant="srdiffusion", min_switch=step, max_switch=step)
        told = always.numbers
        assert dict(ready.switches) == pytest.approx(likeness)
        if step < best:
            assert "best_switch_gain" not in told
        else:
            assert told["best_switch"] == best
            assert told["best_switch_gain"] == pytest.approx(fixed[best]["forwards"] / fixed[step]["forwards"])


def test_without_guidance_there_is_one_branch_to_plan_for() -> None:
    both, alone = (spec.cost(params(**SMALL, guidance=guidance)) for guidance in (5.0, 1.0))
    assert both.flop == pytest.approx(2 * alone.flop)
    assert both.work == pytest.approx(2 * alone.work)


def test_videos_of_a_batch_are_the_same_work_each(data: Path) -> None:
    _, alone = measured(data, variant="fixed-switch")
    check, together = measured(data, variant="fixed-switch", batch=2)
    assert check.passed, check.why
    assert together.step(Unclocked()).units == pytest.approx(2 * alone.step(Unclocked()).units)
    exact, _ = measured(data, variant="large", batch=2)
    assert exact.passed, exact.why
    with pytest.raises(SaihError, match="2 videos are not a whole number of batches of 3"):
        spec.cost(params(**SMALL, batch=3))


def test_the_check_fails_when_the_parts_of_either_are_not_the_model(data: Path) -> None:
    _, ready = measured(data, variant="fixed-switch")
    ready.loop.models[1].blocks.reverse()
    assert "differ from the transformer's own forward" in ready.check().why


def test_random_weights_have_no_quality(tmp_path: Path) -> None:
    sizes = {"layers": 3, "width": 24, "small_layers": 1, "small_width": 12}
    check, _ = measured(tmp_path, model="random", frames=1, rows=4, columns=4, **sizes)
    assert check.passed, check.why
    assert not {"ssim", "psnr_db", "iso_gain", "best_switch_gain"} & check.numbers.keys()


def copy_of(name: str, folder: Path) -> Path:
    shutil.copytree(checkpoint.TOY / name, folder / name)
    return folder / name


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_pair_in_folders_is_used_as_it_is(tmp_path: Path, data: Path) -> None:
    large, small = copy_of("large", tmp_path), copy_of("small", tmp_path)
    sizes = {"layers": 8, "width": 96, "small_layers": 2, "small_width": 96}
    given, _ = measured(data, model=str(large), small=str(small), variant="fixed-switch", **sizes)
    shipped, _ = measured(data, variant="fixed-switch")
    assert given.numbers["psnr_db"] == shipped.numbers["psnr_db"]


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("transformer/config.json", {"in_channels": 16}, "in_channels=1 and 16"),
        ("transformer/config.json", {"text_dim": 48}, "text_dim=32 and 48"),
        ("transformer/config.json", {"_class_name": "CogVideoXTransformer3DModel"}, "_class_name="),
        ("scheduler/scheduler_config.json", {"shift": 5.0}, "shift=3.0 and 5.0"),
        ("vae/config.json", {"scaling_factor": 0.7}, "scaling_factor=None and 0.7"),
    ],
)
def test_a_pair_that_does_not_share_is_refused(tmp_path: Path, file: str, values: dict[str, object], told: str) -> None:
    large, small = copy_of("large", tmp_path), copy_of("small", tmp_path)
    pair.check(large, small)
    path = small / file
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}")
    change(path, **values)
    with pytest.raises(SaihError, match=f"do not share latents, text and schedule: {file} has {told}"):
        spec.cost(params(model=str(large), small=str(small)))


def test_other_words_are_refused(tmp_path: Path) -> None:
    large, small = copy_of("large", tmp_path), copy_of("small", tmp_path)
    words = checkpoint.load(small).words
    assert words is not None
    words.table_VD[0] += 1
    words.save(small)
    with pytest.raises(SaihError, match="their tables of words differ"):
        pair.check(large, small)


def test_pairs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    large = str(copy_of("large", tmp_path))
    with pytest.raises(SaihError, match="name the folder of the small model that goes with"):
        spec.cost(params(model=large))
    with pytest.raises(SaihError, match="random weights go with random weights only"):
        spec.cost(params(model=large, small="random"))
    with pytest.raises(SaihError, match="toy-small has 2 layers of width 96"):
        spec.cost(params(small_width=72))
    with pytest.raises(SaihError, match="min_switch 9 is more than max_switch 8"):
        spec.cost(params(min_switch=9, max_switch=8))


def test_the_pairs_of_the_paper_have_the_shares_of_work_that_they_are_known_for() -> None:
    model = {axis.name: axis for axis in spec.AXES}["model"]
    rungs = {rung.label: dict(rung.params) for rung in model.rungs}
    wan_480p = params(**rungs["wan"], frames=20, rows=60, columns=104)
    cogvideox = params(**rungs["cogvideox"], frames=13, rows=60, columns=90)
    assert spec.small_share(wan_480p) == pytest.approx(0.16, abs=0.01)
    assert spec.small_share(cogvideox) == pytest.approx(0.37, abs=0.02)


@torch.no_grad()
def test_some_blocks_of_a_model_are_those_blocks() -> None:
    large = checkpoint.load(checkpoint.TOY / "large").adapter
    latents, time, text = torch.randn(1, 1, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 32)
    state = large.embed(latents, time, {"encoder_hidden_states": text})
    for block in (7, 2):
        state = large.run(state, block, block + 1)
    assert torch.equal(agree.some_blocks(large.module, (7, 2))(latents, time, text)[0], large.head(state))
    assert torch.equal(
        agree.some_blocks(large.module, ())(latents, time, text)[0], large.module(latents, time, text)[0]
    )


def test_a_small_model_learns_to_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree, "GRID", (2, 8, 8))
    monkeypatch.setattr(agree, "STEPS", 4)
    monkeypatch.setattr(agree, "SWITCHES", (2,))
    monkeypatch.setattr(agree, "TOGETHER", 2)
    settings = ["--videos", "4", "--batch", "2", "--rounds", "2", "--steps", "8", "--rate", "1e-3"]
    words = [str(checkpoint.TOY / "large"), str(checkpoint.TOY / "small"), str(tmp_path / "small")]
    assert agree.main([*words, *settings]) == 0
    large, small = checkpoint.load(checkpoint.TOY / "large"), checkpoint.load(tmp_path / "small")
    assert large.words is not None
    begun = checkpoint.load(checkpoint.TOY / "small")
    lessons = agree.Lessons(large, small, large.words)
    lessons.add(2, 2, (2,))
    states = lessons.states[0]
    assert [each.shape for each in states] == [(4, 2, 1, 2, 8, 8), (4, 2), (4, 2, 1, 2, 8, 8), (4, 2, 1, 2, 8, 8)]
    errors = [float(lessons.loss(each.adapter.module, 64, torch.Generator().manual_seed(0))) for each in (begun, small)]
    assert errors[1] < errors[0], "it agrees better than the one that it began from"
    with pytest.raises(SaihError, match="blocks 0,9: the model has 0 to 7"):
        agree.main([words[0], words[0], words[2], "--blocks", "0,9"])
    twin = agree.Lessons(large, large, large.words)
    twin.add(2, 2, (4,))
    assert float(twin.loss(large.adapter.module, 4, torch.Generator())) < 1e-3, "a model agrees with itself"
