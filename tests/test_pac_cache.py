"""The activation cache: what is stored is what is read, and what is damaged or somebody else's is never used."""

from __future__ import annotations

import threading
from pathlib import Path

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.config import PRESETS
from workloads.llm.loader import random_init
from workloads.llm.model import Stage
from workloads.llm.pac.cache import ActivationCache, cache_key, fingerprint, open_cache
from workloads.llm.pac.encoding import decode_into, encode

POINTS, WIDTH = 3, 8
LENS = {0: 5, 2: 1, 5: 7, 7: 3}


def rows(sample: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sample)
    return list(torch.randn(POINTS, LENS[sample], WIDTH, generator=generator))


def opened(path: Path | None, key: str = "k", precision: str = "fp32") -> ActivationCache:
    return open_cache(path, key, LENS, POINTS, WIDTH, precision, "cpu")


def filled(path: Path | None, key: str = "k", precision: str = "fp32") -> ActivationCache:
    cache = opened(path, key, precision)
    cache.put_batch([7, 0], [torch.cat(pair) for pair in zip(rows(7), rows(0), strict=True)])
    for sample in (5, 2):
        cache.put(sample, rows(sample))
    cache.finish()
    return cache


@pytest.mark.parametrize("disk", [False, True])
def test_samples_are_read_in_any_order_as_they_were_stored(tmp_path: Path, disk: bool) -> None:
    cache = filled(tmp_path / "c.h5" if disk else None)
    assert cache.complete
    batches = [(5, 0), (2,), (0, 7, 2)]
    for samples, ahead in zip(batches, cache.ahead(batches), strict=True):
        expected = [torch.cat(each) for each in zip(*(rows(sample) for sample in samples), strict=True)]
        for found in (cache.get(samples), ahead):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.nbytes == 4 * POINTS * WIDTH * sum(LENS.values())
    cache.close()


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_stored_precisions_err_as_little_as_they_say(tokens: int, size: float, seed: int) -> None:
    rows_PTD = size * torch.randn(POINTS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    largest_PT1 = rows_PTD.abs().amax(-1, keepdim=True)
    for precision, allowed in (("fp32", 0 * rows_PTD), ("fp16", rows_PTD.abs() / 2**11 + 2**-24)):
        out = torch.empty_like(rows_PTD)
        decode_into(out, encode(rows_PTD, precision))
        assert bool(((out - rows_PTD).abs() <= allowed).all())
    out = torch.empty_like(rows_PTD)
    decode_into(out, encode(rows_PTD, "int8"))
    assert bool(((out - rows_PTD).abs() <= largest_PT1 / 254 * 1.001).all())


def test_a_row_of_zeros_and_one_too_large() -> None:
    out = torch.ones(1, 1, 4)
    decode_into(out, encode(torch.zeros(1, 1, 4), "int8"))
    assert not out.any()
    with pytest.raises(SaihError, match="too large for fp16"):
        encode(torch.full((1, 1, 1), 1e6), "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_is_found_again_and_holds_the_same(tmp_path: Path, precision: str) -> None:
    first = filled(tmp_path / "c.h5", precision=precision)
    stored = first.get([5, 2])
    first.close()
    again = opened(tmp_path / "c.h5", precision=precision)
    assert again.complete
    assert not again.tier.why_rebuilt
    assert all(torch.equal(a, b) for a, b in zip(stored, again.get([5, 2]), strict=True))
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


def damage(path: Path, how: str) -> str:
    """Returns the key to open it with."""
    if how == "bits":
        with h5py.File(path, "r+") as file:
            file["values"][17] += 1e-6
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "not HDF5":
        path.write_bytes(b"nothing of the kind")
    elif how == "missing part":
        with h5py.File(path, "r+") as file:
            del file["crc32"]
    return "another" if how == "other key" else "k"


@pytest.mark.parametrize("how", ["bits", "cut", "not HDF5", "missing part", "other key"])
def test_a_cache_that_is_damaged_or_of_another_model_is_made_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "c.h5"
    filled(path).close()
    key = damage(path, how)
    cache = opened(path, key)
    assert not cache.complete
    assert "c.h5" in cache.tier.why_rebuilt
    cache.close()
    cache = filled(path, key)
    assert torch.equal(cache.get([5])[1], rows(5)[1])
    cache.close()
    again = opened(path, key)
    assert again.complete
    again.close()


def test_one_that_was_cut_short_is_never_found(tmp_path: Path) -> None:
    cache = opened(tmp_path / "c.h5")
    cache.put(0, rows(0))
    with pytest.raises(SaihError, match="3 of 4 samples were never stored"):
        cache.finish()
    assert not (tmp_path / "c.h5").exists()
    cache.close()
    assert not list(tmp_path.iterdir())


def test_read_ahead_passes_faults_on_and_ends_with_its_reader(tmp_path: Path) -> None:
    cache = filled(None)
    with pytest.raises(KeyError):
        list(cache.ahead([(0,), (99,)]))
    for _ in cache.ahead([(0,)] * 50):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "cache read-ahead"]


def backbone(seed: int = 0, layers: range | None = None) -> Stage:
    stage = Stage(PRESETS["bert-tiny"], layers=layers, head=False)
    random_init(stage, seed)
    return stage


def test_the_key_changes_with_everything_the_activations_depend_on() -> None:
    ids = [torch.arange(4), torch.arange(3)]
    one = backbone()
    keys = [cache_key(fingerprint(one), "cut at 4", ids, "fp32")]
    assert keys[0] == cache_key(fingerprint(backbone()), "cut at 4", [each.clone() for each in ids], "fp32")
    keys.append(cache_key(fingerprint(one), "cut at 3", ids, "fp32"))
    keys.append(cache_key(fingerprint(one), "cut at 4", ids, "fp16"))
    keys.append(cache_key(fingerprint(one), "cut at 4", list(torch.cat(ids).split([3, 4])), "fp32"))
    keys.append(cache_key(fingerprint(backbone(seed=1)), "cut at 4", ids, "fp32"))
    with torch.no_grad():
        next(iter(one.layers["2"].parameters()))[0] += 1e-7
    keys.append(cache_key(fingerprint(one), "cut at 4", ids, "fp32"))
    assert len({*keys}) == len(keys)


def test_fingerprints_of_stages_add_up() -> None:
    parts = [fingerprint(backbone(layers=layers)) for layers in (range(1), range(1, 3), range(3, 4))]
    assert torch.equal(sum(parts, torch.zeros(4, dtype=torch.int64)), fingerprint(backbone()))
