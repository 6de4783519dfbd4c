"""The host pool and copies: what comes back is what went, urgent chunks go first, nothing is lost in a thread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.llm.allocator import BlockAllocator
from workloads.llm.copythread import CopyThread
from workloads.llm.kv import PagedKV, copy_blocks
from workloads.llm.pool import HostPool, PooledState
from workloads.llm.request import Phase, Request
from workloads.llm.transfer import CopyQueue, SimulatedLink, Transfer, Urgency


def arenas(layout: str, blocks: int) -> tuple[PagedKV, PagedKV]:
    device, host = (PagedKV(2, 1, 4, blocks=blocks, block_size=4, layout=layout) for _ in range(2))
    device.arena.normal_()
    return device, host


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["layer_first", "block_first"]), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
def test_a_round_trip_is_exact_in_any_steps(layout: str, lengths: list[int], data: st.DataObject) -> None:
    """Stored piece by piece as tokens come, and loaded into other blocks."""
    blocks = sum(-(-length // 4) for length in lengths)
    device, host = arenas(layout, 2 * blocks)
    pool, first, again = HostPool(blocks, 4), BlockAllocator(2 * blocks, 4), BlockAllocator(2 * blocks, 4)
    again.grow(99, 4 * blocks)  # other blocks than before
    before = {}
    for number, length in enumerate(lengths):
        assert pool.enter(Request(number, range(length), 1))
        first.grow(number, length)
        cuts = sorted(data.draw(st.lists(st.integers(1, length), max_size=3)))
        for tokens in [*cuts, length]:
            pairs = pool.store(number, tokens, first.table(number))
            copy_blocks(device, host, [a for a, _ in pairs], [b for _, b in pairs])
        before[number] = device.arena.clone()
    assert pool.blocks.free_blocks == 0
    snapshot = device.arena.clone()
    device.arena.zero_()
    for number, length in enumerate(lengths):
        again.grow(number, length)
        pairs = pool.load(number, again.table(number))
        copy_blocks(host, device, [a for a, _ in pairs], [b for _, b in pairs])
        axis = 0 if layout == "block_first" else 1
        old, new = (torch.tensor(table.table(number)) for table in (first, again))
        assert torch.equal(snapshot.index_select(axis, old), device.arena.index_select(axis, new))


def test_only_what_is_new_is_stored() -> None:
    pool = HostPool(10, 4)
    pool.enter(Request(0, range(20), 5))
    assert len(pool.store(0, 8, [0, 1, 2, 3])) == 2
    assert pool.store(0, 8, [0, 1, 2, 3]) == []
    assert [device for device, _ in pool.store(0, 13, [0, 1, 2, 3])] == [2, 3]
    assert [device for device, _ in pool.store(0, 14, [0, 1, 2, 3])] == [3], "a block that was not full goes again"
    assert not pool.enter(Request(1, range(20), 1)), "it reserves all that a request may hold"
    pool.leave(0)
    assert pool.blocks.free_blocks == 10


def test_a_pool_lets_in_who_fits_in_order() -> None:
    state = PooledState(BlockAllocator(4, 4), HostPool(4, 4))
    requests = [Request(number, range(8), 1) for number in range(3)]
    for request in requests:
        state.submit(request)
    assert state.admit() == requests[:2]
    state.blocks.grow(0, 8)
    state.start(requests[0])
    state.suspend(requests[0])
    assert list(state.pooled) == [1, 0]
    assert state.blocks.free_blocks == 4
    state.cancel(requests[1])
    assert requests[1].phase is Phase.CANCELLED
    assert state.admit() == requests[2:]


TRANSFERS = st.lists(
    st.tuples(st.sampled_from(list(Urgency)), st.lists(st.integers(1, 9), min_size=1, max_size=4)), max_size=8
)


@given(TRANSFERS)
def test_urgent_ones_first_and_every_chunk_once(given: list[tuple[Urgency, list[int]]]) -> None:
    queue, order = CopyQueue(), []
    for urgency, chunks in given:
        queue.add(Transfer(urgency, chunks))
    while transfer := queue.next():
        order.append((transfer.urgency, transfer.chunk_bytes[transfer.moved]))
        transfer.moved += 1
    assert [urgency for urgency, _ in order] == sorted(urgency for urgency, _ in order)
    assert sorted(size for _, size in order) == sorted(size for _, chunks in given for size in chunks)


def test_an_activation_waits_for_one_chunk_at_most_and_in_fifo_for_all() -> None:
    ends = {}
    for kind in ("priority", "fifo"):
        link = SimulatedLink(1.0, order=kind)
        link.submit(Transfer(Urgency.OFFLOAD, [10] * 5), 0.0)
        link.advance(3.0)
        activation = link.submit(Transfer(Urgency.ACTIVATION, [1]), 3.0)
        link.advance(100.0)
        ends[kind] = activation.ended_s
    assert ends == {"priority": 11.0, "fifo": 51.0}


def test_a_link_is_idle_between_transfers_and_finishes_what_is_hurried() -> None:
    link = SimulatedLink(2.0)
    first = link.submit(Transfer(Urgency.PREFETCH, [4]), 0.0)
    link.advance(10.0)
    second = link.submit(Transfer(Urgency.PREFETCH, [4, 4]), 10.0)
    third = link.submit(Transfer(Urgency.PREFETCH, [2]), 10.0)
    assert first.ended_s == 2.0
    assert link.finish(third) == 11.0
    assert link.finish(second) == 15.0
    assert link.busy_s == 7.0


@pytest.mark.parametrize("order", ["priority", "fifo"])
def test_a_link_goes_on_with_others_until_one_may_begin(order: str) -> None:
    link = SimulatedLink(1.0, order)
    late = link.submit(Transfer(Urgency.PREFETCH, [2], not_before_s=10.0), 0.0)
    later = link.submit(Transfer(Urgency.OFFLOAD, [1]), 3.0)
    link.advance(5.0)
    assert (later.ended_s, late.done) == (4.0, False)
    link.advance(11.0)
    assert late.ended_s == 12.0, "an idle link begins when it may, not when it is asked"
    latest = link.submit(Transfer(Urgency.PREFETCH, [2], not_before_s=20.0), 15.0)
    assert link.finish(latest) == 22.0


def test_a_thread_copies_what_is_asked_and_stops_what_is_dropped() -> None:
    source, target = arenas("block_first", 32)
    copies = CopyThread(chunk_bytes=2 * source.block_bytes)
    whole = copies.submit(Urgency.PREFETCH, source, target, [(n, 31 - n) for n in range(16)])
    copies.wait(whole)
    assert torch.equal(source.arena[:16], target.arena.flip(0)[:16])
    assert copies.bytes_per_s(1.0) > 1.0
    left = copies.submit(Urgency.OFFLOAD, source, target, [(n, n) for n in range(16)])
    copies.drop(left)
    assert left.done
    copies.wait(copies.submit(Urgency.PREFETCH, source, target, []))
    copies.close()
