"""A trace of requests: topics of Zipf popularity, prompts that vary one another's by a word, arrivals at random.

No prompt is asked twice unless `repeats` says so: what a trace gains is then by similarity, never by replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from saih.errors import SaihError

Embed = Callable[[str], Tensor]
"""A prompt to its unit vector [dim]."""

CANDIDATES = 50
"""Random prompts of which a fresh one is the least like all before."""
TRIES = 50
"""At a variation that nobody has asked for."""


@dataclass(frozen=True)
class Asked:
    """A request of a trace.

    Attributes:
        prompt: what is asked for.
        seed: of its noise; a repeat has that of the request it repeats.
        arrival: when it is asked, in times that a plain request takes.
    """

    prompt: str
    seed: int
    arrival: float


@dataclass(frozen=True)
class Traffic:
    """What a trace is like.

    Attributes:
        requests: how many.
        similar: share that is about a topic: the first about each sets it, the others change a word of an earlier one.
            The rest is as unlike everything before as random prompts can be.
        topics: how many there are; topic k is asked for in proportion to k^-zipf.
        repeats: share that repeats an earlier request, noise and all.
        load: arrivals in the time of a plain request, a Poisson process.
    """

    requests: int
    similar: float
    topics: int
    zipf: float
    repeats: float
    load: float

    def draw(self, attributes: Sequence[Sequence[str]], embed: Embed, seed: int) -> list[Asked]:
        """The same for the same seed. A prompt is a word of each attribute."""
        random = Random(seed)  # noqa: S311
        popularity = [(rank + 1) ** -self.zipf for rank in range(self.topics)]
        topics: list[list[str]] = [[] for _ in range(self.topics)]
        trace: list[Asked] = []
        prompts: dict[str, Tensor] = {}
        time = 0.0
        for place in range(self.requests):
            time += random.expovariate(self.load)
            if trace and random.random() < self.repeats:
                again = random.choice(trace)
                trace.append(Asked(again.prompt, again.seed, time))
                continue
            prompt = None
            if random.random() < self.similar:
                topic = random.choices(topics, popularity)[0]
                prompt = _variation(random.choice(topic), attributes, prompts, random) if topic else None
                prompt = prompt or _fresh(attributes, prompts, embed, random)
                topic.append(prompt)
            prompt = prompt or _fresh(attributes, prompts, embed, random)
            prompts[prompt] = embed(prompt)
            trace.append(Asked(prompt, seed + place, time))
        return trace

    def of_file(self, prompts: Sequence[str], seed: int) -> list[Asked]:
        """Different prompts one after the other. Raises SaihError where there are fewer than requests."""
        different = list(dict.fromkeys(prompts))
        if len(different) < self.requests:
            raise SaihError(
                f"prompts: {len(different)} different ones for {self.requests} requests; a prompt asked twice would be "
                f"a replay: give more, or requests={len(different)}"
            )
        random, time, trace = Random(seed), 0.0, []  # noqa: S311
        for place, prompt in enumerate(different[: self.requests]):
            time += random.expovariate(self.load)
            trace.append(Asked(prompt, seed + place, time))
        return trace


def _variation(
    prompt: str, attributes: Sequence[Sequence[str]], asked: dict[str, Tensor], random: Random
) -> str | None:
    """The prompt with another word in one place, that nobody has asked for; None if none was found."""
    for _ in range(TRIES):
        words = prompt.split()
        place = random.randrange(len(words))
        words[place] = random.choice([word for word in attributes[place] if word != words[place]])
        if " ".join(words) not in asked:
            return " ".join(words)
    return None


def _fresh(attributes: Sequence[Sequence[str]], asked: dict[str, Tensor], embed: Embed, random: Random) -> str:
    """Of some random prompts that nobody has asked for, the least like those that somebody has.

    Once all have been asked for, any.
    """
    drawn = [" ".join(random.choice(words) for words in attributes) for _ in range(CANDIDATES)]
    new = [prompt for prompt in drawn if prompt not in asked]
    if not new or not asked:
        return (new or drawn)[0]
    known = torch.stack(list(asked.values()))
    likeness = (torch.stack([embed(prompt) for prompt in new]) @ known.T).amax(dim=1)
    return new[int(likeness.argmin())]


@dataclass(frozen=True)
class Match:
    """What a request of a trace has behind it in a store that never forgets: the most similar request that was computed
    in full, and how similar; None for the first of a trace."""

    source: str | None
    similarity: float


def matches(trace: Sequence[Asked], embed: Embed, threshold: float) -> list[Match]:
    """For each request, as if those at or above the threshold were resumed and so no source for others.

    It depends on the trace alone: bands of similarity are of the same requests for every variant.
    """
    sources: list[str] = []
    found = []
    for asked in trace:
        vector, best = embed(asked.prompt), Match(None, 0.0)
        if sources:
            similarity, place = (torch.stack([embed(source) for source in sources]) @ vector).max(dim=0)
            best = Match(sources[int(place)], float(similarity))
        if best.similarity < threshold:
            sources.append(asked.prompt)
        found.append(best)
    return found


def queue_latencies(arrivals: Sequence[float], services: Sequence[float]) -> list[float]:
    """Arrival to answer of each request with one server, first come first served; all in the same unit of time."""
    free, latencies = 0.0, []
    for arrival, service in zip(arrivals, services, strict=True):
        free = max(free, arrival) + service
        latencies.append(free - arrival)
    return latencies
