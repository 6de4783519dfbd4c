"""What users would pick instead: caches of diffusers and cache-dit in our loop, the rules of TeaCache and EasyCache.

All of them say at each step how much they reused, so one that never triggered is seen to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saih.errors import SaihError
from workloads.video.adapters import Adapter
from workloads.video.caches import FULL, FullStepCache, relative_change, tensor_bytes
from workloads.video.loop import COND, Policy, Request, Step

REUSE = "reuse"
"""The action of a step in which a peer reused anything."""


class TeaCache(Policy):
    """TeaCache (Liu et al., CVPR 2025): skip all blocks while the time embedding has changed little since the last run.

    The relative change of the modulation a step's blocks get, over that of the step before, is added up; the blocks run
    when the sum reaches `threshold`. The paper rescales each term by a polynomial fitted to the checkpoint, of which
    `coefficients` are the factors, highest power first (see `OutputChanges`); by default it is the identity.
    """

    def __init__(self, threshold: float, coefficients: Sequence[float] = (1.0, 0.0)) -> None:
        self.threshold, self.coefficients = threshold, tuple(coefficients)
        self.cache = FullStepCache(("block",), first=0, last=0)

    def start(self, request: Request) -> None:
        self.cache.clear()
        self.last: Tensor | None = None
        self.distance = 0.0

    def velocity(self, step: Step) -> Tensor:
        now = _modulation(step)
        if self.last is not None:
            self.distance += self._rescaled(relative_change(now, self.last))
        self.last, step.signal = now, self.distance
        ends = step.index in (0, step.steps - 1)
        if ends or self.distance >= self.threshold:
            self.distance = 0.0
            return self.cache.full(step)
        step.action = REUSE
        return self.cache.reuse_block(step)

    def _rescaled(self, change: float) -> float:
        total = 0.0
        for factor in self.coefficients:
            total = total * change + factor
        return abs(total)

    def cache_bytes(self) -> int:
        return self.cache.cache_bytes()


class OutputChanges(Policy):
    """Computes every step in full and notes what TeaCache rescales by: how much the output changes with the modulation.

    Attributes:
        changes: of each step but the first: relative change of the modulation, and of the conditional prediction.
    """

    def start(self, request: Request) -> None:
        self.changes: list[tuple[float, float]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def velocity(self, step: Step) -> Tensor:
        modulation, predicted = _modulation(step), step.predict()
        now = modulation, predicted[COND]
        if self.last is not None:
            of_modulation, of_output = map(relative_change, now, self.last)
            self.changes.append((of_modulation, of_output))
        self.last = now
        return step.guide(predicted)

    def coefficients(self) -> tuple[float, ...]:
        """Of the polynomial of least squares, of the paper's fourth degree or as many as the steps determine."""
        modulation, output = np.array(self.changes).T
        factors = np.polyfit(modulation, output, min(4, len(self.changes) - 1))
        return tuple(map(float, factors))


def _modulation(step: Step) -> Tensor:
    """What a step's blocks are told of the time."""
    fixed = step.peek(step.request.branches if step.models[0].joint else (COND,)).fixed
    told: Tensor = fixed.get("projection", fixed["time"])
    return told


class EasyCache(Policy):
    """EasyCache (Zhou et al. 2025, arXiv:2507.02860): predict how much the output changes from how much the input does.

    With x the latents and v a prediction, the rate k = |v - v'| / |x - x'| of the last two full steps hardly moves, so
    a step changes the output by about k |x - x'| / |v|. These are added up; below `threshold` the prediction is
    x + (v - x) of the last full step. The first `warmup` steps and the last one are full.
    """

    def __init__(self, threshold: float, warmup: int = 5) -> None:
        self.threshold, self.warmup = threshold, warmup

    def start(self, request: Request) -> None:
        self.full_latents = self.last_latents = torch.empty(0)
        self.predicted: dict[str, Tensor] = {}
        self.rate = self.distance = 0.0

    def velocity(self, step: Step) -> Tensor:
        if self.rate:
            moved = (step.latents - self.last_latents).abs().mean()
            self.distance += self.rate * float(moved / self.predicted[COND].abs().mean())
        self.last_latents, step.signal = step.latents, self.distance
        edge = step.index < self.warmup or step.index == step.steps - 1
        if edge or not self.rate or self.distance >= self.threshold:
            return self._full(step)
        step.action = REUSE
        shift = step.latents - self.full_latents
        return step.guide({branch: value + shift for branch, value in self.predicted.items()})

    def _full(self, step: Step) -> Tensor:
        predicted = step.predict()
        if self.predicted:
            moved = (step.latents - self.full_latents).abs().mean()
            self.rate = float((predicted[COND] - self.predicted[COND]).abs().mean() / moved)
        self.full_latents, self.predicted, self.distance = step.latents, predicted, 0.0
        return step.guide(predicted)

    def cache_bytes(self) -> int:
        return tensor_bytes([self.full_latents, self.last_latents, *self.predicted.values()])


