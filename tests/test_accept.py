"""Acceptance: intervals against a tolerance, and a stored sweep that really runs again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saih import cli, store
from saih.analysis.accept import Judged, judge, worst
from tests.synthetic import Scenario, make


def repeats(cell: str, seconds: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"cell": cell, "step_s": seconds})


def verdict(bid: list[float], delivered: list[float], tolerance: float = 0.05) -> Judged:
    (found,) = judge(repeats("a", bid), repeats("b", delivered), {"a": "b"}, {"a": "data=16"}, tolerance)
    return found


@pytest.mark.parametrize(
    ("delivered", "expected"),
    [
        ([1.00, 1.01, 0.99], "pass"),
        ([0.50, 0.51, 0.49], "pass"),
        ([1.20, 1.21, 1.19], "fail"),
        ([1.05, 1.06, 1.04], "undecided"),
        ([0.80, 1.50, 0.90], "undecided"),
        ([1.00], "undecided"),
        ([], "fail"),
    ],
)
def test_a_cell_passes_or_fails_with_its_whole_interval(delivered: list[float], expected: str) -> None:
    found = verdict([1.0, 1.01, 0.99], delivered)
    assert found.verdict == expected
    assert bool(found.why) == (expected != "pass")
    assert json.dumps(found.to_json(), allow_nan=False)


def test_the_tolerance_is_what_decides() -> None:
    assert verdict([1.0, 1.001, 0.999], [1.08, 1.081, 1.079], 0.05).verdict == "fail"
    assert verdict([1.0, 1.001, 0.999], [1.08, 1.081, 1.079], 0.10).verdict == "pass"


def test_a_machine_that_only_meets_its_bid_rarely_fails() -> None:
    """The same machine twice, 3 % noise, no tolerance: 2.5 % may fail by chance, for the interval is one of 95 %."""
    dice = np.random.default_rng(3)
    runs = [np.exp(0.03 * dice.standard_normal((2, 5))) for _ in range(1000)]
    failed = [verdict(list(bid), list(delivered), 0.0).verdict == "fail" for bid, delivered in runs]
    assert 0.01 < np.mean(failed) < 0.04


def test_one_failure_fails_all_and_doubt_is_no_pass() -> None:
    good, bad, unsure = (verdict([1.0, 1.01], each) for each in ([0.9, 0.91], [2.0, 2.01], [1.0, 1.2]))
    assert worst([good]) == "pass"
    assert worst([good, unsure]) == "undecided"
    assert worst([good, unsure, bad]) == "fail"


SITE = """\
device: cpu
device_name: Z80
gpus_per_node: 2
threads_per_rank: 1
node_memory_gib: 4
repeat: 2
peak: {flop_per_s: {fp32: 1.0e+11}, memory_bytes_per_s: 1.0e+10}
"""


def test_a_stored_sweep_runs_again_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on this machine, then delivered as this machine; then against a bid that no machine can meet."""
    monkeypatch.chdir(tmp_path)
    Path("sites").mkdir()
    for name in ("bid", "here"):
        Path("sites", f"{name}.yaml").write_text(SITE)
    words = ["smoke", "--axis", "size=1000,2000", "--set", "seconds=0,steps=5", "--site", "bid", "--no-probe"]
    assert cli.main(["sweep", *words]) == 0
    (path,) = Path("results").glob("smoke-*.h5")
    shutil.copy(path, "bid.h5")
    capsys.readouterr()
    assert cli.main(["accept", "bid.h5", "--site", "here", "--tolerance", "1e5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "pass"
    assert [each["labels"] for each in told["cells"]] == ["size=1000", "size=2000"]
    delivered = store.load(told["results"])
    assert (delivered["status"] == "measured").all()
    assert set(delivered["cell"]) == set(store.load("bid.h5")["cell"]), "the very same points"
    assert delivered.attrs["sweep"]["site"]["name"] == "here"
    with monkeypatch.context() as patch:
        patch.setattr("saih.verbs.accept._run", lambda plan, fresh: Path(told["results"]))
        dream(Path("bid.h5"), Path("dream.h5"))
        assert cli.main(["accept", "dream.h5", "--site", "here"]) == 1
        text = capsys.readouterr().out
    assert "FAIL      size=1000: bid " in text
    assert text.endswith("FAIL: 2 cells against dream.h5, tolerance 5 %\n")


def dream(bid: Path, path: Path) -> None:
    """The bid with a thousandth of the time."""
    points = store.load(bid)
    samples = store.load_samples(bid).drop(columns="step_s")
    phases = [name for name in samples if str(name).endswith("_s")]
    samples[phases] /= 1e6
    tables = {"points": points, "samples": samples, "ranks": store.load_ranks(bid)}
    store._write(path, dict(points.attrs["sweep"]), tables, points.attrs["environments"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--site", "nowhere"], "unknown site 'nowhere'"),
        (["--site", "local"], "unknown workload"),
    ],
)
def test_what_cannot_be_rerun_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = store.gather(make(tmp_path / "jobs", Scenario()), tmp_path)
    assert cli.main(["accept", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint in error


@pytest.mark.parametrize("tolerance", ["-1", "x", "nan"])
def test_a_tolerance_is_a_number_of_percent(capsys: pytest.CaptureFixture[str], tolerance: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["accept", "bid.h5", "--site", "local", f"--tolerance={tolerance}"])
    assert "must be a number of percent" in capsys.readouterr().err
