"""Traces are the same for the same seed, have the lengths they promise, and bad files are named with their line."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.llm import trace, trace_csv
from workloads.llm.trace_csv import TraceRow

SHORT = (trace.uniform(1, 9), trace.constant(3))


def test_a_seed_says_it_all() -> None:
    first = trace.synthetic(50, 2.0, trace.LENGTHS["sharegpt"], seed=1)
    assert first == trace.synthetic(50, 2.0, trace.LENGTHS["sharegpt"], seed=1)
    assert first != trace.synthetic(50, 2.0, trace.LENGTHS["sharegpt"], seed=2)


def test_another_rate_changes_no_length() -> None:
    slow, fast = (trace.synthetic(50, rate, trace.LENGTHS["longbench"], seed=1) for rate in (1.0, 10.0))
    assert [row[1:] for row in slow] == [row[1:] for row in fast]
    assert [row.arrival_s for row in slow] == pytest.approx([10 * row.arrival_s for row in fast])


@pytest.mark.parametrize(("name", "means"), [("sharegpt", (343.76, 237.20)), ("longbench", (2686.89, 101.78))])
def test_means_are_the_published_ones(name: str, means: tuple[float, float]) -> None:
    rows = trace.synthetic(200_000, math.inf, trace.LENGTHS[name], seed=0)
    found = np.array([row[1:] for row in rows])
    assert found.min() >= 1
    assert found.mean(axis=0) == pytest.approx(means, rel=0.02)
    assert np.log(found[:, 0]).std() == pytest.approx(1.0, rel=0.02)


def test_arrivals() -> None:
    gaps = np.diff([0.0, *(row.arrival_s for row in trace.synthetic(50_000, 4.0, SHORT, 0))])
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() == pytest.approx(0.25, rel=0.02), "gaps of a Poisson process are exponential"
    assert [row.arrival_s for row in trace.synthetic(3, 4.0, SHORT, 0, arrivals="constant")] == [0, 0.25, 0.5]
    assert {row.arrival_s for row in trace.synthetic(5, math.inf, SHORT, 0)} == {0.0}


@given(st.floats(0, 1), st.integers(1, 200), st.integers(0, 5))
def test_a_mix_has_exactly_its_share(share: float, count: int, seed: int) -> None:
    rows = trace.synthetic(count, 1.0, trace.short_long(share, trace.constant(7)), seed)
    long = [row.prompt_tokens for row in rows if row.prompt_tokens >= 1000]
    assert len(long) == count - round(share * count)
    assert all(1000 <= tokens <= 8000 for tokens in long)
    drawn = trace.bimodal(3, 900, share)(np.random.default_rng(seed), count).tolist()
    assert (drawn.count(3), drawn.count(900)) == (round(share * count), count - round(share * count))


def test_a_mix_is_shuffled() -> None:
    drawn = trace.bimodal(1, 2, 0.5)(np.random.default_rng(0), 100).tolist()
    assert drawn != sorted(drawn)


def test_uniform_reaches_both_ends() -> None:
    assert set(trace.uniform(2, 4)(np.random.default_rng(0), 200).tolist()) == {2, 3, 4}


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(SaihError, match="rate above 0"):
        trace.synthetic(3, 0.0, SHORT, 0)
    with pytest.raises(SaihError, match=r"'poison'; did you mean poisson"):
        trace.synthetic(3, 1.0, SHORT, 0, arrivals="poison")


ROWS = st.builds(TraceRow, st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6))


@given(rows=st.lists(ROWS, min_size=1, max_size=20))
def test_a_file_gives_back_the_same_numbers(rows: list[TraceRow], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trace") / "a.csv"
    trace_csv.write_csv(path, rows)
    assert trace_csv.read_csv(path) == sorted(rows, key=lambda row: row.arrival_s)
    assert len(trace_csv.read_csv(path, limit=1)) == 1


AZURE = "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def test_the_azure_formats(tmp_path: Path) -> None:
    """Seven decimals as in 2023, a zone as in 2024, rows out of order, a byte order mark, Windows line ends."""
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + "2023-11-16 18:15:50.9518630,396,109\r\n2023-11-16 18:15:46.6805900,374,44\r\n")
    assert trace_csv.read_csv(path) == [TraceRow(0.0, 374, 44), TraceRow(pytest.approx(4.271273), 396, 109)]
    path.write_text(AZURE + "2024-05-10 23:59:59.5+00:00,1,2\n2024-05-11 00:00:00+00:00,3,4\n")
    assert trace_csv.read_csv(path) == [TraceRow(0.0, 1, 2), TraceRow(0.5, 3, 4)]


def test_times_without_a_zone_do_not_jump_with_the_clocks_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + "2024-03-31 01:30:00,1,2\n2024-03-31 03:30:00,3,4\n")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert [row.arrival_s for row in trace_csv.read_csv(path)] == [0.0, 7200.0]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"has columns none; needed: arrival_s, prompt_tokens, new_tokens, or TIMESTAMP, ContextTokens"),
        ("a,b\n1,2\n", "has columns a, b; needed"),
        (AZURE, "holds no requests"),
        (AZURE + "2023-11-16 18:15:46,374,44\nyesterday,1,2\n", r"bad.csv:3: Invalid isoformat string: 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46,374\n", r"bad.csv:2: invalid literal for int"),
        ("arrival_s,prompt_tokens,new_tokens\n0,12.5,3\n", r"bad.csv:2: invalid literal for int\(\).*'12.5'"),
        ("arrival_s,prompt_tokens,new_tokens\n0,12,0\n", r"bad.csv:2: needs a finite time and at least one token"),
        ("arrival_s,prompt_tokens,new_tokens\nnan,12,1\n", r"bad.csv:2: needs a finite time"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(SaihError, match=why):
        trace_csv.read_csv(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"cannot read the trace .*absent.csv: .*No such file"):
        trace_csv.read_csv(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SaihError, match=r"cannot read the trace .*binary.csv"):
        trace_csv.read_csv(tmp_path / "binary.csv")


def test_requests_of_a_trace() -> None:
    rows = [TraceRow(0.0, 5, 2), TraceRow(1.0, 1000, 3)]
    requests = trace.to_requests(rows, vocabulary=11, seed=4)
    assert [(len(each.prompt), each.max_new_tokens, each.arrival_s, each.kind) for each in requests] == [
        (5, 2, 0.0, "short"),
        (1000, 3, 1.0, "long"),
    ]
    assert set(requests[1].prompt) == set(range(11))
    assert requests[0].prompt == trace.to_requests(rows[:1], vocabulary=11, seed=4)[0].prompt
    assert requests[0].prompt != trace.to_requests(rows[:1], vocabulary=11, seed=5)[0].prompt
    assert len(trace.to_requests(rows)[1].prompt) == 1000
