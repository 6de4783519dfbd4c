"""What the ranks of the EnergonAI tests run. Started as processes of their own."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saih.errors import SaihError
from workloads.llm.attention import AttnMeta
from workloads.llm.config import preset
from workloads.llm.energonai.engine import Batch, Engine
from workloads.llm.energonai.stages import ComputedStage, EmulatedStage, Job
from workloads.llm.energonai.worker import Worker
from workloads.llm.loader import random_init
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh

SPEC = preset("gpt-tiny")
TICKETS = 5
CUTS = ((1, 4), (2, 2), (4, 1))
"""tp, pp"""
LENS = ((5, 1, 9), (1,), (4, 4, 4), (12, 2), (3, 7, 1, 2), (1, 1), (16,), (2, 11))
"""More batches than tickets, of every kind: one token, all equal, one full, different from their neighbours."""


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [Batch(lens, torch.randint(SPEC.vocab, (sum(lens),), generator=generator), 2000) for lens in LENS]


def expected() -> list[Tensor]:
    """Logits of every token, from one process."""
    stage = Stage(SPEC, attention="loop")
    random_init(stage, seed=1)
    with torch.inference_mode():
        return [stage(batch.ids_T, AttnMeta.packed(batch.lens)) for batch in batches()]


def join(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)


def worker_of(mesh: Mesh, depth: int, emulated: bool = False) -> Worker:
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))
    if emulated:
        return Worker(EmulatedStage(8, mesh.pp_rank == mesh.pp - 1), mesh, control, depth=depth)
    stage = Stage(SPEC, mesh, attention="padded")
    random_init(stage, seed=1)
    return Worker(ComputedStage(stage), mesh, control, depth=depth, tickets=TICKETS)


def all_at_once(engine: Engine, wanted: Sequence[Batch], padded: bool, every_row: bool) -> list[Tensor]:
    """As many in flight as there are tickets for; results are asked for from the last to the first."""
    found: list[Tensor] = []
    for begin in range(0, len(wanted), TICKETS - 1):
        some = wanted[begin : begin + TICKETS - 1]
        futures = [engine.run(batch, padded=padded, every_row=every_row) for batch in some]
        found += [future.result() for future in reversed(futures)][::-1]
    return found


def grid(rank: int, folder: str) -> None:
    """Four ranks, every cut, both hand-offs, both forms of rows, while every rank picks commands up at random."""
    join(rank, folder, 4)
    found = {}
    for tp, pp in CUTS:
        mesh = Mesh.make(tp, pp)
        for depth in (0, 2):
            threads = threading.active_count()
            worker = worker_of(mesh, depth)
            worker.pickup_delay_s = 0.01
            if rank == 0:
                found[f"tp={tp} pp={pp} depth={depth}"] = compared(Engine(worker))
            else:
                worker.follow()
                worker.wait_for(3 * len(LENS))
                worker.join()
            ended = time.monotonic() + 5
            while threading.active_count() > threads and time.monotonic() < ended:
                time.sleep(0.01)
            found[f"threads tp={tp} pp={pp} depth={depth}"] = [threading.active_count() - threads]
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def compared(engine: Engine) -> list[float]:
    """Largest error of all tokens; whether padded rows give the same bits; largest error of last tokens."""
    wanted = expected()
    packed = all_at_once(engine, batches(), padded=False, every_row=True)
    padded = all_at_once(engine, batches(), padded=True, every_row=True)
    last = all_at_once(engine, batches(), padded=True, every_row=False)
    engine.close()
    ends = [x[torch.tensor(lens).cumsum(0) - 1] for x, lens in zip(wanted, LENS, strict=True)]
    return [
        _far(packed, wanted),
        float(all(torch.equal(a, b) for a, b in zip(packed, padded, strict=True))),
        _far(last, ends),
    ]


def _far(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


class BrokenStage(EmulatedStage):
    """Fails at the second batch."""

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor:
        if job.command.ticket == 1:
            raise ValueError("no room\nin here")
        return super().__call__(job, x_TD)


def accident(rank: int, folder: str, kind: str, depth: int) -> None:
    """A pipeline of three in which something happens on one rank; the others write what they are told, and when."""
    join(rank, folder, 3)
    worker = worker_of(Mesh.make(1, 3), depth, emulated=True)
    if kind == "broken" and rank == 1:
        worker.stage = BrokenStage(8, last=False)
    began_s = time.monotonic()
    try:
        if rank == 0:
            engine = Engine(worker)
            engine.run(batches()[0]).result()  # the pipeline works
        else:
            worker.follow()
            worker.wait_for(1)
        began_s = time.monotonic()
        if kind == f"kill {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            futures = [engine.run(batches()[3]) for _ in range(50)]
            for future in futures:
                future.result()
        else:
            worker.wait_for(50)
        told = "nothing"
    except SaihError as error:
        told = str(error)
    (Path(folder) / f"told{rank}.json").write_text(json.dumps([told, time.monotonic() - began_s]))
    if rank == 0:
        try:
            engine.run(batches()[0])
        except SaihError as error:
            (Path(folder) / "later.json").write_text(json.dumps(str(error)))
        engine.close()
    worker.join()
    sys.stdout.flush()
    os._exit(0)  # threads may wait for the one that is gone
