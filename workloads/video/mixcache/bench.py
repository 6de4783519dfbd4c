"""One step is one video: denoise with the variant's policy, count its work, and know what its quality is worth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from saih.core import Check, Clock, Context, Params, Point, Work
from saih.errors import SaihError
from workloads.video import checkpoint as checkpoints
from workloads.video.caches import ACTIONS, FULL
from workloads.video.checkpoint import Checkpoint
from workloads.video.loop import COND, Result, Step
from workloads.video.mixcache import spec, variants
from workloads.video.reference import Reference, Videos, run, source_digest

CALIBRATION_SEED = 1_000_000
"""Noise and prompts that knobs are set on; quality is measured on others."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def setup(point: Point, context: Context) -> Denoising:
    """Load the model, make the uncached reference where it is not on disk yet, and find the variant's knob."""
    return Denoising(point, context)


class Denoising:
    """A model and a policy, ready to make videos."""

    def __init__(self, point: Point, context: Context) -> None:
        self.params = point.params
        self.checkpoint, identity = load(point.params, context.device)
        self.videos = Videos(
            prompts(self.checkpoint, self.params, point.seed),
            spec.grid(self.params),
            int(self.params["denoise_steps"]),
            float(self.params["guidance"]),
            point.seed,
        )
        folder = Path(context.data_folder)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.checkpoint.trained
        self.reference = Reference.of(self.checkpoint, self.videos, identity, folder) if trained else None
        self.loop = self.checkpoint.loop()
        self.requests = self.videos.requests(self.checkpoint, variants.plain_steps(self.params))
        calibration = Videos(
            prompts(self.checkpoint, {**self.params, "videos": 1}, CALIBRATION_SEED),
            self.videos.grid,
            self.videos.steps,
            self.videos.guidance,
            CALIBRATION_SEED,
        )
        told = [
            source_digest(),
            identity,
            sorted((key, value) for key, value in self.params.items() if key in KNOB_DEPENDS_ON),
        ]
        kept = folder / f"mixcache-knob-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
        self.policy = variants.policy(self.params, self.loop, calibration.requests(self.checkpoint)[0], kept)
        self.flop_per_forward = spec.shape(self.params).forward_flop(self.videos.grid)
        self.worth: float | None = None
        self.made = 0

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        result = self.loop.generate(self.requests[self.made % len(self.requests)], self.policy)
        self.made += 1
        (forwards,) = result.forwards
        return Work(forwards if self.worth is None else self.worth, forwards * self.flop_per_forward)

    def check(self) -> Check:
        """Parts of the model are the model, bit for bit; two runs are equal; quality, work and reuse are noted."""
        results = run(self.loop, self.requests, self.policy)
        again = self.loop.generate(self.requests[0], self.policy)
        numbers = self._counted(results) | self._quality(results)
        whole, alike = self._parts_are_the_model(), torch.equal(again.latents, results[0].latents)
        finite = all(bool(torch.isfinite(result.latents).all()) for result in results)
        exact = self.params["variant"] != "none" or numbers.get("ssim", 1.0) == 1.0
        why = "" if whole else "embedding, blocks and head differ from the transformer's own forward; "
        why += "" if alike else "two runs of one request differ; "
        why += "" if finite else "latents are not finite; "
        why += "" if exact else "the uncached run differs from the reference; "
        return Check(whole and alike and finite and exact, numbers, why.removesuffix("; "))

    def close(self) -> None:
        variants.close(self.policy)

    def _counted(self, results: list[Result]) -> dict[str, float]:
        """Means over videos: work, steps by what was done in them, memory of the cache."""
        count = len(results)
        forwards = sum(result.forwards[0] for result in results) / count
        reused = sum(len(result.actions) - result.counts[FULL] for result in results) / count
        plain = self.videos.steps * len(self.requests[0].branches)
        numbers = {"forwards": forwards, "work_gain": plain / forwards, "reused_steps": reused}
        if self.params["variant"] in spec.OURS:
            numbers |= {f"{kind}_steps": sum(result.counts[kind] for result in results) / count for kind in ACTIONS}
        if self.params["variant"] not in spec.DIFFUSERS:
            numbers["cache_bytes"] = float(max(result.cache_bytes for result in results))
        return numbers

    def _quality(self, results: list[Result]) -> dict[str, float]:
        """Against the uncached videos; nothing for random weights, where it means nothing."""
        if self.reference is None:
            return {}
        quality = self.reference.quality(self.checkpoint, results)
        branches = len(self.requests[0].branches)
        forwards = sum(result.forwards[0] for result in results) / len(results)
        self.worth = branches * self.reference.plain_steps(quality.psnr_db, self.videos.steps)
        if self.params["variant"] == "fewer-steps":
            self.worth = forwards  # by definition; the interpolated curve may be a little off
        numbers = {"ssim": quality.ssim, "iso_forwards": self.worth, "iso_gain": self.worth / forwards}
        return numbers | ({"psnr_db": quality.psnr_db} if quality.psnr_db < float("inf") else {})

    @torch.no_grad()
    def _parts_are_the_model(self) -> bool:
        """One forward of the conditional branch in parts, and by the transformer itself.

        Each in a context of its own, for a cache of diffusers would take the second for a step after the first.
        """
        request, adapter = self.requests[0], self.checkpoint.adapter
        timesteps = adapter.set_timesteps(self.checkpoint.scheduler, request.steps, self.checkpoint.device)
        step = Step(0, timesteps[0], request.noise, request, [adapter])
        with adapter.module.cache_context("parts"):
            parts = step.predict((COND,))[COND]
        with adapter.module.cache_context("whole"):
            whole = adapter.module(
                request.noise.to(adapter.module.dtype),
                timestep=timesteps[0].expand(1),
                **request.conditions[COND],
                return_dict=False,
            )[0]
        return torch.equal(parts, whole)


KNOB_DEPENDS_ON = {
    *("variant", "speedup", "forecast", "trigger", "penalty", "granularity", "denoise_steps", "guidance", "precision"),
    *("frames", "rows", "columns", "layers", "width", "prompts"),
}


def load(params: Params, device: str) -> tuple[Checkpoint, str]:
    """The model, and what its weights are known by."""
    model, dtype = str(params["model"]), DTYPES[str(params["precision"])]
    if model == "random":
        layers, width = int(params["layers"]), int(params["width"])
        return checkpoints.random_wan(layers, width, device, dtype), f"random {layers} x {width} {dtype}"
    folder = {"toy": checkpoints.TOY / "large", "toy-small": checkpoints.TOY / "small"}.get(model, Path(model))
    return checkpoints.load(folder, device, dtype), f"{checkpoints.identity(folder)} {dtype}"


def prompts(checkpoint: Checkpoint, params: Params, seed: int) -> tuple[str, ...]:
    """As many as `videos`: of the file, or drawn from a toy's words. Raises SaihError where there is no source."""
    wanted = int(params["videos"])
    if params["prompts"]:
        lines = Path(str(params["prompts"])).read_text().splitlines()
        given = [line.strip() for line in lines if line.strip()]
        if not given:
            raise SaihError(f"prompts: {params['prompts']} holds none")
        return tuple(given[place % len(given)] for place in range(wanted))
    if checkpoint.words is not None:
        return tuple(checkpoint.words.prompt(seed + place) for place in range(wanted))
    if checkpoint.trained:
        raise SaihError("prompts: name a text file of prompts for a checkpoint with a text encoder")
    return ("random",)
