"""Prefill: packs keep their order and bounds, and several prompts at once leave the keys of each by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workloads.llm import loader
from workloads.llm.allocator import BlockAllocator
from workloads.llm.config import preset
from workloads.llm.model import Stage
from workloads.llm.pool import HostPool
from workloads.llm.prefill import MOST_TOKENS, packs, prefill, prefilled_tokens
from workloads.llm.request import Request


def requests_of(lengths: list[int]) -> list[Request]:
    return [Request(number, range(number, number + length), 1) for number, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 900), max_size=40), st.integers(1, 400))
def test_packs_have_everybody_once_in_order_and_fit(lengths: list[int], blocks: int) -> None:
    requests, allocator = requests_of(lengths), BlockAllocator(blocks, 16)
    found = list(packs(requests, allocator))
    assert [each for pack in found for each in pack] == requests
    for pack in found:
        needed = sum(allocator.blocks_for(prefilled_tokens(each)) for each in pack)
        assert len(pack) == 1 or needed <= max(1, blocks // 4)
        assert len(pack) == 1 or sum(map(prefilled_tokens, pack)) <= MOST_TOKENS
    for one, other in pairwise(found):
        both = sum(allocator.blocks_for(prefilled_tokens(each)) for each in [*one, other[0]])
        assert both > max(1, min(MOST_TOKENS // 16, blocks // 4)), "the next one had no room"


@pytest.mark.parametrize("layout", ["block_first", "layer_first"])
def test_prompts_at_once_leave_what_each_leaves_by_itself(layout: str) -> None:
    stage = Stage(preset("llama-tiny"))
    loader.random_init(stage, 0)
    requests = requests_of([1, 40, 17, 2, 33, 200, 5])
    stored = []
    for most in (512, 1):
        pool, device = HostPool(40, 16), stage.new_kv(48, layout=layout)
        host = stage.new_kv(40, layout=layout)
        batches = [requests] if most > 1 else [[each] for each in requests]
        for batch in batches:
            prefill(stage, batch, pool, host, device)
        stored.append((pool, host))
    (pool, together), (alone_pool, alone) = stored
    for request in requests:
        count = prefilled_tokens(request)
        assert pool.stored_tokens(request.id) == count
        for layer in range(4):
            for a, b in zip(together.layer(layer), alone.layer(layer), strict=True):
                tables = (pool.blocks.table(request.id), alone_pool.blocks.table(request.id))
                kept = [x[table].flatten(0, 1)[:count] for x, table in zip((a, b), tables, strict=True)]
                torch.testing.assert_close(*kept)
                assert not count or kept[0].abs().sum() > 0
