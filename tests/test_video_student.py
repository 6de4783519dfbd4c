"""The 4-step student of the toy, and the probe that reads words back: what they are trained on, and what is shipped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workloads.video import checkpoint, options
from workloads.video.probe import FRAMES, Network, Probe
from workloads.video.quality import psnr_db
from workloads.video.toy import distill
from workloads.video.toy.distill import Trajectories
from workloads.video.words import WordEmbeddings


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


class Decay(nn.Module):
    """Guided velocity x: the exact solution is x(sigma) = x(1) exp(sigma - 1)."""

    def forward(self, latents: Tensor, time: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        conditional = bool(text.abs().sum())
        return (latents / distill.GUIDANCE if conditional else latents * 0,)


def test_trajectories_follow_the_guided_teacher() -> None:
    words = WordEmbeddings.draw([["a", "b"], ["c", "d"]], 4)
    drawn = Trajectories.draw(Decay(), words, steps=4, count=2, batch=2, seed=0)
    assert drawn.sigmas.tolist() == pytest.approx([1, 0.9138, 0.7591, 0.4, 0], abs=1e-4)
    for place, sigma in enumerate(drawn.sigmas):
        exact = drawn.latents[:, 0] * torch.exp(sigma - 1)
        assert torch.allclose(drawn.latents[:, place], exact, atol=2e-3)


def test_a_piece_is_one_euler_step_of_the_student() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0])
    drawn = Trajectories(torch.randn(5, 4, 1, 2, 2, 2, generator=generator), torch.zeros(5, 2, 4), sigmas)
    start, sigma, _, velocity = drawn.batch(64, generator)
    following = {round(float(high), 4): float(low) for high, low in itertools.pairwise(sigmas)}
    fall = torch.tensor([float(each) - following[round(float(each), 4)] for each in sigma]).view(-1, 1, 1, 1, 1)
    ends = drawn.latents.flatten(0, 1)
    for end in start - fall * velocity:
        assert (ends - end).abs().flatten(1).amax(1).min() < 1e-5


def test_the_shipped_student_is_closer_to_its_teacher_than_the_teacher_is_in_as_many_steps() -> None:
    teacher, student = (checkpoint.load(options.folder(name)) for name in ("toy", "toy-4step"))
    assert teacher.words is not None
    guided = [teacher.request(teacher.words.prompt(77), distill.GRID, steps, 5.0, 77) for steps in (30, 4)]
    alone = student.request(teacher.words.prompt(77), distill.GRID, 4, 1.0, 77)
    assert alone.branches == ("cond",), "guidance is in its weights"
    full, short = (teacher.pixels(teacher.loop().generate(request).latents) for request in guided)
    assert psnr_db(student.pixels(student.loop().generate(alone).latents), full) > psnr_db(short, full) + 2


def test_the_probe_reads_clips_that_it_has_never_seen() -> None:
    pytest.importorskip("colossus")
    from workloads.cosmology.clips import make_clip

    probe = Probe.load()
    clips = [make_clip(seed=4321, index=index) for index in range(24)]
    pixels = torch.stack([torch.from_numpy(clip.frames).float() / 255 for clip in clips])
    seen = probe.read(pixels)
    alignment = sum(probe.alignment(*each) for each in zip(seen, (clip.prompt for clip in clips), strict=True)) / 24
    assert alignment > 0.8
    assert [probe.attributes[place][0] for place in probe.readable] == ["near", "thin", "young", "plain"]


def test_alignment_counts_readable_words_only() -> None:
    probe = Probe(Network(6), [["a", "b"], ["c", "d"], ["e", "f"]], [0.9, 0.5, 0.8])
    assert probe.readable == (0, 2)
    assert probe.alignment(("a", "c", "e"), "a d e") == 1.0
    assert probe.alignment(("a", "c", "e"), "a c f") == 0.5


def test_a_probe_is_kept_with_what_it_can_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    probe = Probe(Network(5), [["a", "b"], ["c", "d", "e"]], [0.9, 0.5])
    probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert (loaded.attributes, loaded.accuracy) == ((("a", "b"), ("c", "d", "e")), (0.9, 0.5))
    pixels = torch.rand(3, FRAMES, 24, 24)
    assert loaded.read(pixels) == probe.read(pixels)
    assert loaded.reads([["a", "b"], ["c", "d", "e"]], (FRAMES, 24, 24))
    assert not loaded.reads([["a", "b"], ["c", "d", "x"]], (FRAMES, 24, 24))
    assert not loaded.reads([["a", "b"], ["c", "d", "e"]], (FRAMES, 16, 16))
