"""Parallel adapters beside T5: its arithmetic beside transformers', ladders of both stacks, epochs from the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from saih import workload
from saih.core import Context, Place, Point
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.conftest import package
from workloads.llm.pac import tasks
from workloads.llm.pac.batch import DataSet
from workloads.llm.pac.cache import ActivationCache, MemoryTier
from workloads.llm.pac.stages import Flow, Settings, SideTuned, Tuned, layer_rows, make, make_backbone
from workloads.llm.pac.t5 import T5, biases
from workloads.llm.pac.t5spec import ANSWER, T5_SHAPES
from workloads.llm.pac.training import FineTuning, Recipe

SPEC = T5_SHAPES["t5-tiny"]


def settings(variant: str = "pa", **changes: Any) -> Settings:
    return Settings(SPEC, variant, 0, **changes)


def data(samples: int = 12, length: int = 14) -> DataSet:
    return tasks.synthetic(samples, length, 0.75, SPEC.vocab, 4, seed=0, answered=True)


def through(stage: SideTuned | Tuned, sequences: DataSet) -> tuple[Flow, Any, Any]:
    batch = sequences.batch(range(len(sequences)))
    meta = batch.meta(SPEC.causal)
    return stage(stage.start(batch.ids_T, meta), meta), batch, meta


def opened(stage: SideTuned | Tuned) -> SideTuned:
    """U is zero at first and lets no gradient through."""
    side = cast(SideTuned, stage)
    with torch.no_grad():
        side.ladder.up.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return side


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """Of a checkpoint it wrote, for sources so long that every bucket of distances is used."""
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=SPEC.vocab,
        d_model=SPEC.hidden,
        d_kv=SPEC.head_dim,
        d_ff=SPEC.ffn,
        num_layers=SPEC.layers,
        num_heads=SPEC.heads,
        dropout_rate=0.0,
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    sequences, stage = data(3, length=300), make(settings("full", checkpoint=str(tmp_path)))
    flow, batch, meta = through(stage, sequences)
    logits = stage.logits(flow, meta).split(batch.answers)
    for ids, mine in zip(sequences.ids, logits, strict=True):
        source, answer = ids[:-ANSWER][None], ids[-ANSWER:][None]
        with torch.no_grad():
            expected = theirs(input_ids=source, decoder_input_ids=answer).logits[0]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    whole = theirs.state_dict()
    assert workload.spec("pac").parameters(SPEC) == sum(  # type: ignore[attr-defined]
        whole[name].numel() for name in whole if not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    )


@pytest.mark.parametrize("variant", ["pa", "lora", "adapter"])
@torch.no_grad()
def test_what_has_learned_nothing_changes_nothing(variant: str) -> None:
    """Without a graph: torch has another attention kernel where a table of distances trains."""
    sequences = data()
    plain, tuned = (make(settings(each)) for each in ("full", variant))
    (flow, _, meta), (same, *_) = through(plain, sequences), through(tuned, sequences)
    assert torch.equal(plain.logits(flow, meta), tuned.logits(same, meta))


def test_no_gradient_enters_the_backbone_and_none_is_missed() -> None:
    """Both ladders get theirs: the decoder's hears the encoder's."""
    sequences, stage = data(), opened(make(settings()))
    flow, batch, meta = through(stage, sequences)
    stage.loss(flow, batch, meta).backward()
    backbone = cast(T5, stage.backbone)
    assert not flow.h_TD.requires_grad
    assert all(parameter.grad is None for parameter in backbone.parameters())
    apart = [cast(Tensor, parameter.grad) for parameter in stage.trained().values()]
    assert all(float(gradient.abs().max()) > 0 for gradient in apart)
    e_TD = backbone.embed(batch.ids_T, meta).requires_grad_(True)
    taps = [e_TD, *layer_rows(backbone, e_TD, meta)]
    whole = torch.autograd.grad(stage.loss(stage.from_taps(taps, meta), batch, meta), list(stage.trained().values()))
    assert all(torch.equal(a, b) for a, b in zip(apart, whole, strict=True))


def test_the_ladders_are_what_they_are_said_to_be() -> None:
    """a_i = S_i(a_(i-1) + W_i h_i) beside both stacks, and S_i of the decoder over the encoder's ladder, by hand."""
    sequences, stage = data(1), opened(make(settings()))
    stage.record = True
    flow, batch, meta = through(stage, sequences)
    e_TD, *taps = stage.take_taps()
    ladder = cast(Any, stage.ladder)
    split = len(batch.ids_T) - ANSWER
    bias = (
        biases(ladder.encoder_distances, meta.source.query_lens, ladder.side, ahead=True),
        biases(ladder.decoder_distances, meta.target.query_lens, ladder.side, ahead=False),
    )
    a_TS = e_TD[:split] @ ladder.encoder_down.weight.T
    for layer, h_TD in zip(ladder.encoder.values(), taps, strict=True):
        a_TS = layer.block(a_TS + h_TD[:split] @ layer.down.weight.T, meta, bias[0])
    source_TS = ladder.encoder_norm(a_TS)
    a_TS = e_TD[split:] @ ladder.decoder_down.weight.T
    for layer, h_TD in zip(ladder.decoder.values(), taps, strict=True):
        a_TS = layer.block(a_TS + h_TD[split:] @ layer.down.weight.T, meta, bias[1], source_TS)
    torch.testing.assert_close(flow.a_TS, a_TS)
    assert torch.equal(flow.h_TD, taps[-1][split:])


