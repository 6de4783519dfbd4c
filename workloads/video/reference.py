"""What quality is measured against: uncached videos of some prompts, and what plain fewer steps would have given.

Made once for a model and a set of prompts, then read from disk.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saih.files import write_atomic
from workloads.video.checkpoint import Checkpoint
from workloads.video.kept import kept_path
from workloads.video.loop import Loop, Policy, Request, Result
from workloads.video.quality import Lpips, psnr_db, ssim

SHARES = (0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the steps: where the curve of fewer steps is measured."""


@dataclass(frozen=True)
class Videos:
    """The videos that a point makes: the same noise and prompts for every variant.

    Attributes:
        prompts: one a video.
        grid: latent frames, rows and columns.
        steps: denoise steps.
        guidance: scale of classifier-free guidance.
        seed: of the noise of the first video; the next ones follow.
        batch: videos of one request.
    """

    prompts: tuple[str, ...]
    grid: tuple[int, int, int]
    steps: int
    guidance: float
    seed: int = 0
    batch: int = 1

    def requests(self, checkpoint: Checkpoint, steps: int = 0) -> list[Request]:
        """Requests for all videos, in as many steps."""
        alone = [
            checkpoint.request(prompt, self.grid, steps or self.steps, self.guidance, self.seed + place)
            for place, prompt in enumerate(self.prompts)
        ]
        if self.batch == 1:
            return alone
        return [self._together(checkpoint, alone[at : at + self.batch]) for at in range(0, len(alone), self.batch)]

    def _together(self, checkpoint: Checkpoint, requests: Sequence[Request]) -> Request:
        conditions = {
            branch: checkpoint.adapter.join([request.conditions[branch] for request in requests])
            for branch in requests[0].branches
        }
        return replace(requests[0], noise=torch.cat([request.noise for request in requests]), conditions=conditions)


@dataclass(frozen=True)
class Quality:
    """psnr_db over all pixels of all videos, infinite where nothing differs; ssim as the mean over videos."""

    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Reference:
    """Uncached videos, and PSNR against them of the plain loop in fewer steps.

    Attributes:
        pixels: of each video, float32 [frames, channels, rows, columns].
        curve: (steps, dB) of the plain loop, steps rising.
    """

    pixels: tuple[Tensor, ...]
    curve: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, videos: Videos, identity: str, folder: Path) -> Reference:
        """From `folder`, or made and kept there. `identity` is what the weights are known by."""
        path = kept_path(folder, "video-reference", identity, astuple(videos)).with_suffix(".npz")
        if not path.exists():
            cls.make(checkpoint, videos).save(path)
        with np.load(path, allow_pickle=False) as file:
            pixels = tuple(torch.from_numpy(video) for video in file["pixels"])
            curve = tuple((int(steps), float(db)) for steps, db in file["curve"])
        return cls(pixels, curve)

    @classmethod
    def make(cls, checkpoint: Checkpoint, videos: Videos) -> Reference:
        """Run the plain loop in all of the steps, then in fewer."""
        loop = checkpoint.loop()
        pixels = tuple(pixels_of(checkpoint, run(loop, videos.requests(checkpoint))))
        plain = cls(pixels, ())
        curve = {}
        for steps in sorted({max(2, round(share * videos.steps)) for share in SHARES} - {videos.steps}):
            results = run(loop, videos.requests(checkpoint, steps))
            curve[steps] = plain.quality(checkpoint, results).psnr_db
        return cls(pixels, tuple(curve.items()))

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        arrays = {"pixels": torch.stack(self.pixels).numpy(), "curve": np.array(self.curve, dtype=np.float64)}
        write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def quality(self, checkpoint: Checkpoint, results: Sequence[Result]) -> Quality:
        """Of the results of all requests."""
        pixels = pixels_of(checkpoint, results)
        likeness = [ssim(video, plain) for video, plain in zip(pixels, self.pixels, strict=True)]
        return Quality(psnr_db(torch.stack(pixels), torch.stack(self.pixels)), sum(likeness) / len(likeness))

    def perceived(self, checkpoint: Checkpoint, results: Sequence[Result], weights: Path) -> float:
        """LPIPS of the results of all requests: mean over videos. `weights` as `Lpips` takes them."""
        network = Lpips(weights)
        pairs = zip(pixels_of(checkpoint, results), self.pixels, strict=True)
        return sum(network.distance(video, plain) for video, plain in pairs) / len(self.pixels)

    def plain_steps(self, db: float, steps: int) -> float:
        """In how many steps the plain loop is as close to the reference, at most `steps`."""
        return work_at(self.curve, db, steps)


def pixels_of(checkpoint: Checkpoint, results: Sequence[Result]) -> list[Tensor]:
    """Of each video of each result: float32 in [0, 1], [frames, channels, rows, columns]."""
    return [checkpoint.pixels(latents).cpu() for result in results for latents in result.latents.split(1)]


def work_at(curve: Sequence[tuple[float, float]], db: float, most: float) -> float:
    """The work that reaches that many decibels on a curve of (work, dB), work rising; at most `most`.

    Between two points of the curve, and beyond its ends, log(work) is linear in decibels.
    """
    points: list[tuple[float, float]] = []
    for work, reached in curve:  # where a noisy curve says that more work is worse, it is not believed
        if not points or reached > points[-1][1]:
            points.append((work, reached))
    place = min(max(bisect_left([reached for _, reached in points], db), 1), len(points) - 1)
    (less, low), (more, high) = points[place - 1], points[place]
    return float(min(most, less * (more / less) ** ((db - low) / (high - low)))) if math.isfinite(db) else most


def run(loop: Loop, requests: Sequence[Request], policy: Policy | None = None) -> list[Result]:
    """Requests one after the other."""
    return [loop.generate(request, policy) for request in requests]
