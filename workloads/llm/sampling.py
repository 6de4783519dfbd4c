"""The next token of each request from its logits; what a request draws depends on nothing but itself."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from workloads.llm.request import Request


class Draw(NamedTuple):
    """How one token is to be chosen: the most likely at temperature 0, else the top-p set's at `uniform` in [0, 1)."""

    temperature: float
    top_p: float
    uniform: float


def draw(request: Request) -> Draw:
    """Of the request's next token. Its number is a hash of the request's seed, id and position.

    So neither the batch around a request nor a preemption changes what it draws.
    """
    how = request.sampling
    if how.temperature == 0:
        return Draw(0.0, 1.0, 0.0)
    digest = hashlib.sha256(f"{how.seed} {request.id} {len(request.generated)}".encode()).digest()
    return Draw(how.temperature, how.top_p, int.from_bytes(digest[:8], "little") / 2**64)


def choose(logits_BV: Tensor, draws_B3: Tensor) -> Tensor:
    """One token for each row, int64 [B]; `draws_B3` holds a `Draw` a row, on the device of the logits."""
    tokens_B = logits_BV.argmax(-1)
    drawn_B = (draws_B3[:, 0] > 0).nonzero()[:, 0]
    if len(drawn_B):
        tokens_B[drawn_B] = _from_top_p(logits_BV[drawn_B].float(), draws_B3[drawn_B])
    return tokens_B


def _from_top_p(logits_BV: Tensor, draws_B3: Tensor) -> Tensor:
    temperature_B1, top_p_B1, uniform_B1 = draws_B3.split(1, dim=1)
    chance_BV, token_BV = (logits_BV / temperature_B1).softmax(-1).sort(-1, descending=True)
    before_BV = chance_BV.cumsum(-1) - chance_BV
    kept_BV = chance_BV.masked_fill(before_BV >= top_p_B1, 0.0)
    reached_BV = kept_BV.cumsum(-1)
    place_B1 = torch.searchsorted(reached_BV, uniform_B1 * reached_BV[:, -1:], right=True)
    last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    chosen_B1: Tensor = token_BV.gather(1, torch.minimum(place_B1, last_B1))
    return chosen_B1[:, 0]
