"""Where models come from: a local folder in the layout of diffusers, the toy that is shipped, or random weights.

Nothing is ever fetched from a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saih.errors import SaihError
from workloads.video.adapters import ADAPTERS, Adapter, Condition, adapt
from workloads.video.loop import COND, UNCOND, Loop, Request
from workloads.video.shapes import POOLED_WIDTH, settings
from workloads.video.words import FILE as WORDS
from workloads.video.words import WordEmbeddings

TOY = Path(__file__).parent / "toy" / "weights"
"""Folders of the shipped models: `large` and `small` share latents, words and schedule."""

PIXEL_SCALE = 2.0
"""Latents of a checkpoint without a VAE are pixels of [-1, 1] times this."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with what makes requests for it and pixels of its latents.

    Attributes:
        adapter: of the transformer.
        scheduler: of the checkpoint; for CogVideoX its deterministic DDIM, since the loop takes steps without noise.
        trained: whether quality means anything.
        words: the table of a toy.
        pipeline: the pipeline of a folder with a text encoder and a VAE.
    """

    adapter: Adapter
    scheduler: Any
    device: str
    trained: bool = True
    words: WordEmbeddings | None = None
    pipeline: Any = None

    def loop(self, *others: Checkpoint) -> Loop:
        """A denoise loop with this model first; the others must share its latents, conditions and schedule."""
        return Loop([self.adapter, *(other.adapter for other in others)], self.scheduler, self.device)

    def request(self, prompt: str, grid: Sequence[int], steps: int, guidance: float, seed: int) -> Request:
        """A request for one video of `grid` latent frames, rows and columns; the same noise on every device.

        Without guidance above 1 there is no second branch, as in the pipelines.

        Raises SaihError for a prompt that a toy's table does not know.
        """
        channels, (frames, rows, columns) = self.adapter.module.config.in_channels, grid
        shape = (frames, channels) if self.adapter.frames_first else (channels, frames)
        noise = torch.randn(1, *shape, rows, columns, generator=torch.Generator().manual_seed(seed))
        conditions = self._conditions(prompt, grid, guidance)
        if not self.adapter.embedded_guidance:
            order = (UNCOND, COND) if self.adapter.joint else (COND, UNCOND)
            conditions = {branch: conditions[branch] for branch in order if branch == COND or guidance > 1}
        return Request(noise.to(self.device), conditions, guidance, steps)

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """A video as people see it: float32 in [0, 1], [frames, channels, rows, columns]."""
        if self.pipeline is None:
            return (latents[0].transpose(0, 1).float() / PIXEL_SCALE / 2 + 0.5).clamp(0, 1)
        video: Tensor = self.pipeline.video_processor.postprocess_video(self._decode(latents), output_type="pt")[0]
        return video.float()

    def _decode(self, latents: Tensor) -> Tensor:
        """As each family's pipeline does it."""
        vae = self.pipeline.vae
        if self.adapter.frames_first:
            video: Tensor = self.pipeline.decode_latents(latents)
            return video
        latents = latents.to(vae.dtype)
        if "latents_mean" in vae.config and vae.config.latents_mean is not None:
            mean, deviation = (
                torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
                for values in (vae.config.latents_mean, vae.config.latents_std)
            )
            video = vae.decode(latents * deviation + mean, return_dict=False)[0]
        else:
            video = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return video

    @torch.no_grad()
    def _conditions(self, prompt: str, grid: Sequence[int], guidance: float) -> dict[str, Condition]:
        texts = {COND: prompt, UNCOND: ""}
        if self.words is not None:
            return {
                branch: {"encoder_hidden_states": self.words.encode([text]).to(self.device)}
                for branch, text in texts.items()
            }
        if self.pipeline is None:
            drawn = {branch: self._random_condition(text, grid, guidance) for branch, text in texts.items()}
            return {COND: drawn[COND]} if self.adapter.embedded_guidance else drawn
        if self.adapter.embedded_guidance:
            return {COND: self._hunyuan_condition(prompt, guidance)}
        encoded = self.pipeline.encode_prompt(prompt, "", True, device=self.device)
        told: dict[str, Condition] = {
            branch: {"encoder_hidden_states": text} for branch, text in zip(texts, encoded, strict=True)
        }
        if self.adapter.frames_first:
            scale = self.pipeline.vae_scale_factor_spatial
            place = (grid[1] * scale, grid[2] * scale, grid[0], self.device)
            rotary = None
            if self.adapter.module.config.use_rotary_positional_embeddings:  # 5B has them, 2B has not
                rotary = self.pipeline._prepare_rotary_positional_embeddings(*place)
            told = {branch: {**condition, "image_rotary_emb": rotary} for branch, condition in told.items()}
        return told

    def _hunyuan_condition(self, prompt: str, guidance: float) -> Condition:
        text, pooled, mask = self.pipeline.encode_prompt(prompt, device=self.device)
        scale = torch.tensor([1000.0 * guidance], dtype=text.dtype, device=self.device)
        return {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "encoder_attention_mask": mask.to(text.dtype),
            "guidance": scale,
        }

    def _random_condition(self, prompt: str, grid: Sequence[int], guidance: float) -> Condition:
        """Random weights need some text; the same for the same prompt."""
        generator = torch.Generator().manual_seed(int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16))
        config, dtype = self.adapter.module.config, self.adapter.module.dtype

        def drawn(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator).to(self.device, dtype)

        if self.adapter.embedded_guidance:
            return {
                "encoder_hidden_states": drawn(HUNYUAN_TEXT_TOKENS, config.text_embed_dim),
                "pooled_projections": drawn(POOLED_WIDTH),
                "encoder_attention_mask": torch.ones(1, HUNYUAN_TEXT_TOKENS, device=self.device, dtype=dtype),
                "guidance": torch.tensor([1000.0 * guidance], device=self.device, dtype=dtype),
            }
        if not self.adapter.frames_first:
            return {"encoder_hidden_states": drawn(TEXT_TOKENS, config.text_dim)}
        return {
            "encoder_hidden_states": drawn(TEXT_TOKENS, config.text_embed_dim),
            "image_rotary_emb": self._rotary(grid),
        }

    def _rotary(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Angles of a CogVideoX for a grid of its own, as its pipeline has them where nothing is cropped."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        config = self.adapter.module.config
        frames, (rows, columns) = grid[0], (size // config.patch_size for size in grid[1:])
        cosine, sine = get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), (rows, columns)), (rows, columns), frames, device=self.device
        )
        return cosine, sine


