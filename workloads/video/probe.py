"""Does a video show what its prompt says? A small classifier of the toy's clips reads the words back.

It is to the toy what CLIP scores are to real models. Trained on the clips that the toys learn from, never on generated
videos: python -m workloads.video.probe CLIPS.npz FILE.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workloads.video.checkpoint import Checkpoint

FILE = Path(__file__).parent / "toy" / "weights" / "probe" / "probe.safetensors"
"""The shipped probe."""
FRAMES = 8
WIDTHS = (32, 48, 64)
READABLE = 0.75
"""Accuracy from which on an attribute counts: what real clips do not show cannot be asked of generated ones."""
HELD_OUT = 256
"""The last clips of a file are never trained on; accuracy is measured on them."""


class Network(nn.Module):
    """Convolutions over periodic frames, their epochs as channels; then the mean over space: logits of every word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, (inward, outward) in enumerate(zip((FRAMES, *WIDTHS), WIDTHS, strict=False)):
            convolution = nn.Conv2d(inward, outward, 3, stride=1 + (stage > 0), padding=1, padding_mode="circular")
            layers += [convolution, nn.BatchNorm2d(outward), nn.GELU()]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(2 * WIDTHS[-1] + 2 * FRAMES, 64)
        self.head = nn.Linear(64, words)

    def forward(self, pixels_NFHW: Tensor) -> Tensor:
        """Pixels in [0, 1] to logits [N, words]."""
        features = self.features(pixels_NFHW - 0.5)
        pooled = [features.mean((2, 3)), features.amax((2, 3)), pixels_NFHW.mean((2, 3)), pixels_NFHW.std((2, 3))]
        logits: Tensor = self.head(nn.functional.gelu(self.hidden(torch.cat(pooled, dim=1))))
        return logits


class Probe:
    """Reads the words of a video.

    Attributes:
        attributes: the words of each.
        accuracy: share of real clips, not trained on, whose word of each attribute is read rightly.
    """

    def __init__(self, network: Network, attributes: Sequence[Sequence[str]], accuracy: Sequence[float]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.attributes = tuple(tuple(words) for words in attributes)
        self.accuracy = tuple(accuracy)

    @classmethod
    def load(cls, path: Path = FILE) -> Probe:
        """The shipped one, or another."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["probe"])
            network = Network(sum(len(words) for words in told["attributes"]))
            network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
        return cls(network, told["attributes"], told["accuracy"])

    def save(self, path: Path) -> None:
        """In half precision, with what it can read and how well."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"attributes": self.attributes, "accuracy": self.accuracy})
        state = {key: value.half().contiguous() for key, value in self.network.state_dict().items()}
        save_file(state, path, metadata={"probe": told})

    @classmethod
    def of(cls, checkpoint: Checkpoint, grid: Sequence[int]) -> Probe | None:
        """The shipped one, where the videos of this checkpoint, of this grid, are what it was trained on."""
        if not checkpoint.trained or checkpoint.words is None:
            return None
        probe = cls.load()
        return probe if probe.reads(checkpoint.words.attributes, grid) else None

    def reads(self, attributes: Sequence[Sequence[str]], grid: Sequence[int]) -> bool:
        """Whether videos of this grid, with prompts of these words, are what it was trained on."""
        return tuple(map(tuple, attributes)) == self.attributes and tuple(grid) == (FRAMES, 24, 24)

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[tuple[str, ...]]:
        """The likeliest word of each attribute. pixels float32 in [0, 1]: [videos, FRAMES, 24, 24]."""
        groups = self.network(pixels).split([len(words) for words in self.attributes], dim=1)
        places = torch.stack([group.argmax(dim=1) for group in groups], dim=1).tolist()
        return [tuple(words[place] for words, place in zip(self.attributes, row, strict=True)) for row in places]

    @property
    def readable(self) -> tuple[int, ...]:
        """Places of the attributes that can be told from a clip at all."""
        return tuple(place for place, share in enumerate(self.accuracy) if share >= READABLE)

    def alignment(self, seen: Sequence[str], prompt: str) -> float:
        """Share of the prompt's readable words that are seen: 1 for a video that shows all of them."""
        wanted = prompt.split()
        return sum(seen[place] == wanted[place] for place in self.readable) / len(self.readable)


def train(pixels: Tensor, places: Tensor, attributes: Sequence[Sequence[str]], epochs: int, seed: int) -> Network:
    """AdamW on cross entropy, clips mirrored and shifted at random. pixels [N, F, H, W], places int64 [N, attributes].

    Shifts are by up to two pixels: what is planted lies in the middle.
    """
    torch.manual_seed(seed)
    network, batch = Network(sum(len(words) for words in attributes)), 64
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(pixels) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels))[: len(pixels) // batch * batch].split(batch):
            clips = pixels[chosen]
            for axis in (-1, -2):
                clips = clips.flip(axis) if torch.rand(()) < 0.5 else clips
            clips = clips.roll(torch.randint(-2, 3, (2,)).tolist(), (-1, -2))
            groups = network(clips).split([len(words) for words in attributes], dim=1)
            losses = [
                nn.functional.cross_entropy(group, place, label_smoothing=0.05)
                for group, place in zip(groups, places[chosen].unbind(1), strict=True)
            ]
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    return network


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on all clips but the last ones, print accuracy on those, and write the probe."""
    parser = argparse.ArgumentParser(prog="python -m workloads.video.probe", description=__doc__)
    parser.add_argument("clips", type=Path, help="an .npz of clips")
    parser.add_argument("file", type=Path, help="the probe to write")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the clips (40)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with np.load(options.clips, allow_pickle=False) as file:
        frames, prompts = file["frames"], [str(prompt).split() for prompt in file["prompts"]]
        attributes = [str(line).split() for line in file["attributes"]]
    pixels = torch.from_numpy(frames).float() / 255
    places = torch.tensor(
        [[words.index(word) for word, words in zip(prompt, attributes, strict=True)] for prompt in prompts]
    )
    probe = Probe(
        train(pixels[:-HELD_OUT], places[:-HELD_OUT], attributes, options.epochs, options.seed), attributes, ()
    )
    seen = probe.read(pixels[-HELD_OUT:])
    right = np.array(seen) == np.array(prompts[-HELD_OUT:])
    probe.accuracy = tuple(round(float(share), 3) for share in right.mean(axis=0))
    for words, share in zip(attributes, probe.accuracy, strict=True):
        print(f"{share:.3f} of held-out clips: {' '.join(words)}")
    print(f"alignment of real clips: {right[:, probe.readable].mean():.3f}, over words of accuracy {READABLE} or more")
    probe.save(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
