"""Video transformers taken apart: embed, any range of blocks, head; one small adapter for each family of diffusers.

Taken one after the other the parts are the transformer's own `forward`, bit for bit: what a system does in between is
the only difference from the plain pipeline. Calls go through the modules themselves: hooks on them keep working.

Shapes: B = rows of a batch, S = video tokens, L = text tokens, D = width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saih.errors import SaihError

Condition = Mapping[str, Any]
"""What a branch is conditioned on: keyword arguments of the transformer's forward beside latents and timestep."""


@dataclass(frozen=True)
class State:
    """A forward that has come to some block.

    Attributes:
        streams: what blocks change: video tokens [B, S, D] and, in families that update it, text [B, L, D].
        fixed: what blocks only read (time, text, rotary angles, masks), by name.
        grid: frames, rows and columns of video tokens; S is their product unless `select` took some.
    """

    streams: tuple[Tensor, ...]
    fixed: Mapping[str, Any]
    grid: tuple[int, int, int]

    @property
    def rows(self) -> int:
        return self.streams[0].shape[0]

    def minus(self, earlier: State) -> tuple[Tensor, ...]:
        """The residual that the blocks in between have added to each stream."""
        return tuple(now - before for now, before in zip(self.streams, earlier.streams, strict=True))

    def plus(self, residual: Sequence[Tensor]) -> State:
        """This state with a residual added in place of running blocks."""
        return replace(self, streams=tuple(now + more for now, more in zip(self.streams, residual, strict=True)))


class Adapter:
    """A transformer in parts. Subclasses say what the parts of their family are.

    Attributes:
        module: the diffusers transformer.
        blocks: all its blocks, in the order they run.
        dtype: of its weights; asking a module of diffusers costs as much as a small forward.
        joint: whether the family's pipeline runs the branches of guidance as one batch, unconditional first.
        frames_first: whether latents are [B, F, C, H, W] rather than [B, C, F, H, W].
        embedded_guidance: whether the model takes the guidance scale as an input and usually runs a single branch.
        forwards: work done so far, in forwards of this model over all tokens: blocks x tokens x branches.
    """

    blocks_of: tuple[str, ...]
    joint = False
    frames_first = False
    embedded_guidance = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.blocks = [block for name in self.blocks_of for block in getattr(module, name)]
        self.dtype: torch.dtype = self.module.dtype  # type: ignore[assignment]
        self.forwards = 0.0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def embed(self, latents: Tensor, timestep: Tensor, condition: Condition) -> State:
        """Everything before the first block. latents as the family lays them out; timestep [B]."""
        raise NotImplementedError

    def run(self, state: State, first: int, last: int, requests: int = 1) -> State:
        """Blocks first .. last - 1. `requests` is how many videos are in the batch; its other rows are branches."""
        for block in self.blocks[first:last]:
            state = replace(state, streams=self._block(block, state))
        tokens = state.grid[0] * state.grid[1] * state.grid[2]
        share = state.streams[0].shape[1] / tokens
        self.forwards += (last - first) / self.depth * share * state.rows / requests
        return state

    def head(self, state: State) -> Tensor:
        """Everything after the last block: the model's prediction, shaped like the latents."""
        raise NotImplementedError

    def select(self, state: State, tokens: Tensor) -> State:
        """Only these video tokens (indices, int64 [tokens]), each with its own place: attention sees no others."""
        streams = (state.streams[0][:, tokens], *state.streams[1:])
        return replace(state, streams=streams, fixed=self._select_fixed(state, tokens))

    def merge(self, state: State, part: State, tokens: Tensor) -> State:
        """`state` with the video tokens that `select` took replaced by those of `part`."""
        video = state.streams[0].clone()
        video[:, tokens] = part.streams[0]
        return replace(state, streams=(video, *part.streams[1:]))

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Several branches as the rows of one batch, in this order."""
        first = conditions[0]
        return {
            name: torch.cat([each[name] for each in conditions]) if isinstance(first[name], Tensor) else first[name]
            for name in first
        }

    def set_timesteps(self, scheduler: Any, steps: int, device: str) -> Tensor:
        """Timesteps as the family's pipeline sets them, high noise first: [steps]."""
        scheduler.set_timesteps(steps, device=device)
        timesteps: Tensor = scheduler.timesteps
        return timesteps

    def _block(self, block: nn.Module, state: State) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _select_fixed(self, state: State, tokens: Tensor) -> Mapping[str, Any]:
        raise NotImplementedError


