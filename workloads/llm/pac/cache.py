"""The activation cache: what a frozen backbone puts out for a sample, kept so that later epochs need no backbone.

Samples are stored one by one and unpadded, so an epoch may take them in any order. A cache belongs to one backbone, one
tokenisation and one data set; its key says which. P = layers + 1 points, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from saih.core import Params
from workloads.llm.pac.batch import DataSet
from workloads.llm.pac.cachefile import CacheFile
from workloads.llm.pac.encoding import Encoded, decode_into, encode


def fingerprint(module: nn.Module) -> Tensor:
    """int64 [4]: a sum over parameters of a hash of name and content; those of all stages add up to the model's."""
    total = torch.zeros(4, dtype=torch.int64)
    for name, parameter in module.named_parameters():
        content = hashlib.sha256(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        total += torch.from_numpy(np.frombuffer(content.digest(), dtype=np.int64).copy())
    return total


def cache_key(backbone: Tensor, tokenisation: str, ids: Sequence[Tensor], precision: str) -> str:
    """Digits that change with the backbone, the tokenisation (truncation included), the samples, what is stored."""
    content = hashlib.sha256(json.dumps([backbone.tolist(), tokenisation, precision, len(ids)]).encode())
    for each in ids:
        content.update(np.int64(len(each)).tobytes() + each.cpu().numpy().tobytes())
    return content.hexdigest()


class MemoryTier:
    """Samples in host memory: gone with the process."""

    why_rebuilt = ""

    def __init__(self) -> None:
        self.held: dict[int, Encoded] = {}
        self.complete = False

    def write(self, sample: int, encoded: Encoded) -> None:
        self.held[sample] = encoded

    def read(self, sample: int) -> Encoded:
        return self.held[sample]

    def finish(self) -> None:
        self.complete = True

    def clear(self) -> None:
        self.held.clear()
        self.complete = False

    def close(self) -> None:
        self.clear()

    @property
    def nbytes(self) -> int:
        return sum(encoded.nbytes for encoded in self.held.values())


class ActivationCache:
    """The samples of one rank."""

    def __init__(
        self, tier: MemoryTier | CacheFile, lens: Mapping[int, int], precision: str = "fp32", device: str = "cpu"
    ) -> None:
        """lens: tokens of each sample that belongs here."""
        self.tier, self.lens, self.precision, self.device = tier, dict(lens), precision, torch.device(device)

    @property
    def complete(self) -> bool:
        """Whether every sample can be read."""
        return self.tier.complete

    @property
    def nbytes(self) -> int:
        return self.tier.nbytes

    def put(self, sample: int, taps: Sequence[Tensor]) -> None:
        """Store e and the output of each layer, each [T, D], of one sample."""
        self.tier.write(sample, encode(torch.stack(list(taps)).cpu(), self.precision))

    def put_batch(self, samples: Sequence[int], taps: Sequence[Tensor]) -> None:
        """Store the samples of a packed batch; taps [T, D] have the rows of all of them."""
        lens = [self.lens[sample] for sample in samples]
        for sample, rows in zip(samples, zip(*(tap.split(lens) for tap in taps), strict=True), strict=True):
            self.put(sample, rows)

    def finish(self) -> None:
        """All samples are stored."""
        self.tier.finish()

    def clear(self) -> None:
        """Forget all samples, to be stored anew."""
        self.tier.clear()

    def close(self) -> None:
        """Let go of memory and files; a whole file stays on the disk."""
        self.tier.close()

    def get(self, samples: Sequence[int]) -> list[Tensor]:
        """e and the output of each layer, [T, D] fp32 on the device, rows of these samples one behind the other."""
        return list(self._assemble(samples).to(self.device))

    def ahead(self, batches: Sequence[Sequence[int]], depth: int = 2) -> Iterator[list[Tensor]]:
        """`get` of each of these mini-batches in turn, `depth` of them read ahead by a thread of their own.

        Raises what reading raised, when its turn comes.
        """
        ready: queue.Queue[Tensor | Exception] = queue.Queue(depth)
        abandoned = threading.Event()

        def read() -> None:
            try:
                for samples in batches:
                    _put(ready, self._assemble(samples), abandoned)
            except Exception as error:
                _put(ready, error, abandoned)

        reader = threading.Thread(target=read, name="cache read-ahead", daemon=True)
        reader.start()
        try:
            for _ in batches:
                found = ready.get()
                if isinstance(found, Exception):
                    raise found
                yield list(found.to(self.device, non_blocking=True))
        finally:
            abandoned.set()
            reader.join()

    def _assemble(self, samples: Sequence[int]) -> Tensor:
        """[P, T, D] fp32 in host memory, pinned where a device takes it from there."""
        stored = [self.tier.read(sample) for sample in samples]
        points, _, width = stored[0].values_PTD.shape
        lens = [self.lens[sample] for sample in samples]
        out_PTD = torch.empty((points, sum(lens), width), pin_memory=self.device.type == "cuda")
        for rows_PTD, each in zip(out_PTD.split(lens, 1), stored, strict=True):
            decode_into(rows_PTD, each)
        return out_PTD


def _put(ready: queue.Queue[Tensor | Exception], item: Tensor | Exception, abandoned: threading.Event) -> None:
    while not abandoned.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=0.1)
            return


def open_rank_cache(
    root: Path,
    params: Params,
    data: DataSet,
    samples: Sequence[int],
    backbone: Tensor,
    *,
    points: int,
    width: int,
    place: tuple[int, int],
    device: str,
    name: str = "cache",
) -> ActivationCache:
    """Of samples[rank::world], place = (rank, world), in the tier of the point's params; files lie below `root`.

    `samples`: of all ranks. `backbone`: its fingerprint.
    """
    (rank, world), precision = place, str(params["cache_dtype"])
    key = cache_key(backbone, data.tokenisation, [data.ids[sample] for sample in samples], precision)
    lens = {sample: len(data.ids[sample]) for sample in samples[rank::world]}
    path = None
    if params["tier"] == "disk":
        about = f"{params['model']}-{params['task']}-{params['samples']}x{params['length']}-{precision}"
        path = root / "pac" / f"{name}-{about}-{rank}-of-{world}.h5"
    return open_cache(path, key, lens, points, width, precision, device)


def open_cache(
    path: Path | None, key: str, lens: Mapping[int, int], points: int, width: int, precision: str, device: str
) -> ActivationCache:
    """On disk at `path`, else in memory. A file there that is whole and has this key is used as it is."""
    tier = MemoryTier() if path is None else CacheFile(path, key, lens, points, width, precision)
    return ActivationCache(tier, lens, precision, device)
