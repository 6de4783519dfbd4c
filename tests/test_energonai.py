"""EnergonAI: ticket order, hand-offs, packed rows, what happens when a rank dies, and what a window costs."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from saih import plan, workload
from saih.core import Context, Params, Place, Point
from saih.errors import SaihError
from saih.timing import StepClock, Unclocked, run_steps
from tests import energonai_ranks as ranks
from workloads.llm import stepcost
from workloads.llm.attention import AttnMeta
from workloads.llm.config import preset
from workloads.llm.energonai import bench, overlap, spec, timeline, window
from workloads.llm.energonai import engine as engine_module
from workloads.llm.energonai.consistency import ConsistencyQueue
from workloads.llm.energonai.engine import Batch, Engine
from workloads.llm.energonai.message import Kind, Message
from workloads.llm.energonai.stages import EmulatedStage
from workloads.llm.energonai.worker import Worker
from workloads.llm.handoff import Outbox, ahead
from workloads.llm.loader import random_init
from workloads.llm.model import Stage
from workloads.llm.shard import Mesh

ROOT = Path(bench.__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# -- Tickets -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 7), st.lists(st.permutations(range(6)), min_size=1, max_size=4))
def test_any_order_of_arrival_comes_out_in_ticket_order(tickets: int, rounds: list[list[int]]) -> None:
    """Fewer items than tickets are under way at a time, and tickets begin again at 0."""
    queue: ConsistencyQueue[int] = ConsistencyQueue(tickets)
    found, base = [], 0
    for arrival in rounds:
        some = [place for place in arrival if place < tickets - 1]
        for place in some:
            queue.put((base + place) % tickets, base + place)
        found += [queue.pop() for _ in some]
        base += len(some)
    assert found == list(range(base))


def test_the_queue_waits_for_the_next_ticket_though_later_ones_are_there() -> None:
    queue: ConsistencyQueue[str] = ConsistencyQueue()
    queue.put(1, "second")
    with ThreadPoolExecutor(1) as pool:
        popped = [pool.submit(queue.pop), pool.submit(queue.pop)]
        with pytest.raises(TimeoutError):
            popped[0].result(0.05)
        queue.put(0, "first")
        assert [each.result(5) for each in popped] == ["first", "second"]


def test_a_ticket_cannot_come_twice() -> None:
    queue: ConsistencyQueue[int] = ConsistencyQueue()
    queue.put(3, 0)
    with pytest.raises(ValueError, match="ticket 3"):
        queue.put(3, 0)


class Recorder(EmulatedStage):
    """Remembers what it was given to execute."""

    def __init__(self) -> None:
        super().__init__(8, last=True)
        self.seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def __call__(self, job: Any, x_TD: Any) -> torch.Tensor:
        self.seen.append((job.command.ticket, job.command.lens, job.meta.query_lens))
        return super().__call__(job, x_TD)


def test_a_ticket_is_executed_with_its_own_lengths_whoever_picked_it_up() -> None:
    """The released code takes the lengths of the thread that executes, not of the ticket it executes."""
    stage, results = Recorder(), dict[int, torch.Tensor]()
    worker = Worker(stage, Mesh(), None, depth=0)
    worker.start(results.__setitem__, pytest.fail)
    lens = {0: (3,), 1: (1, 4), 2: (2, 2, 2)}
    for ticket in (2, 0, 1):
        worker.put(Message(Kind.RUN, ticket, lens[ticket], torch.full((sum(lens[ticket]),), 10 * ticket)))
    worker.wait_for(3)
    worker.put(Message(Kind.STOP, 3))
    worker.join(5)
    assert stage.seen == [(ticket, lens[ticket], lens[ticket]) for ticket in range(3)]
    assert {ticket: x[:, 0].tolist() for ticket, x in results.items()} == {
        ticket: [10 * ticket + 1.0] * len(lens[ticket]) for ticket in range(3)
    }


def documented() -> list[str]:
    """The programs of the page: on one rank, on two."""
    page = (Path(bench.__file__).parent / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def told_by(*command: str) -> tuple[str, str, int]:
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    return run.stdout, run.stderr, run.returncode


def test_the_documented_serial_code_runs() -> None:
    code = documented()[0] + "\nprint(tuple(logits_BV.shape), tuple(second.result(0).shape))"
    assert told_by("-c", code) == ("(2, 512) (1, 512)\n", "", 0)


def test_the_documented_code_of_two_ranks_runs_and_says_what_one_rank_says(tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(documented()[1])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out, err, code = told_by(*launcher, str(tmp_path / "serve.py"))
    assert code == 0, err
    stage = Stage(preset("gpt-tiny"))
    random_init(stage, seed=0)
    with torch.inference_mode():
        alone = [stage(torch.arange(n), AttnMeta.packed((n,)))[-1].argmax().item() for n in (3, 1, 2)]
    assert out == f"{alone}\n"


@pytest.fixture
def alone() -> Iterator[Engine]:
    engine = Engine(Worker(EmulatedStage(4, last=True), Mesh(), None, depth=0, tickets=4))
    yield engine
    engine.close()


def test_what_cannot_be_a_batch_is_refused(alone: Engine) -> None:
    for lens, ids in (((), 0), ((2, 0), 2)):
        with pytest.raises(SaihError, match="at least one token"):
            alone.run(Batch(lens, torch.zeros(ids, dtype=torch.int64)))
    with pytest.raises(SaihError, match="3 ids whose lengths add up to 4"):
        alone.run(Batch((4,), torch.zeros(3, dtype=torch.int64)))
    for ids in (torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(SaihError, match=re.escape(f"{ids.dtype} and shape {tuple(ids.shape)}; they must be int64")):
            alone.run(Batch((4,), ids))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_batch_the_model_cannot_take_is_refused_and_the_next_one_served(tp: int, tmp_path: Path) -> None:
    """With two ranks an id that neither has would be a row of zeros."""
    assert run_ranks(ranks.refusals, tp, tmp_path, tp) == [0] * tp
    assert json.loads((tmp_path / "told.json").read_text()) == [*ranks.BAD, "served"]


def test_a_future_cannot_be_cancelled(alone: Engine) -> None:
    future = alone.run(Batch((2,), torch.tensor([5, 6]), emulated_us=50_000))
    assert not future.cancel()
    assert future.result(30)[0, 0] == 7.0


def test_whatever_fails_in_the_engine_fails_the_engine(alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ended without a word would leave futures without a result."""
    monkeypatch.setattr(engine_module, "receive", lambda rank, group: Message(Kind.RESULT, 3))
    alone._listen(1)
    with pytest.raises(SaihError, match="rank 0 failed: KeyError: 3"):
        alone.run(Batch((1,), torch.tensor([5])))


