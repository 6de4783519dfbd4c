"""Distil a toy into a student of few steps without guidance: python -m workloads.video.toy.distill FOLDER

Piecewise rectified flow (Yan et al. 2024, arXiv:2405.07510), at the ends of the pieces only: a step of the student is
the mean velocity of the guided teacher over that step, so the student's Euler steps are the teacher's trajectory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workloads.video.checkpoint import TOY, Checkpoint, load
from workloads.video.quality import psnr_db
from workloads.video.reference import Videos, run
from workloads.video.toy.train import SHIFT, fit, save
from workloads.video.words import WordEmbeddings

GRID = (8, 24, 24)
SHIFT_TERMINAL = 0.4
"""Noise before the student's last step. In the teacher's own schedule the last of four steps is next to nothing."""
GUIDANCE = 5.0
SUBSTEPS = 6
"""Of the teacher, for each step of the student."""
PROMPT_SEED = 2_000_000
TEACHER_STEPS = 50


def schedule() -> Any:
    """The student's scheduler: the teacher's, stretched to end at `SHIFT_TERMINAL`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, shift_terminal=SHIFT_TERMINAL)


@dataclass(frozen=True)
class Trajectories:
    """Of the guided teacher.

    Attributes:
        latents: before each step of the student and after the last: float32 [count, steps + 1, 1, F, H, W].
        text: float32 [count, words, dim].
        sigmas: noise at those places: float32 [steps + 1].
    """

    latents: Tensor
    text: Tensor
    sigmas: Tensor

    @classmethod
    @torch.no_grad()
    def draw(
        cls, teacher: nn.Module, words: WordEmbeddings, steps: int, count: int, batch: int, seed: int
    ) -> Trajectories:
        """Random prompts and noise, integrated by the second-order Adams-Bashforth rule."""
        scheduler = schedule()
        scheduler.set_timesteps(steps)
        sigmas, generator = scheduler.sigmas.float(), torch.Generator().manual_seed(seed)
        texts, latents = [], []
        for first in range(0, count, batch):
            text = words.encode([words.prompt(seed + first + place) for place in range(batch)])
            noise = torch.randn(batch, 1, *GRID, generator=generator)
            texts.append(text)
            latents.append(torch.stack(list(_integrate(teacher, noise, text, sigmas)), dim=1))
            print(f"teacher: {first + batch} trajectories", flush=True)
        return cls(torch.cat(latents), torch.cat(texts), sigmas)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random pieces: latents at the start, noise there, text, and the mean velocity over the piece."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        piece = torch.randint(len(self.sigmas) - 1, (size,), generator=generator)
        start, end = self.latents[chosen, piece], self.latents[chosen, piece + 1]
        fall = (self.sigmas[piece] - self.sigmas[piece + 1]).view(-1, 1, 1, 1, 1)
        return start, self.sigmas[piece], self.text[chosen], (start - end) / fall


def _integrate(teacher: nn.Module, latents: Tensor, text: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """The latents at each of `sigmas`."""
    yield latents
    before, last_fall = None, 1.0
    for high, low in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        fall = (high - low) / SUBSTEPS
        for place in range(SUBSTEPS):
            time = torch.full((len(latents),), 1000 * (high - place * fall))
            cond = teacher(latents, time, text, return_dict=False)[0]
            uncond = teacher(latents, time, torch.zeros_like(text), return_dict=False)[0]
            velocity = uncond + GUIDANCE * (cond - uncond)
            slope = 0 if before is None else (velocity - before) / (2 * last_fall)
            latents = latents - fall * (velocity + fall * slope)
            before, last_fall = velocity, fall
        yield latents


def train(model: nn.Module, pieces: Trajectories, steps: int, batch: int, rate: float, seed: int) -> Iterator[float]:
    """Regress mean velocities; yields the loss of each step."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        latents, sigma, text, wanted = pieces.batch(batch, generator)
        return nn.functional.mse_loss(model(latents, sigma * 1000, text, return_dict=False)[0], wanted)

    yield from fit(model, loss, steps, rate)


def likeness_db(teacher: Checkpoint, student: Checkpoint, steps: int, prompts: Sequence[str]) -> dict[str, float]:
    """PSNR against the teacher in full, on noise that no trajectory had."""
    guided, alone = (Videos(tuple(prompts), GRID, steps, guidance, PROMPT_SEED) for guidance in (GUIDANCE, 1.0))

    def pixels(checkpoint: Checkpoint, asked: Videos, count: int) -> Tensor:
        results = run(checkpoint.loop(), asked.requests(checkpoint, count))
        return torch.stack([checkpoint.pixels(result.latents) for result in results])

    full = pixels(teacher, guided, TEACHER_STEPS)
    return {
        f"student in {steps} steps": psnr_db(pixels(student, alone, steps), full),
        f"teacher in {steps} steps": psnr_db(pixels(teacher, guided, steps), full),
        f"teacher in {4 * steps} steps": psnr_db(pixels(teacher, guided, 4 * steps), full),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw trajectories, train, write the checkpoint, and say how close it is to its teacher."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    teacher, student = load(options.teacher), load(options.start or options.teacher)
    if teacher.words is None:
        raise SystemExit(f"{options.teacher} is no toy: it has no table of words")
    start_s, losses = time.perf_counter(), []
    drawn = Trajectories.draw(
        teacher.adapter.module, teacher.words, options.steps, options.trajectories, 16, options.seed
    )
    model = student.adapter.module.requires_grad_(True)
    training = train(model, drawn, options.updates, options.batch, options.rate, options.seed)
    for update, loss in enumerate(training, 1):
        losses.append(loss)
        if update % 50 == 0:
            spent_s = time.perf_counter() - start_s
            print(f"update {update}: loss {np.mean(losses[-50:]):.4f}, {spent_s:.0f} s", flush=True)
    save(model, teacher.words, options.folder, schedule())
    prompts = [teacher.words.prompt(PROMPT_SEED + place) for place in range(16)]
    for what, db in likeness_db(teacher, load(options.folder), options.steps, prompts).items():
        print(f"{what}: {db:.1f} dB against the teacher in {TEACHER_STEPS} steps")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.video.toy.distill", description=__doc__)
    parser.add_argument("folder", type=Path, help="the checkpoint to write")
    parser.add_argument("--teacher", type=Path, default=TOY / "large", help="a toy (the shipped large one)")
    parser.add_argument("--start", type=Path, help="a student to go on from, rather than from the teacher")
    parser.add_argument("--steps", type=int, default=4, help="of the student (4)")
    parser.add_argument("--trajectories", type=int, default=640, help="of the teacher (640), half a second each")
    parser.add_argument("--updates", type=int, default=1000, help="training steps (1000), half a second each")
    parser.add_argument("--batch", type=int, default=16, help="pieces of a training step (16)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (0.001)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, prompts and batches (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
