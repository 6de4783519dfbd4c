"""Fill a stage's weights: from a local Hugging Face checkpoint, or at random; only this rank's slices, ever."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.config import ModelSpec
from workloads.llm.shard import Piece

_LLAMA = {
    "tokens": "model.embed_tokens",
    "layers.#.attn_norm": "model.layers.#.input_layernorm",
    "layers.#.attn.qkv.q": "model.layers.#.self_attn.q_proj",
    "layers.#.attn.qkv.k": "model.layers.#.self_attn.k_proj",
    "layers.#.attn.qkv.v": "model.layers.#.self_attn.v_proj",
    "layers.#.attn.q_norm": "model.layers.#.self_attn.q_norm",
    "layers.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
    "layers.#.attn.out": "model.layers.#.self_attn.o_proj",
    "layers.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.mlp.up.gate": "model.layers.#.mlp.gate_proj",
    "layers.#.mlp.up.up": "model.layers.#.mlp.up_proj",
    "layers.#.mlp.down": "model.layers.#.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_OPT = {
    "tokens": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions.weight",
    "layers.#.attn_norm": "model.decoder.layers.#.self_attn_layer_norm",
    "layers.#.attn.qkv.q": "model.decoder.layers.#.self_attn.q_proj",
    "layers.#.attn.qkv.k": "model.decoder.layers.#.self_attn.k_proj",
    "layers.#.attn.qkv.v": "model.decoder.layers.#.self_attn.v_proj",
    "layers.#.attn.out": "model.decoder.layers.#.self_attn.out_proj",
    "layers.#.mlp_norm": "model.decoder.layers.#.final_layer_norm",
    "layers.#.mlp.up.up": "model.decoder.layers.#.fc1",
    "layers.#.mlp.down": "model.decoder.layers.#.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}
_GPT2 = {
    "tokens": "transformer.wte",
    "positions": "transformer.wpe.weight",
    "layers.#.attn_norm": "transformer.h.#.ln_1",
    "layers.#.attn.qkv.q": "transformer.h.#.attn.c_attn",
    "layers.#.attn.qkv.k": "transformer.h.#.attn.c_attn",
    "layers.#.attn.qkv.v": "transformer.h.#.attn.c_attn",
    "layers.#.attn.out": "transformer.h.#.attn.c_proj",
    "layers.#.mlp_norm": "transformer.h.#.ln_2",
    "layers.#.mlp.up.up": "transformer.h.#.mlp.c_fc",
    "layers.#.mlp.down": "transformer.h.#.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
_BERT = {
    "tokens": "bert.embeddings.word_embeddings",
    "tokens.bias": "cls.predictions.bias",
    "positions": "bert.embeddings.position_embeddings.weight",
    "segments": "bert.embeddings.token_type_embeddings.weight",
    "embed_norm": "bert.embeddings.LayerNorm",
    "layers.#.attn.qkv.q": "bert.encoder.layer.#.attention.self.query",
    "layers.#.attn.qkv.k": "bert.encoder.layer.#.attention.self.key",
    "layers.#.attn.qkv.v": "bert.encoder.layer.#.attention.self.value",
    "layers.#.attn.out": "bert.encoder.layer.#.attention.output.dense",
    "layers.#.attn_norm": "bert.encoder.layer.#.attention.output.LayerNorm",
    "layers.#.mlp.up.up": "bert.encoder.layer.#.intermediate.dense",
    "layers.#.mlp.down": "bert.encoder.layer.#.output.dense",
    "layers.#.mlp_norm": "bert.encoder.layer.#.output.LayerNorm",
    "head_dense": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions.decoder",
    "head.bias": "cls.predictions.bias",
}
_T5 = {
    "tokens": "shared",
    **{
        f"{stack}{ours}": f"{stack}.block.{theirs}"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for ours, theirs in {
            ".#.attn_norm": "#.layer.0.layer_norm",
            ".#.attn.qkv.q": "#.layer.0.SelfAttention.q",
            ".#.attn.qkv.k": "#.layer.0.SelfAttention.k",
            ".#.attn.qkv.v": "#.layer.0.SelfAttention.v",
            ".#.attn.out": "#.layer.0.SelfAttention.o",
            "_distances": "0.layer.0.SelfAttention.relative_attention_bias.weight",
            ".#.mlp_norm": f"#.layer.{last}.layer_norm",
            ".#.mlp.up.up": f"#.layer.{last}.DenseReluDense.wi",
            ".#.mlp.down": f"#.layer.{last}.DenseReluDense.wo",
        }.items()
    },
    "decoder.#.cross_norm": "decoder.block.#.layer.1.layer_norm",
    "decoder.#.cross.q": "decoder.block.#.layer.1.EncDecAttention.q",
    "decoder.#.cross.kv.k": "decoder.block.#.layer.1.EncDecAttention.k",
    "decoder.#.cross.kv.v": "decoder.block.#.layer.1.EncDecAttention.v",
    "decoder.#.cross.out": "decoder.block.#.layer.1.EncDecAttention.o",
    "encoder_norm": "encoder.final_layer_norm",
    "final_norm": "decoder.final_layer_norm",
}
NAMES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "opt": _OPT, "gpt2": _GPT2, "bert": _BERT, "t5": _T5}
"""Family -> our module -> theirs; # is the layer. A full name of a parameter goes before that of its module."""


class Sliced(Protocol):
    """A stage, or anything else that says which slices of which tensors it holds."""

    def pieces(self) -> Iterator[Piece]: ...


class Described(Sliced, Protocol):
    """One that says besides which model it is of."""

    @property
    def spec(self) -> ModelSpec: ...


