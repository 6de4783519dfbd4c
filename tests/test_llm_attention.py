"""Attention over packed rows against the formula written out, padded index maths, the paged cache and its copies."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saih.errors import SaihError
from tests.conftest import package
from workloads.llm import triton_decode
from workloads.llm.attention import BACKENDS, AttnMeta, backend, even, loop, padded, varlen
from workloads.llm.kv import LAYOUTS, EmulatedLink, PagedKV, copy_blocks

KERNELS = {"padded": padded, "loop": loop, "even": even}
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def formula(q_THd: Tensor, k_KGd: Tensor, v_KGd: Tensor, meta: AttnMeta) -> Tensor:
    """softmax(q k / sqrt(d)) v, one row and one head at a time, in fp64."""
    found = torch.empty_like(q_THd, dtype=torch.float64)
    group = q_THd.shape[1] // k_KGd.shape[1]
    row = first = 0
    for rows, start, keys in zip(meta.query_lens, meta.starts, meta.key_rows, strict=True):
        for place in range(rows):
            seen = start + place + 1 if meta.causal else keys
            for head in range(q_THd.shape[1]):
                k, v = (x[first : first + seen, head // group].double() for x in (k_KGd, v_KGd))
                p = torch.softmax(k @ q_THd[row, head].double() / math.sqrt(q_THd.shape[2]), 0)
                found[row, head] = p @ v
            row += 1
        first += keys
    return found.float()


def some(rows: int, heads: int, size: int = 8) -> Tensor:
    return torch.randn(rows, heads, size, generator=torch.Generator().manual_seed(rows * 31 + heads))


def tables_for(lens: list[int], block_size: int, seed: int = 3) -> tuple[list[list[int]], int]:
    """Blocks in an order that is anything but consecutive, and how many there are."""
    need = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(need), generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[sum(need[:i]) : sum(need[: i + 1])] for i in range(len(need))], sum(need)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(lens=lengths, causal=st.booleans(), kv_heads=st.sampled_from([1, 2, 4]))
@example(lens=[1, 1, 1], causal=True, kv_heads=2)
@example(lens=[7, 7], causal=False, kv_heads=4)
@example(lens=[1, 12, 1], causal=True, kv_heads=1)
def test_packed_rows_attend_within_their_sequence(kernel: str, lens: list[int], causal: bool, kv_heads: int) -> None:
    meta = AttnMeta.packed(lens, causal=causal)
    q, k, v = some(sum(lens), 4), some(sum(lens), kv_heads), some(sum(lens), kv_heads) + 1
    torch.testing.assert_close(KERNELS[kernel](q, k, v, meta), formula(q, k, v, meta), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25)
@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 4, 16]),
)
@example(steps=[(4, 1), (0, 1), (9, 1)], block_size=4)
def test_rows_that_go_on_attend_to_the_cache(
    kernel: str, layout: str, steps: list[tuple[int, int]], block_size: int
) -> None:
    starts, lens = [a for a, _ in steps], [b for _, b in steps]
    tables, blocks = tables_for([a + b for a, b in steps], block_size)
    meta = AttnMeta.packed(lens, starts=starts, block_tables=tables, block_size=block_size)
    kv = PagedKV(2, 2, 8, blocks=blocks, block_size=block_size, layout=layout)
    kv.arena.fill_(float("nan"))  # nothing unwritten may be seen
    q, k, v = some(sum(lens), 4), some(len(meta.slots_K), 2), some(len(meta.slots_K), 2) - 1
    kv.write(1, meta.slots_K, k, v)
    first = (meta.cu_k[:-1] + torch.tensor(starts)).tolist()
    now = torch.cat([torch.arange(a, a + rows) for a, rows in zip(first, lens, strict=True)])
    attend = backend(kernel)
    k_now, v_now = k[now] + 2, v[now] + 2
    k[now], v[now] = k_now, v_now
    found = attend(q, k_now, v_now, meta, kv, 1)
    torch.testing.assert_close(found, formula(q, k, v, meta), atol=1e-5, rtol=0)
    assert kv.layer(0)[0].isnan().all()


def test_memory_kept_between_steps_is_not_seen_in_the_next() -> None:
    """Steps that need more, less and as much, two layers each, of two types: as one call a sequence gives them."""
    kept, alone = backend("padded"), backend("loop")
    tables, blocks = tables_for([30, 2, 17], 4)
    results = []
    for which, dtype, inferring in (
        ([1], torch.float32, True),
        ([0, 1, 2], torch.float32, False),
        ([1, 2], torch.float32, True),
        ([0, 1, 2], torch.bfloat16, True),
    ):
        starts, mine = [[29, 1, 16][each] for each in which], [tables[each] for each in which]
        meta = AttnMeta.packed([1] * len(which), starts=starts, block_tables=mine, block_size=4)
        kv = PagedKV(2, 2, 8, blocks=blocks, block_size=4, layout="block_first", dtype=dtype)
        kv.arena.fill_(float("nan"))
        for layer in (0, 1):
            keys = len(meta.slots_K)
            kv.write(layer, meta.slots_K, some(keys, 2).to(dtype) + layer, some(keys, 2).to(dtype) * 2 - layer)
            q, k, v = (some(len(which), heads).to(dtype) for heads in (4, 2, 2))
            with torch.inference_mode(inferring):
                results.append((kept(q, k, v, meta, kv, layer), alone(q, k, v, meta, kv, layer)))
    for found, wanted in results:  # after all have run: none lies in what was kept
        torch.testing.assert_close(found, wanted, atol=1e-5 if found.dtype == torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@given(lens=lengths, causal=st.booleans())
def test_padded_rows_give_on_valid_rows_what_packed_rows_give(kernel: str, lens: list[int], causal: bool) -> None:
    """Bit by bit where both are padded in the end: the same call on the same numbers."""
    longest = max(lens)
    valid = torch.cat([torch.arange(b * longest, b * longest + length) for b, length in enumerate(lens)])
    q, k, v = (some(len(lens) * longest, heads) * 3 for heads in (4, 2, 2))
    rubbish = AttnMeta.padded(lens, causal=causal)
    packed = AttnMeta.packed(lens, causal=causal)
    found = KERNELS[kernel](q, k, v, rubbish)[valid]
    wanted = padded(q[valid], k[valid], v[valid], packed)
    torch.testing.assert_close(found, wanted, atol=0 if kernel == "padded" else 1e-5, rtol=0)
    assert rubbish.last_rows.tolist() == [b * longest + length - 1 for b, length in enumerate(lens)]
    assert torch.equal(valid[packed.last_rows], rubbish.last_rows)
    assert torch.equal(rubbish.positions_T[valid], packed.positions_T)


@given(lens=lengths)
def test_the_padded_places_are_those_of_pad_sequence(lens: list[int]) -> None:
    rows = torch.arange(sum(lens)).split(lens)
    filled = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1).flatten()
    assert filled[AttnMeta.packed(lens).padded_rows_T].tolist() == list(range(sum(lens)))


def test_a_step_that_cannot_be_is_refused() -> None:
    with pytest.raises(SaihError, match="empty batch"):
        AttnMeta.packed([])
    with pytest.raises(SaihError, match="sequence 1 has 0 rows"):
        AttnMeta.packed([3, 0])
    with pytest.raises(SaihError, match="need a KV cache"):
        AttnMeta.packed([1], starts=[4])
    with pytest.raises(SaihError, match="sequence 0 has 2 blocks of 4 tokens, too few for 9"):
        AttnMeta.packed([1], starts=[8], block_tables=[[5, 1]], block_size=4)
    with pytest.raises(SaihError, match="1 starts for 2 sequences"):
        AttnMeta.packed([1, 1], starts=[1])
    meta = AttnMeta.packed([2], block_tables=[[0]], block_size=4)
    with pytest.raises(SaihError, match="no KV cache was given"):
        backend()(some(2, 2), some(2, 2), some(2, 2), meta, None, 0)


def test_a_backend_that_the_device_lacks_is_refused() -> None:
    assert backend().name == "loop"
    with pytest.raises(SaihError, match=r"'varlen' needs CUDA; possible on cpu with torch.float32: padded, loop"):
        backend("varlen")
    with pytest.raises(SaihError, match="'triton' needs CUDA"):
        backend("triton", "cpu", torch.bfloat16)
    with pytest.raises(SaihError, match="needs fp16 or bf16"):
        backend("varlen", "cuda", torch.float32)
    with pytest.raises(SaihError, match="unknown attention backend 'flash'"):
        backend("flash")
    with pytest.raises(SaihError, match="'loop' has no splits"):
        backend("loop", splits=4)


@pytest.mark.parametrize("gqa", [True, False])
def test_varlen_is_called_as_each_torch_wants_it(monkeypatch: pytest.MonkeyPatch, gqa: bool) -> None:
    """The kernel needs CUDA; a stand-in with the signature of torch 2.11, or of 2.12, checks what it is given."""

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert query.shape[1] == key.shape[1] or gqa
        assert (max_q, max_k) == (4, 7)
        outputs = []
        for i in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
            mask = torch.ones(len(q), len(k), dtype=torch.bool)
            mask = mask.tril(len(k) - len(q) + window_size[1]) if window_size[1] >= 0 else mask
            o = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, enable_gqa=True
            )
            outputs.append(o.transpose(0, 1))
        return torch.cat(outputs)

    def with_gqa(*words, enable_gqa=False, **more):  # type: ignore[no-untyped-def]
        assert enable_gqa
        return stand_in(*words, **more)

    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", with_gqa if gqa else stand_in)
    tables, _ = tables_for([7, 3, 5], 4)
    meta = AttnMeta.packed([4, 3, 1], starts=[3, 0, 4], block_tables=tables, block_size=4)
    q, k, v = some(8, 4), some(15, 2), some(15, 2) + 1
    torch.testing.assert_close(varlen(q, k, v, meta), formula(q, k, v, meta), atol=1e-5, rtol=0)
    with pytest.raises(SaihError, match="packed rows only"):
        varlen(q, k, v, AttnMeta.padded([2, 4]))


# -- Paged decode in Triton --------------------------------------------------------------------------------------------


def test_the_decode_kernel_in_the_interpreter_of_triton() -> None:
    """It is chosen when triton is imported, so the tests below run in a process of their own."""
    package("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "paged_decode"]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert re.search(r"\b25 passed\b", ran.stdout), ran.stdout[-300:]
    assert "skipped" not in ran.stdout


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the process of the test above, with TRITON_INTERPRET=1"
)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (8, 2, 24), (6, 1, 64)])
def test_paged_decode(layout: str, splits: int, heads: int, kv_heads: int, size: int) -> None:
    lens = [1, 5, 64, 65, 200, 130]
    tables, blocks = tables_for(lens, 16)
    kv = PagedKV(3, kv_heads, size, blocks=blocks, block_size=16, layout=layout)
    kv.arena.normal_()
    meta = AttnMeta.packed([1] * 6, starts=[n - 1 for n in lens], block_tables=tables, block_size=16)
    q = some(6, heads, size)
    found = triton_decode.paged_decode(q, *kv.layer(1), meta.block_table_BN, meta.kv_lens_B, splits)
    torch.testing.assert_close(found, formula(q, *kv.read(1, meta.slots_K), meta), atol=1e-5, rtol=0)


@interpreted
def test_paged_decode_fills_the_device_with_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of splits there are as many as the multiprocessors want, and the result is the same."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=16))
    lens = [1, 300, 600]
    tables, blocks = tables_for(lens, 16)
    kv = PagedKV(1, 2, 16, blocks=blocks, block_size=16)
    kv.arena.normal_()
    meta = AttnMeta.packed([1] * 3, starts=[n - 1 for n in lens], block_tables=tables, block_size=16)
    q = some(3, 4, 16)
    found = triton_decode.paged_decode(q, *kv.layer(0), meta.block_table_BN, meta.kv_lens_B)
    torch.testing.assert_close(found, formula(q, *kv.read(0, meta.slots_K), meta), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("programs", "most_keys", "splits"), [(6, 10_000, 6), (6, 600, 2), (6, 10, 1), (1000, 10_000, 1), (1, 10_000, 32)]
)
def test_splits_give_every_multiprocessor_work_but_not_too_little(
    programs: int, most_keys: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 multiprocessors, two programs each, and at least 256 keys a split."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=16))
    assert triton_decode._filling(torch.device("cpu"), programs, most_keys) == splits


# -- The cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_and_stands_in_its_block(layout: str) -> None:
    kv = PagedKV(3, 2, 4, blocks=5, block_size=3, layout=layout)
    slots = torch.tensor([0, 14, 7, 4])
    written = {layer: (some(4, 2, 4) + layer, some(4, 2, 4) - layer) for layer in range(3)}
    for layer, (k, v) in written.items():
        kv.write(layer, slots, k, v)
    for layer, (k, v) in written.items():
        k_read, v_read = kv.read(layer, slots)
        assert torch.equal(k_read, k)
        assert torch.equal(v_read, v)
        k_NSGd, v_NSGd = kv.layer(layer)
        assert torch.equal(k_NSGd[slots // 3, slots % 3], k)
        assert torch.equal(v_NSGd[slots // 3, slots % 3], v)
    assert kv.arena.count_nonzero() == 3 * 2 * 4 * 2 * 4
    assert kv.block_bytes * 5 == kv.arena.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    moves=st.lists(st.integers(0, 7), unique=True, max_size=8).flatmap(
        lambda a: st.tuples(st.just(a), st.permutations(a))
    )
)
def test_blocks_move_whole(layout: str, moves: tuple[list[int], list[int]]) -> None:
    a, b = (PagedKV(2, 1, 2, blocks=8, block_size=2, layout=layout) for _ in range(2))
    a.arena.copy_(torch.arange(a.arena.numel()).view(a.arena.shape))
    b.arena.fill_(-1)
    source, target = moves
    moved = copy_blocks(a, b, source, target)
    assert moved.bytes == len(source) * a.block_bytes
    for layer in range(2):
        for ours, theirs in zip(a.layer(layer), b.layer(layer), strict=True):
            assert torch.equal(theirs[target], ours[source])
            assert (theirs[[block for block in range(8) if block not in target]] == -1).all()


def test_a_run_of_blocks_is_one_copy_or_one_a_layer() -> None:
    runs = [3, 4, 5, 0, 7], [1, 2, 3, 4, 0]  # 3-5 -> 1-3, 0 -> 4, 7 -> 0
    found = {}
    for layout in LAYOUTS:
        a, b = (PagedKV(4, 1, 2, blocks=8, block_size=2, layout=layout) for _ in range(2))
        found[layout] = copy_blocks(a, b, *runs).copies
    assert found == {"layer_first": 12, "block_first": 3}


def test_arenas_that_differ_and_unknown_layouts_are_refused() -> None:
    a, b = PagedKV(2, 1, 2, blocks=4), PagedKV(2, 1, 2, blocks=4, layout="block_first")
    with pytest.raises(SaihError, match="KV arenas differ"):
        copy_blocks(a, b, [0], [0])
    with pytest.raises(SaihError, match="2 blocks cannot be copied to 1"):
        copy_blocks(a, a, [0, 1], [0])
    with pytest.raises(SaihError, match="valid: layer_first, block_first"):
        PagedKV(2, 1, 2, blocks=4, layout="token_first")


def test_an_emulated_link_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("workloads.llm.kv.time.sleep", slept.append)
    monkeypatch.setattr("workloads.llm.kv.time.perf_counter", lambda: 5.0)
    a, b = (PagedKV(2, 1, 2, blocks=8, block_size=2) for _ in range(2))
    copy_blocks(a, b, [0, 1], [4, 5], EmulatedLink(bytes_per_s=a.block_bytes, copy_s=0.5))
    assert slept == [pytest.approx(2 + 2 * 0.5)]


def test_every_backend_has_its_kernel() -> None:
    assert {"varlen", "triton", *KERNELS} == set(BACKENDS)
