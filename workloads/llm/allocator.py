"""Which block of the KV cache belongs to whom: integers only, so it runs in simulated time too."""

from saih.errors import SaihError


class BlockAllocator:
    """`blocks` blocks of `block_size` tokens each, handed out in tables, one table for each owner.

    Position p of an owner lies in block `table(owner)[p // block_size]` at offset `p % block_size`.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise SaihError(f"a KV cache needs at least one block of one token, got {blocks} x {block_size}")
        self.blocks = blocks
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def table(self, owner: int) -> list[int]:
        """The owner's blocks in the order of its tokens; empty where it has none. Not to be changed."""
        return self._tables.get(owner, [])

    def grow(self, owner: int, tokens: int) -> bool:
        """Lets the owner's table hold at least `tokens`; False, and nothing changes, where the free blocks run out."""
        table = self._tables.get(owner, [])
        missing = self.blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        if missing > 0:
            self._tables[owner] = table + [self._free.pop() for _ in range(missing)]
        return True

    def release(self, owner: int) -> None:
        """All blocks of the owner are free again."""
        self._free += reversed(self._tables.pop(owner, []))
