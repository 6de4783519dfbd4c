"""Tiny random video transformers of each family, with a request and the plain diffusers pipeline to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workloads.video.adapters import Adapter, adapt
from workloads.video.loop import COND, UNCOND, Loop, Request

STEPS, GUIDANCE = 4, 3.0


@dataclass(frozen=True)
class Tiny:
    """A loop, a request, and what the pipeline of diffusers makes of the same request."""

    loop: Loop
    request: Request
    pipeline: Callable[[], Tensor]

    @property
    def adapter(self) -> Adapter:
        return self.loop.models[0]


def wan_model(seed: int = 0, layers: int = 4) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def wan() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    model = wan_model()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(1)
    noise, text, no_text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    pipe = WanPipeline(None, None, None, scheduler, transformer=model)

    def pipeline() -> Tensor:
        return _latents(
            pipe,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise,
            prompt_embeds=text,
            negative_prompt_embeds=no_text,
        )

    conditions = {COND: {"encoder_hidden_states": text}, UNCOND: {"encoder_hidden_states": no_text}}
    return Tiny(Loop([adapt(model)], scheduler), Request(noise, conditions, GUIDANCE, STEPS), pipeline)


def cogvideox() -> Tiny:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    ).eval()
    scheduler = CogVideoXDDIMScheduler()
    noise, text, no_text = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    pipe = CogVideoXPipeline(None, None, None, model, scheduler)

    def pipeline() -> Tensor:
        return _latents(
            pipe,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise,
            prompt_embeds=text,
            negative_prompt_embeds=no_text,
            max_sequence_length=6,
        )

    rotary = pipe._prepare_rotary_positional_embeddings(64, 64, 3, torch.device("cpu"))
    conditions = {
        UNCOND: {"encoder_hidden_states": no_text, "image_rotary_emb": rotary},
        COND: {"encoder_hidden_states": text, "image_rotary_emb": rotary},
    }
    return Tiny(Loop([adapt(model)], scheduler), Request(noise, conditions, GUIDANCE, STEPS), pipeline)


def hunyuan(true_cfg: bool = False) -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    noise, pooled = torch.randn(1, 4, 3, 8, 8), torch.randn(2, 1, 8)
    text, mask = torch.randn(2, 1, 6, 16), torch.tensor([[[1, 1, 1, 1, 0, 0]], [[1, 1, 0, 0, 0, 0]]])
    pipe = HunyuanVideoPipeline(None, None, model, None, scheduler, None, None)
    negative = {
        "true_cfg_scale": GUIDANCE,
        "negative_prompt_embeds": text[1],
        "negative_pooled_prompt_embeds": pooled[1],
        "negative_prompt_attention_mask": mask[1],
    }

    def pipeline() -> Tensor:
        return _latents(
            pipe,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=STEPS,
            guidance_scale=6.0,
            latents=noise,
            prompt_embeds=text[0],
            pooled_prompt_embeds=pooled[0],
            prompt_attention_mask=mask[0],
            **(negative if true_cfg else {}),
        )

    conditions = {
        branch: {
            "encoder_hidden_states": text[place],
            "encoder_attention_mask": mask[place].float(),
            "pooled_projections": pooled[place],
            "guidance": torch.tensor([6000.0]),
        }
        for place, branch in enumerate((COND, UNCOND) if true_cfg else (COND,))
    }
    return Tiny(Loop([adapt(model)], scheduler), Request(noise, conditions, GUIDANCE, STEPS), pipeline)


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "wan": wan,
    "cogvideox": cogvideox,
    "hunyuan": hunyuan,
    "hunyuan with a second branch": lambda: hunyuan(true_cfg=True),
}


def _latents(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        frames: Tensor = pipe(**arguments, output_type="latent", return_dict=False)[0]
    return frames
