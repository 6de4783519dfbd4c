"""One step is one request: what the benches of all systems of this family share, from loading to quality.

A bench is a subclass that sets a policy, and says what its videos are worth and what of them it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from saih.core import Check, Clock, Context, Params, Point, Work
from saih.errors import SaihError
from workloads.video import checkpoint as checkpoints
from workloads.video import options
from workloads.video.adapters import Adapter
from workloads.video.checkpoint import Checkpoint
from workloads.video.kept import digest, kept_path, made_once
from workloads.video.loop import COND, Loop, Policy, Result, Step
from workloads.video.probe import Probe
from workloads.video.reference import Reference, Videos, pixels_of, run
from workloads.video.shapes import DiT

CALIBRATION_SEED = 1_000_000
"""Noise and prompts that knobs are set on; quality is measured on others."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Denoising:
    """Models and a policy, ready to make videos.

    Args:
        shapes: of the loop's models, the first one being the one that quality is measured against.
        others: the loop's further models, each with what its weights are known by.

    Attributes:
        baseline: the variant that must give the reference's own bits.
        checkpoint: of the first model.
        reference: None for random weights, where quality means nothing.
        probe: None for videos that it cannot read.
        requests: what is made, by turns.
    """

    baseline = ""

    def __init__(
        self,
        point: Point,
        context: Context,
        loaded: tuple[Checkpoint, str],
        shapes: Sequence[DiT],
        others: Sequence[tuple[Adapter, str]] = (),
    ) -> None:
        self.params = point.params
        self.checkpoint, identity = loaded
        self.videos = videos(self.checkpoint, self.params, point.seed)
        self.folder = Path(context.data_folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        trained = self.checkpoint.trained
        self.reference = Reference.of(self.checkpoint, self.videos, identity, self.folder) if trained else None
        self.probe = Probe.of(self.checkpoint, self.videos.grid)
        models = [self.checkpoint.adapter, *(adapter for adapter, _ in others)]
        self.loop = Loop(models, self.checkpoint.scheduler, context.device)
        self.requests = self.videos.requests(self.checkpoint)
        self.policy = Policy()
        self.forward_flop = [shape.forward_flop(self.videos.grid) for shape in shapes]
        self.made = 0
        self.numbers: dict[str, float] = {}
        known_by = identity, *(told for _, told in others), context.device, torch.get_num_threads()
        self.kept = kept_path(
            self.folder, "video-checked", *known_by, astuple(self.videos), sorted(self.params.items())
        )

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        request = self.requests[self.made % len(self.requests)]
        self.made += 1
        forwards = self.forwards(self.loop.generate(request, self.policy))
        made = len(request.noise)
        return Work(made * self.units(forwards), made * forwards * self.forward_flop[0])

    def check(self) -> Check:
        """Parts of the models are the models, bit for bit; two runs are equal; quality and work are noted.

        The numbers of all videos are counted once and then read from disk: a repeat makes the first request only.
        """
        known = made_once(self.kept, self._make_all)
        again = self.loop.generate(self.requests[0], self.policy).latents
        self.numbers = known["numbers"]
        exact = self.params["variant"] != self.baseline or self.numbers.get("ssim", 1.0) == 1.0
        wrong = {
            "embedding, blocks and head differ from the transformer's own forward": not self._parts_are_the_models(),
            "two runs of one request differ": digest(again) != known["digest"],
            "latents are not finite": not known["finite"],
            "the uncached run differs from the reference": not exact,
        }
        return Check(not any(wrong.values()), self.numbers, "; ".join(why for why, is_so in wrong.items() if is_so))

    def close(self) -> None:
        """Nothing is held outside this object."""

    def forwards(self, result: Result) -> float:
        """Work of each video of a request in forwards of the first model."""
        done = zip(result.forwards, self.forward_flop, strict=True)
        return sum(forwards * flop for forwards, flop in done) / self.forward_flop[0]

    def units(self, forwards: float) -> float:
        """What a video of that much work is worth, in the workload's unit."""
        return forwards

    def counted(self, results: Sequence[Result]) -> dict[str, float]:
        """Work, and what a system wants noted of it; means over videos."""
        forwards = sum(map(self.forwards, results)) / len(results)
        plain = self.videos.steps * len(self.requests[0].branches)
        return {"forwards": forwards, "work_gain": plain / forwards}

    def quality(self, results: Sequence[Result]) -> dict[str, float]:
        """Against the uncached videos, and the forwards that plain fewer steps need for that; empty without them."""
        if self.reference is None:
            return {}
        quality = self.reference.quality(self.checkpoint, results)
        forwards = sum(map(self.forwards, results)) / len(results)
        worth = len(self.requests[0].branches) * self.reference.plain_steps(quality.psnr_db, self.videos.steps)
        if self.params["variant"] == "fewer-steps":
            worth = forwards  # by definition; the interpolated curve may be a little off
        numbers = {"ssim": quality.ssim, "iso_forwards": worth, "iso_gain": worth / forwards}
        if self.probe is not None:
            seen = self.probe.read(torch.cat([video.transpose(0, 1) for video in pixels_of(self.checkpoint, results)]))
            pairs = zip(seen, self.videos.prompts, strict=True)
            numbers["alignment"] = sum(self.probe.alignment(*pair) for pair in pairs) / len(seen)
        if self.params["lpips"]:
            weights = Path(str(self.params["lpips"]))
            numbers["lpips"] = self.reference.perceived(self.checkpoint, results, weights)
        return numbers | ({"psnr_db": quality.psnr_db} if quality.psnr_db < float("inf") else {})

    def _make_all(self) -> dict[str, Any]:
        """Numbers over all requests, whether their latents are finite, and the digest of the first one's."""
        results = run(self.loop, self.requests, self.policy)
        finite = all(bool(torch.isfinite(result.latents).all()) for result in results)
        numbers = self.counted(results) | self.quality(results)
        return {"numbers": numbers, "finite": finite, "digest": digest(results[0].latents)}

    @torch.no_grad()
    def _parts_are_the_models(self) -> bool:
        """One forward of the conditional branch in parts, and by each transformer itself.

        Each in a context of its own, for a cache of diffusers would take the second for a step after the first.
        """
        request, first = self.requests[0], self.loop.models[0]
        timesteps = first.set_timesteps(self.loop.scheduler, request.steps, self.loop.device)
        for adapter in self.loop.models:
            step = Step(0, timesteps[0], request.noise, request, [adapter])
            with adapter.module.cache_context("parts"):
                parts = step.predict((COND,))[COND]
            with adapter.module.cache_context("whole"):
                whole = adapter.module(
                    request.noise.to(adapter.dtype),
                    timestep=timesteps[0].expand(len(request.noise)),
                    **request.conditions[COND],
                    return_dict=False,
                )[0]
            if not torch.equal(parts, whole):
                return False
        return True


def load(model: str, layers: int, width: int, params: Params, device: str) -> tuple[Checkpoint, str]:
    """A model by name, and what its weights are known by. layers and width are of random weights."""
    dtype = DTYPES[str(params["precision"])]
    if model == "random":
        family = str(params.get("family", "wan"))
        made = checkpoints.random(family, layers, width, device, dtype)
        return made, f"random {family} {layers} x {width} {dtype}"
    folder = options.folder(model)
    return checkpoints.load(folder, device, dtype), f"{checkpoints.identity(folder)} {dtype}"


def load_transformer(model: str, layers: int, width: int, params: Params, device: str) -> tuple[Adapter, str]:
    """The same without what encodes and decodes: for a model that works on another one's videos."""
    if model == "random":
        checkpoint, identity = load(model, layers, width, params, device)
        return checkpoint.adapter, identity
    dtype, folder = DTYPES[str(params["precision"])], options.folder(model)
    return checkpoints.transformer(folder, device, dtype), f"{checkpoints.identity(folder)} {dtype}"


def videos(checkpoint: Checkpoint, params: Params, seed: int, skip: int = 0) -> Videos:
    """The videos of a point, of prompts and noise from this seed on; the first `skip` prompts of a file left out."""
    steps, guidance = int(params["denoise_steps"]), float(params["guidance"])
    batch = int(params.get("batch", 1))
    return Videos(prompts(checkpoint, params, seed, skip), options.grid(params), steps, guidance, seed, batch)


def calibration(checkpoint: Checkpoint, params: Mapping[str, float | str], count: int = 1) -> Videos:
    """Videos that knobs are set on: of a file, the prompts after those that quality is measured on."""
    return videos(checkpoint, {**params, "videos": count}, CALIBRATION_SEED, skip=int(params["videos"]))


def prompts(checkpoint: Checkpoint, params: Params, seed: int, skip: int = 0) -> tuple[str, ...]:
    """As many as `videos`: drawn from a toy's words, or of the file, from the first again after the last.

    The first `skip` of a file are left out. Raises SaihError where there is no source.
    """
    wanted = int(params["videos"])
    if params["prompts"]:
        given = prompts_of(Path(str(params["prompts"])))
        return tuple(given[place % len(given)] for place in range(skip, skip + wanted))
    if checkpoint.words is not None:
        return tuple(checkpoint.words.prompt(seed + place) for place in range(wanted))
    if checkpoint.trained:
        raise SaihError("prompts: name a text file of prompts for a checkpoint with a text encoder")
    return ("random",) * int(params.get("batch", 1))


def prompts_of(path: Path) -> list[str]:
    """Of a text file, one a line. Raises SaihError for a file without any."""
    given = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not given:
        raise SaihError(f"prompts: {path} holds none")
    return given
