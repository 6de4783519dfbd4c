"""What a transformer is, read from a Hugging Face folder or a preset. Imports no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saih.errors import SaihError, unknown


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions reach further than the model was first trained for: "llama3" of Llama 3.1 and 3.2.

    Frequencies of a wave longer than the old context over `low` are divided by `factor`, those of one shorter than it
    over `high` stay, and between the two it goes over smoothly.
    """

    factor: float
    low: float
    high: float
    old_positions: int


@dataclass(frozen=True)
class ModelSpec:
    """The shape and the choices of one transformer."""

    family: str
    """One of FAMILIES: decides the names in a checkpoint."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm: str = "layer"
    """'layer' (mean and variance, with bias) or 'rms' (no mean, no bias)."""
    norm_eps: float = 1e-5
    post_norm: bool = False
    """BERT: normalise after the residual sum, and the embeddings; otherwise before each branch, and once at the end."""
    activation: str = "gelu"
    """'relu', 'gelu' (exact), 'gelu_tanh', or 'swiglu' (silu(gate) * up)."""
    rope_theta: float = 0.0
    """Base of rotary positions; 0 = a learned table."""
    rope_scaling: RopeScaling | None = None
    position_offset: int = 0
    """Row of the learned table where position 0 stands (OPT: 2)."""
    causal: bool = True
    tied: bool = True
    """The head uses the matrix of the token embedding."""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    """RMS norm over each head of q and k before rotation (Qwen3)."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise SaihError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")

    @property
    def masked_lm(self) -> bool:
        """BERT: two segments, and a head with a dense layer, a norm and a bias."""
        return self.family == "bert"

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def table_rows(self) -> int:
        """Rows of the learned position table; 0 with rotary positions."""
        return 0 if self.rope_theta else self.max_positions + self.position_offset