def test_more_batches_under_way_than_tickets_are_refused(alone: Engine) -> None:
    batch = Batch((1,), torch.ones(1, dtype=torch.int64), emulated_us=200_000)
    futures: list[Future[torch.Tensor]] = [alone.run(batch) for _ in range(3)]
    with pytest.raises(SaihError, match="3 batches are under way and there are 4 tickets"):
        alone.run(batch)
    assert all(future.result().shape == (1, 4) for future in futures)
    assert alone.run(batch).result()[0, 0] == 2.0


def test_a_closed_engine_takes_nothing(alone: Engine) -> None:
    future = alone.run(Batch((2,), torch.tensor([5, 6])))
    alone.close()
    assert future.result(0)[0, 0] == 7.0, "what was submitted is done before"
    with pytest.raises(SaihError, match="closed"):
        alone.run(Batch((1,), torch.tensor([5])))


# -- Hand-offs ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(0, 12))
def test_ahead_gives_the_same_items_and_is_never_further_ahead(depth: int, count: int) -> None:
    taken = 0
    furthest = []

    def source() -> Iterator[int]:
        nonlocal taken
        for item in range(count):
            taken += 1
            yield item

    found = []
    for item in ahead(source(), depth):
        found.append(item)
        furthest.append(taken - len(found))
    assert found == list(range(count))
    assert max(furthest, default=0) <= depth


def test_ahead_runs_ahead_and_says_what_failed() -> None:
    reached = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        yield 1
        reached.set()
        raise ConnectionError("gone")

    items = ahead(source(), 2)
    assert next(items) == 0
    assert reached.wait(5), "taken while the consumer is busy"
    assert next(items) == 1
    with pytest.raises(ConnectionError, match="gone"):
        next(items)