class HookedCache(Policy):
    """A cache that hooks itself into the model, run in our loop.

    It skips modules inside the blocks, where the loop cannot see it: work is what the linear layers and the attention
    in the blocks really multiplied, in units of the first step, which all of these caches compute in full.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self._products, self._of_a_full_step = adapter, 0, 0
        self._queries = 0
        layers = {layer for block in adapter.blocks for layer in block.modules()}
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        attention = [layer for layer in layers if hasattr(layer, "to_q") and hasattr(layer, "to_k")]
        self._counters = [
            *(layer.register_forward_hook(self._count) for layer in linear),
            *(layer.to_q.register_forward_hook(self._asked) for layer in attention),
            *(layer.to_k.register_forward_hook(self._answered) for layer in attention),
        ]

    def start(self, request: Request) -> None:
        self._of_a_full_step = 0

    def velocity(self, step: Step) -> Tensor:
        self._products, before = 0, self.adapter.forwards
        branches = step.request.branches
        predicted: dict[str, Tensor] = {}
        for group in [branches] if self.adapter.joint else [(branch,) for branch in branches]:
            predicted |= self.predict(step, group)
        self._of_a_full_step = self._of_a_full_step or self._products
        share = self._products / self._of_a_full_step
        self.adapter.forwards = before + share * len(branches)
        step.action, step.signal = FULL if share == 1 else REUSE, share
        return step.guide(predicted)

    def predict(self, step: Step, group: tuple[str, ...]) -> dict[str, Tensor]:
        """The predictions of branches that run as one batch, with the cache at work."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """Not known: it is inside the hooks."""
        return 0

    def close(self) -> None:
        """Take it off the model."""
        for counter in self._counters:
            counter.remove()

    def _count(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._products += inputs[0].numel() * output.shape[-1]

    def _asked(self, layer: nn.Module, inputs: tuple[Tensor, ...], queries_BSD: Tensor) -> None:
        self._queries = queries_BSD.numel()

    def _answered(self, layer: nn.Module, inputs: tuple[Tensor, ...], keys_BLD: Tensor) -> None:
        """Each query with each key, and its weights with each value."""
        self._products += 2 * self._queries * keys_BLD.shape[1]


class DiffusersCache(HookedCache):
    """A cache of diffusers. `config` is what `enable_cache` takes, made from a function that tells the timestep."""

    def __init__(self, adapter: Adapter, config: Callable[[Callable[[], int]], Any]) -> None:
        from diffusers.hooks import HookRegistry

        self._timestep = 0
        adapter.module.enable_cache(config(lambda: self._timestep))
        HookRegistry.check_if_exists_or_initialize(adapter.module)._child_registries_cache = None  # of a cache before
        super().__init__(adapter)

    def start(self, request: Request) -> None:
        super().start(request)
        self.adapter.module._reset_stateful_cache()

    def predict(self, step: Step, group: tuple[str, ...]) -> dict[str, Tensor]:
        self._timestep = int(step.timestep)
        with self.adapter.module.cache_context("_".join(group[::-1])):
            return step.predict(group)

    def close(self) -> None:
        super().close()
        self.adapter.module.disable_cache()


class CacheDit(HookedCache):
    """cache-dit (vipshop): dual block cache, first block always computed, with its TaylorSeer of first order.

    The others are skipped while the first block's residual has changed by less than `threshold`, after five steps. It
    replaces the transformer's list of blocks, so the transformer's own forward runs in place of ours.

    Raises:
        SaihError: the package is missing, or the model is no Wan.
    """

    def __init__(self, adapter: Adapter, threshold: float) -> None:
        try:
            import cache_dit
        except ImportError as error:
            raise SaihError(
                f"variant cache-dit needs the cache-dit package ({error}): pip install 'saih[caches]'"
            ) from None
        if type(adapter.module).__name__ != "WanTransformer3DModel":
            raise SaihError(f"variant cache-dit is for Wan here, not for {type(adapter.module).__name__}")
        super().__init__(adapter)
        self._package = cache_dit
        self._hooked = cache_dit.BlockAdapter(
            transformer=adapter.module,
            blocks=adapter.module.blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_2,
            has_separate_cfg=True,
        )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=5,
            enable_separate_cfg=True,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
        cache_dit.enable_cache(self._hooked, cache_config=config, calibrator_config=calibrator)

    def start(self, request: Request) -> None:
        super().start(request)
        self._package.refresh_context(self.adapter.module, num_inference_steps=request.steps, verbose=False)

    def predict(self, step: Step, group: tuple[str, ...]) -> dict[str, Tensor]:
        (branch,) = group
        latents = step.latents.to(self.adapter.module.dtype)
        timestep = step.timestep.expand(len(latents))
        condition = step.request.conditions[branch]
        return {branch: self.adapter.module(latents, timestep=timestep, **condition, return_dict=False)[0]}

    def close(self) -> None:
        super().close()
        self._package.disable_cache(self._hooked)


def first_block_cache(adapter: Adapter, threshold: float) -> DiffusersCache:
    """First-block cache: skip the other blocks where the first one's residual changed by less than `threshold`."""
    from diffusers import FirstBlockCacheConfig

    return DiffusersCache(adapter, lambda timestep: FirstBlockCacheConfig(threshold=threshold))


