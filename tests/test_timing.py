"""The clock: phases add up to the step, counted on a clock that the test turns by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih import worker
from saih.core import PHASES, Check, Clock, Work
from saih.timing import StepClock, run_steps

MARKS = st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 10**9)), max_size=8)


class FakeTime:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now_ns = 10**15

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(time, "perf_counter_ns", made)
    return made


class Script:
    """A bench whose steps enter phases and let time pass as written: (phase, ns after it), one list a step."""

    def __init__(self, fake: FakeTime, steps: Sequence[Sequence[tuple[str, int]]], before_ns: int = 0) -> None:
        self.fake, self.steps, self.before_ns, self.done = fake, steps, before_ns, 0

    def check(self) -> Check:
        return Check(True)

    def step(self, clock: Clock) -> Work:
        self.fake.now_ns += self.before_ns
        for phase, after_ns in self.steps[self.done]:
            clock.enter(phase)
            self.fake.now_ns += after_ns
        self.done += 1
        return Work(units=self.done)

    def close(self) -> None:
        pass


def test_each_enter_ends_the_phase_before_it(fake: FakeTime) -> None:
    steps = [[("input", 3), ("compute", 40), ("communication", 500), ("compute", 6000)], [("transfer", 7)], []]
    samples = run_steps(Script(fake, steps, before_ns=20_000), StepClock("cpu"), 3)
    expected = [
        {"input": 3e-9, "compute": 6.04e-6, "communication": 5e-7, "other": 2e-5},
        {"transfer": 7e-9, "other": 2e-5},
        {"other": 2e-5},
    ]
    for row, seconds in zip(samples.phase_s, expected, strict=True):
        assert dict(zip(PHASES, row, strict=True)) == pytest.approx(dict.fromkeys(PHASES, 0.0) | seconds, rel=1e-12)
    assert [work.units for work in samples.work] == [1, 2, 3]


@given(st.lists(MARKS, min_size=1, max_size=4), st.integers(0, 10**9))
def test_phases_add_up_to_the_step(steps: list[list[tuple[str, int]]], before_ns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeTime()
        patch.setattr(time, "perf_counter_ns", fake)
        samples = run_steps(Script(fake, steps, before_ns), StepClock("cpu"), len(steps))
    assert len(samples.phase_s) == len(samples.work) == len(steps)
    for marks, row in zip(steps, samples.phase_s, strict=True):
        whole_ns = before_ns + sum(after for _, after in marks)
        assert float(sum(map(Fraction, row))) == pytest.approx(whole_ns / 1e9, rel=1e-12, abs=1e-18)
        for place, phase in enumerate(PHASES):
            spent_ns = sum(after for name, after in marks if name == phase) + (before_ns if phase == "other" else 0)
            assert row[place] == pytest.approx(spent_ns / 1e9, rel=1e-12, abs=1e-18)


def test_nothing_between_steps_counts(fake: FakeTime) -> None:
    clock = StepClock("cpu")
    clock.start()
    fake.now_ns += 5
    clock.stop()
    fake.now_ns += 10**12
    clock.enter("input")  # a stray mark outside a step
    clock.start()
    fake.now_ns += 7
    assert sum(clock.stop()) == pytest.approx(7e-9)


def test_no_steps_no_samples(fake: FakeTime) -> None:
    samples = run_steps(Script(fake, []), StepClock("cpu"), 0)
    assert (samples.phase_s, samples.work) == ([], [])


@pytest.mark.parametrize("phase", ["comput", "", "Compute"])
def test_an_unknown_phase_is_refused(fake: FakeTime, phase: str) -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        run_steps(Script(fake, [[(phase, 1)]]), StepClock("cpu"), 1)


def test_the_real_clock_goes_forward() -> None:
    clock = StepClock("cpu")
    clock.start()
    clock.enter("compute")
    begin = time.perf_counter()
    while time.perf_counter() == begin:
        pass
    row = dict(zip(PHASES, clock.stop(), strict=True))
    assert row["compute"] > 0
    assert all(seconds >= 0 for seconds in row.values())


class FakeEvent:
    """A device event whose clock is advanced by hand; elapsed_time is in milliseconds, as CUDA's is."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = FakeEvent.now_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_on_a_gpu_phases_are_device_time_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronised.append(FakeEvent.now_ms))
    clock = StepClock("cuda:0")
    FakeEvent.now_ms = 1000.0
    clock.start()
    FakeEvent.now_ms = 1002.0
    clock.enter("compute")
    FakeEvent.now_ms = 1010.0
    assert dict(zip(PHASES, clock.stop(), strict=True))["compute"] == pytest.approx(8e-3)
    assert synchronised == [1000.0, 1010.0]  # before the first mark and after the last


def test_fp32_means_fp32() -> None:
    before = torch.backends.fp32_precision
    try:
        worker._strict_fp32()
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
        torch.backends.cudnn.benchmark = False
