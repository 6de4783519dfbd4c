"""Whole runs of PAC over ranks, by `saih sweep` and its own launcher: what is learned, and ranks that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saih import store, workload
from saih.errors import SaihError
from tests import pac_ranks as ranks
from tests.test_pac_pipeline import run_ranks

ROOT = Path(__file__).resolve().parent.parent
SITE = "scheduler: local\nlauncher: torchrun\ndevice: cpu\ngpus_per_node: 2\n"
TINY = ("model=bert-tiny", "samples=16", "batch=8", "length=12", "valid=0.75", "micro_batches=2", "tier=disk")
PLANTED = """\
import os, signal, sys
if os.environ.get("RANK") == "1" and "DIES_AT" in os.environ:
    import itertools, torch
    whole, steps = torch.optim.AdamW.step, itertools.count(1)
    def fatal(*args, **kwargs):
        if next(steps) == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    torch.optim.AdamW.step = fatal
elif "DIES_AT" in os.environ:
    import time, traceback
    whole = traceback.format_exception
    def late(*args, **kwargs):
        time.sleep(1)
        return whole(*args, **kwargs)
    traceback.format_exception = late
"""
"""Kills rank 1 at this step of its optimiser (two steps are an epoch); the other is told to end before it can tell."""


def sweep(folder: Path, *words: str, dies_at: int = 0) -> pd.DataFrame:
    """What `saih sweep pac` measures on two ranks."""
    for name, text in (("sites/two.yaml", SITE), ("planted/sitecustomize.py", PLANTED)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    fixed = ("gpus=2", "seconds=0", "warmup=0", *TINY)
    command = [sys.executable, "-m", "saih.cli", "sweep", "pac", "--site=two", "--no-probe", "--repeat=1"]
    environment = os.environ | {"PYTHONPATH": f"{folder / 'planted'}:{ROOT}"}
    if dies_at:
        environment["DIES_AT"] = str(dies_at)
    done = subprocess.run(
        [*command, f"--set={','.join(fixed)}", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode in (0, 1), done.stderr
    (results,) = (folder / "results").glob("*.h5")
    return store.load(results)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("joint")
    assert run_ranks(ranks.joint, 2, folder) == [0, 0]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ranks.JOINT)
def test_runs_over_ranks_learn_what_one_rank_does(two_ranks: list[dict[str, Any]], case: str) -> None:
    """Losses of every epoch; what goes from layers to samples is counted; steps that begin anew learn the same."""
    numbers, notes, losses = two_ranks[0][case]
    assert numbers["loss_difference"] < 1e-5
    assert numbers["finished_before"] == 0
    assert notes[1].startswith("seconds of each epoch: ")
    assert all(each == losses[0] for each in losses), "steps begin anew"
    if case.startswith("pa-cache"):
        assert numbers["redistributed_bytes"] == numbers["expected_bytes"]
        assert numbers["redistribution_s"] > 0
    else:
        assert "redistributed_bytes" not in numbers


def test_killed_ranks_are_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """In epoch 1 nothing is finished; in epoch 3 two epochs are, and the cache is then used as it was left."""
    words = ("--axis=variant=pa-cache", "--set=layout=pp,span=later,steps=2")
    for dies_at, finished in ((2, 0), (5, 2)):
        (lost,) = sweep(tmp_path, *words, dies_at=dies_at).to_dict("records")
        assert lost["status"] == "failed"
        assert lost["reason"] == (
            f"SaihError: rank 1 was lost in epoch {finished + 1}; "
            f"{finished} finished epochs and the activations cached for them are kept"
        )
        stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.h5")}
        assert len(stamps) == (2 if finished else 0)
        kept = list(tmp_path.glob("jobs/*/points/*/kept/*"))  # which --fresh sets aside
        assert bool(kept) == bool(finished)
    (found,) = sweep(tmp_path, *words).to_dict("records")
    assert found["status"] == "measured"
    assert found["check_finished_before"] == 2
    assert found["check_loss_difference"] < 1e-5
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert not list(tmp_path.rglob("kept")), "nothing is kept of what is measured"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"span": "mini-batch"}, "span=mini-batch is one on a plan"),
        ({"cluster": "emulated-mixed"}, "emulates mini-batches of epoch 1 alone; set span=mini-batch"),
        ({"layout": "pp", "gpus": 2, "tests": 8}, "tests need a whole backbone on a rank"),
    ],
)
def test_spans_that_make_no_sense_are_refused(changes: dict[str, str | int], why: str) -> None:
    spec = workload.spec("pac")
    params = {name: each.default for name, each in workload.parameters(spec).items()}
    with pytest.raises(SaihError, match=why):
        spec.cost(params | changes)