def pyramid_attention_broadcast(adapter: Adapter, every: int) -> DiffusersCache:
    """PAB: between timesteps 100 and 800 self-attention runs every `every` steps, cross-attention half as often.

    The hooks of diffusers 0.39 keep one state for both branches of guidance, so where these are two forwards (Wan)
    one branch is given the attention of the other.
    """
    from diffusers import PyramidAttentionBroadcastConfig

    return DiffusersCache(
        adapter,
        lambda timestep: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            cross_attention_block_skip_range=2 * every,
            current_timestep_callback=timestep,
        ),
    )


TAYLORSEER_WARMUP, TAYLORSEER_LONGEST = 5, 8
"""Full steps that TaylorSeer has at the least, and its longest interval."""


def taylorseer_cached(interval: int, before: int, steps: int) -> int:
    """Steps that TaylorSeer leaves out: after `before` full ones it begins with one of those."""
    return steps - before - ceil((steps - before - 1) / interval)


def taylorseer_rhythm(cached: int, steps: int) -> tuple[int, int]:
    """The interval of TaylorSeer, and the full steps before it, that leave out `cached` of the steps.

    The shortest interval that can, begun as late as it can. Raises ValueError where none can.
    """
    for interval in range(2, TAYLORSEER_LONGEST + 1):
        for before in range(steps - 1, TAYLORSEER_WARMUP - 1, -1):
            if taylorseer_cached(interval, before, steps) == cached:
                return interval, before
    raise ValueError(f"{cached} of {steps} steps cannot be cached")


def taylorseer(adapter: Adapter, interval: int, before: int = TAYLORSEER_WARMUP) -> DiffusersCache:
    """TaylorSeer of first order on attention and feed-forward: `before` full steps, then one every `interval` steps.

    The modules are named, for the pattern that diffusers has by default matches nothing in a Wan.
    """
    from diffusers import TaylorSeerCacheConfig

    return DiffusersCache(
        adapter,
        lambda timestep: TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=before,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*blocks\.\d+\.(attn\d?|ffn?)"],
        ),
    )


def magcache(adapter: Adapter, threshold: float, ratios: Sequence[float]) -> DiffusersCache:
    """MagCache: skip all blocks while the product of the calibrated `ratios` (one a step) stays near one."""
    from diffusers import MagCacheConfig

    return DiffusersCache(
        adapter,
        lambda timestep: MagCacheConfig(
            threshold=threshold, num_inference_steps=len(ratios), mag_ratios=torch.tensor(ratios)
        ),
    )


class MagnitudeRatios(Policy):
    """Computes every step in full and notes by how much the residual of all blocks grew: what MagCache is given.

    After a request `ratios` has a number for each step, the mean over tokens of |R| / |R of the step before|.
    """

    def start(self, request: Request) -> None:
        self.cache = FullStepCache(("block",), first=0, last=0)
        self.ratios: list[float] = []
        self.norms: Tensor | None = None

    def velocity(self, step: Step) -> Tensor:
        before = self.norms
        velocity = self.cache.full(step)
        self.norms = self.cache.residuals[COND].values[-1][1][0].norm(dim=-1)
        self.ratios.append(1.0 if before is None else float((self.norms / (before + 1e-8)).mean()))
        return velocity
