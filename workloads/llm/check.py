"""Whether generated tokens are right: against the full forward pass, without cache, batching or packed matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saih.core import Check
from workloads.llm.attention import AttnMeta
from workloads.llm.model import Stage

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""How far below the best logit a chosen token may be, in standard deviations of the logits: what rounding decides."""


@torch.inference_mode()
def logit_gaps(stage: Stage, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """How far each token is below the most likely one at its place, in standard deviations of the logits."""
    ids = torch.tensor([*prompt, *tokens[:-1]], device=stage.device)
    places = torch.arange(len(prompt) - 1, len(ids), device=stage.device)
    logits_RV = stage(ids, AttnMeta.packed([len(ids)], device=stage.device), None, places).float()
    chosen_R = logits_RV.gather(1, torch.tensor(tokens, device=stage.device)[:, None])[:, 0]
    gaps_R: torch.Tensor = (logits_RV.amax(1) - chosen_R) / logits_RV.std(1)
    return gaps_R.cpu()


def check_tokens(stage: Stage, asked: Sequence[tuple[Sequence[int], int]], found: Sequence[Sequence[int]]) -> Check:
    """Every token of every request is the most likely one after its prompt and the tokens before it.

    asked: (prompt, wanted tokens) of each request; found: its tokens.
    """
    wrong = [place for place, (each, got) in enumerate(zip(asked, found, strict=True)) if len(got) != each[1]]
    if wrong:
        return Check(
            False, {"requests_of_wrong_length": len(wrong)}, f"requests {wrong[:5]} have too few or too many tokens"
        )
    gaps = torch.cat([logit_gaps(stage, prompt, got) for (prompt, _), got in zip(asked, found, strict=True)])
    largest = float(gaps.max())
    numbers = {"tokens": float(len(gaps)), "tokens_not_first": float((gaps > 0).sum()), "largest_gap_std": largest}
    return Check(
        largest <= TOLERANCE[stage.dtype],
        numbers,
        f"a token is {largest:.3g} standard deviations below the most likely one",
    )
