"""Prepacked matrices give the logits of plain ones, in every family, and say where they cannot be."""

from dataclasses import replace

import pytest
import torch

from saih.errors import SaihError
from workloads.llm import config, loader
from workloads.llm import prepack as prepack_module
from workloads.llm.attention import AttnMeta
from workloads.llm.model import Stage
from workloads.llm.prepack import prepack
from workloads.llm.shard import ColumnLinear, RowLinear


@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny", "opt-tiny", "bert-tiny"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_prepacked_logits_are_those_of_plain_matrices(
    name: str, dtype: torch.dtype, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepack_module, "SMALLEST", 0)
    spec = config.preset(name)
    stage = Stage(spec, dtype=dtype)
    loader.random_init(stage, 3)
    meta = AttnMeta.packed([5, 1, 17], causal=spec.causal)
    ids = torch.arange(23) * 7 % spec.vocab
    wanted = stage(ids, meta)
    prepack(stage)
    assert all(each.weight.is_mkldnn for each in stage.modules() if isinstance(each, ColumnLinear | RowLinear))
    assert (stage.tokens if spec.tied else stage.head).prepacked.is_mkldnn
    assert wanted.std() > 0.1
    torch.testing.assert_close(stage(ids, meta), wanted, atol=atol, rtol=0)


def test_matrices_too_small_to_gain_stay_as_they_are() -> None:
    spec = replace(config.preset("llama-tiny"), ffn=4096, vocab=4095)  # 64 x 8192 into the MLP, 4096 x 64 out of it
    stage = Stage(spec, dtype=torch.float32)
    loader.random_init(stage, 3)
    prepack(stage)
    names = {name for name, parameter in stage.named_parameters() if parameter.is_mkldnn}
    assert names == {f"layers.{number}.mlp.{part}.weight" for number in range(spec.layers) for part in ("up", "down")}
    assert stage.head.prepacked is None


def test_matrices_that_cannot_be_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(SaihError, match="on a CPU with oneDNN only"):
        prepack(Stage(config.preset("llama-tiny")))


def test_a_torch_without_the_operators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack_module, "OPERATORS", ("_reorder_linear_weight", "_gone"))
    with pytest.raises(SaihError, match=r"lacks mkldnn._gone, which prepacked matrices need; use torch 2.13"):
        prepack(Stage(config.preset("llama-tiny")))
