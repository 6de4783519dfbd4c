"""What the ranks of the EnergonAI tests run. Started as processes of their own."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Context, Place, Point
from saih.errors import SaihError
from saih.timing import Unclocked
from workloads.llm.attention import AttnMeta
from workloads.llm.config import preset
from workloads.llm.energonai import bench, spec
from workloads.llm.energonai.engine import Batch, Engine
from workloads.llm.energonai.message import Kind
from workloads.llm.energonai.stages import ComputedStage, EmulatedStage, Job
from workloads.llm.energonai.worker import Worker
from workloads.llm.handoff import Outbox
from workloads.llm.loader import random_init
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh

SPEC = preset("gpt-tiny")
TICKETS = 5
CUTS = ((1, 4), (2, 2), (4, 1))
"""tp, pp"""
LENS = ((5, 1, 9), (1,), (4, 4, 4), (12, 2), (3, 7, 1, 2), (1, 1), (16,), (2, 11))
"""More batches than tickets, of every kind: one token, all equal, one full, different from their neighbours."""

BAD = {
    f"id {SPEC.vocab} is outside the vocabulary: 0 to {SPEC.vocab - 1}": Batch((2,), torch.tensor([1, SPEC.vocab])),
    f"id -1 is outside the vocabulary: 0 to {SPEC.vocab - 1}": Batch((2,), torch.tensor([-1, 1])),
    f"a sequence of {SPEC.max_positions + 1} tokens; the model has {SPEC.max_positions} positions": Batch(
        (1, SPEC.max_positions + 1), torch.ones(SPEC.max_positions + 2, dtype=torch.int64)
    ),
}
"""Batches that the model cannot take, and what is said to them."""


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [Batch(lens, torch.randint(SPEC.vocab, (sum(lens),), generator=generator), 2000) for lens in LENS]


def expected() -> list[Tensor]:
    """Logits of every token, from one process."""
    stage = Stage(SPEC, attention="loop")
    random_init(stage, seed=1)
    with torch.inference_mode():
        return [stage(batch.ids_T, AttnMeta.packed(batch.lens)) for batch in batches()]


def join(rank: int, folder: str, ranks: int, at_most_s: float = 30) -> None:
    """Ranks meet. One that takes longer from then on hangs: it tells where its threads are and exits with 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    faulthandler.dump_traceback_later(at_most_s, exit=True)


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
    join(rank, folder, 4, at_most_s=120)
    found: dict[str, list[float]] = {}
    for tp, pp in CUTS:
        mesh = Mesh.make(tp, pp)
        for depth in (0, 2):
            threads = threading.active_count()
            worker = worker_of(mesh, depth)
            worker.pickup_delay_s = 0.01
            sent, summed = counted("send", mesh.pp_group), counted("all_reduce", mesh.tp_group)
            if rank == 0:
                found[f"tp={tp} pp={pp} depth={depth}"] = compared(Engine(worker))
            else:
                worker.follow()
            found[f"bytes tp={tp} pp={pp} depth={depth}"] = [sum(sent), sum(summed)]
            ended = time.monotonic() + 5
            while threading.active_count() > threads and time.monotonic() < ended:
                time.sleep(0.01)
            found[f"threads tp={tp} pp={pp} depth={depth}"] = [threading.active_count() - threads]
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def silent(rank: int, folder: str) -> None:
    """Two stages of two ranks each; once they are silent, batches go through with no sum and no hand-off."""
    join(rank, folder, 4, at_most_s=120)
    found: dict[str, list[int]] = {}
    known = {each.name: each.default for each in spec.PARAMETERS}
    tiny = {"model": "gpt-tiny", "batch": 4, "length": 12, "batches": 3, "gpus": 4, "nodes": 1, "tp": 2, "pp": 2}
    for handoff in ("rendezvous", "nbpp"):
        point = Point("energonai", known | tiny | {"handoff": handoff})
        windows = bench.setup(point, Context(Place(rank, rank, 4), "cpu", ""))
        own = windows.worker.mesh
        groups = {"send": own.pp_group, "recv": own.pp_group, "all_reduce": own.tp_group, "all_gather": own.tp_group}
        assert windows.check().passed
        for part in ("none", "communication"):
            if part != "none":
                windows.ablate(part)
            dist.barrier()
            moved = {name: counted(name, group) for name, group in groups.items()}
            windows.step(Unclocked())
            dist.barrier()
            found[f"{part} {handoff}"] = [len(each) for each in moved.values()]
        windows.close()
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


