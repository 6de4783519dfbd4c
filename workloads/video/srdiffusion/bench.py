"""SRDiffusion's bench: who takes which steps of a video, and what the best fixed switch would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from torch import Tensor

from saih.core import Context, Params, Point
from workloads.video.denoising import Denoising, load, load_transformer
from workloads.video.kept import kept_path, made_once
from workloads.video.loop import Policy, Request, Result, Step
from workloads.video.reference import Reference
from workloads.video.srdiffusion import spec
from workloads.video.srdiffusion.policy import RENDER, SKETCH, EveryOther, SelfDifference, SketchRender, Switch

FIRST, LAST = 0.1, 0.6
"""Of the steps: between which a fixed switch is tried at every one."""

Curve = tuple[tuple[int, float], ...]
"""(steps before the switch, SSIM) of fixed switches, steps rising."""


def setup(point: Point, context: Context) -> SharedDenoising:
    """Load both models and make what quality is measured against where it is not on disk yet."""
    return SharedDenoising(point, context)


class SharedDenoising(Denoising):
    """A large and a small model, and a variant's policy."""

    baseline = "large"

    def __init__(self, point: Point, context: Context) -> None:
        params = point.params
        large, small = str(params["model"]), spec.small(params)
        sizes = [spec.shape_of_large(params), spec.shape_of_small(params)]
        first = load(large, int(params["layers"]), int(params["width"]), params, context.device)
        second = load_transformer(
            small, int(params["small_layers"]), int(params["small_width"]), params, context.device
        )
        super().__init__(point, context, first, sizes, [second])
        self.requests = self.videos.requests(self.checkpoint, spec.plain_steps(params))
        self.policy = policy(params)
        self.small_share = self.forward_flop[1] / self.forward_flop[0]
        self.switches = self._fixed_switches(self.reference, (first[1], second[1])) if self.reference else ()

    def counted(self, results: Sequence[Result]) -> dict[str, float]:
        """Also the steps of each model, and the gain that the shares of steps and of work predict."""
        count, steps = len(results), self.requests[0].steps
        sketched = sum(result.counts[SKETCH] for result in results) / count
        numbers = super().counted(results) | {"small_share": self.small_share}
        if self.params["variant"] == "fewer-steps":
            return numbers
        numbers |= {
            "switch_step": sketched,
            "first_switch": float(min(result.counts[SKETCH] for result in results)),
            "last_switch": float(max(result.counts[SKETCH] for result in results)),
            "reused_steps": steps - sketched - sum(result.counts[RENDER] for result in results) / count,
            "cache_bytes": float(max(result.cache_bytes for result in results)),
        }
        if self.params["variant"] == "reversed":
            sketched = steps - sketched
        share = sketched / steps
        return numbers | {"predicted_gain": 1 / (share + (1 - share) * self.small_share)}

    def quality(self, results: Sequence[Result]) -> dict[str, float]:
        """Also the best fixed switch of the same videos, the earliest one that keeps the likeness claimed, and its work
        over the work done; nothing of that for videos that are themselves less alike."""
        numbers = super().quality(results)
        if not numbers or numbers["ssim"] < spec.LIKENESS:
            return numbers
        steps = self.videos.steps
        best = next((switch for switch, likeness in self.switches if likeness >= spec.LIKENESS), steps)
        work = len(self.requests[0].branches) * (best + (steps - best) * self.small_share)
        done = sum(map(self.forwards, results)) / len(results)
        return numbers | {"best_switch": float(best), "best_switch_gain": work / done}

    def _fixed_switches(self, reference: Reference, identities: Sequence[str]) -> Curve:
        """From disk, or measured and kept there."""
        path = kept_path(self.folder, "srdiffusion-switches", *identities, astuple(self.videos))
        curve = made_once(path, lambda: self._measure_fixed_switches(reference))
        return tuple((int(switch), float(likeness)) for switch, likeness in curve)

    def _measure_fixed_switches(self, reference: Reference) -> Curve:
        """The large model goes all the way once; the small one sets out from many places of it."""
        steps, requests, curve = self.videos.steps, self.videos.requests(self.checkpoint), []
        sketches = [Sketch() for _ in requests]
        for request, sketch in zip(requests, sketches, strict=True):
            self.loop.generate(request, sketch)
        for switch in range(round(FIRST * steps), round(LAST * steps) + 1):
            results = [
                self.loop.generate(replace(request, noise=sketch.latents[switch]), SketchRender(Switch(0)), switch)
                for request, sketch in zip(requests, sketches, strict=True)
            ]
            curve.append((switch, reference.quality(self.checkpoint, results).ssim))
        return tuple(curve)


class Sketch(Policy):
    """The plain loop, with the latents before each step kept."""

    def start(self, request: Request) -> None:
        self.latents = [request.noise]

    def after(self, step: Step, latents: Tensor) -> Tensor:
        self.latents.append(latents)
        return latents


def policy(params: Params) -> Policy:
    """The policy of these parameters."""
    variant, steps = str(params["variant"]), int(params["denoise_steps"])
    if variant == "fewer-steps":
        return Policy()
    if variant in spec.ADAPTIVE:
        bounds = int(params["min_switch"]), int(params["max_switch"])
        render = EveryOther() if variant == "srdiffusion+cache" else Policy()
        switch_rule = SelfDifference(float(params["threshold"]), *bounds, int(params["falls"]))
        return SketchRender(switch_rule, render=render)
    switch = min(steps, int(params["switch_step"]))
    if variant == "reversed":
        return SketchRender(Switch(steps - switch), models=(1, 0))
    return SketchRender(Switch({"large": steps, "small": 0}.get(variant, switch)))
