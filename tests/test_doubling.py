"""Twice the ranks: predicted from what several ranks have of a ceiling at once, on steps that the test makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih.analysis.doubling import doubled, gain_of_second_ranks
from saih.core import Cost, Operation

RATES = {"fp32": 1e9, "copy": 1e10, "allreduce-torch": 1e8}


def cost(work: float = 1.0, message_bytes: float = 0.0) -> Cost:
    """Of each unit of work a kernel that FLOP bind for a second, and one that memory binds for half a second."""
    kernels = (Operation(1e9 * work, 1.0), Operation(1.0, 5e9 * work))
    return Cost(1e9 * work, work, kernels, message_bytes=message_bytes)


def test_a_second_machine_doubles_and_a_shared_one_gives_nothing() -> None:
    for share, gain in ((1.0, 2.0), (0.5, 1.0)):
        ceilings = {"rates": RATES, "together": {"fp32": {"2": share}, "copy": {"2": share}}}
        assert gain_of_second_ranks(1.0, 1.5, "fp32", ceilings, 1, (cost(), cost())) == pytest.approx(gain)


@given(st.floats(0.25, 1), st.floats(0.25, 1), st.floats(0, 10), st.floats(0, 1e8))
def test_each_kernel_is_stretched_at_its_own_ceiling(flop: float, copy: float, rest_s: float, said: float) -> None:
    step_s, on_two_s = 1.5 + rest_s, 1.0 / flop + 0.5 / copy + rest_s + said / 1e8
    ceilings = {"rates": RATES, "together": {"fp32": {"2": flop}, "copy": {"2": copy}}}
    both = cost(), cost(message_bytes=said)
    found = gain_of_second_ranks(1.5 / step_s, step_s, "fp32", ceilings, 1, both)
    assert found == pytest.approx(2 * step_s / on_two_s)


def test_strong_scaling_halves_the_work_of_each() -> None:
    ceilings = {"rates": RATES, "together": {"fp32": {"2": 1.0}, "copy": {"2": 1.0}}}
    shared = cost(), cost(work=0.5)
    assert gain_of_second_ranks(1.0, 1.5, "fp32", ceilings, 1, shared) == pytest.approx(2.0)
    assert gain_of_second_ranks(0.5, 3.0, "fp32", ceilings, 1, shared) == pytest.approx(4 / 3)


def test_what_was_not_measured_is_not_predicted() -> None:
    silent, talking = (cost(), cost()), (cost(), cost(message_bytes=1e6))
    known = {"rates": RATES, "together": {"fp32": {"2": 0.9}, "copy": {"2": 0.9}}}
    assert gain_of_second_ranks(1.0, 1.5, "fp32", {"rates": RATES}, 1, silent) is None
    assert gain_of_second_ranks(1.0, 1.5, "bf16", known, 1, silent) is None
    assert gain_of_second_ranks(1.0, 1.5, "fp32", known, 2, silent) is None
    unheard = known | {"rates": {"fp32": 1e9, "copy": 1e10}}
    assert gain_of_second_ranks(1.0, 1.5, "fp32", unheard, 1, silent) is not None
    assert gain_of_second_ranks(1.0, 1.5, "fp32", unheard, 1, talking) is None


def test_ranks_are_doubled_on_each_node() -> None:
    assert doubled({"nodes": 2, "gpus": 4, "mesh": 16}) == {"nodes": 2, "gpus": 8, "mesh": 16}
