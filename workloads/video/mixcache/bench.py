"""MixCache's bench: a video under the variant's policy, worth the forwards that fewer steps need for its quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from saih.core import Context, Point
from workloads.video.caches import ACTIONS, FULL
from workloads.video.denoising import Denoising, calibration, load
from workloads.video.kept import kept_path
from workloads.video.loop import Result
from workloads.video.mixcache import spec, variants


def setup(point: Point, context: Context) -> Caching:
    """Load the model, make the uncached reference where it is not on disk yet, and find the variant's knob."""
    return Caching(point, context)


class Caching(Denoising):
    """A model and a variant's policy."""

    baseline = "none"

    def __init__(self, point: Point, context: Context) -> None:
        params = point.params
        layers, width = int(params["layers"]), int(params["width"])
        loaded = load(str(params["model"]), layers, width, params, context.device)
        super().__init__(point, context, loaded, [spec.shape(params)])
        self.requests = self.videos.requests(self.checkpoint, variants.plain_steps(params))
        decisive = sorted((key, value) for key, value in params.items() if key in KNOB_DEPENDS_ON)
        calibrating = calibration(self.checkpoint, params, CALIBRATED_ON)
        kept = kept_path(self.folder, "mixcache-knob", loaded[1], context.device, astuple(calibrating), decisive)
        self.policy = variants.policy(params, self.loop, calibrating.requests(self.checkpoint), kept)

    def close(self) -> None:
        variants.close(self.policy)

    def units(self, forwards: float) -> float:
        return self.numbers.get("iso_forwards", forwards)

    def counted(self, results: Sequence[Result]) -> dict[str, float]:
        """Also steps by what was done in them, and memory of the cache."""
        count = len(results)
        numbers = super().counted(results)
        numbers["reused_steps"] = sum(len(result.actions) - result.counts[FULL] for result in results) / count
        if self.params["variant"] in spec.OURS:
            numbers |= {f"{kind}_steps": sum(result.counts[kind] for result in results) / count for kind in ACTIONS}
        if self.params["variant"] not in spec.HOOKED:
            numbers["cache_bytes"] = float(max(result.cache_bytes for result in results))
        return numbers


CALIBRATED_ON = 3
"""Prompts that knobs are searched on: one would hit the speed-up asked for on that one only."""
KNOB_DEPENDS_ON = {"variant", "speedup", "forecast", "repair", "trigger", "penalty", "granularity"}
"""Beside the model and the videos it is searched on."""