def test_an_outbox_tells_at_the_latest_when_it_closes_what_sending_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    last = threading.Event()

    def gone(*_: object, **__: object) -> None:
        last.wait(30)
        raise ConnectionError("gone")

    monkeypatch.setattr(torch.distributed, "send", gone)
    box = Outbox(1, None, depth=2)
    box.send(torch.zeros(1))
    last.set()
    with pytest.raises(ConnectionError, match="gone"):
        box.close()


@dataclass
class _Stage:
    """Of the event simulation: what it is doing, what lies before and behind it."""

    left: int = 0
    """Ticks of work left on the batch it computes; -1: it holds a computed one that it has to hand over."""
    batch: int | None = None
    inbox: list[int] = field(default_factory=list)
    outbox: list[int] = field(default_factory=list)
    expected: int = 0
    """Batches whose transfer to this stage has begun."""


def simulate(handoff: str, durations: list[int], stages: int, transfer: int, buffer: int) -> int:
    """Ticks that a window takes: every stage and every link moves one tick at a time. No recurrence in it."""
    line = [_Stage() for _ in range(stages)]
    line[0].inbox = list(range(len(durations)))
    links: list[list[int] | None] = [None] * stages  # into stage s: [batch, ticks left]
    done, now = 0, 0
    while done < len(durations):
        moved = True
        while moved:  # whatever can happen at this instant
            moved = False
            for place, stage in enumerate(line):
                link = links[place]
                if link is not None and link[1] == 0:
                    stage.inbox.append(link[0])
                    links[place] = None
                    if handoff != "nbpp":
                        line[place - 1].outbox.pop(0)
                    else:
                        line[place - 1].outbox.remove(link[0])
                    moved = True
                if stage.batch is not None and stage.left == 0:
                    if place + 1 < stages:
                        stage.outbox.append(stage.batch)
                    else:
                        done += 1
                    stage.batch, moved = None, True
                stuck = len(stage.outbox) > (buffer if handoff == "nbpp" else 0)
                first = place == 0 and handoff == "blocking" and stage.inbox and stage.inbox[0] > done
                if stage.batch is None and stage.inbox and not stuck and not first:
                    stage.batch = stage.inbox.pop(0)
                    stage.left, moved = durations[stage.batch], True
                before = line[place - 1] if place else None
                if before is not None and links[place] is None:
                    waiting = [each for each in before.outbox if each == stage.expected]
                    idle = stage.batch is None and not stage.inbox and not stage.outbox
                    room = len(stage.inbox) < buffer if handoff == "nbpp" else idle
                    if waiting and room:
                        links[place] = [waiting[0], transfer]
                        stage.expected += 1
                        moved = True
        if done == len(durations):
            return now
        now += 1
        for stage in line:
            if stage.batch is not None:
                stage.left -= 1
        for link in links:
            if link is not None:
                link[1] -= 1
    return now


@settings(max_examples=300)
@given(
    st.sampled_from(timeline.HANDOFFS),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 3),
)
def test_recurrences_are_what_a_simulation_by_events_finds(
    handoff: str, durations: list[int], stages: int, transfer: int, buffer: int
) -> None:
    found = timeline.window_s(handoff, durations, stages, transfer, buffer)
    assert found == simulate(handoff, durations, stages, transfer, buffer)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 9), st.integers(1, 4))
def test_less_waiting_is_never_slower(durations: list[int], stages: int, transfer: int, buffer: int) -> None:
    nbpp, more = (timeline.nbpp_s(durations, stages, transfer, size) for size in (buffer, buffer + 1))
    rendezvous = timeline.rendezvous_s(durations, stages, transfer)
    assert more <= nbpp <= rendezvous <= timeline.blocking_s(durations, stages, transfer)
    assert nbpp >= max(sum(durations), stages * max(durations) + (stages - 1) * transfer)


# -- Windows -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 300), st.floats(0.01, 1.0))
def test_lengths_fill_exactly_what_they_should(batch: int, longest: int, valid: float) -> None:
    try:
        found = window.lengths(batch, longest, valid)
    except SaihError:
        assert not longest + batch - 1 <= round(valid * batch * longest) <= batch * longest
        return
    assert len(found) == batch
    assert max(found) == longest
    assert min(found) >= 1
    assert sum(found) == round(valid * batch * longest)
    orders = {window.shuffled_lengths(batch, longest, valid, 0, number) for number in range(3)}
    assert all(sorted(order) == sorted(found) for order in orders)


