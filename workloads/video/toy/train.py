"""Train a toy video model on clips: python -m workloads.video.toy.train CLIPS.npz FOLDER --size large

The clips come from `python -m workloads.cosmology.clips CLIPS.npz`. The folder is a checkpoint in the layout of
diffusers, with a table of words in place of a text encoder and no VAE: the latents are the pixels.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workloads.video.checkpoint import PIXEL_SCALE, load
from workloads.video.words import WordEmbeddings

TEXT_DIM = 32
SIZES: dict[str, dict[str, int]] = {
    "large": {"num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 384},
    "small": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 384},
}
PATCH = (2, 4, 4)
SHIFT = 3.0
"""Of the schedule: sigma = SHIFT u / (1 + (SHIFT - 1) u) for u from 1 to 0, as Wan samples at 480p."""
DROPPED = 0.1
"""Share of prompts left empty, for classifier-free guidance."""
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Clips:
    """Training data: latents float32 [clips, 1, F, H, W] and text float32 [clips, words, TEXT_DIM]."""

    latents: Tensor
    text: Tensor
    words: WordEmbeddings

    @classmethod
    def load(cls, path: Path) -> Clips:
        with np.load(path, allow_pickle=False) as file:
            frames, prompts, attributes = file["frames"], file["prompts"], file["attributes"]
        words = WordEmbeddings.draw([str(line).split() for line in attributes], TEXT_DIM)
        pixels = torch.from_numpy(frames).float().div_(127.5).sub_(1)
        return cls(pixels.mul_(PIXEL_SCALE).unsqueeze(1), words.encode([str(prompt) for prompt in prompts]), words)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random clips, mirrored at random, some without their prompt."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        latents, text = self.latents[chosen], self.text[chosen].clone()
        for axis in (-1, -2):
            if torch.rand((), generator=generator) < 0.5:
                latents = latents.flip(axis)
        text[torch.rand(size, generator=generator) < DROPPED] = 0
        return latents, text


def make_model(size: str) -> nn.Module:
    """A Wan transformer of that size, untrained."""
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel(
        patch_size=PATCH,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT_DIM,
        freq_dim=64,
        rope_max_seq_len=32,
        **SIZES[size],
    )
    return model


def train(model: nn.Module, clips: Clips, steps: int, batch: int, learning_rate: float, seed: int) -> Iterator[float]:
    """Flow matching (Lipman et al. 2023): predict noise - clip at a random place between; yields each step's loss."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        clean, text = clips.batch(batch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        u = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        velocity = model(mixed, sigma * 1000, text, return_dict=False)[0]
        return nn.functional.mse_loss(velocity, noise - clean)

    yield from fit(model, loss, steps, learning_rate)


def fit(model: nn.Module, loss_of_batch: Callable[[], Tensor], steps: int, learning_rate: float) -> Iterator[float]:
    """AdamW on one batch after the other; yields the loss of each step.

    At the end the model holds the moving average of its weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        yield loss.item()
    model.load_state_dict(average.module.state_dict())


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def save(model: Any, words: WordEmbeddings, folder: Path, scheduler: Any = None) -> None:
    """Write a checkpoint in half precision: the layout of diffusers, and the table of words."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder / "transformer")
    (scheduler or FlowMatchEulerDiscreteScheduler(shift=SHIFT)).save_pretrained(folder / "scheduler")
    words.save(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one size and write its checkpoint."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    clips, model = Clips.load(options.clips), make_model(options.size)
    if options.start:
        model.load_state_dict(load(options.start).adapter.module.state_dict())
        model.requires_grad_(True)
    print(f"{options.size}: {sum(each.numel() for each in model.parameters()):,} parameters", flush=True)
    start_s, losses = time.perf_counter(), []
    for step, loss in enumerate(train(model, clips, options.steps, options.batch, options.rate, options.seed), 1):
        losses.append(loss)
        if step % 50 == 0:
            print(f"step {step}: loss {np.mean(losses[-50:]):.4f}, {time.perf_counter() - start_s:.0f} s", flush=True)
    save(model, clips.words, options.folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.video.toy.train", description=__doc__)
    parser.add_argument("clips", type=Path, help="an .npz of clips")
    parser.add_argument("folder", type=Path, help="the checkpoint to write")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    parser.add_argument("--batch", type=int, default=16, help="clips of a step (16)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (0.002)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--start", type=Path, help="a checkpoint of this size to go on from")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and batches (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