def test_losses_from_the_cache_are_those_through_the_backbone() -> None:
    """To the bit, over epochs that mix samples of other lengths; a sample is cached unpadded, source and answer."""
    sequences = data()
    cache = ActivationCache(MemoryTier(), {n: len(ids) for n, ids in enumerate(sequences.ids)})
    cached, plain = (
        FineTuning(opened(make(settings())), sequences, range(len(sequences)), Recipe(4, 1e-2, 0), each)
        for each in (cache, None)
    )
    losses = [(cached.epoch(Unclocked()), plain.epoch(Unclocked()))]
    cached.forget_backbone()
    losses += [(cached.epoch(Unclocked()), plain.epoch(Unclocked())) for _ in range(4)]
    assert all(a == b for a, b in losses)
    assert sum(losses[-1][0]) < 0.8 * sum(losses[0][0])
    for sample, ids in enumerate(sequences.ids):
        assert cache.tier.read(sample).values_PTD.shape == (SPEC.layers + 1, len(ids), SPEC.hidden)


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "full"},
        {"variant": "full-ckpt"},
        {"variant": "lora"},
        {"variant": "pa"},
        {"variant": "pa-cache", "tier": "disk", "valid": 0.75},
    ],
    ids=str,
)
def test_points_of_every_variant_pass_their_check(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    bench = bench_of(tmp_path, **changes)
    try:
        check = bench.check()
        assert check.passed, check.why
        assert bench.step(Unclocked()).units == 8
    finally:
        bench.close()


def bench_of(folder: Path, **changes: Any) -> Any:
    tiny = {"model": "t5-tiny", "head": "lm", "samples": 8, "batch": 4, "length": 12}
    params = {name: each.default for name, each in workload.parameters(workload.spec("pac")).items()} | tiny | changes
    return workload.bench("pac").setup(Point("pac", params), Context(Place(0, 0, 1), "cpu", str(folder)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "answers in words: set head=lm"),
        ({"head": "lm", "layout": "pp", "gpus": 2}, "every layer of a decoder takes what the encoder ends with"),
        ({"head": "lm", "ladder": "gated"}, "has plain ladders"),
    ],
)
def test_what_is_not_built_for_t5_is_refused(changes: dict[str, Any], why: str) -> None:
    spec = workload.spec("pac")
    params = {name: each.default for name, each in workload.parameters(spec).items()}
    with pytest.raises(SaihError, match=why):
        spec.cost(params | {"model": "t5-tiny"} | changes)


def test_weights_behind_the_layers_are_those_of_the_whole() -> None:
    """The head stays when the backbone goes, and is the same."""
    whole, tail = (cast(T5, make_backbone(settings(), layers)) for layers in (range(3), range(3, 3)))
    kept = dict(whole.named_parameters())
    assert {name for name, _ in tail.named_parameters()} == {"tokens.weight", "final_norm.weight"}
    assert all(torch.equal(parameter, kept[name]) for name, parameter in tail.named_parameters())