def test_at_half_the_tokens_every_length_is_as_likely() -> None:
    found = window.lengths(100, 100, 0.5)
    assert max(abs(length - place) for place, length in enumerate(found)) <= 2


def test_rungs_of_variation_are_the_spread_of_the_times() -> None:
    axis = next(axis for axis in spec.AXES if axis.name == "variation")
    assert [rung.params["emulated_durations"] for rung in axis.rungs] == list(window.DURATIONS)
    for rung in axis.rungs:
        times_s = window.durations_s(str(rung.params["emulated_durations"]), 40, 0.02)
        assert statistics.pstdev(times_s) / statistics.mean(times_s) == pytest.approx(rung.size, abs=0.005)


@pytest.mark.parametrize("kind", window.DURATIONS)
def test_durations_have_the_mean_asked_for(kind: str) -> None:
    found = window.durations_s(kind, 40, 0.02)
    assert math.isclose(sum(found), 40 * 0.02)
    low, high = {"uniform": (1, 1), "random": (0.25, 1.75), "bimodal": (0.25, 4)}[kind]
    assert 0.02 * low <= min(found)
    assert max(found) <= 0.02 * high + 1e-12
    assert kind == "uniform" or list(found) != sorted(found)


# -- Ranks -------------------------------------------------------------------------------------------------------------


def run_ranks(target: Callable[..., None], count: int, folder: Path, *args: object) -> list[int | None]:
    """Exit codes of so many processes that run `target(rank, folder, *args)`; those that hang end themselves."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder), *args)) for rank in range(count)]
    for process in processes:
        process.start()
    ended_s = time.monotonic() + 180
    for process in processes:
        process.join(max(0.0, ended_s - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("grid")
    assert run_ranks(ranks.grid, 4, folder) == [0] * 4
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("tp", "pp"), ranks.CUTS)
def test_results_are_those_of_one_process_however_commands_are_picked_up(
    four_ranks: list[dict[str, list[float]]], tp: int, pp: int, depth: int
) -> None:
    error, same_bits, last_error = four_ranks[0][f"tp={tp} pp={pp} depth={depth}"]
    assert error < 1e-4
    assert last_error < 1e-4
    assert same_bits or tp > 2, "a sum of more than two depends on where in a message it stands"


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("tp", "pp"), ranks.CUTS)
def test_closing_ends_every_thread(four_ranks: list[dict[str, list[float]]], tp: int, pp: int, depth: int) -> None:
    assert [found[f"threads tp={tp} pp={pp} depth={depth}"] for found in four_ranks] == [[0]] * 4


@pytest.mark.parametrize(
    ("kind", "depth", "told"),
    [
        ("kill 1", 2, "rank 1 died: its connection was closed"),
        ("kill 2", 2, "rank 2 died: its connection was closed"),
        ("kill 0", 0, "rank 0, the engine, is gone"),
        ("broken", 0, "rank 1 failed: ValueError: no room"),
    ],
)
def test_every_rank_is_told_within_seconds_what_went_wrong(kind: str, depth: int, told: str, tmp_path: Path) -> None:
    codes = run_ranks(ranks.accident, 3, tmp_path, kind, depth)
    survivors = [rank for rank in range(3) if kind != f"kill {rank}"]
    assert codes == [0 if rank in survivors else -9 for rank in range(3)]
    for rank in survivors:
        what, after_s = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert (rank, what) == (rank, told)
        assert after_s < 10
    if 0 in survivors:
        assert json.loads((tmp_path / "later.json").read_text()) == told


@pytest.mark.parametrize(
    ("kind", "told", "undone"),
    [
        ("broken", "rank 1 failed: ValueError: no room", 3),
        ("kill", "rank 1 died: its connection was closed", 3),
        ("stop", "rank 1 died: its connection was closed", 0),
    ],
)
def test_what_goes_wrong_while_the_engine_closes_is_told_everywhere(
    kind: str, told: str, undone: int, tmp_path: Path
) -> None:
    """In a batch submitted before, or behind the last of them."""
    codes = run_ranks(ranks.closing, 3, tmp_path, kind)
    assert codes == [0, 0 if kind == "broken" else -9, 0]
    first, *futures = json.loads((tmp_path / "told0.json").read_text())
    assert first == told
    assert futures[4 - undone :] == [told] * undone
    assert set(futures[: 4 - undone]) <= ({"done", told} if undone else {"done"})
    for rank in (1, 2) if kind == "broken" else (2,):
        assert json.loads((tmp_path / f"told{rank}.json").read_text()) == [told]


def test_a_rank_that_dies_in_a_sum_is_named_everywhere(tmp_path: Path) -> None:
    """Its neighbour's sum fails too, and the stage before it cannot hand over: neither is to blame."""
    assert run_ranks(ranks.death_in_a_sum, 4, tmp_path) == [0, 0, 0, -9]
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(3)]
    died = "rank 3 died: its connection was closed"
    assert [each[0] for each in told] == [died] * 3
    assert told[0][2:] == [died] * 3


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("tp", "pp"), ranks.CUTS)
def test_hand_offs_and_sums_carry_the_rows_asked_for(
    four_ranks: list[dict[str, list[float]]], tp: int, pp: int, depth: int
) -> None:
    """Every batch goes through once packed, tokens alone, and twice padded, filled up to the longest."""
    rows = sum(sum(lens) + 2 * max(lens) * len(lens) for lens in ranks.LENS)
    row_bytes, layers = 4 * ranks.SPEC.hidden, ranks.SPEC.layers // pp
    for rank, found in enumerate(four_ranks):
        stage = rank // tp
        sends = 1 if stage < pp - 1 else 0
        sums = 2 * layers + (1 if stage == 0 else 0) if tp > 1 else 0  # two a layer, one for the embedding
        assert found[f"bytes tp={tp} pp={pp} depth={depth}"] == [sends * rows * row_bytes, sums * rows * row_bytes]


