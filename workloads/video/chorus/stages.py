"""Where a resumed request begins and where its stage 2 ends, as a function of similarity. Planning knows it too.

Chorus (arXiv:2604.04451, 2026) says that boundaries K1 < K2 rise with the similarity. The lines they rise on are this
project's own. NIRVANA's table is from its paper (NSDI'24).
"""

from __future__ import annotations

from dataclasses import dataclass

NIRVANA = ((0.95, 25), (0.9, 20), (0.85, 15), (0.75, 10), (0.65, 5))
"""Similarity above which NIRVANA resumes, and from which of 50 steps; of fewer from the nearest, as Chorus does."""
RESUME = (0.1, 0.5)
REGIONS = (0.25, 0.8)
"""Where stages 1 and 2 end, as shares of the steps: at the threshold and at similarity 1, linear between."""


@dataclass(frozen=True)
class Bounds:
    """Stage 1 stands for the steps before `resume`, stage 2 takes those before `regions`, stage 3 the rest."""

    resume: int
    regions: int


@dataclass(frozen=True)
class Reuse:
    """How a server uses its store.

    Attributes:
        table: NIRVANA's table of where to resume, rather than Chorus' map.
        selective: whether there is a stage 2.
        threshold: similarity from which a request is a hit; the table has its own.
        region: share of the video tokens that stage 2 denoises.
        amplification: lambda of TGAA at the start of stage 2.
    """

    table: bool
    selective: bool
    threshold: float
    region: float
    amplification: float

    def stages(self, similarity: float, steps: int) -> Bounds | None:
        """Of a request with a match; None for a miss."""
        if self.table:
            resume = next((round(of_50 * steps / 50) for above, of_50 in NIRVANA if similarity > above), 0)
            return Bounds(resume, resume) if resume else None
        if similarity < self.threshold:
            return None
        found = bounds(similarity, self.threshold, steps)
        return found if self.selective else Bounds(found.resume, found.resume)

    def work(self, similarity: float, steps: int) -> float:
        """Steps' worth of forwards that a request with a match takes."""
        found = self.stages(similarity, steps)
        if found is None:
            return steps
        return steps - found.regions + (found.regions - found.resume) * self.region


def bounds(similarity: float, threshold: float, steps: int) -> Bounds:
    """Chorus' boundaries for a similarity at or above the threshold.

    A match saves a step at least, its regions take one at least, and the last step is always plain.
    """
    share = min(1.0, (similarity - threshold) / (1 - threshold)) if threshold < 1 else 1.0
    resume, regions = (low + share * (high - low) for low, high in (RESUME, REGIONS))
    first = min(max(1, round(steps * resume)), steps - 2)
    return Bounds(first, min(max(first + 1, round(steps * regions)), steps - 1))


def latest(steps: int) -> int:
    """The last step before which latents can be asked for."""
    return bounds(1.0, 0.0, steps).regions
