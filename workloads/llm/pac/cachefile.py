"""The disk tier of the activation cache: one HDF5 file, whole or absent, with its key and a checksum a sample."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from saih.errors import SaihError
from workloads.llm.pac.encoding import DTYPES, Encoded

FORMAT = 1


class CacheFile:
    """Samples one behind the other, each [P, T, D] in one piece: what a mini-batch needs are as many contiguous reads.

    The file is written under another name and renamed once all samples are there, so one that was cut short is never
    found. One that is there is read through, checksums and all, before it is used.
    """

    def __init__(self, path: Path, key: str, lens: Mapping[int, int], points: int, width: int, precision: str) -> None:
        """lens: tokens of each sample that belongs here. Needs h5py; a SaihError says so.

        `complete` says whether a good file is there; if not, `why_rebuilt` says what was wrong with the one that was.
        """
        self.path, self.key, self.precision = path, key, precision
        self.points, self.width, self.rows = points, width, sum(lens.values())
        self.lens = dict(sorted(lens.items()))
        self.begin = dict(zip(self.lens, accumulate(self.lens.values(), initial=0), strict=False))
        self.place = {sample: place for place, sample in enumerate(self.lens)}
        self._file: Any = None
        self._missing = set(lens)
        self.why_rebuilt = self._fault() if path.exists() else ""
        self.complete = self._file is not None

    @property
    def nbytes(self) -> int:
        scale = 4 if self.precision == "int8" else 0
        return self.points * self.rows * (self.width * DTYPES[self.precision].itemsize + scale)

    def __contains__(self, sample: int) -> bool:
        return self.complete and sample in self.lens

    def write(self, sample: int, encoded: Encoded) -> None:
        """Raises OSError as the disk reports it."""
        if self._file is None:
            self._begin()
        rows, scales = self._places(sample)
        self._file["values"][rows] = encoded.values_PTD.numpy().reshape(-1)
        if encoded.scales_PT1 is not None:
            self._file["scales"][scales] = encoded.scales_PT1.numpy().reshape(-1)
        self._file["crc32"][self.place[sample]] = encoded.crc32
        self._missing.discard(sample)

    def read(self, sample: int) -> Encoded:
        """As it was written."""
        shape = (self.points, self.lens[sample], self.width)
        values, scales = torch.empty(shape, dtype=DTYPES[self.precision]), None
        value_places, scale_places = self._places(sample)
        self._file["values"].read_direct(values.numpy().reshape(-1), value_places)
        if self.precision == "int8":
            scales = torch.empty((*shape[:2], 1))
            self._file["scales"].read_direct(scales.numpy().reshape(-1), scale_places)
        return Encoded(values, scales)

    def finish(self) -> None:
        """All samples are written: give the file its name. Raises SaihError if some are not."""
        if self._missing:
            raise SaihError(f"{self.path}: {len(self._missing)} of {len(self.lens)} samples were never stored")
        self._file.attrs["key"] = self.key
        self._file.flush()
        self._file.close()
        os.replace(self._partial, self.path)
        self._file = _h5py().File(self.path, "r")
        self.complete = True

    def clear(self) -> None:
        """Forget all samples; the file goes."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.complete = False

    def close(self) -> None:
        """Let go of the file; one that is not whole goes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _h5py().File(self._partial, "w")
        self._file.attrs["format"] = FORMAT
        kind = str(DTYPES[self.precision]).removeprefix("torch.")
        self._file.create_dataset("values", (self.points * self.rows * self.width,), kind)
        self._file.create_dataset("crc32", (len(self.lens),), "uint32")
        if self.precision == "int8":
            self._file.create_dataset("scales", (self.points * self.rows,), "float32")
        self._missing = set(self.lens)

    def _places(self, sample: int) -> tuple[slice, slice]:
        """Of a sample's values, and of its scales."""
        begin = self.begin[sample] * self.points
        end = begin + self.lens[sample] * self.points
        return slice(begin * self.width, end * self.width), slice(begin, end)

    def _fault(self) -> str:
        """What is wrong with the file that is there; if nothing is, it stays open."""
        try:
            file = _h5py().File(self.path, "r")
        except OSError as error:
            return f"{self.path.name} cannot be read: {' '.join(str(error).split())[:200]}"
        try:
            if file.attrs.get("format") != FORMAT or file.attrs.get("key") != self.key:
                why = f"{self.path.name} is of another backbone, tokenisation or data set"
            else:
                self._file = file
                bad = [sample for sample in self.lens if self.read(sample).crc32 != file["crc32"][self.place[sample]]]
                why = f"{self.path.name} is damaged: {len(bad)} samples differ from their checksums" if bad else ""
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = f"{self.path.name} is damaged: {' '.join(str(error).split())[:200]}"
        if why:
            self._file = None
            file.close()
        return why


def _h5py() -> Any:
    """By name, for jobs that keep activations in memory run without it."""
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise SaihError("tier=disk needs h5py: pip install h5py, or choose tier=memory") from None