def counted(name: str, group: Any) -> list[int]:
    """Bytes of every tensor that goes through this function of torch.distributed to this group from now on."""
    whole, found = getattr(dist, name), list[int]()

    def count(x: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if group is not None and kwargs.get("group") is group:
            found.append(x.nbytes if isinstance(x, Tensor) else sum(each.nbytes for each in x))
        return whole(x, *args, **kwargs)

    setattr(dist, name, count)
    return found


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
            worker.start_following()
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


class FatalStage(EmulatedStage):
    """Ends its process at the second batch."""

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor:
        if job.command.ticket == 1:
            die()
        return super().__call__(job, x_TD)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def closing(rank: int, folder: str, kind: str) -> None:
    """A pipeline of three whose engine closes at once behind its batches, while rank 1 goes wrong."""
    join(rank, folder, 3)
    worker = worker_of(Mesh.make(1, 3), 2, emulated=True)
    if rank == 1 and kind == "stop":
        put = worker.put
        worker.put = lambda command: die() if command.kind == Kind.STOP else put(command)  # type: ignore[method-assign]
    elif rank == 1:
        worker.stage = {"broken": BrokenStage, "kill": FatalStage}[kind](8, last=False)
    tell(rank, folder, worker, lambda engine: [engine.run(batches()[3]) for _ in range(4)])


def death_in_a_sum(rank: int, folder: str) -> None:
    """Rank 3, of the second stage, dies in the second batch's sums, where rank 2 waits for it."""
    join(rank, folder, 4)
    worker = worker_of(Mesh.make(2, 2), 2)
    whole, sums = dist.all_reduce, 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal sums
        sums += 1
        return die() if sums > SPEC.layers + 2 else whole(*args, **kwargs)  # a batch has two a layer

    if rank == 3:
        dist.all_reduce = fatal
    tell(rank, folder, worker, lambda engine: [engine.run(batch) for batch in batches()[:4]])


def tell(rank: int, folder: str, worker: Worker, submit: Callable[[Engine], Sequence[Future[Tensor]]]) -> None:
    """Write what this rank was told, and on the first what became of each batch when the engine has closed."""
    told = ["nothing"]
    if rank == 0:
        engine = Engine(worker)
        futures = submit(engine)
        engine.close()
        told = [worker.failure, *(str(future.exception(timeout=0) or "done") for future in futures)]
    else:
        try:
            worker.follow()
        except SaihError as error:
            told = [str(error)]
    (Path(folder) / f"told{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # threads may wait for the one that is gone


class GatedStage(EmulatedStage):
    """Computes nothing before the gate opens."""

    def __init__(self, last: bool) -> None:
        super().__init__(8, last)
        self.gate = threading.Event()

    def __call__(self, job: Job, x_TD: Tensor | None) -> Tensor:
        self.gate.wait()
        return super().__call__(job, x_TD)


def handoffs(rank: int, folder: str) -> None:
    """Two stages, the second of which does not receive, or does not compute, until the first has been looked at."""
    join(rank, folder, 2, at_most_s=60)
    mesh = Mesh.make(1, 2)
    found: dict[str, Any] = {f"outbox {depth}": outbox(mesh, depth) for depth in (0, 1, 3)}
    for depth in (0, 1, 2):
        found[f"pipeline {depth}"] = pipeline(mesh, depth, blocking=False)
    found["pipeline blocking"] = pipeline(mesh, 0, blocking=True)
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def settled(count: Callable[[], int], least: int) -> int:
    """What it has counted to when it counts no further: at least so far, sooner or later, and then for a while."""
    while count() < least:
        time.sleep(0.01)
    time.sleep(0.3)
    return count()


def outbox(mesh: Mesh, depth: int) -> list[int]:
    """Sends that have returned, of six, when 0, 1 and 2 were received."""
    if mesh.pp_rank == 1:
        for tensors in (0, 1, 1, 4):
            for _ in range(tensors):
                dist.recv(torch.empty(3), group=mesh.pp_group, group_src=0)
            dist.barrier()
        return []
    box, returned = Outbox(1, mesh.pp_group, depth), 0

    def send() -> None:
        nonlocal returned
        for _ in range(6):
            box.send(torch.zeros(3))
            returned += 1

    sender = threading.Thread(target=send)
    sender.start()
    found = []
    for received in range(3):
        found.append(settled(lambda: returned, depth + received))
        dist.barrier()
    dist.barrier()
    sender.join()
    box.close()
    return found


def pipeline(mesh: Mesh, depth: int, blocking: bool) -> list[int]:
    """Of eight batches: executed on the first stage, and under way, while the second stage is at its first."""
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))
    stage = GatedStage(last=mesh.pp_rank == 1)
    worker = Worker(stage, mesh, control, depth=depth)
    if mesh.pp_rank == 1:
        worker.start_following()
        dist.barrier()
        stage.gate.set()
        worker.join()
        return []
    stage.gate.set()
    engine, futures = Engine(worker, blocking=blocking), list[Future[Tensor]]()
    user = threading.Thread(target=lambda: futures.extend(engine.run(batch) for batch in batches()))
    user.start()
    executed = settled(lambda: worker._executed, 1 + 2 * depth)
    under_way = settled(lambda: len(engine._waiting), 1 if blocking else len(LENS))
    dist.barrier()
    user.join()
    engine.close()
    return [executed, under_way]


def refusals(rank: int, folder: str, tp: int) -> None:
    """What the engine says to each bad batch, and to a good one behind them."""
    if tp > 1:
        join(rank, folder, tp)
    mesh = Mesh.make(tp, 1)
    stage = Stage(SPEC, mesh)
    random_init(stage, seed=1)
    worker = Worker(ComputedStage(stage), mesh, dist.new_group(backend="gloo") if tp > 1 else None, depth=0)
    if rank:
        worker.follow()
        return
    engine, told = Engine(worker), list[str]()
    for batch in (*BAD.values(), batches()[0]):
        try:
            engine.run(batch).result()
            told.append("served")
        except SaihError as error:
            told.append(str(error))
    engine.close()
    (Path(folder) / "told.json").write_text(json.dumps(told))