def test_without_communication_no_rank_tells_another_anything(tmp_path: Path) -> None:
    assert run_ranks(ranks.silent, 4, tmp_path) == [0] * 4
    for rank in range(4):
        found = json.loads((tmp_path / f"found{rank}.json").read_text())
        for handoff in ("rendezvous", "nbpp"):
            send, recv, sums, gathered = found[f"none {handoff}"]
            assert (send, recv) == ((3, 0) if rank < 2 else (0, 3)), "each of three batches is handed on"
            assert sums > 0
            assert gathered == (3 if rank > 1 else 0), "logits of the last stage"
            assert found[f"communication {handoff}"] == [0] * 4


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    folder = tmp_path_factory.mktemp("handoffs")
    assert run_ranks(ranks.handoffs, 2, folder) == [0, 0]
    found: dict[str, list[int]] = json.loads((folder / "found0.json").read_text())
    return found


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_send_returns_when_fewer_than_depth_are_not_taken(two_stages: dict[str, list[int]], depth: int) -> None:
    """With depth 0, only when the neighbour has taken it."""
    assert two_stages[f"outbox {depth}"] == [depth, depth + 1, depth + 2]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_stage_gets_ahead_of_the_next_by_what_both_may_keep(two_stages: dict[str, list[int]], depth: int) -> None:
    """The one that the next stage is at, those it has received ahead, those that wait here. All are submitted."""
    assert two_stages[f"pipeline {depth}"] == [1 + 2 * depth, len(ranks.LENS)]


def test_a_blocking_engine_has_one_batch_under_way(two_stages: dict[str, list[int]]) -> None:
    assert two_stages["pipeline blocking"] == [1, 1]


# -- The workload ------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"model": "gpt-tiny", "batch": 4, "length": 12, "batches": 3}


def params(**changes: Any) -> Params:
    known = workload.parameters(workload.spec("energonai"))
    return {name: parameter.default for name, parameter in known.items()} | TINY | changes


def windows(**changes: Any) -> bench.Windows:
    return bench.setup(Point("energonai", params(**changes)), Context(Place(0, 0, 1), "cpu", ""))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "packed"},
        {"rows": "padded", "handoff": "blocking"},
        {"attention": "loop", "handoff": "rendezvous"},
        {"emulated_stage_ms": 1.0, "emulated_durations": "bimodal"},
    ],
)
def test_a_window_is_checked_and_measured(changes: dict[str, Any]) -> None:
    ready = windows(**changes)
    try:
        check = ready.check()
        samples = run_steps(ready, StepClock("cpu"), 2)
    finally:
        ready.close()
    assert check.passed, check
    assert [work.units for work in samples.work] == [3 * 24] * 2
    assert all(phases[2] > 0 for phases in samples.phase_s)


