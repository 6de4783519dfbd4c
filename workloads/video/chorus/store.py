"""The request store: latents of earlier requests under a byte bound, found again by exact key or similar prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saih.errors import SaihError
from workloads.video.caches import tensor_bytes

LRU, LCBFU = "lru", "lcbfu"


@dataclass(frozen=True)
class Key:
    """What must be equal for the latents of one request to mean anything to another.

    Attributes:
        model: what the weights and their precision are known by.
        grid: latent frames, rows and columns.
        schedule: the scheduler with its settings.
        steps: denoise steps.
        guidance: scale of classifier-free guidance.
    """

    model: str
    grid: tuple[int, int, int]
    schedule: str
    steps: int
    guidance: float


@dataclass(eq=False)
class Entry:
    """A request that was served.

    Attributes:
        key: of all requests it can be of use to.
        prompt, seed: of the request, for exact hits.
        embedding: of the prompt, unit length: float32 [dim].
        final: the video, not decoded.
        latents: before some steps, by step; a request that was itself resumed has none.
        attention: what each text token got from each video token in cross attention, [L, S]; empty where not watched.
        uses: how often another request began from it.
        steps_saved: by those requests together.
    """

    key: Key
    prompt: str
    seed: int
    embedding: Tensor
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    uses: int = 0
    steps_saved: float = 0.0

    @property
    def bytes(self) -> int:
        """Memory of its tensors."""
        return tensor_bytes([self.embedding, self.final, self.attention, *self.latents.values()])

    @property
    def last(self) -> int:
        """The last step that a request can begin from; 0 where there is none."""
        return max(self.latents, default=0)

    def before(self, step: int, key: Key) -> Tensor:
        """The latents before a step, for a request of this key. Raises SaihError for any other key or step."""
        if key != self.key:
            differ = [name for name in Key.__dataclass_fields__ if getattr(key, name) != getattr(self.key, name)]
            raise SaihError(f"a cached request of another {', '.join(differ)} cannot be resumed")
        if step not in self.latents:
            raise SaihError(f"step {step} is not cached; there are {', '.join(map(str, sorted(self.latents)))}")
        return self.latents[step]


class Store:
    """Entries within a byte bound, least worth keeping first out.

    LRU evicts the one whose last use is longest ago. LCBFU (NIRVANA, NSDI'24: least computationally beneficial and
    frequently used) the one that has saved least work so far, of equals the one whose last use is longest ago.

    Args:
        capacity_bytes: bound on the tensors of all entries.
        eviction: LRU or LCBFU.
    """

    def __init__(self, capacity_bytes: float, eviction: str = LRU) -> None:
        self.capacity_bytes, self.eviction = capacity_bytes, eviction
        self.bytes = self.peak_bytes = self.evicted = 0
        self.entries: dict[tuple[Key, str, int], Entry] = {}
        """By exact key, last used last."""
        self._index: dict[Key, tuple[Tensor, list[Entry]]] = {}

    def exact(self, key: Key, prompt: str, seed: int) -> Entry | None:
        """The very same request, if it was served."""
        return self.entries.get((key, prompt, seed))

    def nearest(self, key: Key, embedding: Tensor) -> tuple[Entry, float] | None:
        """The entry to resume from whose prompt is most similar, and its cosine. Other keys are not seen."""
        if key not in self._index:
            entries = [entry for entry in self.entries.values() if entry.key == key and entry.latents]
            if not entries:
                return None
            self._index[key] = torch.stack([entry.embedding for entry in entries]), entries
        matrix, entries = self._index[key]
        similarity, place = (matrix @ embedding).max(dim=0)
        return entries[int(place)], float(similarity)

    def use(self, entry: Entry, steps_saved: float) -> None:
        """A request was served from this entry."""
        entry.uses += 1
        entry.steps_saved += steps_saved
        name = (entry.key, entry.prompt, entry.seed)
        self.entries[name] = self.entries.pop(name)

    def add(self, entry: Entry) -> None:
        """Keep an entry, evicting others as needed; one larger than the whole store is not kept."""
        self._drop((entry.key, entry.prompt, entry.seed))
        if entry.bytes > self.capacity_bytes:
            return
        while self.bytes + entry.bytes > self.capacity_bytes:
            self._drop(self._victim())
            self.evicted += 1
        self.entries[entry.key, entry.prompt, entry.seed] = entry
        self.bytes += entry.bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        if entry.latents and entry.key in self._index:
            matrix, entries = self._index[entry.key]
            self._index[entry.key] = torch.cat([matrix, entry.embedding[None]]), [*entries, entry]

    def _victim(self) -> tuple[Key, str, int]:
        if self.eviction == LRU:
            return next(iter(self.entries))
        return min(self.entries, key=lambda name: self.entries[name].steps_saved)

    def _drop(self, name: tuple[Key, str, int]) -> None:
        entry = self.entries.pop(name, None)
        if entry is not None:
            self.bytes -= entry.bytes
            self._index.pop(entry.key, None)
