"""One rank's half of serving: run the steps that rank 0 decides, as integers that every rank receives."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.allocator import BlockAllocator
from workloads.llm.attention import AttnMeta
from workloads.llm.kv import PagedKV
from workloads.llm.model import Stage
from workloads.llm.sampling import choose, draw
from workloads.llm.scheduler import BatchPlan

IDLE = timedelta(days=7)
"""How long followers wait for the next step: a trace may have long gaps. The death of a rank is noticed at once."""
FIRST_WORDS = 1024
"""Size of the one message that carries most steps; what is longer follows in a second."""


class Step(NamedTuple):
    """A batch plan in numbers, all int32 on the CPU: T rows of B sequences, of which R get a token."""

    ids_T: Tensor
    counts_B: Tensor
    starts_B: Tensor
    """Tokens of each sequence that are in the cache already."""
    table_lengths_B: Tensor
    blocks: Tensor
    """The sequences' block tables, one after the other."""
    sampled_R: Tensor
    """Which sequences get a token."""
    draws: Tensor
    """A `Draw` for each of them: the bits of 3R float32."""

    @classmethod
    def of(cls, plan: BatchPlan, blocks: BlockAllocator) -> "Step":
        pairs = list(zip(plan.requests, plan.tokens, strict=True))
        tables = [blocks.table(request.id) for request in plan.requests]
        sampled = [place for place, (request, tokens) in enumerate(pairs) if tokens == request.pending]
        draws = [draw(plan.requests[place]) for place in sampled]
        return cls(
            _words(each for request, tokens in pairs for each in request.tokens(request.computed, tokens)),
            _words(plan.tokens),
            _words(request.computed for request in plan.requests),
            _words(map(len, tables)),
            _words(chain.from_iterable(tables)),
            _words(sampled),
            torch.tensor(draws, dtype=torch.float32).view(torch.int32).flatten(),
        )

    def words(self) -> Tensor:
        """As one row of integers, the lengths of the parts first."""
        return torch.cat([_words(map(len, self)), *self])

    @classmethod
    def from_words(cls, words: Tensor) -> "Step":
        lengths = words[: len(cls._fields)].tolist()
        return cls(*words[len(lengths) :].split(lengths))


STOP = Step(*[torch.zeros(0, dtype=torch.int32)] * len(Step._fields))


@contextmanager
def _others_live() -> Iterator[None]:
    """Says in one line what gloo and NCCL say of a connection that broke."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise SaihError(
            f"rank {dist.get_rank()} of the engine lost another rank, whose log says why: {reason}"
        ) from error


class Worker:
    """A stage and its cache. Rank 0's is driven by an engine, the others `follow`.

    Activations go from each rank to the same tensor-parallel rank of the next stage; the last stage sends the chosen
    tokens to rank 0. Nothing waits for a send, so rank 0 may start a batch for each stage before the first returns.
    Every method raises SaihError where another rank has ended.
    """

    def __init__(self, stage: Stage, kv: PagedKV) -> None:
        self.stage, self.kv = stage, kv
        self.mesh = stage.mesh
        self._alone = self.mesh.tp * self.mesh.pp == 1
        self._control = None if self._alone else dist.new_group(backend="gloo", timeout=IDLE)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def follow(self) -> None:
        """On every rank but 0: runs steps until the engine closes."""
        while len((step := Step.from_words(self.receive())).ids_T):
            self.run(step)

    def send_step(self, step: Step) -> None:
        """On rank 0: tells all others what to run."""
        if not self._alone:
            self.send(step.words())

    @_others_live()
    def send(self, words: Tensor) -> None:
        """On rank 0: integers, int32, for all others."""
        first = torch.zeros(FIRST_WORDS, dtype=torch.int32)
        first[0] = len(words)
        first[1 : 1 + len(words)] = words[: FIRST_WORDS - 1]
        for message in (first, words[FIRST_WORDS - 1 :].clone()):
            if len(message):
                self._keep(dist.broadcast(message, 0, group=self._control, async_op=True), message)

    @_others_live()
    def receive(self) -> Tensor:
        """On every rank but 0: what rank 0 has sent."""
        words = torch.empty(FIRST_WORDS, dtype=torch.int32)
        dist.broadcast(words, 0, group=self._control)
        total = int(words[0])
        if total > FIRST_WORDS - 1:
            rest = torch.empty(total - FIRST_WORDS + 1, dtype=torch.int32)
            dist.broadcast(rest, 0, group=self._control)
            return torch.cat([words[1:], rest])
        return words[1 : 1 + total]

    @_others_live()
    @torch.inference_mode()
    def run(self, step: Step) -> Tensor | None:
        """This rank's share of a step; the chosen tokens [R] where the last stage's first rank is rank 0 itself."""
        device = self.stage.device
        tables = [table.tolist() for table in step.blocks.split(step.table_lengths_B.tolist())]
        meta = AttnMeta.packed(
            step.counts_B.tolist(),
            starts=step.starts_B.tolist(),
            block_tables=tables,
            block_size=self.kv.block_size,
            device=device,
        )
        x = step.ids_T.long().to(device) if self.stage.first else self._receive_rows(len(step.ids_T))
        if not self.stage.last:
            h_TD = self.stage(x, meta, self.kv).contiguous()
            self._keep(dist.isend(h_TD, dist.get_rank() + self.mesh.tp), h_TD)
            return None
        logits_RV = self.stage(x, meta, self.kv, meta.last_rows[step.sampled_R.long().to(device)])
        if self.mesh.tp_rank != 0:
            return None
        tokens_R = choose(logits_RV, step.draws.view(torch.float32).view(-1, 3).to(device))
        if self.mesh.pp == 1:
            return tokens_R
        tokens_R = tokens_R.cpu()
        self._keep(dist.isend(tokens_R, 0, group=self._control), tokens_R)
        return None

    @_others_live()
    def receive_tokens(self, count: int) -> Tensor:
        """On rank 0: what the last stage chose in the oldest step whose tokens were not received yet."""
        tokens_R = torch.empty(count, dtype=torch.int64)
        dist.recv(tokens_R, (self.mesh.pp - 1) * self.mesh.tp, group=self._control)
        return tokens_R

    @_others_live()
    def wait(self) -> None:
        """Until all that was sent has left."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _receive_rows(self, rows: int) -> Tensor:
        h_TD = torch.empty(rows, self.stage.spec.hidden, dtype=self.stage.dtype, device=self.stage.device)
        dist.recv(h_TD, dist.get_rank() - self.mesh.tp)
        return h_TD

    def _keep(self, work: dist.Work | None, tensor: Tensor) -> None:
        """Holds on to what is being sent, and waits for the oldest when that is much."""
        if work is not None:
            self._sent.append((work, tensor))
        if len(self._sent) > 4 * self.mesh.pp:
            self._sent.popleft()[0].wait()


def _words(numbers: Iterable[int] | Sequence[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)
