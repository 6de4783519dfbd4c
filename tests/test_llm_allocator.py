"""Blocks of the KV cache: none twice, none lost, whatever owners do."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator

BLOCKS, BLOCK_SIZE = 7, 3


class Owners(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(BLOCKS, BLOCK_SIZE)
        self.tokens: dict[int, int] = {}

    @rule(owner=st.integers(0, 4), tokens=st.integers(0, 12))
    def grow(self, owner: int, tokens: int) -> None:
        before = {each: list(self.allocator.table(each)) for each in range(5)}
        more = max(0, -(-tokens // BLOCK_SIZE) - len(before[owner]))
        fits = more <= self.allocator.free_blocks
        assert self.allocator.grow(owner, tokens) == fits
        if fits:
            self.tokens[owner] = max(tokens, self.tokens.get(owner, 0))
            assert self.allocator.table(owner)[: len(before[owner])] == before[owner], "a token's block never moves"
        else:
            assert before == {each: list(self.allocator.table(each)) for each in range(5)}

    @rule(owner=st.integers(0, 4))
    def release(self, owner: int) -> None:
        self.allocator.release(owner)
        self.tokens.pop(owner, None)

    @invariant()
    def every_block_has_one_place(self) -> None:
        held = [block for owner in range(5) for block in self.allocator.table(owner)]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(BLOCKS))
        assert len(held) + self.allocator.free_blocks == BLOCKS

    @invariant()
    def tables_are_as_long_as_their_tokens_need(self) -> None:
        for owner in range(5):
            assert len(self.allocator.table(owner)) == -(-self.tokens.get(owner, 0) // BLOCK_SIZE)


Owners.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_owners = Owners.TestCase


def test_released_blocks_can_all_be_had_again() -> None:
    allocator = BlockAllocator(4, 2)
    for _ in range(3):
        assert allocator.grow(1, 5)
        assert not allocator.grow(2, 3)
        allocator.release(1)
        assert allocator.grow(2, 8)
        assert sorted(allocator.table(2)) == [0, 1, 2, 3]
        allocator.release(2)


@pytest.mark.parametrize(("blocks", "block_size"), [(0, 4), (4, 0)])
def test_a_cache_without_room_is_refused(blocks: int, block_size: int) -> None:
    with pytest.raises(SaihError, match="at least one block"):
        BlockAllocator(blocks, block_size)