class WanAdapter(Adapter):
    """WanTransformer3DModel (Wan 2.1 text-to-video). Latents [B, C, F, H, W]."""

    blocks_of = ("blocks",)

    def embed(self, latents: Tensor, timestep: Tensor, condition: Condition) -> State:
        model, text = self.module, condition["encoder_hidden_states"]
        per_frame, per_row, per_column = model.config.patch_size
        _, _, frames, rows, columns = latents.shape
        rotary = model.rope(latents)
        video = model.patch_embedding(latents).flatten(2).transpose(1, 2)
        time, projection, text, _ = model.condition_embedder(timestep, text, None, timestep_seq_len=None)
        fixed = {"time": time, "projection": projection.unflatten(1, (6, -1)), "text": text, "rotary": rotary}
        return State((video,), fixed, (frames // per_frame, rows // per_row, columns // per_column))

    def head(self, state: State) -> Tensor:
        model, (frames, rows, columns) = self.module, state.grid
        video: Tensor = state.streams[0]
        shift, scale = (model.scale_shift_table + state.fixed["time"].unsqueeze(1)).chunk(2, dim=1)
        video = (model.norm_out(video.float()) * (1 + scale) + shift).type_as(video)
        video = model.proj_out(video)
        video = video.reshape(state.rows, frames, rows, columns, *model.config.patch_size, -1)
        video = video.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _block(self, block: nn.Module, state: State) -> tuple[Tensor, ...]:
        fixed = state.fixed
        return (block(state.streams[0], fixed["text"], fixed["projection"], fixed["rotary"]),)

    def _select_fixed(self, state: State, tokens: Tensor) -> Mapping[str, Any]:
        return {**state.fixed, "rotary": tuple(angles[:, tokens] for angles in state.fixed["rotary"])}


class CogVideoXAdapter(Adapter):
    """CogVideoXTransformer3DModel. Latents [B, F, C, H, W]; both branches run as one batch."""

    blocks_of = ("transformer_blocks",)
    joint = True
    frames_first = True

    def embed(self, latents: Tensor, timestep: Tensor, condition: Condition) -> State:
        model, text = self.module, condition["encoder_hidden_states"]
        frames, rows, columns = latents.shape[1], latents.shape[3], latents.shape[4]
        time = model.time_embedding(model.time_proj(timestep).to(latents.dtype), None)
        joined = model.embedding_dropout(model.patch_embed(text, latents))
        text, video = joined[:, : text.shape[1]], joined[:, text.shape[1] :]
        size, per_frame = model.config.patch_size, model.config.patch_size_t or 1
        fixed = {"time": time, "rotary": condition["image_rotary_emb"]}
        return State((video, text), fixed, (-(-frames // per_frame), rows // size, columns // size))

    def head(self, state: State) -> Tensor:
        model, (frames, rows, columns) = self.module, state.grid
        size, per_frame = model.config.patch_size, model.config.patch_size_t
        video: Tensor = model.norm_out(model.norm_final(state.streams[0]), temb=state.fixed["time"])
        video = model.proj_out(video)
        if per_frame is None:
            video = video.reshape(state.rows, frames, rows, columns, -1, size, size)
            return video.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        video = video.reshape(state.rows, frames, rows, columns, -1, per_frame, size, size)
        return video.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def _block(self, block: nn.Module, state: State) -> tuple[Tensor, ...]:
        video, text = state.streams
        result: tuple[Tensor, ...] = block(
            hidden_states=video,
            encoder_hidden_states=text,
            temb=state.fixed["time"],
            image_rotary_emb=state.fixed["rotary"],
            attention_kwargs=None,
        )
        return result

    def _select_fixed(self, state: State, tokens: Tensor) -> Mapping[str, Any]:
        rotary = state.fixed["rotary"]
        return {**state.fixed, "rotary": rotary and tuple(angles[tokens] for angles in rotary)}


class HunyuanVideoAdapter(Adapter):
    """HunyuanVideoTransformer3DModel (text-to-video). Latents [B, C, F, H, W]; guidance is an input of the model."""

    blocks_of = ("transformer_blocks", "single_transformer_blocks")
    embedded_guidance = True

    def embed(self, latents: Tensor, timestep: Tensor, condition: Condition) -> State:
        model, mask = self.module, condition["encoder_attention_mask"]
        _, _, frames, rows, columns = latents.shape
        size, per_frame = model.config.patch_size, model.config.patch_size_t
        timestep = timestep.to(latents.dtype)
        rotary = model.rope(latents)
        time, replaced = model.time_text_embed(timestep, condition["pooled_projections"], condition["guidance"])
        video = model.x_embedder(latents)
        text = model.context_embedder(condition["encoder_hidden_states"], timestep, mask)
        fixed = {"time": time, "replaced": replaced, "rotary": rotary, "text_tokens": mask.sum(dim=1, dtype=torch.int)}
        return State((video, text), fixed, (frames // per_frame, rows // size, columns // size))

    def head(self, state: State) -> Tensor:
        model, (frames, rows, columns) = self.module, state.grid
        size, per_frame = model.config.patch_size, model.config.patch_size_t
        video: Tensor = model.proj_out(model.norm_out(state.streams[0], state.fixed["time"]))
        video = video.reshape(state.rows, frames, rows, columns, -1, per_frame, size, size)
        return video.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def set_timesteps(self, scheduler: Any, steps: int, device: str) -> Tensor:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].numpy(), device=device)
        timesteps: Tensor = scheduler.timesteps
        return timesteps

    def _block(self, block: nn.Module, state: State) -> tuple[Tensor, ...]:
        video, text = state.streams
        fixed, first_frame = state.fixed, state.grid[1] * state.grid[2]
        mask = self._mask(video, text, fixed["text_tokens"])
        result: tuple[Tensor, ...] = block(
            video, text, fixed["time"], mask, fixed["rotary"], fixed["replaced"], first_frame
        )
        return result

    @staticmethod
    def _mask(video: Tensor, text: Tensor, text_tokens: Tensor) -> Tensor:
        """True where attention may look: all video tokens, then the text that is no padding. [B, 1, 1, S + L]"""
        places = torch.arange(video.shape[1] + text.shape[1], device=video.device)
        return (places < (video.shape[1] + text_tokens).unsqueeze(1))[:, None, None]

    def _select_fixed(self, state: State, tokens: Tensor) -> Mapping[str, Any]:
        return {**state.fixed, "rotary": tuple(angles[tokens] for angles in state.fixed["rotary"])}


ADAPTERS: dict[str, type[Adapter]] = {
    "WanTransformer3DModel": WanAdapter,
    "CogVideoXTransformer3DModel": CogVideoXAdapter,
    "HunyuanVideoTransformer3DModel": HunyuanVideoAdapter,
}
"""Class name of a diffusers transformer -> its adapter."""


def adapt(module: nn.Module) -> Adapter:
    """The adapter of a diffusers transformer. Raises SaihError for a family without one, or a variant of one."""
    name = type(module).__name__
    if name not in ADAPTERS:
        raise SaihError(f"no adapter for {name}; there are adapters for {', '.join(ADAPTERS)}")
    config: Any = module.config
    for key in ("image_dim", "image_condition_type", "ofs_embed_dim"):
        if config.get(key) is not None:
            raise SaihError(
                f"{name} with {key}={config[key]} is conditioned on an image; only text-to-video is adapted"
            )
    return ADAPTERS[name](module)
