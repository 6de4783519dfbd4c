"""Specs from Hugging Face configs, analytic costs against real tensors and counters, random weights in any split."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from saih.errors import SaihError
from workloads.llm import stepcost
from workloads.llm.attention import AttnMeta
from workloads.llm.config import FAMILIES, PRESETS, ModelSpec, RopeScaling, from_hf, preset, split_layers
from workloads.llm.loader import _uniform, random_init
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh, cut_kv_heads, cut_vocab
from workloads.llm.stepcost import Batch

TINY = {name: spec for name, spec in PRESETS.items() if name.endswith("tiny")}
TINY["qwen3-tiny"] = replace(PRESETS["llama-tiny"], family="qwen3", qk_norm=True, head_dim=24, tied=True, vocab=501)
TINY["qwen2-tiny"] = replace(PRESETS["llama-tiny"], family="qwen2", qkv_bias=True)
TINY["bert-untied"] = replace(PRESETS["bert-tiny"], tied=False)


def on_paper(spec: ModelSpec, **more: object) -> Stage:
    """A stage without memory."""
    return Stage(spec, device="meta", **more)  # type: ignore[arg-type]


# -- Configs -----------------------------------------------------------------------------------------------------------

OPT = {
    "model_type": "opt",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 16,
    "vocab_size": 11,
    "max_position_embeddings": 6,
    "activation_function": "relu",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 11,
    "max_position_embeddings": 6,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba"}, "unknown model type 'mamba'"),
        (OPT | {"do_layer_norm_before": False}, "opt with do_layer_norm_before=False is not supported, only True"),
        (OPT | {"word_embed_proj_dim": 4}, "opt with word_embed_proj_dim=4 is not supported, only 8"),
        (OPT | {"activation_function": "tanh"}, "unknown activation 'tanh'"),
        ({k: v for k, v in OPT.items() if k != "ffn_dim"}, "config.json of a opt model lacks 'ffn_dim'"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "yarn"}},
            "type 'yarn' is not supported, only 'default'",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "config.json of a llama model lacks 'factor'"),
        (LLAMA | {"sliding_window": 4096}, "llama with sliding_window=4096 is not supported, only None"),
        (LLAMA | {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        (LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 4}, "6 heads cannot share 4 KV heads"),
    ],
)
def test_variants_whose_arithmetic_differs_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(SaihError, match=said):
        from_hf(config)


LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_configs_are_read() -> None:
    """As their config.json says it, with all that the core has no use for."""
    llama, qwen = from_hf(LLAMA_3_2_1B), from_hf(QWEN_2_5_HALF_B)
    assert llama == replace(
        PRESETS["llama-1b"], max_positions=131072, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), norm_eps=1e-5
    )
    assert stepcost.parameters(llama) == 1_235_814_400, "as its model card counts, 1.23B"
    assert (qwen.qkv_bias, qwen.out_bias, qwen.rope_theta, qwen.rope_scaling) == (True, False, 1e6, None)
    assert stepcost.parameters(qwen) == 494_032_768, "0.49B"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"config.json does not exist"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(SaihError, match="is not a JSON object"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OPT))
    assert from_hf(tmp_path) == from_hf(OPT)


@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters", "rope_scaling"])
def test_the_base_of_rotary_positions_is_found_where_old_and_new_configs_have_it(where: str) -> None:
    value = 5e5 if where == "rope_theta" else {"rope_type": "default", "rope_theta": 5e5}
    assert from_hf(LLAMA | {where: value}).rope_theta == 5e5
    assert from_hf(LLAMA).rope_theta == 1e4


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SaihError, match="did you mean gpt-175b"):
        preset("gpt-175")


@given(layers=st.integers(1, 100), data=st.data())
def test_layers_are_split_evenly_and_in_order(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    parts = split_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert {len(part) for part in parts} <= {layers // stages, -(-layers // stages)}
    with pytest.raises(SaihError, match="cannot be split"):
        split_layers(layers, layers + 1)


# -- Cuts --------------------------------------------------------------------------------------------------------------


@given(vocab=st.integers(1, 300), tp=st.integers(1, 8))
def test_the_vocabulary_is_cut_without_gaps(vocab: int, tp: int) -> None:
    cuts = [cut_vocab(vocab, Mesh(tp=tp, tp_rank=rank)) for rank in range(tp)]
    assert [word for each in cuts for word in range(each.start, each.stop)] == list(range(vocab))


@pytest.mark.parametrize(("kv_heads", "tp"), [(8, 2), (2, 2), (2, 4), (1, 8)])
def test_a_rank_has_the_kv_heads_that_its_query_heads_use(kv_heads: int, tp: int) -> None:
    heads = 16
    for rank in range(tp):
        mine = cut_kv_heads(kv_heads, Mesh(tp=tp, tp_rank=rank))
        used = {head * kv_heads // heads for head in range(rank * heads // tp, (rank + 1) * heads // tp)}
        assert set(range(mine.start, mine.stop)) == used


def test_heads_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(SaihError, match="4 heads cannot be cut over tp=3"):
        on_paper(TINY["gpt-tiny"], mesh=Mesh(tp=3))
    with pytest.raises(SaihError, match="2 KV heads cannot be shared by tp=3"):
        cut_kv_heads(2, Mesh(tp=3))
    with pytest.raises(SaihError, match="tp=2 x pp=1 needs 2 ranks, there are 1"):
        Mesh.make(2, 1)


# -- Random weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_the_same_in_any_split(name: str) -> None:
    whole = Stage(TINY[name])
    random_init(whole, seed=3)
    wanted = {piece.name: piece.target for piece in whole.pieces()}
    for tp, pp in ((2, 1), (1, 3), (4, 2), (2, 4)):
        seen: Counter[str] = Counter()
        for rank in range(tp * pp):
            stage = Stage(TINY[name], Mesh(tp, pp, rank % tp, rank // tp))
            random_init(stage, seed=3)
            for piece in stage.pieces():
                assert piece.shape == wanted[piece.name].shape
                assert torch.equal(piece.target, wanted[piece.name][piece.index]), piece.name
                seen[piece.name] += piece.target.numel()
        assert seen.keys() == wanted.keys()
        assert all(seen[each] >= tensor.numel() for each, tensor in wanted.items())


def test_random_weights_have_their_deviation_and_depend_on_seed_and_name() -> None:
    stages = [Stage(PRESETS["gpt-tiny"]) for _ in range(2)]
    for seed, stage in enumerate(stages):
        random_init(stage, seed, std=0.05)
    one, other = ({piece.name: piece.target for piece in stage.pieces()} for stage in stages)
    for name, tensor in one.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            assert abs(tensor.std().item() / 0.05 - 1) < 0.05
            assert abs(tensor.mean().item()) < 4 * 0.05 / tensor.numel() ** 0.5
            assert not torch.equal(tensor, other[name])
    a, b = one["layers.0.attn.out.weight"].flatten(), one["layers.1.attn.out.weight"].flatten()
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack((a[1:], a[:-1])))[0, 1]) < 0.06


def test_the_generator_is_splitmix64() -> None:
    """The first five words of the reference implementation (Vigna) for the seed 1234567."""
    words = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    upper = [(word >> 40) - (1 << 24 if word >> 63 else 0) for word in words]
    assert _uniform(torch.arange(1, 6), 1234567).tolist() == [(each + 0.5) / 2**23 for each in upper]


# -- Costs -------------------------------------------------------------------------------------------------------------

BATCHES = [Batch.prefill([5, 9, 1]), Batch((4, 1), (0, 7), 2)]


def meta_of(batch: Batch, causal: bool, device: str = "meta") -> AttnMeta:
    if not any(batch.contexts):
        return AttnMeta.packed(batch.queries, causal=causal, device=device)
    tables = [[0, 0]] * len(batch.queries)
    return AttnMeta.packed(batch.queries, starts=batch.contexts, block_tables=tables, block_size=16, device=device)


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_those_of_the_model(name: str) -> None:
    assert stepcost.parameters(TINY[name]) == sum(each.numel() for each in on_paper(TINY[name]).parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt-175b", 175), ("gpt-13b", 12.9), ("gpt-1.3b", 1.32), ("llama-8b", 8.03), ("llama-70b", 70.55)],
)
def test_presets_have_the_size_that_their_name_says(name: str, billions: float) -> None:
    assert stepcost.parameters(preset(name)) / 1e9 == pytest.approx(billions, rel=0.01)


def test_presets_are_known_families_and_can_be_built() -> None:
    for name, spec in PRESETS.items():
        assert spec.family in FAMILIES, name
        parts = [on_paper(spec, layers=layers) for layers in (range(0, 1), range(spec.layers - 1, spec.layers))]
        assert all(parts), name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TINY)
def test_linear_flop_are_those_that_torch_counts(name: str, batch: Batch) -> None:
    """Attention is counted apart: torch counts the whole square. Block tables have to be there to be read."""
    spec = TINY[name]
    if not spec.causal and any(batch.contexts):
        return
    device = "cpu" if any(batch.contexts) else "meta"
    stage = Stage(spec, attention="loop", device=device)
    ids = torch.zeros(batch.rows, dtype=torch.int64, device=device)
    meta = meta_of(batch, spec.causal, device)
    rows = torch.zeros(batch.head_rows, dtype=torch.int64, device=device)
    kv = stage.new_kv(4) if any(batch.contexts) else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage(ids, meta, kv, rows)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flop for kernel, flop in counts.items() if "mm" in str(kernel) and "bmm" not in str(kernel))
    assert linear == stepcost.linear_flop(spec, batch)
    square = replace(spec, causal=False)
    assert sum(counts.values()) - linear in (0, stepcost.attention_flop(square, batch))


@given(steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_pairs_are_those_under_the_triangle(steps: list[tuple[int, int]]) -> None:
    batch = Batch(tuple(q for q, _ in steps), tuple(c for _, c in steps), 1)
    assert batch.pairs(causal=True) == sum(c + i + 1 for q, c in steps for i in range(q))
    assert batch.pairs(causal=False) == sum(q * (q + c) for q, c in steps)


def test_phases_add_up() -> None:
    both = Batch.prefill([5, 3]) + Batch.decode([7, 2])
    assert both == Batch((5, 3, 1, 1), (0, 0, 7, 2), 4)
    assert (both.rows, both.keys) == (10, 19)
    spec = TINY["llama-tiny"]
    parts = [stepcost.forward_flop(spec, each) for each in (Batch.prefill([5, 3]), Batch.decode([7, 2]))]
    assert stepcost.forward_flop(spec, both) == sum(parts)


@pytest.mark.parametrize("name", TINY)
def test_kv_bytes_are_those_of_the_cache(name: str) -> None:
    kv = Stage(TINY[name], dtype=torch.bfloat16).new_kv(blocks=3, block_size=4)
    assert kv.arena.nbytes == 12 * stepcost.kv_bytes_per_token(TINY[name], word=2)


@pytest.mark.parametrize("name", TINY)
def test_messages_are_those_that_a_rank_sends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, batch, sent = TINY[name], Batch.prefill([5, 9, 1]), []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: sent.append(x.nbytes))
    monkeypatch.setattr(dist, "all_gather", lambda parts, x, group=None: sent.append(x.nbytes))
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    stage = on_paper(spec, mesh=Mesh(tp=2))
    meta = meta_of(batch, spec.causal)
    with torch.inference_mode():
        stage(torch.zeros(15, dtype=torch.int64, device="meta"), meta, rows=meta.last_rows)
    assert sum(sent) == stepcost.tp_bytes(spec, batch, 4, tp=2)
    assert stepcost.tp_bytes(spec, batch, 4, tp=1) == 0
    assert stepcost.pp_bytes(spec, batch, 4, pp=4) == 3 * 15 * spec.hidden * 4


@pytest.mark.parametrize("name", TINY)
def test_activation_bytes_are_near_the_measured_peak(name: str) -> None:
    spec, batch = TINY[name], Batch.prefill([200, 56])
    stage = Stage(spec, attention="loop")
    random_init(stage, 0)
    meta = AttnMeta.packed(batch.queries, causal=spec.causal)
    ids = torch.zeros(batch.rows, dtype=torch.int64)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        stage(ids, meta, rows=meta.last_rows)
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda each: each.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0.6 < stepcost.activation_bytes(spec, batch, 4) / peak < 1.4


def test_traffic_of_a_decode_step_is_weights_and_cache() -> None:
    spec, batch = preset("llama-8b"), Batch.decode([4096] * 8)
    weights = 2 * (stepcost.parameters(spec) - spec.hidden * spec.vocab + 8 * spec.hidden)
    assert stepcost.weight_bytes(spec, batch, 2) == weights
    assert stepcost.kv_traffic_bytes(spec, batch, 2) == 131072 * (8 + 8 * 4097)
    assert weights + stepcost.kv_traffic_bytes(spec, batch, 2) > 0.99 * stepcost.step_bytes(spec, batch, 2)