@pytest.mark.parametrize(
    "changes", [{}, {"rows": "padded"}, {"offload_interval": 1, "staging": 2, "attention": "loop"}]
)
def test_weights_put_away_are_checked_and_measured(changes: dict[str, Any]) -> None:
    ready = windows(weights="cpu-offload", link_gb_per_s=0.01, **changes)
    try:
        check = ready.check()
        samples = run_steps(ready, StepClock("cpu"), 2)
        assert ready.pmep is not None
        copies_s = ready.pmep.copies_s()
    finally:
        ready.close()
    assert check.passed, check
    assert len(samples.work) == 2
    assert check.numbers["offloaded_minus_resident"] == 0.0
    interval, told = int(changes.get("offload_interval", 2)), check.numbers
    assert told["copy_s"] >= spec.copy_s(ready.params, ready.shape.model) > 0.015
    assert min(copies_s) >= spec.copy_s(ready.params, ready.shape.model)
    assert told["room"] == pytest.approx((interval - 1) * told["layer_s"] / told["copy_s"])
    assert told["predicted_slowdown"] > 1, "a copy of 20 ms does not fit beside layers of less than one"
    assert told["emulated_link"] == 1.0


def test_weights_of_another_layer_fail_the_check() -> None:
    ready = windows(weights="cpu-offload")
    assert ready.pmep is not None
    stored = ready.pmep._weights[1].stored
    stored[-64:] = stored[-64:].view(torch.float32).add(1e-6).view(torch.uint8)
    try:
        check = ready.check()
    finally:
        ready.close()
    assert not check.passed
    assert 0 < check.numbers["offloaded_minus_resident"] < 1e-4, "too little for the comparison with one process"


def test_a_peer_is_another_gpu() -> None:
    with pytest.raises(SaihError, match="a peer is another GPU, and the stage is on cpu; use the host"):
        windows(weights="peer")


def test_layers_put_away_are_never_made_on_the_device() -> None:
    """With a device that holds nothing: what is put away has memory, what stays has none."""
    stage = Stage(preset("gpt-tiny"), device="meta", attention="loop", on_host=range(1, 4, 2))
    homes = {name: {parameter.device.type for parameter in layer.parameters()} for name, layer in stage.layers.items()}
    assert homes == {"0": {"meta"}, "1": {"cpu"}, "2": {"meta"}, "3": {"cpu"}}


