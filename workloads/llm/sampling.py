"""The next token of each request from its logits; what a request draws depends on nothing but itself."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from workloads.llm.request import Request


def sample(logits_BV: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each row: the most likely one, or one drawn from its top-p set at its temperature.

    The number a request draws is a hash of its seed, id and position, so neither the batch around it nor a preemption
    changes its tokens.
    """
    tokens = logits_BV.argmax(-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits_BV[drawn].float(), [requests[row] for row in drawn])
    return [int(token) for token in tokens.tolist()]


def _draw(logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits_BV.device)[:, None]

    temperature_B1 = column([request.sampling.temperature for request in requests])
    top_p_B1 = column([request.sampling.top_p for request in requests])
    uniform_B1 = column([_uniform(request) for request in requests])
    chance_BV, order_BV = (logits_BV / temperature_B1).softmax(-1).sort(-1, descending=True)
    before_BV = chance_BV.cumsum(-1) - chance_BV
    kept_BV = chance_BV.masked_fill(before_BV >= top_p_B1, 0.0)
    reached_BV = kept_BV.cumsum(-1)
    place_B1 = torch.searchsorted(reached_BV, uniform_B1 * reached_BV[:, -1:], right=True)
    last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    return order_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]


def _uniform(request: Request) -> float:
    """In [0, 1), from the request's seed and id and the number of tokens it has so far."""
    digest = hashlib.sha256(f"{request.sampling.seed} {request.id} {len(request.generated)}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
