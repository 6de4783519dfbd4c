"""How long a batch takes, as a linear model in what it asks of the device. Imports no numpy."""

from dataclasses import dataclass

from workloads.llm.scheduler import Load


@dataclass(frozen=True)
class CostModel:
    """Seconds of a batch as a sum over its `Load`; no term is negative.

    `per_longest_token_s` is what makes long requests slow down short ones beside them (padding, or one block of threads
    for each sequence); without it, grouping requests by length cannot raise throughput at a given KV budget. A prefill
    token costs the same wherever it stands: attention over a long prompt grows faster than this model.
    """

    fixed_s: float = 0.0
    per_decode_s: float = 0.0
    per_context_token_s: float = 0.0
    per_longest_token_s: float = 0.0
    per_prefill_token_s: float = 0.0

    def step_s(self, load: Load) -> float:
        return (
            self.fixed_s
            + self.per_decode_s * load.decodes
            + self.per_context_token_s * load.context_tokens
            + self.per_longest_token_s * load.longest_tokens
            + self.per_prefill_token_s * load.prefill_tokens
        )
