"""Quality against known answers, the reference on disk, the toy's words, and training that learns."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.cosmology import clips
from workloads.video import checkpoint
from workloads.video.quality import Lpips, psnr_db, ssim
from workloads.video.reference import Reference, Videos, run
from workloads.video.toy import train
from workloads.video.words import WordEmbeddings


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def test_psnr_of_a_known_error() -> None:
    video = torch.zeros(2, 1, 4, 4)
    assert psnr_db(video + 0.1, video) == pytest.approx(20)
    assert psnr_db(video, video) == math.inf


def test_ssim_is_one_for_equals_and_falls_with_noise_and_with_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(3, 1, 24, 24, generator=generator)
    noise = torch.randn(video.shape, generator=generator)
    assert ssim(video, video) == pytest.approx(1)
    assert 1 > ssim(video + 0.02 * noise, video) > ssim(video + 0.2 * noise, video) > 0
    assert ssim(0.5 * video, video) < 0.9
    assert ssim(video, video + 0.1 * noise) == pytest.approx(ssim(video + 0.1 * noise, video))


def test_ssim_of_constants_is_its_luminance_term() -> None:
    """Without variance (2 x y + C1) / (x^2 + y^2 + C1) is left, of Wang et al. 2004, equation 6."""
    one, other = torch.full((1, 1, 16, 16), 0.4), torch.full((1, 1, 16, 16), 0.8)
    assert ssim(one, other) == pytest.approx((2 * 0.32 + 1e-4) / (0.16 + 0.64 + 1e-4), rel=1e-6)


def test_ssim_takes_frames_smaller_than_its_window() -> None:
    video = torch.rand(1, 1, 4, 6)
    assert ssim(video, video) == pytest.approx(1)


CURVE = Reference((), ((10, 30.0), (20, 36.0), (40, 42.0)))


def test_plain_steps_are_read_off_the_curve() -> None:
    assert [CURVE.plain_steps(db, 50) for db in (30.0, 36.0, 42.0)] == pytest.approx([10, 20, 40])
    assert CURVE.plain_steps(33.0, 50) == pytest.approx(math.sqrt(200))
    assert CURVE.plain_steps(24.0, 50) == pytest.approx(5)
    assert CURVE.plain_steps(60.0, 50) == CURVE.plain_steps(math.inf, 50) == 50


def test_where_the_curve_falls_it_is_not_believed() -> None:
    noisy = Reference((), ((10, 30.0), (20, 36.0), (30, 35.0), (40, 42.0)))
    assert 10 < noisy.plain_steps(35.5, 50) < 20
    assert noisy.plain_steps(39.0, 50) == pytest.approx(math.sqrt(800))


@given(st.floats(10, 70), st.floats(10, 70))
def test_better_quality_is_never_worth_fewer_steps(one: float, other: float) -> None:
    noisy = Reference((), ((10, 30.0), (20, 36.0), (30, 35.0), (40, 42.0)))
    low, high = sorted((one, other))
    assert noisy.plain_steps(low, 50) <= noisy.plain_steps(high, 50) + 1e-9


def test_a_reference_is_made_once_and_is_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = checkpoint.load(checkpoint.TOY / "small")
    assert toy.words is not None
    videos = Videos((toy.words.prompt(0), toy.words.prompt(1)), (4, 8, 8), 6, 3.0)
    first = Reference.of(toy, videos, "small", tmp_path)
    monkeypatch.setattr(Reference, "make", lambda *given: pytest.fail("made again"))
    second = Reference.of(toy, videos, "small", tmp_path)
    assert first.curve == second.curve
    assert [steps for steps, _ in first.curve] == [2, 3, 4, 5]
    assert first.curve[-1][1] > first.curve[0][1]
    quality = second.quality(toy, run(toy.loop(), videos.requests(toy)))
    assert (quality.psnr_db, quality.ssim) == (math.inf, pytest.approx(1))


def test_words_survive_a_file_and_unknown_ones_are_named(tmp_path: Path) -> None:
    words = WordEmbeddings.draw([("small", "large"), ("red", "blue")], dim=4)
    words.save(tmp_path)
    again = WordEmbeddings.load(tmp_path)
    assert again.attributes == words.attributes
    assert torch.equal(again.encode(["large red"]), words.encode(["large red"]))
    assert not torch.equal(words.encode(["large red"]), words.encode(["small red"]))
    assert not words.encode([""]).any()
    with pytest.raises(SaihError, match=r"unknown word of a prompt 'green'.*red"):
        words.encode(["large green"])
    with pytest.raises(SaihError, match="has 2 words, or none"):
        words.encode(["large"])
    assert {words.prompt(seed) for seed in range(40)} == {"small red", "small blue", "large red", "large blue"}


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"no transformer/config\.json"):
        checkpoint.load(tmp_path)
    described = tmp_path / "transformer" / "config.json"
    described.parent.mkdir()
    described.write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(SaihError, match="no adapter for FluxTransformer2DModel"):
        checkpoint.load(tmp_path)
    described.write_text('{"_class_name": "WanTransformer3DModel"}')
    for setting in ('"boundary_ratio": 0.875', '"expand_timesteps": true'):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "WanPipeline", {setting}}}')
        for load in (checkpoint.load, checkpoint.transformer):
            with pytest.raises(SaihError, match=f"{setting[1:12]}.* is of Wan 2.2, .*; Wan 2.1 is adapted"):
                load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": null, "expand_timesteps": false}')
    with pytest.raises(SaihError, match=r"neither a text_encoder nor words\.safetensors"):
        checkpoint.load(tmp_path)


def test_latents_of_a_wan_are_decoded_as_its_pipeline_does() -> None:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    from tests.tiny_video import wan, wan_model

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    ).eval()
    tiny = wan()
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=wan_model())
    pipe.set_progress_bar_config(disable=True)
    conditions = {branch: condition["encoder_hidden_states"] for branch, condition in tiny.request.conditions.items()}
    frames = pipe(
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=tiny.request.steps,
        guidance_scale=tiny.request.guidance,
        latents=tiny.request.noise,
        prompt_embeds=conditions["cond"],
        negative_prompt_embeds=conditions["uncond"],
        output_type="pt",
        return_dict=False,
    )[0]
    ours = checkpoint.Checkpoint(tiny.adapter, tiny.loop.scheduler, "cpu", pipeline=pipe)
    assert torch.equal(ours.pixels(tiny.loop.generate(tiny.request).latents), frames[0])


def test_clips_are_reproducible_grow_and_show_what_was_planted(tmp_path: Path) -> None:
    made = [clips.make_clip(0, index) for index in range(24)]
    assert np.array_equal(made[3].frames, clips.make_clip(0, 3).frames)
    assert made[3].prompt == clips.make_clip(0, 3).prompt
    middle = slice(clips.MESH // 2 - 2, clips.MESH // 2 + 3)
    halos = [clip.frames[-1, middle, middle].mean() for clip in made if clip.prompt.endswith(" halo")]
    voids = [clip.frames[-1, middle, middle].mean() for clip in made if clip.prompt.endswith(" void")]
    assert min(halos) > max(voids)
    assert all(clip.frames[-1].std() > clip.frames[0].std() for clip in made)
    for clip in made:
        assert all(word in words for word, words in zip(clip.prompt.split(), clips.ATTRIBUTES.values(), strict=True))


def test_training_learns_and_its_checkpoint_loads(tmp_path: Path) -> None:
    assert clips.main([str(tmp_path / "clips.npz"), "--clips", "8"]) == 0
    data = train.Clips.load(tmp_path / "clips.npz")
    torch.manual_seed(0)
    model = train.make_model("small")
    losses = list(train.train(model, data, steps=12, batch=4, learning_rate=2e-3, seed=0))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    train.save(model, data.words, tmp_path / "toy")
    loaded = checkpoint.load(tmp_path / "toy")
    assert loaded.words is not None
    request = loaded.request(loaded.words.prompt(0), (8, 24, 24), 2, 3.0, seed=0)
    assert torch.isfinite(loaded.loop().generate(request).latents).all()


class FakeLpips(torch.nn.Module):
    """What the package promises: pixels in [-1, 1], three channels, one distance a frame."""

    def __init__(self, net: str, pretrained: bool, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert (net, pretrained, pnet_rand) == ("alex", False, True), "nothing may be fetched"
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.shape[1] == other.shape[1] == 3
        assert one.min() >= -1
        return self.scale * (one - other).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_is_measured_with_local_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "lpips.pth"
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "lpips", None)
        with pytest.raises(SaihError, match="needs the lpips package"):
            Lpips(weights)
    package = types.ModuleType("lpips")
    package.LPIPS = FakeLpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(SaihError, match=r"lpips.pth holds no state dict of lpips.LPIPS\(net='alex'\)"):
        Lpips(weights)
    torch.save({"scale": torch.tensor([2.0])}, weights)
    found, black = Lpips(weights), torch.zeros(2, 1, 64, 64)
    assert found.distance(black, black) == 0
    assert found.distance(black + 0.25, black) == pytest.approx(2 * 2 * 0.25)
    with pytest.raises(SaihError, match="frames of 24 x 64 pixels; it needs 64 at least"):
        found.distance(black[..., :24, :], black[..., :24, :])
    torch.save({"other": torch.zeros(1)}, weights)
    with pytest.raises(SaihError, match="holds no state dict"):
        Lpips(weights)
