"""A request: its prompt, what was generated, where it stands, and when each token came."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from saih.errors import SaihError


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    REFUSED = "refused"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else one drawn from the top-p set.

    Raises SaihError for a negative temperature and a top-p set that would be empty.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SaihError(f"a temperature is at least 0, got {self.temperature}; 0 takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise SaihError(f"top_p is above 0 and at most 1, got {self.top_p}; 1 draws from all tokens")


GREEDY = Sampling()


@dataclass(eq=False, slots=True)
class Request:
    """One prompt to continue.

    `computed` counts the tokens whose keys and values are in the cache; the rest of the context is `pending` and has to
    run through the model before the next token can be chosen. A prompt, a chunk of it, a decode step and the
    recomputation after a preemption are all just pending tokens. In simulated time the prompt is a `range`.
    """

    id: int
    prompt: Sequence[int]
    max_new_tokens: int
    arrival_s: float = 0.0
    kind: str = ""
    """The class it is reported under, such as "short" or "long"."""
    sampling: Sampling = GREEDY
    stop_token: int | None = None
    generated: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    """When each generated token came, on the clock of `arrival_s`."""
    computed: int = 0
    phase: Phase = Phase.WAITING
    in_flight: bool = False
    """Whether a batch with it is running: it is in no second one until that has returned."""
    preemptions: int = 0
    refusal: str = ""
    """Why it was refused."""

    @property
    def context_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        return len(self.prompt) + len(self.generated) - self.computed

    @property
    def longest_kv_tokens(self) -> int:
        """What its cache holds at most: the last token generated is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    def tokens(self, first: int, count: int) -> list[int]:
        """Ids of `count` tokens of the context (prompt, then what was generated) from position `first` on."""
        split = len(self.prompt)
        head = list(self.prompt[first : first + count])
        return head + self.generated[max(0, first - split) : max(0, first + count - split)]

    def emit(self, token: int, now_s: float) -> bool:
        """Takes the next token; returns whether it was the last one."""
        self.generated.append(token)
        self.token_s.append(now_s)
        return len(self.generated) == self.max_new_tokens or token == self.stop_token