@pytest.mark.parametrize("interval", [1, 2, 4])
@pytest.mark.parametrize("staging", [1, 2])
@pytest.mark.parametrize("link_gb_per_s", [0.001, 0.02, 1e3])
def test_the_plan_is_the_schedule_of_overlapped_copies(interval: int, staging: int, link_gb_per_s: float) -> None:
    """Whole groups of layers: the roofline of the two chains is the schedule's steady state, and its condition."""
    speed = plan.Rates(1e10, 1e9, 0.0, "test")
    asked = {"batches": 1, "offload_interval": interval, "staging": staging, "link_gb_per_s": link_gb_per_s}
    resident, away = (spec.cost(params(weights=weights, **asked)) for weights in ("resident", "cpu-offload"))
    head_s = plan.predict_step_s(replace(resident, operations=resident.operations[-1:]), speed)
    layer_s = (plan.predict_step_s(resident, speed) - head_s) / 4
    copy_s = spec.copy_s(params(**asked), preset("gpt-tiny"))
    waited_s = plan.predict_step_s(away, speed) - plan.predict_step_s(resident, speed)
    depth = min(staging, 4 // interval)
    scheduled_s = overlap.predicted_step_s(4, interval, copy_s, layer_s, depth)
    most_s = scheduled_s - 4 * layer_s
    assert max(0.0, most_s - head_s) - 1e-12 <= waited_s <= most_s + 1e-12
    if staging == 1 and overlap.copies_hide(interval, copy_s, layer_s):
        assert waited_s == 0


def test_memory_on_the_device_is_less_by_what_is_put_away() -> None:
    layer = 4 * stepcost.layer_parameters(preset("gpt-tiny"))
    resident = spec.cost(params()).device_bytes
    for interval, staging, layers in ((2, 1, 1), (1, 1, 3), (1, 3, 1), (4, 1, 0), (1, 9, 0)):
        asked = {"weights": "cpu-offload", "offload_interval": interval, "staging": staging}
        assert resident - spec.cost(params(**asked)).device_bytes == layers * layer


def test_a_wrong_weight_fails_the_check() -> None:
    ready = windows()
    stage: Any = ready.worker.stage
    with torch.no_grad():
        stage.stage.layers["1"].mlp.down.weight[3, 5] += 0.5
    try:
        assert not ready.check().passed
    finally:
        ready.close()


@pytest.mark.parametrize("changes", [{}, {"emulated_stage_ms": 1.0}])
def test_results_of_another_ticket_fail_the_check(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ready = windows(**changes)
    engine: Any = ready.engine
    whole, kept = engine._resolve, dict[int, torch.Tensor]()

    def swapped(ticket: int, result: torch.Tensor) -> None:
        """Tickets 0 and 1 get each other's results, cut to their own size."""
        if ticket > 1:
            whole(ticket, result)
            return
        kept[ticket] = result
        if len(kept) == 2:
            rows = [engine._waiting[each][0].words for each in (0, 1)]
            for each in (0, 1):
                other = kept[1 - each]
                whole(each, other[torch.arange(len(rows[each])) % len(other)])

    monkeypatch.setattr(engine.worker, "_deliver", swapped)
    try:
        assert not ready.check().passed
    finally:
        ready.close()


def test_the_clock_of_a_step_is_put_away_behind_it() -> None:
    ready = windows()
    clock = StepClock("cpu")
    run_steps(ready, clock, 1)
    marks = len(clock._marks)
    ready.check()
    ready.close()
    assert len(clock._marks) == marks
    assert isinstance(ready.worker._clock, Unclocked)


class SlowClock:
    """Takes its time when the executor calls."""

    def __init__(self) -> None:
        self.begun, self.entered, self.left = threading.Event(), 0, 0

    def enter(self, phase: str) -> None:
        if threading.current_thread().name != "executor":
            return
        self.entered += 1
        self.begun.set()
        time.sleep(0.3)
        self.left += 1


def test_a_clock_that_is_put_away_is_told_nothing_more() -> None:
    worker, clock = Worker(EmulatedStage(4, last=True), Mesh(), None, depth=0), SlowClock()
    worker.start(lambda ticket, result: None, pytest.fail)
    worker.use(clock)
    worker.put(Message(Kind.RUN, 0, (1,), torch.zeros(1, dtype=torch.int64)))
    assert clock.begun.wait(30)
    worker.use(Unclocked())
    entered = clock.entered
    assert clock.left == entered
    worker.put(Message(Kind.STOP, 1))
    worker.join(30)
    assert clock.entered == entered
    assert isinstance(worker._clock, Unclocked)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"batches": 10_000}, "batches=10000: at most 9999, for there are 10000 tickets"),
        ({"gpus": 4, "tp": 2}, "tp=2 x pp=1 needs 2 ranks; nodes x gpus = 4"),
        ({"gpus": 3, "pp": 2}, "tp=1 x pp=2 needs 2 ranks; nodes x gpus = 3"),
        ({"gpus": 8}, "4 heads and 256 MLP columns cannot be cut over tp=8"),
        ({"gpus": 8, "pp": 8}, "4 layers cannot be split over 8"),
        ({"gpus": 2, "emulated_stage_ms": 5.0}, "emulated stages have one rank each, not tp=2; set pp=2"),
        ({"emulated_durations": "random"}, "emulated_durations need emulated_stage_ms > 0"),
        ({"length": 4096, "valid": 0.5}, "has 2048 positions"),
        ({"rows": "padded", "attention": "varlen"}, "rows=padded needs attention=padded or loop"),
        ({"batch": 4, "valid": 0.1}, "valid=0.1 is impossible for 4 sequences of up to 12 tokens"),
        ({"gpus": 2, "weights": "peer"}, "weights=peer lets one device run a model larger than itself; ranks=2"),
        ({"weights": "cpu-offload", "emulated_stage_ms": 5.0}, "emulated stages have no weights to put away"),
        ({"weights": "cpu-offload", "offload_interval": 5}, "interval=5 offloads no layer of 4"),
        ({"weights": "peer", "link_gb_per_s": 1.0}, "a peer has a real one"),
    ],
)
def test_what_makes_no_sense_is_said(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SaihError, match=why):
        spec.cost(params(**changes))


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_products_of_a_window_are_those_that_torch_counts(rows: str) -> None:
    """Without attention, whose kernels are counted apart."""
    model, changes = preset("gpt-tiny"), {"rows": rows, "batches": 1}
    stage = Stage(model, attention="loop")
    random_init(stage, 0)
    lens = window.lengths(4, 12, 0.5)
    meta = AttnMeta.packed(lens) if rows == "packed" else AttnMeta.padded(lens)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        stage(torch.zeros(len(meta.positions_T), dtype=torch.int64), meta, rows=meta.last_rows)
    products = {
        str(name): flop for name, flop in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    }
    operations = spec.cost(params(**changes)).operations
    attention = [operation.flop for operation in operations[2::7]][: model.layers]
    assert sum(operation.flop for operation in operations) - sum(attention) == sum(products.values())