def load(stage: Described, folder: Path | str) -> int:
    """Read this stage's slices of a checkpoint folder (config.json, *.safetensors, an index if sharded).

    Returns the bytes read. Raises SaihError if a tensor is missing or has another shape than the spec says.
    Needs the safetensors package.
    """
    read = 0
    with ExitStack() as files:
        tensors = _open(Path(folder), files)
        for piece in stage.pieces():
            key = _find(source_name(stage.spec, piece.name), tensors, folder)
            shape, index, transposed = _place_there(stage.spec, piece)
            whole = tensors[key].get_slice(key)
            if tuple(whole.get_shape()) != shape:
                raise SaihError(f"{folder}: {key} is {tuple(whole.get_shape())}, the spec says {shape}")
            mine: Tensor = whole[index]
            read += mine.nbytes
            piece.target.copy_(mine.T if transposed else mine)
    return read


def state_dict(stage: Described) -> dict[str, Tensor]:
    """The weights of a whole model as a Hugging Face checkpoint names and shapes them: what `load` would read."""
    found: dict[str, Tensor] = {}
    for piece in stage.pieces():
        key = source_name(stage.spec, piece.name)
        shape, index, transposed = _place_there(stage.spec, piece)
        whole = found.setdefault(key, piece.target.new_empty(shape))
        whole[index] = piece.target.T if transposed else piece.target
    return found


def source_name(spec: ModelSpec, name: str) -> str:
    """The name in a Hugging Face checkpoint of a tensor of the whole model."""
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name)
    names = NAMES[spec.family]
    module, _, leaf = general.rpartition(".")
    theirs = names[general] if general in names else f"{names[module]}.{leaf}"
    return theirs.replace("#", number[1]) if number else theirs


def _place_there(spec: ModelSpec, piece: Piece) -> tuple[tuple[int, ...], tuple[slice, ...], bool]:
    """Whole shape, slice and whether it is transposed in the checkpoint.

    GPT-2 keeps the matrices of its layers transposed, and q, k, v side by side in one.
    """
    shape, index = piece.shape, piece.index
    if spec.family != "gpt2" or not piece.name.startswith("layers."):
        return shape, index, False
    if ".qkv." in piece.name:
        before = "qkv".index(piece.name.split(".")[-2]) * spec.hidden
        index = (slice(index[0].start + before, index[0].stop + before), *index[1:])
        shape = (3 * spec.hidden, *shape[1:])
    return shape[::-1], index[::-1], len(shape) == 2


def _open(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Name of a tensor -> the open file that has it. Opening reads a file's header only."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise SaihError("reading a checkpoint needs the safetensors package: pip install 'saih[llm]'") from None

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = [folder / name for name in sorted(_named_by(index))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SaihError(f"{folder} holds no *.safetensors; convert other formats with save_pretrained of transformers")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SaihError(f"{folder} lacks {', '.join(missing)}, which its index names")
    tensors: dict[str, Any] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise SaihError(f"{path} cannot be read as safetensors: {error}") from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _named_by(index: Path) -> set[str]:
    """The files that an index names, all beside it."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaihError(f"{index} is not an index of tensors ({type(error).__name__}: {error})") from error
    elsewhere = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if elsewhere:
        raise SaihError(f"{index} names files outside its folder: {', '.join(elsewhere[:3])}")
    return names


def _find(key: str, tensors: dict[str, Any], folder: Path | str) -> str:
    """The name as it stands in the files: some lack the prefix of the base model, old ones say gamma and beta."""
    bare = key.partition(".")[2]
    for each in (key, bare):
        for name in (
            each,
            re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", each),
            each.replace("Norm.bias", "Norm.beta"),
        ):
            if name in tensors:
                return name
    raise SaihError(f"{folder}: no tensor {key}; there are {len(tensors)}, the first is {min(tensors, default='none')}")


# -- Random weights ----------------------------------------------------------------------------------------------------

CHUNK = 1 << 22
"""Elements made at a time."""


def random_init(stage: Sliced, seed: int, std: float = 0.02) -> None:
    """Weights uniform with this deviation, norms 1, biases 0: the same model for any split and on any device.

    An element depends only on the seed, its tensor's name and its place there, so a rank makes its own slices alone.
    """
    for piece in stage.pieces():
        target = piece.target
        if piece.name.endswith("norm.weight"):
            target.fill_(1.0)
        elif piece.name.endswith("bias"):
            target.zero_()
        else:
            key = hashlib.sha256(f"{seed} {piece.name}".encode()).digest()[:8]
            _fill(target, piece, int.from_bytes(key, "little", signed=True), std)


def _fill(target_RC: Tensor, piece: Piece, key: int, std: float) -> None:
    rows, columns = piece.index
    column_C = torch.arange(columns.start, columns.stop, device=target_RC.device)
    step = max(1, CHUNK // len(column_C))
    for begin in range(rows.start, rows.stop, step):
        row_R = torch.arange(begin, min(begin + step, rows.stop), device=target_RC.device)
        noise_RC = _uniform(row_R[:, None] * piece.shape[1] + column_C, key)
        target_RC[begin - rows.start :][: len(row_R)] = noise_RC.mul_(std * math.sqrt(3))


def _uniform(counter: Tensor, key: int) -> Tensor:
    """fp32 in (-1, 1), a pure function of counter and key: splitmix64 (Steele et al., 2014), its upper 24 bits.

    Integers wrap alike on all devices, and each of the few float operations is exact or rounded once.
    """
    bits = (counter * _signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    bits = bits.bitwise_xor_(_shifted(bits, 31))
    return (bits >> 40).float().add_(0.5).mul_(2.0**-23)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in: int64 would bring in copies of its sign."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