def split_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Consecutive layers of each pipeline stage; the first stages take one more where it does not divide.

    Raises SaihError if there are fewer layers than stages.
    """
    if not 1 <= stages <= layers:
        raise SaihError(f"{layers} layers cannot be split over {stages} pipeline stages; at most one stage a layer")
    small, more = divmod(layers, stages)
    starts = [stage * small + min(stage, more) for stage in range(stages + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(starts))


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def from_hf(source: Path | str | Mapping[str, Any]) -> ModelSpec:
    """The spec of a checkpoint folder (its config.json) or of the content of a config.json.

    Raises SaihError for a family that is not here and for variants whose arithmetic differs from what the core does.
    """
    config = source if isinstance(source, Mapping) else _read(Path(source))
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise unknown("model type", family, FAMILIES, "config.json")
    try:
        return FAMILIES[family](config)
    except KeyError as error:
        raise SaihError(f"config.json of a {family} model lacks {error}") from None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise SaihError(f"{path} does not exist; a checkpoint folder holds config.json and *.safetensors") from None
    except (ValueError, TypeError) as error:
        raise SaihError(f"{path} is not a JSON object: {error}") from None


def _only(config: Mapping[str, Any], **allowed: Any) -> None:
    """Refuse a variant: each named setting must be absent or have this value."""
    for key, value in allowed.items():
        if config.get(key, value) != value:
            raise SaihError(f"{config['model_type']} with {key}={config[key]!r} is not supported, only {value!r}")


def _activation(config: Mapping[str, Any], key: str) -> str:
    names = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if config[key] not in names:
        raise unknown("activation", config[key], names, config["model_type"])
    return names[config[key]]


def _llama(config: Mapping[str, Any]) -> ModelSpec:
    family = config["model_type"]
    _only(config, hidden_act="silu", use_sliding_window=False)
    if "use_sliding_window" not in config:  # else it decides, and a width that is stated is not used
        _only(config, sliding_window=None)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    attention_bias = config.get("attention_bias", False)
    return ModelSpec(
        family=family,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm="rms",
        norm_eps=config["rms_norm_eps"],
        activation="swiglu",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, family),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=family == "qwen3",
    )


def _rope_scaling(rope: Mapping[str, Any], family: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise SaihError(
            f"{family} with rotary positions of type {kind!r} is not supported, only 'default' and 'llama3'"
        )
    return RopeScaling(
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _opt(config: Mapping[str, Any]) -> ModelSpec:
    _only(config, do_layer_norm_before=True, enable_bias=True, layer_norm_elementwise_affine=True)
    _only(config, word_embed_proj_dim=config["hidden_size"], _remove_final_layer_norm=False)
    heads = config["num_attention_heads"]
    return ModelSpec(
        family="opt",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        ffn=config["ffn_dim"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        activation=_activation(config, "activation_function"),
        position_offset=2,
        tied=config.get("tie_word_embeddings", True),
    )


def _gpt2(config: Mapping[str, Any]) -> ModelSpec:
    _only(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    heads = config["n_head"]
    return ModelSpec(
        family="gpt2",
        layers=config["n_layer"],
        hidden=config["n_embd"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["n_embd"] // heads,
        ffn=config.get("n_inner") or 4 * config["n_embd"],
        vocab=config["vocab_size"],
        max_positions=config["n_positions"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function"),
        tied=config.get("tie_word_embeddings", True),
    )


def _bert(config: Mapping[str, Any]) -> ModelSpec:
    _only(config, position_embedding_type="absolute", is_decoder=False)
    heads = config["num_attention_heads"]
    return ModelSpec(
        family="bert",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["layer_norm_eps"],
        post_norm=True,
        activation=_activation(config, "hidden_act"),
        causal=False,
        tied=config.get("tie_word_embeddings", True),
    )


FAMILIES = {"llama": _llama, "qwen2": _llama, "qwen3": _llama, "opt": _opt, "gpt2": _gpt2, "bert": _bert}

# -- Presets -----------------------------------------------------------------------------------------------------------


def _gpt(layers: int, hidden: int, heads: int) -> ModelSpec:
    """The shapes of GPT-3 (Brown et al., 2020, table 2.1), as GPT-2 models: same arithmetic, dense attention."""
    return ModelSpec(
        "gpt2", layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50257, 2048, activation="gelu_tanh"
    )


_LLAMA = ModelSpec(
    "llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab=128256,
    max_positions=8192,
    norm="rms",
    activation="swiglu",
    rope_theta=500000.0,
    tied=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
_LLAMA_TINY = replace(_LLAMA, layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512)
_BERT = ModelSpec("bert", 12, 768, 12, 12, 64, 3072, 30522, 512, norm_eps=1e-12, post_norm=True, causal=False)

PRESETS = {
    "gpt-tiny": replace(_gpt(4, 64, 4), vocab=512),
    "gpt-mini": replace(_gpt(6, 512, 8), vocab=8192),
    "gpt-125m": _gpt(12, 768, 12),
    "gpt-350m": _gpt(24, 1024, 16),
    "gpt-760m": _gpt(24, 1536, 16),
    "gpt-1.3b": _gpt(24, 2048, 16),
    "gpt-2.7b": _gpt(32, 2560, 32),
    "gpt-6.7b": _gpt(32, 4096, 32),
    "gpt-13b": _gpt(40, 5120, 40),
    "gpt-175b": _gpt(96, 12288, 96),
    "opt-tiny": replace(
        _gpt(4, 64, 4), family="opt", vocab=512, max_positions=8192, activation="relu", position_offset=2
    ),
    "bert-tiny": replace(_BERT, layers=4, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=256, vocab=512),
    "bert-mini": replace(_BERT, layers=8, hidden=384, heads=6, kv_heads=6, ffn=1536, vocab=2048),
    "bert-base": _BERT,
    "bert-large": replace(_BERT, layers=24, hidden=1024, heads=16, kv_heads=16, ffn=4096),
    "llama-tiny": _LLAMA_TINY,
    "llama-mini": replace(_LLAMA_TINY, layers=8, hidden=512, heads=8, head_dim=64, ffn=1408, vocab=8192),
    "llama-1b": replace(_LLAMA, layers=16, hidden=2048, head_dim=64, ffn=8192, tied=True),
    "llama-8b": _LLAMA,
    "llama-70b": replace(_LLAMA, layers=80, hidden=8192, heads=64, ffn=28672),
}
"""Name -> shape. Those of published models are their shapes with random weights, never their checkpoints."""


def preset(name: str) -> ModelSpec:
    """Raises SaihError with the valid names for one that does not exist."""
    if name not in PRESETS:
        raise unknown("model", name, PRESETS)
    return PRESETS[name]