def executed_flop(**changes: Any) -> float:
    return sum(operation.flop for operation in spec.cost(params(model="gpt-mini", gpus=2, **changes)).operations)


def test_bounds_of_packed_rows_are_ratios_of_the_flop_executed_in_the_study() -> None:
    """More tokens a second by so much, or a batch in so much of the time, if every FLOP takes as long."""
    study = yaml.safe_load((ROOT / "jobs/studies/energonai.yaml").read_text())["parts"]
    claims = {claim.name: claim for claim in spec.CLAIMS}
    forms = {rung.label: rung.params for axis in spec.AXES if axis.name == "filled_up" for rung in axis.rungs}
    size = {name: study["drce"]["set"][name] for name in ("batch", "length")} | {"batches": 1}
    for claim in (claim for name, claim in claims.items() if name.startswith("drce")):
        valid = int(claim.where["valid"]) / 100
        padded, packed = (
            executed_flop(**size, valid=valid, **forms[side["filled_up"]])
            for side in (claim.denominator, claim.numerator)
        )
        assert claim.bound == pytest.approx(padded / packed, rel=0.003)
        assert padded / packed > 1 / valid
    size = {name: study["tp-latency"]["set"][name] for name in ("batch", "length", "valid")} | {"batches": 1}
    ratio = executed_flop(**size, rows="packed") / executed_flop(**size, rows="padded")
    assert claims["tp-latency"].bound == pytest.approx(ratio, rel=0.003)


def test_packed_rows_are_claimed_over_both_padded_forms() -> None:
    """Over the better one, that is; both targets are the same."""
    found = [claim for claim in spec.CLAIMS if claim.name.startswith("drce")]
    targets = {
        form: {claim.where["valid"]: claim.target for claim in found if claim.denominator == {"filled_up": form}}
        for form in ("rows", "rows-looped")
    }
    assert targets["rows"] == targets["rows-looped"] == {"26": 2.5, "48": 1.9, "68": 1.3}
    assert {claim.numerator["filled_up"] for claim in found} == {"nothing"}


def test_the_bound_of_packed_rows_is_one_over_the_valid_share() -> None:
    """Predicted less than that by what attention, which fills up in both, adds."""
    for valid in (0.26, 0.48, 0.68, 1.0):
        flop = [
            sum(
                each.flop
                for each in spec.cost(params(model="gpt-mini", batch=16, length=128, rows=rows, valid=valid)).operations
            )
            for rows in ("padded", "packed")
        ]
        assert 0.9 / valid < flop[0] / flop[1] <= 1 / valid


def test_what_a_user_gets_does_not_depend_on_how() -> None:
    """Work and FLOP are those of valid tokens, shared by the ranks."""
    one = spec.cost(params(gpus=1))
    for changes in ({"rows": "padded"}, {"gpus": 2}, {"gpus": 2, "pp": 2}, {"handoff": "blocking"}):
        other = spec.cost(params(**changes))
        shares = int(changes.get("gpus", 1))
        assert (other.work * shares, other.flop * shares) == (one.work, one.flop)


def test_memory_of_the_largest_model_is_that_of_its_weights() -> None:
    cost = spec.cost(params(model="gpt-175b", gpus=8, nodes=2, pp=2, precision="bf16", attention="loop"))
    assert 175e9 * 2 / 16 < cost.device_bytes < 1.1 * 175e9 * 2 / 16
