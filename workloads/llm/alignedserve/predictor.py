"""What a variant should give on paper, from lengths and a cost model: the bound beside what comes out.

A request of N tokens at a mean context l is N times in a batch. With room for K tokens and at most R requests, batches
of its own length hold b = min(K / l, R), and each of its tokens is 1 / b of an iteration; a batch of all lengths holds
b = min(K / mean l, R), and its longest is the expected maximum of b draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workloads.llm.costs import CostModel
from workloads.llm.request import Request


class Predictor:
    """Decoding these requests with room for `kv_tokens` tokens and `most` requests in a batch.

    Nothing is lost on switches, evictions, copies or a last batch that is not full: `aligned` is a bound from above.
    padded: the kernel attends to the longest context for everybody.
    """

    def __init__(
        self, requests: Sequence[Request], model: CostModel, kv_tokens: int, most: int, *, padded: bool
    ) -> None:
        self.model, self.padded = model, padded
        self.new_N = np.array([each.max_new_tokens for each in requests], dtype=np.float64)
        self.context_N = np.array([len(each.prompt) for each in requests]) + self.new_N / 2
        self.alone_N = np.minimum(kv_tokens / self.context_N, most).clip(1.0)
        share_N = self.new_N / self.new_N.sum()
        self.mean = float((share_N * self.context_N).sum())
        self.together = max(1.0, min(kv_tokens / self.mean, float(most)))
        self.longest = _expected_longest(self.context_N, share_N, self.together)

    def tokens_per_s(self, aligned: bool, copies_s: float = 0.0) -> float:
        """copies_s: what stands between iterations in all."""
        if aligned:
            total_s = float((self.new_N * self._aligned_step_s() / self.alone_N).sum())
        else:
            total_s = float(self.new_N.sum()) * self._mixed_step_s() / self.together
        return float(self.new_N.sum()) / (total_s + copies_s)

    def tpot_p99_s(self, aligned: bool) -> float:
        """Of the requests; in batches of all lengths every iteration is alike."""
        return float(np.percentile(self._aligned_step_s(), 99)) if aligned else self._mixed_step_s()

    def _aligned_step_s(self) -> NDArray[np.float64]:
        """An iteration of each request's own length."""
        return self._step_s(self.alone_N, self.context_N, self.context_N)

    def _mixed_step_s(self) -> float:
        mean = self.longest if self.padded else self.mean
        return float(self._step_s(np.array(self.together), np.array(mean), np.array(self.longest)))

    def _step_s(
        self, batch: NDArray[np.float64], mean: NDArray[np.float64], longest: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        model = self.model
        per_request_s = model.per_decode_s + model.per_context_token_s * mean
        step_s: NDArray[np.float64] = model.fixed_s + per_request_s * batch + model.per_longest_token_s * longest
        return step_s


def _expected_longest(length_N: NDArray[np.float64], share_N: NDArray[np.float64], draws: float) -> float:
    """Of so many lengths drawn with these shares: P(all are at most l) is the share up to l, to the power of draws."""
    order = np.argsort(length_N)
    below_N = np.cumsum(share_N[order]) ** draws
    return float((length_N[order] * np.diff(below_N, prepend=0.0)).sum() / below_N[-1])
