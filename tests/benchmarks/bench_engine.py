"""What the engine costs for each packed local point, beyond set-up, check and the steps themselves."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from saih.files import read_json

TOYS = Path(__file__).parents[1] / "toys"
POINTS = 200


def main() -> None:
    """Run 200 points of a millisecond in one launch and print the median cost of the engine, with its spread."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _sweep(folder)
        (events,) = folder.glob("jobs/*/jobs/000/events.jsonl")
        told = [json.loads(line) for line in events.read_text().splitlines()]
        started = [(event["time"], event["point"]) for event in told if event["event"] == "started"]
        own_s = dict(_own_seconds(home) for home in folder.glob("jobs/*/points/*"))
        costs = [after - before - own_s[point] for (before, point), (after, _) in itertools.pairwise(started)]
    middle, worst = statistics.median(costs), max(costs)
    print(
        f"engine cost a point: median {1e3 * middle:.1f} ms, worst {1e3 * worst:.1f} ms of {len(costs)} (target: 50 ms)"
    )


def _sweep(folder: Path) -> None:
    values = ",".join(str(n) for n in range(POINTS))
    words = [
        "sweep",
        "faulty",
        f"--axis=amount={values}",
        "--set=seconds=0,steps=5,warmup=1",
        "--repeat=1",
        "--no-probe",
    ]
    subprocess.run(
        [sys.executable, "-m", "saih.cli", *words],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _own_seconds(home: Path) -> tuple[str, float]:
    """(point id, seconds it spent on set-up, check and all steps)."""
    measurement = read_json(home / "measurement.json")
    with np.load(home / "samples.npz") as arrays:
        steps_s = float(arrays["phase_s"].sum() + arrays["warmup_phase_s"].sum())
    return measurement["point"]["id"], measurement["per_rank"]["setup_s"][0] + measurement["per_rank"]["check_s"][
        0
    ] + steps_s


if __name__ == "__main__":
    main()
