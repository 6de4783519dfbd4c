"""Horovod beside DistributedDataParallel on CosmoFlow: the same gradients under every launcher; life without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from saih import store
from saih.errors import SaihError
from workloads.cosmology.cosmoflow import parallel

ROOT = Path(__file__).parent.parent
COMPARE = """
import json, sys, threading
import torch, torch.distributed as dist
from saih import launchers, workload
from saih.core import Context, Point
from saih.timing import Unclocked
from workloads.cosmology.cosmoflow import bench, spec

place = launchers.place()
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=place.rank, world_size=place.world)
defaults = {name: each.default for name, each in workload.parameters(spec).items()}
gradients, threads = {}, []
for backend in ("ddp", "horovod", "ddp", "horovod"):  # Horovod stops and starts again
    params = defaults | {"gpus": place.world, "mesh": 16, "width": 4, "samples": 4, "backend": backend}
    training = bench.setup(Point("cosmoflow", params, seed=7), Context(place, "cpu", sys.argv[1]))
    training.parallel.backward(training._own_loss(), Unclocked())
    gradient = bench._flat(training.parallel.gradients())
    assert torch.equal(gradients.setdefault(backend, gradient), gradient), "the same again"
    training.optimizer.zero_grad()
    check = training.check()
    assert check.passed, check.why
    training.close()
    threads.append(threading.active_count())
assert threads[1] == threads[3], f"a server is left behind: {threads} threads"
alone = gradients["ddp"].clone()
dist.broadcast(alone, 0)
assert torch.equal(alone, gradients["ddp"])
if place.rank == 0:
    difference = (gradients["ddp"] - gradients["horovod"]).norm() / gradients["ddp"].norm()
    print(json.dumps({"difference": float(difference), "norm": float(gradients["ddp"].norm())}))
dist.destroy_process_group()
"""


TWO_NODES = """
import os, socket
import torch.distributed as dist
from saih import launchers
from saih.core import Place
from workloads.cosmology.cosmoflow import parallel

rank = launchers.place().rank
dist.init_process_group("gloo", rank=rank, world_size=2)
os.environ["MASTER_ADDR"] = "first-node"
socket.gethostbyname = {"first-node": ("127.0.1.1", "127.0.0.1")[rank]}.__getitem__
hvd, rendezvous = parallel.start_horovod(Place(rank, 0, 2), "cpu")
assert hvd.size() == 2
assert os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "127.0.0.1", "as the other node sees it"
hvd.shutdown()
assert (rendezvous is not None) == (rank == 0)
dist.destroy_process_group()
"""


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200)


def sweep(folder: Path, launcher: str, *words: str, **environment: str) -> pd.DataFrame:
    lines = ["scheduler: local", f"launcher: {launcher}", "device: cpu", "gpus_per_node: 2", "environment:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in ({"LANG": "C"} | environment).items()]
    (folder / "sites").mkdir()
    (folder / "sites" / "two.yaml").write_text("\n".join(lines) + "\n")
    small = "--set=gpus=2,mesh=16,width=4,samples=4,seconds=0,steps=3,warmup=1"
    command = [sys.executable, "-m", "saih.cli", "sweep", "cosmoflow", "--site=two", "--no-probe", "--repeat=1"]
    done = run([*command, small, *words], folder)
    (results,) = (folder / "results").glob("*.h5")
    points = store.load(results)
    assert len(points), done.stderr
    return points


@pytest.mark.usefixtures("horovod")
def test_gradients_equal_those_of_ddp(tmp_path: Path) -> None:
    (tmp_path / "compare.py").write_text(COMPARE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "compare.py", str(tmp_path / "data")]
    done = run([sys.executable, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["norm"] > 0
    assert told["difference"] < 1e-6


@pytest.mark.usefixtures("horovod")
def test_ranks_meet_where_the_other_nodes_see_the_first_one(tmp_path: Path) -> None:
    """On Debian a host's own name stands for a loopback, which nobody else reaches."""
    (tmp_path / "nodes.py").write_text(TWO_NODES)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "nodes.py"]
    done = run([sys.executable, *words], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("horovod")
def test_an_address_no_interface_leads_to_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    assert parallel._interface_to("127.0.0.1") == "lo"
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": []})
    with pytest.raises(SaihError, match=r"no network interface of .* has 127\.0\.0\.1, by which it reaches"):
        parallel._interface_to("127.0.0.1")


@pytest.mark.usefixtures("horovod")
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec", "horovodrun"])
def test_a_sweep_measures_both_backends_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    points = sweep(tmp_path, launcher, "--axis=backend=ddp,horovod")
    assert list(points["status"]) == ["measured"] * 2, list(points["log_tail"])
    assert list(points["label_backend"]) == ["ddp", "horovod"]
    assert set(points["ranks"]) == {2}
    assert (points["check_gradient_error"] < 1e-4).all()


def test_without_horovod_the_rest_is_measured_and_the_way_to_get_it_is_said(tmp_path: Path) -> None:
    """A package that cannot be imported stands where Horovod would."""
    (tmp_path / "without" / "horovod").mkdir(parents=True)
    (tmp_path / "without" / "horovod" / "__init__.py").write_text("raise ImportError('No module named horovod')\n")
    path = os.pathsep.join([str(tmp_path / "without"), str(ROOT)])
    points = sweep(tmp_path, "torchrun", "--axis=backend=ddp,horovod", PYTHONPATH=path)
    assert list(points["status"]) == ["measured", "failed"]
    assert "make horovod" in points["reason"].iloc[1]