TEXT_TOKENS, HUNYUAN_TEXT_TOKENS = 226, 256
"""Of a request for a model without a text encoder: what the pipelines pad to, Wan's and CogVideoX's, HunyuanVideo's."""


def transformer(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Adapter:
    """The transformer alone of a checkpoint folder: enough for a loop's second model.

    Raises:
        SaihError: there is none, it has no adapter, or its pipeline is one of Wan 2.2.
    """
    import diffusers

    model = getattr(diffusers, _family(folder)).from_pretrained(folder / "transformer", torch_dtype=dtype)
    return _ready(model, device)


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The checkpoint in a local folder in the layout of diffusers.

    Raises:
        SaihError: there is none, its transformer has no adapter, its pipeline is one of Wan 2.2, or it has neither
            text encoder nor table of words.
    """
    import diffusers

    family = _family(folder)
    if (folder / WORDS).is_file():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        return Checkpoint(transformer(folder, device, dtype), scheduler, device, words=WordEmbeddings.load(folder))
    if not (folder / "text_encoder").is_dir():
        raise SaihError(f"{folder} has neither a text_encoder nor {WORDS}: nothing there can read a prompt")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    if family == "CogVideoXTransformer3DModel":
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(scheduler.config)
    return Checkpoint(_ready(pipeline.transformer, device), scheduler, device, pipeline=pipeline)


def _family(folder: Path) -> str:
    described = folder / "transformer" / "config.json"
    if not described.is_file():
        raise SaihError(f"{folder} is no checkpoint folder: it has no transformer/config.json")
    family: str = json.loads(described.read_text())["_class_name"]
    if family not in ADAPTERS:
        raise SaihError(f"{folder}: no adapter for {family}; there are adapters for {', '.join(ADAPTERS)}")
    index = folder / "model_index.json"
    pipeline = json.loads(index.read_text()) if index.is_file() else {}
    for setting in ("boundary_ratio", "expand_timesteps"):
        if pipeline.get(setting):
            raise SaihError(
                f"{folder}: {setting}={pipeline[setting]} is of Wan 2.2, whose pipeline takes other steps than the "
                "loop here; Wan 2.1 is adapted"
            )
    return family


def identity(folder: Path) -> str:
    """What the weights of a checkpoint folder are known by: names, sizes and times of its files, to a hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def random(
    family: str, layers: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Checkpoint:
    """A transformer of any family and size with random weights and its own latents and text, for speed alone.

    `family` is one of `shapes.FAMILIES`.
    """
    import diffusers

    made, scheduler = {
        "wan": (diffusers.WanTransformer3DModel, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        "cogvideox": (diffusers.CogVideoXTransformer3DModel, diffusers.CogVideoXDDIMScheduler()),
        "hunyuanvideo": (
            diffusers.HunyuanVideoTransformer3DModel,
            diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        ),
    }[family]
    torch.manual_seed(seed)
    with torch.device(device):
        model = made(**settings(family, layers, width)).to(dtype)
    return Checkpoint(_ready(model, device), scheduler, device, trained=False)


def _ready(model: nn.Module, device: str) -> Adapter:
    return adapt(model.to(device).eval().requires_grad_(False))
