"""Requests by the length of their keys and values, in a quad-tree with counts, and batches of neighbours out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from workloads.llm.request import Request

LEAF_TOKENS = 16
DEPTH = 6
LONGEST_TOKENS = 65536
"""LEAF_TOKENS * 4^DEPTH, as in arXiv 2605.23389; a longer request is counted as one of this length."""

Node = tuple[int, int]
"""(level, place): place * width(level) <= length - 1 < (place + 1) * width(level); the root is (0, 0)."""
ROOT: Node = (0, 0)


def width(level: int) -> int:
    """Lengths that a node of this level covers."""
    return LONGEST_TOKENS >> 2 * level


def node_of(tokens: int, level: int) -> Node:
    """The node of this level that covers a length."""
    return level, (min(max(tokens, 1), LONGEST_TOKENS) - 1) // width(level)


def children(node: Node) -> list[Node]:
    """The four quarters of a node's range, from short to long; none of a leaf."""
    level, place = node
    return [] if level == DEPTH else [(level + 1, 4 * place + quarter) for quarter in range(4)]


def parent(node: Node) -> Node:
    """The node whose quarter this one is; of the root nobody asks."""
    level, place = node
    return level - 1, place // 4


class QuadTree:
    """Every node knows how many requests its range holds and how many blocks they need; a leaf holds them in order.

    A request's length is the context that its next step attends to; it must not change while the request is here.
    """

    def __init__(self, blocks_for: Callable[[int], int]) -> None:
        self.blocks_for = blocks_for
        self._requests: list[dict[int, int]] = [{} for _ in range(DEPTH + 1)]
        self._blocks: list[dict[int, int]] = [{} for _ in range(DEPTH + 1)]
        self._leaves: dict[int, dict[int, Request]] = {}

    def __len__(self) -> int:
        return self.requests(ROOT)

    def requests(self, node: Node) -> int:
        return self._requests[node[0]].get(node[1], 0)

    def blocks(self, node: Node) -> int:
        return self._blocks[node[0]].get(node[1], 0)

    def insert(self, request: Request) -> None:
        self._count(request, 1)
        self._leaves.setdefault(node_of(request.context_tokens, DEPTH)[1], {})[request.id] = request

    def remove(self, request: Request) -> None:
        """Raises KeyError for one that is not here."""
        del self._leaves[node_of(request.context_tokens, DEPTH)[1]][request.id]
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        tokens = request.context_tokens
        blocks = sign * self.blocks_for(tokens)
        place = node_of(tokens, DEPTH)[1]
        for level in range(DEPTH, -1, -1):
            requests, held = self._requests[level], self._blocks[level]
            requests[place] = requests.get(place, 0) + sign
            held[place] = held.get(place, 0) + blocks
            if not requests[place]:
                del requests[place], held[place]
                if level == DEPTH:
                    del self._leaves[place]
            place //= 4

    def densest(self, most_blocks: int) -> Node:
        """Density-first search: down to the child with the most requests, until a node fits (or is a leaf)."""
        node = ROOT
        while self.blocks(node) > most_blocks and node[0] < DEPTH:
            node = max(children(node), key=self.requests)  # the shorter one of two alike
        return node

    def around(self, tokens: int, most_blocks: int) -> Node:
        """The largest node that covers a length and fits; its leaf if none does."""
        level = 0
        while level < DEPTH and self.blocks(node_of(tokens, level)) > most_blocks:
            level += 1
        return node_of(tokens, level)

    def nearest(self, tokens: int, node: Node) -> Iterator[Request]:
        """The requests of a node, those of the leaves nearest to a length first; in order of arrival in each leaf."""
        for leaf in self._nearest_leaves(tokens, node):
            yield from list(self._leaves[leaf].values())

    def _nearest_leaves(self, tokens: int, node: Node) -> Iterator[int]:
        if not self.requests(node):
            return
        if node[0] == DEPTH:
            yield node[1]
            return
        for child in sorted(children(node), key=lambda each: _distance(each, tokens)):
            yield from self._nearest_leaves(tokens, child)

    def batch(self, most_blocks: int, fewest: int, first: Request | None = None) -> tuple[list[Request], Node]:
        """The next batch, and the node it is from: at most `most_blocks`, and `fewest` requests or more if it has them.

        From the densest part, or with `first` from around that request, which is then in the batch. With fewer than
        `fewest` it takes the nearest lengths of the parent, then of the parent's parent, and so on.
        Nothing is removed. A first request that exceeds `most_blocks` by itself makes a batch by itself.
        """
        if not len(self):
            return [], ROOT
        node = self.densest(most_blocks) if first is None else self.around(first.context_tokens, most_blocks)
        chosen = {} if first is None else {first.id: first}
        room = most_blocks - sum(self.blocks_for(each.context_tokens) for each in chosen.values())
        middle = int((node[1] + 0.5) * width(node[0]))
        if first is not None:
            middle = first.context_tokens
        wider = node
        while True:
            for request in self.nearest(middle, wider):
                needed = self.blocks_for(request.context_tokens)
                if wider != node and len(chosen) >= fewest:
                    break
                if request.id not in chosen and (needed <= room or not chosen):
                    chosen[request.id] = request
                    room -= needed
            if len(chosen) >= fewest or wider == ROOT or room <= 0:
                return list(chosen.values()), node
            wider = parent(wider)


def _distance(node: Node, tokens: int) -> int:
    """From a length to the nearest one in a node's range."""
    low = node[1] * width(node[0]) + 1
    return max(low - tokens, tokens - (low + width(node[0]) - 1), 0)
