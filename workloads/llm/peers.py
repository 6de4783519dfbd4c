"""Other engines on the same weights and requests: transformers in two ways, CTranslate2. Imported when asked for."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.config import ModelSpec
from workloads.llm.request import Request

BLOCK_TOKENS = 256
"""Of the cache of transformers: its default."""


class Generator(Protocol):
    """Continues prompts greedily."""

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """`max_new_tokens` tokens of each request; nothing else stops it."""

    def close(self) -> None:
        """Ends what runs beside."""


def peer(
    engine: str, model: Any, requests: Sequence[Request], batching: str, max_requests: int, max_tokens: int
) -> Generator:
    """The engine of this name around a model of transformers; `requests` are those it will be asked to serve."""
    if engine == "hf-generate":
        return StaticBatches(model, batching, max_requests)
    if engine == "hf-continuous":
        return ContinuousBatches(model, requests, max_requests, max_tokens)
    return CTranslate2(model, batching, max_requests)


def batches_of(requests: Sequence[Request], batching: str, max_requests: int) -> list[list[int]]:
    """Places of the requests that share a batch in an engine that lets none join later.

    prompts: of like prompt length, so that little is filled up; outputs: of like output length, so that few wait for
    the longest; equal: of one prompt length only; together: all in one batch, whatever `max_requests` is.
    """
    if batching == "together":
        return [list(range(len(requests)))]
    sizes = [len(each.prompt) if batching != "outputs" else each.max_new_tokens for each in requests]
    order = sorted(range(len(requests)), key=sizes.__getitem__)
    found: list[list[int]] = []
    for place in order:
        full = not found or len(found[-1]) == max_requests
        if full or (batching == "equal" and sizes[found[-1][0]] != sizes[place]):
            found.append([])
        found[-1].append(place)
    return found


def hf_model(spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> Any:
    """A model of transformers with these weights, named as in a checkpoint.

    Raises SaihError where transformers lacks a weight or wants more.
    """
    transformers = _package("transformers")
    model = transformers.AutoModelForCausalLM.from_config(_hf_config(spec), dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unknown = [*unexpected, *(name for name in missing if not (spec.tied and name == "lm_head.weight"))]
    if unknown:
        raise SaihError(f"transformers and the core differ in the weights of a {spec.family}: {', '.join(unknown)}")
    return model.to(device).eval()


def hf_checkpoint(folder: str, dtype: torch.dtype, device: str) -> Any:
    """A model of transformers from a local folder."""
    transformers = _package("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.generation_config = transformers.GenerationConfig()  # a checkpoint's own would stop at its end token
    return model.to(device).eval()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SaihError(f"this engine needs the {name} package ({error}): pip install 'saih[peers]'") from None


def _hf_config(spec: ModelSpec) -> Any:
    """The config of transformers that `config.from_hf` reads as this spec."""
    transformers = _package("transformers")
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"vocab_size": spec.vocab, "tie_word_embeddings": spec.tied, **ends}
    if spec.family == "llama":
        return transformers.LlamaConfig(
            **common,
            hidden_size=spec.hidden,
            intermediate_size=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.max_positions,
            rms_norm_eps=spec.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},  # presets have no other
        )
    if spec.family == "gpt2":
        return transformers.GPT2Config(
            **common,
            n_embd=spec.hidden,
            n_inner=spec.ffn,
            n_layer=spec.layers,
            n_head=spec.heads,
            n_positions=spec.max_positions,
            layer_norm_epsilon=spec.norm_eps,
        )
    if spec.family == "opt":
        return transformers.OPTConfig(
            **common,
            hidden_size=spec.hidden,
            ffn_dim=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            max_position_embeddings=spec.max_positions,
            word_embed_proj_dim=spec.hidden,
        )
    raise SaihError(f"no random {spec.family} model for transformers; use --set checkpoint=DIR")


class StaticBatches:
    """`generate` over batches padded on the left; a batch ends with its last request."""

    def __init__(self, model: Any, batching: str, max_requests: int) -> None:
        self.model, self.batching, self.max_requests = model, batching, max_requests

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in requests]
        for places in batches_of(requests, self.batching, self.max_requests):
            for place, tokens in zip(places, self._batch([requests[place] for place in places]), strict=True):
                found[place] = tokens[: requests[place].max_new_tokens]
        return found

    def _batch(self, requests: Sequence[Request]) -> list[list[int]]:
        longest = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        settings = _package("transformers").GenerationConfig(
            do_sample=False, max_new_tokens=max(request.max_new_tokens for request in requests), pad_token_id=0
        )
        device = self.model.device
        out = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        tokens: list[list[int]] = out[:, longest:].tolist()
        return tokens

    def close(self) -> None:
        """Nothing runs beside."""


class ContinuousBatches:
    """Continuous batching of transformers, with as many requests, tokens and cache as the engine of the core has.

    Blocks are not shared: the same prompts come again in every step, and would be found in the cache.
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        max_requests: int,
        max_tokens: int,
        *,
        cache_tokens: int = 0,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """cache_tokens: room of the cache; 0 = for as many of the longest request as a batch may have.

        block_tokens: of its blocks. A request has whole ones, so an equal cache needs equal blocks too.
        """
        transformers = _package("transformers")
        settings = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        blocks = -(-cache_tokens // block_tokens) or max_requests * -(-longest // block_tokens)
        batching = transformers.ContinuousBatchingConfig(
            block_size=block_tokens,
            num_blocks=blocks + 1,
            max_batch_tokens=max_tokens,
            max_requests_per_batch=max_requests,
            allow_block_sharing=False,
        )
        self.manager = model.init_continuous_batching(settings, batching)
        self.manager.start()

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        names = [
            self.manager.add_request(list(request.prompt), max_new_tokens=request.max_new_tokens)
            for request in requests
        ]
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise SaihError("the continuous batching of transformers ended; its log says why")
            if result is not None and result.error is not None:
                raise SaihError(f"the continuous batching of transformers failed: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        return [found[name] for name in names]

    def close(self) -> None:
        self.manager.stop(block=True)


class CTranslate2:
    """CTranslate2: batches that requests leave when they are done, and none joins."""

    def __init__(self, model: Any, batching: str, max_requests: int) -> None:
        package = _package("ctranslate2")
        device = model.device.type
        kind = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[model.dtype]
        able = sorted(package.get_supported_compute_types(device))
        if kind not in able:
            raise SaihError(f"ctranslate2 has no {kind} on {device} here, only {', '.join(able)}")
        self.batching, self.max_requests = batching, max_requests
        with tempfile.TemporaryDirectory() as folder:
            _save_with_tokenizer(model, Path(folder) / "hf")
            converter = package.converters.TransformersConverter(str(Path(folder) / "hf"))
            converter.convert(str(Path(folder) / "ct2"))
            self.generator = package.Generator(
                str(Path(folder) / "ct2"), device=device, compute_type=kind, intra_threads=torch.get_num_threads()
            )

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in requests]
        for places in batches_of(requests, self.batching, self.max_requests):
            for place, tokens in zip(places, self._batch([requests[place] for place in places]), strict=True):
                found[place] = tokens
        return found

    def _batch(self, requests: Sequence[Request]) -> list[list[int]]:
        wanted = [request.max_new_tokens for request in requests]

        def is_done(result: Any) -> bool:  # its `step` counts from the shortest prompt of a batch, not from each one's
            wanted[result.batch_id] -= 1
            return not wanted[result.batch_id]

        results = self.generator.generate_batch(
            [[str(token) for token in request.prompt] for request in requests],
            max_batch_size=len(requests),
            max_length=max(wanted),
            min_length=max(wanted),
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=None if min(wanted) == max(wanted) else is_done,
        )
        return [result.sequences_ids[0] for result in results]

    def close(self) -> None:
        self.generator.unload_model()


def _save_with_tokenizer(model: Any, folder: Path) -> None:
    """The model as its converter wants it: with a tokenizer, here one whose words are the numbers of the tokens."""
    transformers, tokenizers = _package("transformers"), _package("tokenizers")
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "0")
    words = {str(token): token for token in range(model.config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, special["unk_token"]))
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
