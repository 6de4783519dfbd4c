"""Some layers of a model that is fine-tuned, with what trains beside or inside them: the unit of all layouts.

T rows of all sequences, B sequences, D hidden, S width of the ladder, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workloads.llm import loader
from workloads.llm.attention import AttnMeta
from workloads.llm.config import ModelSpec
from workloads.llm.model import Stage
from workloads.llm.pac import baselines
from workloads.llm.pac.adapters import ATTENTION, Ladder, initialise
from workloads.llm.pac.batch import Batch, PairMeta
from workloads.llm.pac.t5 import T5, Run, T5Ladder, call
from workloads.llm.pac.t5spec import T5Spec
from workloads.llm.shard import ColumnLinear, Cut, Make, Mesh

Backbone = Stage | T5


@dataclass(frozen=True)
class Settings:
    """What is fine-tuned, and how."""

    spec: ModelSpec
    variant: str
    """One of spec.VARIANTS."""
    classes: int
    """0: the language-modelling head of the backbone, which stays as it is."""
    reduction: int = 8
    gated: bool = False
    lora_rank: int = 8
    bottleneck: int = 48
    checkpoint: str = ""
    """Folder of pretrained weights; empty: random ones."""
    seed: int = 0
    device: str = "cpu"

    @property
    def parallel_adapters(self) -> bool:
        return self.variant.startswith("pa")


class Flow(NamedTuple):
    """What goes from layer to layer, and from stage to stage."""

    h_TD: Tensor
    a_TS: Tensor | None = None
    """Of parallel adapters."""


def make(settings: Settings, layers: range | None = None) -> SideTuned | Tuned:
    """The stage of these layers (default: all). Weights are the same for any split."""
    layers = range(settings.spec.layers) if layers is None else layers
    return SideTuned(settings, layers) if settings.parallel_adapters else Tuned(settings, layers)


def make_backbone(settings: Settings, layers: range, head: bool = True) -> Backbone:
    """Its weights read, or random; a language-modelling head only if there are no classes."""
    headed, spec = head and settings.classes == 0, settings.spec
    stage: Backbone
    if isinstance(spec, T5Spec):
        stage = T5(spec, layers, headed, settings.device)
    else:
        stage = Stage(spec, layers=layers, attention=ATTENTION, device=settings.device, head=headed)
    if settings.checkpoint:
        loader.load(stage, settings.checkpoint)
    else:
        loader.random_init(stage, settings.seed)
        if isinstance(stage, T5):
            stage.spread_words()
    return stage


def layer_rows(backbone: Backbone, h_TD: Tensor, meta: AttnMeta, run: Run = call) -> list[Tensor]:
    """What each layer of a backbone puts out, [T, D]; `run` calls it."""
    if isinstance(backbone, T5):
        return backbone.rows(h_TD, cast(PairMeta, meta), run)
    rows, by = [], backbone.rotation(meta)
    for block in backbone.layers.values():
        h_TD = run(block, h_TD, meta, by)
        rows.append(h_TD)
    return rows


def headed_rows(h_TD: Tensor, meta: AttnMeta) -> Tensor:
    """Those that go to the head: of an encoder-decoder the answers', else all."""
    return meta.apart(h_TD)[1] if isinstance(meta, PairMeta) else h_TD


class Classifier(nn.Module):
    """Logits of each sequence: of its mean row (encoders), or of its last one (causal models)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        made = Make(torch.device(settings.device), torch.float32)
        width = settings.spec.hidden
        self.causal = settings.spec.causal
        self.classifier = ColumnLinear(width, {"": Cut(settings.classes, 0, settings.classes)}, True, Mesh(), made)
        initialise(self, settings.seed)

    def forward(self, h_TD: Tensor, meta: AttnMeta) -> Tensor:
        if self.causal:
            pooled_BD = h_TD.index_select(0, meta.last_rows)
        else:
            pooled_BD = torch.stack([rows.mean(0) for rows in h_TD.split(list(meta.query_lens))])
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC


class Tail:
    """What the last stage does with the rows: logits and loss."""

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        bare = settings.classes > 0 and isinstance(backbone, Stage)
        self.final: Callable[[Tensor], Tensor] = cast(Stage, backbone).normed if bare else backbone.logits
        self.classifier = Classifier(settings) if settings.classes else None

    def logits(self, h_TD: Tensor, meta: AttnMeta) -> Tensor:
        out = self.final(h_TD)
        return out if self.classifier is None else cast(Tensor, self.classifier(out, meta))

    def loss(self, h_TD: Tensor, batch: Batch, meta: AttnMeta) -> Tensor:
        """Cross-entropy, summed over the sequences; of language models the mean over a sequence's next tokens."""
        logits = self.logits(h_TD, meta)
        if self.classifier is not None:
            return F.cross_entropy(logits, batch.labels_B, reduction="sum")
        said = batch.said()
        each = zip(logits.split([len(ids) for ids in said]), said, strict=True)
        return torch.stack([F.cross_entropy(rows[:-1], ids[1:]) for rows, ids in each]).sum()

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.classifier.named_parameters()) if self.classifier is not None else {}


