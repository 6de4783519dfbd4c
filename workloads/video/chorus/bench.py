"""One step is one trace: a server that begins with nothing stored answers all of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from saih.errors import SaihError
from saih.timing import Unclocked
from workloads.video import options, peers
from workloads.video.checkpoint import TOY, Checkpoint
from workloads.video.chorus import spec
from workloads.video.chorus.server import EXACT, MISS, SEMANTIC, Served, Server, SharingServer, embed
from workloads.video.chorus.store import Store
from workloads.video.chorus.trace import Asked, Traffic, matches, queue_latencies
from workloads.video.denoising import load, prompts_of
from workloads.video.kept import digest, kept_path, made_once
from workloads.video.loop import COND
from workloads.video.probe import Probe
from workloads.video.words import WordEmbeddings

SERVED_AGAIN = 12
"""Requests from the beginning of the trace that a check whose numbers are known serves again."""
SAVED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Edges of the histogram of saved work, as shares of a plain request."""


def setup(point: Point, context: Context) -> Serving:
    """Load the model and draw the trace."""
    return Serving(point, context)


class Serving:
    """A model, a trace, and how it is served."""

    def __init__(self, point: Point, context: Context) -> None:
        params = point.params
        layers, width = int(params["layers"]), int(params["width"])
        loaded, self.identity = load(str(params["model"]), layers, width, params, context.device)
        self.params, self.seed = params, point.seed
        self.checkpoint = with_words(loaded)
        self.probe = Probe.of(self.checkpoint, options.grid(params))
        self.embed = lru_cache(None)(lambda prompt: prompt_vector(self.checkpoint, prompt))
        self.trace = self._draw()
        shape = spec.shape(params)
        self.plain = int(params["denoise_steps"]) * options.branches(params, shape)
        self.flop_per_forward = shape.forward_flop(options.grid(params))
        told = self.identity, context.device, torch.get_num_threads(), list(map(astuple, self.trace))
        self.kept = kept_path(Path(context.data_folder), "chorus-served", *told, sorted(params.items()))

    def step(self, clock: Clock) -> Work:
        server, forwards = self.server(), 0.0
        for asked in self.trace:
            forwards += server.serve(asked, clock).forwards
        return Work(len(self.trace), forwards * self.flop_per_forward)

    def check(self) -> Check:
        """What is computed in full is the plain loop's, bit for bit; a request resumed from itself gives itself; the
        store kept its bound; serving is deterministic. Numbers of a trace are counted once and then read from disk."""
        known = made_once(self.kept, self._serve_all)
        server = self.server()
        again = [server.serve(asked, Unclocked()) for asked in self.trace[:SERVED_AGAIN]]
        digests = [digest(served.latents) for served in again]
        wrong = {
            "serving the trace again gave other videos": digests != known["digests"][: len(digests)],
            "the first request differs from the plain loop": not self._first_is_plain(again[0]),
            "the store outgrew its bound": known["numbers"]["cache_bytes"] > self._capacity(),
            "the first request, asked again, was not found": not self._found_again(),
            "latents are not finite": not all(bool(torch.isfinite(served.latents).all()) for served in again),
        }
        return Check(not any(wrong.values()), known["numbers"], "; ".join(why for why, is_so in wrong.items() if is_so))

    def close(self) -> None:
        """Nothing is held outside this object."""

    def server(self) -> Server:
        """One that has served nothing yet."""
        params, reuse = self.params, spec.reuse(self.params)
        told = self.checkpoint, options.grid(params), int(params["denoise_steps"]), float(params["guidance"])
        if reuse is not None:
            return SharingServer(*told, Store(self._capacity(), str(params["eviction"])), reuse, self.identity)
        return Server(*told, peers.TeaCache(float(params["teacache"])) if params["variant"] != "none" else None)

    def _capacity(self) -> float:
        return float(self.params["store_mb"]) * 1e6

    def _draw(self) -> list[Asked]:
        params = self.params
        traffic = Traffic(
            int(params["requests"]),
            *(float(params["similar"]), int(params["topics"]), float(params["zipf"])),
            *(float(params["repeats"]), float(params["load"])),
        )
        if params["prompts"]:
            return traffic.of_file(prompts_of(Path(str(params["prompts"]))), self.seed)
        if self.checkpoint.words is None:
            raise SaihError("prompts: name a text file of prompts for a checkpoint with a text encoder")
        return traffic.draw(self.checkpoint.words.attributes, self.embed, self.seed)

    def _serve_all(self) -> dict[str, Any]:
        server = self.server()
        served = [server.serve(asked, Unclocked()) for asked in self.trace]
        numbers = self._counted(served, server.store if isinstance(server, SharingServer) else None) | self._shown(
            served
        )
        return {"numbers": numbers, "digests": [digest(each.latents) for each in served]}

    def _counted(self, served: Sequence[Served], store: Store | None) -> dict[str, float]:
        """Hits by kind, work, histogram of what it saved, latencies in plain requests, bytes."""
        count = len(served)
        kinds = {kind: sum(each.kind == kind for each in served) for kind in (EXACT, SEMANTIC, MISS)}
        work = np.array([each.forwards for each in served]) / self.plain
        hits = [each.similarity for each in served if each.kind == SEMANTIC]
        latencies = queue_latencies([asked.arrival for asked in self.trace], work.tolist())
        numbers = {
            "hit_rate": (kinds[EXACT] + kinds[SEMANTIC]) / count,
            "exact_hits": float(kinds[EXACT]),
            "semantic_hits": float(kinds[SEMANTIC]),
            "misses": float(kinds[MISS]),
            "forwards": float(work.mean() * self.plain),
            "work_gain": float(1 / work.mean()),
            "latency_p50": float(np.percentile(latencies, 50)),
            "latency_p95": float(np.percentile(latencies, 95)),
            "cache_bytes": float(store.peak_bytes if store else 0),
            "evicted": float(store.evicted if store else 0),
        }
        if hits:
            numbers["hit_similarity"] = float(np.mean(hits))
        saved = 1 - work
        numbers["saved_nothing"] = float((saved <= 0).sum())
        for low, high in pairwise(SAVED):
            numbers[f"saved_to_{100 * high:.0f}"] = float(((saved > low) & (saved <= high)).sum())
        return numbers

    def _shown(self, served: Sequence[Served]) -> dict[str, float]:
        """What the probe reads: words of the prompts, by band of similarity; of those that differ from the similar
        request's, its words or the prompt's. Nothing where the probe cannot read."""
        if self.probe is None:
            return {}
        pixels = torch.cat([self.checkpoint.pixels(each.latents).cpu().transpose(0, 1) for each in served])
        seen = self.probe.read(pixels)
        found = matches(self.trace, self.embed, float(self.params["threshold"]))
        alignment = np.array([self.probe.alignment(*each) for each in zip(seen, self._prompts(), strict=True)])
        similarity = np.array([match.similarity for match in found])
        numbers = {"alignment": float(alignment.mean())}
        band = np.digitize(similarity, spec.BANDS[:-1])
        for place, high in enumerate(spec.BANDS):
            numbers[f"requests_to_{100 * high:.0f}"] = float((band == place).sum())
            if (band == place).any():
                numbers[f"alignment_to_{100 * high:.0f}"] = float(alignment[band == place].mean())
        changed = [
            (words[place] == now[place], words[place] == before[place])
            for words, now, before in (
                (words, prompt.split(), match.source.split())
                for words, prompt, match in zip(seen, self._prompts(), found, strict=True)
                if match.source is not None and match.similarity >= float(self.params["threshold"])
            )
            for place in self.probe.readable
            if now[place] != before[place]
        ]
        if changed:
            shown, leaked = np.array(changed).mean(axis=0)
            numbers |= {"changed_words": len(changed), "changed_alignment": float(shown), "leakage": float(leaked)}
        return numbers

    def _prompts(self) -> list[str]:
        return [asked.prompt for asked in self.trace]

    def _first_is_plain(self, first: Served) -> bool:
        """Nothing is stored yet: it must be computed in full, and storing it must not change it."""
        if self.params["variant"] == "intra-request":
            return True
        asked, server = self.trace[0], self.server()
        request = self.checkpoint.request(asked.prompt, server.grid, server.steps, server.guidance, asked.seed)
        return torch.equal(server.loop.generate(request).latents, first.latents)

    def _found_again(self) -> bool:
        """The first request is answered from the store with the same video and no work; under another seed it is
        resumed, where the variant resumes at all, to that same video."""
        server, asked = self.server(), self.trace[0]
        if not isinstance(server, SharingServer):
            return True
        first, second = server.serve(asked, Unclocked()), server.serve(asked, Unclocked())
        if not server.store.entries:
            return True  # none fits
        third = server.serve(replace(asked, seed=asked.seed + len(self.trace)), Unclocked())
        same = torch.allclose(third.latents, first.latents, atol=1e-5) or third.kind == MISS
        return second.kind == EXACT and torch.equal(first.latents, second.latents) and same


def with_words(checkpoint: Checkpoint) -> Checkpoint:
    """Random weights read the toy's prompts, so that some are similar."""
    if checkpoint.trained:
        return checkpoint
    attributes = WordEmbeddings.load(TOY / "large").attributes
    return replace(checkpoint, words=WordEmbeddings.draw(attributes, checkpoint.adapter.module.config.text_dim))


def prompt_vector(checkpoint: Checkpoint, prompt: str) -> Tensor:
    """A prompt as the store sees it."""
    if checkpoint.words is not None:
        return embed(checkpoint.words.encode([prompt]))
    request = checkpoint.request(prompt, (1, 2, 2), 1, 1.0, 0)
    return embed(request.conditions[COND]["encoder_hidden_states"])
