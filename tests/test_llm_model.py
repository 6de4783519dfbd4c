"""The transformer core against Hugging Face transformers on the same random weights, in every split."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from saih.errors import SaihError
from tests import llm_ranks
from tests.conftest import package
from tests.llm_ranks import BACKENDS, STAGES, Pipeline, errors_of, gradients_of, ids_of
from workloads.llm.config import from_hf
from workloads.llm.loader import load
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = package("transformers", whole_module=True)

VOCAB = 131
"""Odd, so that the vocabulary does not divide."""
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, rope_theta=5e5, tie_word_embeddings=False)
    ),
    "llama3": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **LLAMA,
            num_key_value_heads=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e3,
                "factor": 4.0,
                "low_freq_factor": 0.5,  # waves of 16, 32 and 64 positions: each of the three ways is taken
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=5,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=5, n_head=4, n_positions=64)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    ),
}
TRAINED = ["qwen3", "opt", "bert"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder with a model of random weights (biases and norms too), its logits, and gradients of some."""
    torch.manual_seed(0)
    folders = {}
    for family, make in FAMILIES.items():
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, max_shard_size="20KB" if family in ("llama", "gpt2") else "1GB")
        logits = [model(ids[None]).logits[0] for ids in ids_of(VOCAB)]
        torch.save([each.detach().clone() for each in logits], folder / "logits.pt")
        if family in TRAINED:
            torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(ids_of(VOCAB)).flip(0)).backward()
            gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
            torch.save(gradients, folder / "gradients.pt")
    return folders


@pytest.fixture(scope="session")
def ranks(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes found, all cases in one start."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {family: str(folder) for family, folder in checkpoints.items()}
    mp.spawn(llm_ranks.four_ranks, (port, folders, TRAINED, str(out)), nprocs=4)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pp", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(checkpoints: dict[str, Path], family: str, pp: int, backend: str) -> None:
    wanted = torch.load(checkpoints[family] / "logits.pt", weights_only=True)
    with torch.inference_mode():
        found = errors_of(Pipeline(checkpoints[family], backend, pp), backend, wanted)
    assert max(found.values()) < 1e-4, found
    assert torch.cat(wanted).std() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pp", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_are_on_two_tensor_parallel_ranks(ranks: Path, family: str, pp: int, backend: str) -> None:
    for rank in range(2):
        found = json.loads((ranks / f"{family}{rank}.json").read_text())[f"pp={pp} {backend}"]
        assert max(found.values()) < 1e-4, found


def test_a_grid_of_processes_finds_its_places(ranks: Path) -> None:
    found = [json.loads((ranks / f"grid{rank}.json").read_text()) for rank in (2, 3)]
    assert [place for _, *place in found] == [[0, [3, 4]], [1, [3, 4]]]
    assert all(error < 1e-4 for error, *_ in found)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("family", TRAINED)
def test_gradients_are_those_of_transformers(checkpoints: dict[str, Path], family: str, pp: int) -> None:
    compare_gradients(checkpoints[family], gradients_of(Pipeline(checkpoints[family], "loop", pp)))


@pytest.mark.parametrize("family", TRAINED)
def test_so_gradients_are_on_two_ranks(checkpoints: dict[str, Path], ranks: Path, family: str) -> None:
    """Each rank has the gradients of its slices, and whole ones of what is not cut."""
    (one, cut), (other, _) = (torch.load(ranks / f"{family}{rank}.pt", weights_only=True) for rank in range(2))
    assert cut
    for mine, theirs in ((one, other), (other, one)):
        joined = {name: mine[name] + theirs[name] if name in cut else mine[name] for name in mine}
        compare_gradients(checkpoints[family], joined)


def compare_gradients(folder: Path, found: dict[str, torch.Tensor]) -> None:
    wanted = torch.load(folder / "gradients.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_its_slices_alone(checkpoints: dict[str, Path], family: str) -> None:
    spec = from_hf(checkpoints[family])
    stages = [Stage(spec, Mesh(2, 2, tp, pp)) for pp in range(2) for tp in range(2)]
    read = [load(stage, checkpoints[family]) for stage in stages]
    assert read == [sum(parameter.nbytes for parameter in stage.parameters()) for stage in stages]
    whole = load(Stage(spec), checkpoints[family])
    assert max(read) < 0.45 * whole


def test_a_checkpoint_of_the_base_model_and_old_names_are_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for family, prefix in (("opt", "model."), ("bert", "bert.")):
        folder = tmp_path / family
        folder.mkdir()
        tensors = load_file(checkpoints[family] / "model.safetensors")
        old = {
            name.removeprefix(prefix)
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("Norm.bias", "Norm.beta"): t
            for name, t in tensors.items()
        }
        if family == "opt":
            old = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        assert old.keys() != tensors.keys()
        save_file(old, folder / "model.safetensors")
        (folder / "config.json").write_text((checkpoints[family] / "config.json").read_text())
        one, other = Stage(from_hf(folder)), Stage(from_hf(folder))
        assert load(one, folder) == load(other, checkpoints[family])
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_is_wrong_with_a_checkpoint_is_said(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    spec = from_hf(checkpoints["opt"])
    with pytest.raises(SaihError, match=r"holds no \*.safetensors"):
        load(Stage(spec), tmp_path)
    with pytest.raises(SaihError, match=r"embed_tokens.weight is \(131, 32\), the spec says \(132, 32\)"):
        load(Stage(replace(spec, vocab=132)), checkpoints["opt"])
    with pytest.raises(SaihError, match=r"no tensor model.decoder.layers.5"):
        load(Stage(replace(spec, layers=6)), checkpoints["opt"])
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SaihError, match=r"lacks model-00001-of-00002.safetensors, which its index names"):
        load(Stage(spec), tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"rubbish that is no header")
    with pytest.raises(SaihError, match=r"model-00001-of-00002.safetensors cannot be read as safetensors: "):
        load(Stage(spec), tmp_path)
    for text, why in (
        ("{", "is not an index of tensors"),
        ("{}", "is not an index of tensors .*weight_map"),
        ('{"weight_map": ["a"]}', "is not an index of tensors"),
        ('{"weight_map": {"x": "../a.safetensors", "y": "/b.safetensors"}}', "outside its folder: ../a.*, /b.safe"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(SaihError, match=why):
            load(Stage(spec), tmp_path)
