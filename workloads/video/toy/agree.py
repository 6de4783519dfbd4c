"""Make a small toy agree with a large one: python -m workloads.video.toy.agree LARGE START FOLDER

The small model goes on from START, or from some blocks of it, and learns the large one's predictions along guided
denoising, both branches and their guided sum: what two models must agree on to share one video. Part of the videos is
denoised by the small model itself from some step on, so that it learns where its own errors lead (DAgger, Ross et al.
2011).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saih.errors import SaihError
from workloads.video.adapters import adapt
from workloads.video.checkpoint import Checkpoint, load
from workloads.video.loop import COND, UNCOND, Policy, Request, Step
from workloads.video.toy.train import fit, save
from workloads.video.words import WordEmbeddings

STEPS, GUIDANCE, GRID = 50, 5.0, (8, 24, 24)
TOGETHER = 16
"""Videos denoised together."""
FIRST_SEED = 10_000_000
"""Of prompts and noise: far from those that quality is measured on."""
SWITCHES = (10, STEPS, 14, 18, 10, STEPS, 12, 24)
"""Steps after which the small model leads, by turns."""
FIRST_SWITCH, WEIGHT_AFTER = 10, 3.0
"""Steps that a small model may have to take weigh more than those before."""


class Taught(Policy):
    """Asks the large model (0) about every step, and from step `switch` on goes where the small one (1) leads.

    Attributes:
        seen: for each step the latents, the timestep, and the large model's predictions, in half precision.
    """

    def __init__(self, switch: int) -> None:
        self.switch = switch
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def velocity(self, step: Step) -> Tensor:
        told = step.predict()
        times = step.timestep.expand(len(step.latents))
        self.seen.append((step.latents.half(), times, told[COND].half(), told[UNCOND].half()))
        return step.guide(told if step.index < self.switch else step.predict(model=1))


class Lessons:
    """States of denoising and what the large model predicts there; grows with every round.

    Attributes:
        weights: chance of each step to be learnt from: how far it moves the latents, more after FIRST_SWITCH.
    """

    def __init__(self, large: Checkpoint, small: Checkpoint, words: WordEmbeddings, seed: int = FIRST_SEED) -> None:
        self.loop, self.words, self.seed = large.loop(small), words, seed
        self.text: list[Tensor] = []
        self.states: list[tuple[Tensor, ...]] = []
        timesteps = large.adapter.set_timesteps(large.scheduler, STEPS, "cpu")
        self.weights = -torch.diff(timesteps, append=torch.zeros(1))
        self.weights[FIRST_SWITCH:] *= WEIGHT_AFTER

    def add(self, videos: int, batch: int, switches: Sequence[int]) -> None:
        """Denoise more videos; the small model takes over at one of `switches`, in turn."""
        for turn in range(videos // batch):
            seeds = range(self.seed, self.seed + batch)
            self.seed += batch
            text = self.words.encode([self.words.prompt(seed) for seed in seeds])
            noise = torch.randn(batch, 1, *GRID, generator=torch.Generator().manual_seed(seeds[0]))
            branches = {COND: text, UNCOND: torch.zeros_like(text)}
            conditions = {branch: {"encoder_hidden_states": value} for branch, value in branches.items()}
            policy = Taught(switches[turn % len(switches)])
            self.loop.generate(Request(noise, conditions, GUIDANCE, STEPS), policy)
            self.text.append(text)
            self.states.append(tuple(torch.stack(each) for each in zip(*policy.seen, strict=True)))

    def loss(self, model: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        """Squared errors of both branches and of their guided sum, at `batch` random states."""
        group = int(torch.randint(len(self.states), (), generator=generator))
        latents, times, cond, uncond = self.states[group]
        step = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        video = torch.randint(latents.shape[1], (batch,), generator=generator)
        text = self.text[group][video]
        rows, both_times = latents[step, video].float().repeat(2, 1, 1, 1, 1), times[step, video].repeat(2)
        predicted: Tensor = model(rows, both_times, torch.cat([text, torch.zeros_like(text)]), return_dict=False)[0]
        error = predicted - torch.cat([cond[step, video], uncond[step, video]]).float()
        of_cond, of_uncond = error.chunk(2)
        guided = of_uncond + GUIDANCE * (of_cond - of_uncond)
        return guided.square().mean() + error.square().mean()


def main(arguments: Sequence[str] | None = None) -> int:
    """Learn in rounds; the small model's checkpoint is written after each."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    large, small = load(options.large), load(options.start)
    if small.words is None:
        raise SaihError(f"{options.start} is no toy: it has no table of words")
    model, generator = some_blocks(small.adapter.module, options.blocks), torch.Generator().manual_seed(0)
    learner = replace(small, adapter=adapt(model))
    lessons, start_s = Lessons(large, learner, small.words, options.seed), time.perf_counter()
    losses: list[float] = []
    for _ in range(options.rounds):
        lessons.add(options.videos // options.rounds, TOGETHER, SWITCHES)
        model.requires_grad_(True)
        steps = options.steps // options.rounds
        for loss in fit(model, lambda: lessons.loss(model, options.batch, generator), steps, options.rate):
            losses.append(loss)
            if len(losses) % 100 == 0:
                taken_s = time.perf_counter() - start_s
                print(f"step {len(losses)}: loss {np.mean(losses[-100:]):.4f}, {taken_s:.0f} s", flush=True)
        model.requires_grad_(False)
        save(copy.deepcopy(model), small.words, options.folder)
    return 0


def some_blocks(model: Any, blocks: Sequence[int]) -> Any:
    """A Wan of only these blocks, in this order, and all else the same; of all blocks where none are named."""
    depth = len(model.blocks)
    if any(block not in range(depth) for block in blocks):
        raise SaihError(f"blocks {','.join(map(str, blocks))}: the model has 0 to {depth - 1}")
    chosen = list(blocks) or list(range(depth))
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    made = type(model).from_config({**settings, "num_layers": len(chosen)}).eval()
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    made.load_state_dict(rest, strict=False)
    for mine, block in zip(made.blocks, chosen, strict=True):
        mine.load_state_dict(model.blocks[block].state_dict())
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.video.toy.agree", description=__doc__)
    parser.add_argument("large", type=Path, help="checkpoint of the large model")
    parser.add_argument("start", type=Path, help="checkpoint of the small model to go on from, or LARGE again")
    parser.add_argument("folder", type=Path, help="the checkpoint to write")
    parser.add_argument(
        "--blocks",
        type=lambda text: [int(block) for block in text.split(",")],
        default=[],
        help="go on from these blocks of START only, such as 0,7 (all)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of denoising and learning (3)")
    parser.add_argument("--videos", type=int, default=96, help="videos to learn from, all rounds together (96)")
    parser.add_argument("--steps", type=int, default=3600, help="training steps, all rounds together (3600)")
    parser.add_argument("--batch", type=int, default=8, help="states of a step (8)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate (0.0015)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help=f"of the first prompt and noise ({FIRST_SEED})")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