class SideTuned(nn.Module):
    """Layers of a frozen backbone and the side layers beside them. Gradients go through `a` alone."""

    carries = "a"

    def __init__(self, settings: Settings, layers: range, backbone: bool = True) -> None:
        super().__init__()
        self.settings, self.layers = settings, layers
        self.backbone: Backbone | None = None
        """None where a cache has what it puts out."""
        if backbone:
            self.backbone = make_backbone(settings, layers, head=False).requires_grad_(False)
        made = Make(torch.device(settings.device), torch.float32)
        self.ladder: Ladder | T5Ladder
        if isinstance(settings.spec, T5Spec):
            self.ladder = T5Ladder(settings.spec, settings.reduction, made, settings.seed)
        else:
            self.ladder = Ladder(settings.spec, layers, settings.reduction, settings.gated, made, settings.seed)
        self.first, self.last = layers.start == 0, layers.stop == settings.spec.layers
        if self.last:  # of its own: it stays when the backbone goes
            behind = range(layers.stop, layers.stop)
            self.tail = Tail(settings, make_backbone(settings, behind).requires_grad_(False))
        self.record = False
        self.taps: list[Tensor] = []

    def start(self, ids_T: Tensor, meta: AttnMeta) -> Flow:
        """Embeddings e, which are the first tap, and a_0."""
        with torch.no_grad():
            e_TD = cast(Stage, self.backbone).embed(ids_T, meta)
        if self.record:
            self.taps.append(e_TD)
        return Flow(e_TD, self.ladder.start(e_TD, meta))

    def forward(self, flow: Flow, meta: AttnMeta) -> Flow:
        """Through my layers of the backbone, without a graph, then up the ladder."""
        with torch.no_grad():
            taps = layer_rows(cast(Stage, self.backbone), flow.h_TD, meta)
        if self.record:
            self.taps += taps
        return Flow(headed_rows(taps[-1], meta), self.ladder.climb(cast(Tensor, flow.a_TS), taps, meta))

    def from_taps(self, taps: list[Tensor], meta: AttnMeta) -> Flow:
        """The whole model's flow from e, h_1, ..., h_L as a cache has them: needs no backbone."""
        a_TS = self.ladder.climb(self.ladder.start(taps[0], meta), taps[1:], meta)
        return Flow(headed_rows(taps[-1], meta), a_TS)

    def logits(self, flow: Flow, meta: AttnMeta) -> Tensor:
        """Of the last stage: [B, C], or [T, V] of a language model."""
        return self.tail.logits(self.ladder.merge(flow.h_TD, cast(Tensor, flow.a_TS)), meta)

    def loss(self, flow: Flow, batch: Batch, meta: AttnMeta) -> Tensor:
        """Of the last stage; a sum over sequences."""
        return self.tail.loss(self.ladder.merge(flow.h_TD, cast(Tensor, flow.a_TS)), batch, meta)

    def take_taps(self) -> list[Tensor]:
        """What was recorded since the last call: [e,] h_i of my layers for each forward."""
        taken, self.taps = self.taps, []
        return taken

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by the name it has in the whole model."""
        found = {f"ladder.{name}": parameter for name, parameter in self.ladder.named_parameters()}
        return found | (self.tail.trained() if self.last else {})


class Tuned(nn.Module):
    """Layers of a backbone that gradients go through: all of it trains, or what was put into its blocks."""

    carries = "h"

    def __init__(self, settings: Settings, layers: range) -> None:
        super().__init__()
        self.settings, self.layers = settings, layers
        self.backbone = make_backbone(settings, layers)
        self.first, self.last = layers.start == 0, layers.stop == settings.spec.layers
        if self.last:
            self.tail = Tail(settings, self.backbone)
        self.checkpointed = settings.variant.endswith("-ckpt")
        made = Make(torch.device(settings.device), torch.float32)
        blocks, seed = self.backbone.layers, settings.seed
        if settings.variant.startswith("full"):
            self.inside = dict(self.backbone.named_parameters())
        else:
            self.backbone.requires_grad_(False)
            if settings.variant.startswith("lora"):
                self.inside = baselines.add_lora(blocks, settings.lora_rank, 2.0 * settings.lora_rank, made, seed)
            else:
                self.inside = baselines.add_adapters(blocks, settings.bottleneck, made, seed)

    def start(self, ids_T: Tensor, meta: AttnMeta) -> Flow:
        """Embeddings."""
        return Flow(self.backbone.embed(ids_T, meta))

    def forward(self, flow: Flow, meta: AttnMeta) -> Flow:
        """Through my layers; checkpointed ones keep their input alone and are computed anew in backward."""
        run = partial(checkpoint, use_reentrant=False) if self.checkpointed else call
        return Flow(headed_rows(layer_rows(self.backbone, flow.h_TD, meta, run)[-1], meta))

    def logits(self, flow: Flow, meta: AttnMeta) -> Tensor:
        """Of the last stage: [B, C], or [T, V] of a language model."""
        return self.tail.logits(flow.h_TD, meta)

    def loss(self, flow: Flow, batch: Batch, meta: AttnMeta) -> Tensor:
        """Of the last stage; a sum over sequences."""
        return self.tail.loss(flow.h_TD, batch, meta)

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by the name it has in the whole model."""
        found = {f"backbone.{name}": parameter for name, parameter in self.inside.items()}
        return found | (self.tail.trained() if self.last else {})
