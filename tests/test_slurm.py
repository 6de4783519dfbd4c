"""Against a real Slurm of four simulated nodes: whatever happens there, every point ends measured once or explained."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from saih import store
from saih.errors import SaihError
from saih.files import read_json
from saih.schedulers import State, expand, slurm
from tests.cluster.slurm import Cluster, cluster, is_alive
from tests.commands import Commands
from workloads.cosmology.dataset import generate, missing
from workloads.cosmology.recipe import Recipe
from workloads.cosmology.storages import DEFAULT_STORAGE

ROOT = Path(__file__).parent.parent
TOYS = ROOT / "tests" / "toys"
OPEN_MPI_AS_ROOT = '  OMPI_ALLOW_RUN_AS_ROOT: "1"\n  OMPI_ALLOW_RUN_AS_ROOT_CONFIRM: "1"\n'
QUICK = "--set=seconds=0,steps=3,warmup=1"


class LoginNode:
    """A folder on the cluster's "shared file system", and saih as a person runs it there."""

    def __init__(self, folder: Path, running: Cluster) -> None:
        self.folder, self.cluster = folder, running
        (folder / "sites").mkdir(parents=True)
        for launcher in ("srun", "torchrun", "mpiexec", "openmpi"):
            (folder / "sites" / f"{launcher}.yaml").write_text(running.site(launcher) + OPEN_MPI_AS_ROOT)
        (folder / "sites" / "pmi2.yaml").write_text(running.site("srun") + "mpi: pmi2\n")
        self.path = os.environ["PATH"]

    def start(self, *words: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return subprocess.Popen(
            [sys.executable, "-m", "saih.cli", *words],
            cwd=self.folder,
            env=os.environ | self.cluster.environment | {"PYTHONPATH": paths, "PATH": self.path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def saih(self, *words: str, status: int = 0) -> str:
        process = self.start(*words)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == status, output
        return output

    def results(self) -> Path:
        (path,) = self.folder.glob("results/*.h5")
        return path


@pytest.fixture
def login(tmp_path: Path, slurm_cluster: Cluster) -> LoginNode:
    return LoginNode(tmp_path / "home", slurm_cluster)


def test_a_job_nobody_knows_has_ended_and_one_of_another_name_is_not_ours(
    slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    number = slurm_cluster.run("sbatch", "--parsable", "--job-name=theirs", "--chdir=/", "--wrap=sleep 60").strip()
    states = slurm.states(["99999999 saih-x", f"{number} saih-x", f"{number} theirs"])
    assert [state.phase for state in states.values()][:2] == ["ended", "ended"]
    assert states[f"{number} theirs"].phase != "ended"
    slurm.cancel([f"{number} theirs"])
    wait_until(lambda: slurm.states([f"{number} theirs"])[f"{number} theirs"].cause == "cancelled", "the end")


def test_a_job_is_found_by_a_name_no_other_folder_has(login: LoginNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", login.cluster.environment["SLURM_CONF"])
    homes = [login.folder / checkout / "jobs" / "s" / "jobs" / "000" for checkout in ("one", "two")]
    for home in homes:
        home.mkdir(parents=True)
        (home / "job.sh").write_text("#!/bin/bash\nsleep 60\n")
    name = slurm.submit(homes[0] / "job.sh")
    assert slurm.find(homes[0]) == name
    assert slurm.find(homes[1]) is None
    slurm.cancel([name])


def test_no_answer_is_not_the_answer_that_there_is_no_such_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path / "bin")
    commands.add("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", 1)
    monkeypatch.setenv("PATH", f"{commands.folder}:/usr/bin:/bin")
    with pytest.raises(SaihError, match="squeue does not answer"):
        slurm.find(tmp_path / "s" / "jobs" / "000")
    assert slurm.states(["7 saih-x"]) == {"7 saih-x": State("queued", detail="the controller does not answer")}


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpiexec", "openmpi"])
def test_every_launcher_gives_the_same_measurements(
    launcher: str, login: LoginNode, require: Callable[[str], str]
) -> None:
    if launcher == "openmpi":
        require("ompi_info")
    sweep = ["sweep", "faulty", "--no-probe", "--axis=size=1,2", "--axis=nodes=1,2", "--set=gpus=2", QUICK]
    assert "4 measured" in login.saih(*sweep, f"--site={launcher}")
    points = store.load(login.results())
    assert sorted(points["ranks"]) == [2, 2, 4, 4]
    assert set(zip(points["label_size"], points["label_nodes"], strict=True)) == {
        (size, nodes) for size in "12" for nodes in "12"
    }
    samples = store.load_samples(login.results())
    assert set(samples[samples["point"] == points["ranks"].idxmax()]["rank"]) == {0, 1, 2, 3}


def test_cosmoflow_scales_over_nodes_to_the_report(login: LoginNode) -> None:
    axes = ["--axis=data=16,32", "--axis=model=w4,w8", "--axis=nodes=1,2,4"]
    output = login.saih("sweep", "cosmoflow", "--no-probe", "--site=srun", "--repeat=1", *axes, "--set=gpus=2", QUICK)
    assert "12 measured" in output
    points = store.load(login.results())
    assert points.groupby("label_nodes")["ranks"].agg(set).to_dict() == {"1": {2}, "2": {4}, "4": {8}}
    assert (points["check_gradient_error"] < 1e-4).all()
    (page,) = login.folder.glob("reports/*.html")
    assert "efficiency" in page.read_text()


def test_mpi_reduces_over_the_ranks_that_srun_starts(login: LoginNode, require: Callable[[str], str]) -> None:
    require("mpiexec")
    sweep = ["sweep", "ceilings", "--no-probe", "--site=pmi2", "--repeat=1", "--axis=transport=mpi", "--axis=nodes=1,2"]
    assert "2 measured" in login.saih(*sweep, "--set=gpus=2,kernel=allreduce", QUICK)
    assert sorted(store.load(login.results())["ranks"]) == [2, 4]


def test_a_rank_that_does_not_even_start_ends_the_job(login: LoginNode) -> None:
    """The others would wait for it for minutes: saih gives up here before they would."""
    script = login.folder / "python"
    script.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" != 1 ] || exit 7\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    site = login.folder / "sites" / "srun.yaml"
    site.write_text(site.read_text() + f"python: {script}\n")
    sweep = ["sweep", "faulty", "--no-probe", "--site=srun", "--repeat=1", "--axis=size=1", "--set=gpus=2", QUICK]
    driver = login.start(*sweep)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1, output
    points = store.load(login.results())
    assert list(points["kind"]) == ["not-started"]
    assert "exit code 7" in points["log_tail"][0]


def test_one_rank_that_fails_ends_the_others_where_they_are(login: LoginNode) -> None:
    """The other ones are in a step of ten minutes."""
    words = ["--axis=fault=error-on-last-rank", "--set=gpus=2,nodes=2,seconds=0,steps=1,warmup=0,step_ms=600000"]
    driver = login.start("sweep", "faulty", "--no-probe", "--site=srun", "--repeat=1", *words)
    output, _ = driver.communicate(timeout=100)
    assert driver.returncode == 1, output
    assert list(store.load(login.results())["reason"]) == ["ValueError: this point is <b>broken</b>"]


def test_a_data_set_made_by_ranks_on_two_nodes_is_that_of_one_process(login: LoginNode, tmp_path: Path) -> None:
    recipe = Recipe(mesh=128, channels=4, seed=0, samples=4)
    words = ["generate", "--set", "mesh=128,samples=4,nodes=2,gpus=1", "--site=srun"]
    assert "0 MB of 67.11 MB are there; 1 piece x 2 ranks on srun" in login.saih(*words)
    generate(tmp_path / "alone", recipe)
    alone, made = (root / recipe.folder_name(DEFAULT_STORAGE) for root in (tmp_path / "alone", login.folder / "data"))
    names = sorted(path.name for path in alone.iterdir())
    assert [path.name for path in sorted(made.iterdir())] == names
    assert len(names) == 4, "two shards, a manifest each"
    assert all((alone / name).read_bytes() == (made / name).read_bytes() for name in names)
    assert "made     0 MB" in login.saih(*words), "what is there stays"


def test_ranks_on_two_nodes_share_a_universe(login: LoginNode) -> None:
    recipe = Recipe(mesh=32, channels=4, seed=0, samples=2)
    login.saih("generate", "--set", "mesh=32,samples=2,spread=slabs,nodes=2,gpus=2", "--site=srun")
    assert missing(login.folder / "data", recipe) == []


def test_a_batch_script_is_no_rank(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Only what srun starts is; Slurm gives a rank to the script, too."""
    ask = [sys.executable, "-c", "from saih import launchers; print(launchers.find_place())"]
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{shlex.join(ask)}\nsrun --ntasks=1 {shlex.join(ask)}\n")
    words = [f"--chdir={ROOT}", f"--output={tmp_path}/told", "--wait", "--ntasks=2", str(tmp_path / "job.sh")]
    slurm_cluster.run("sbatch", *words)
    assert (tmp_path / "told").read_text().splitlines() == ["None", "Place(rank=0, local_rank=0, world=1)"]


def test_a_cluster_leaves_no_daemon_behind_when_it_is_terminated(slurm_cluster: Cluster, tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.slurm", str(tmp_path / "cluster")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert any("Ctrl-C stops" in line for line in started.stdout)
    pids = [int(path.read_text()) for path in (tmp_path / "cluster").glob("*.pid")]
    assert len(pids) == 6
    assert all(is_alive(pid) for pid in pids)
    started.terminate()
    started.wait(timeout=60)
    assert not [pid for pid in pids if is_alive(pid)]
    assert {path.name for path in (tmp_path / "sites").iterdir()} == {"cluster.yaml", "cluster-mpi.yaml"}


@pytest.mark.usefixtures("horovod")
def test_horovod_runs_over_nodes(login: LoginNode) -> None:
    sweep = ["sweep", "cosmoflow", "--no-probe", "--site=srun", "--repeat=1", "--axis=backend=ddp,horovod"]
    assert "2 measured" in login.saih(*sweep, "--set=nodes=2,gpus=2,mesh=16,width=4", QUICK)
    assert (store.load(login.results())["check_gradient_error"] < 1e-4).all()


def test_a_sweep_is_a_handful_of_polite_calls(login: LoginNode, tmp_path: Path, tell: Callable[[str], None]) -> None:
    calls = spy_on_slurm(login, tmp_path)
    sizes = ",".join(str(n) for n in range(200))
    began = time.monotonic()
    output = login.saih("sweep", "faulty", "--no-probe", "--site=srun", f"--axis=amount={sizes}", QUICK)
    took_s = time.monotonic() - began
    assert "200 measured" in output
    made = calls.read_text().split()
    assert len(made) < 30
    events = next(login.folder.glob("jobs/*/jobs/000/events.jsonl"))
    told = [float(line.split('"time": ')[1].rstrip("}")) for line in events.read_text().splitlines()]
    ratio = took_s / (told[-1] - told[0])
    tell(f"200 points: {len(made)} calls of Slurm, {ratio:.1f}x the time of the points alone")


def spy_on_slurm(login: LoginNode, folder: Path) -> Path:
    """Wrappers first on the PATH of saih that note each call."""
    wrappers, calls = folder / "wrappers", folder / "calls"
    wrappers.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        real = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        (wrappers / name).write_text(f'#!/bin/sh\necho {name} >>"{calls}"\nexec {real} "$@"\n')
        (wrappers / name).chmod(0o755)
    login.path = f"{wrappers}:{login.path}"
    return calls


def test_hostile_folder_names_and_verbatim_set_up_lines(slurm_cluster: Cluster, tmp_path: Path) -> None:
    login = LoginNode(tmp_path / 'it\'s a "$HOME" %j\nfolder', slurm_cluster)
    site = login.folder / "sites" / "srun.yaml"
    line = "export MARK='a  b' # $(touch not-executed-by-saih) \"quoted\""
    site.write_text(site.read_text() + yaml.safe_dump({"setup": [line]}, width=1000))
    assert "1 measured" in login.saih(
        "sweep", "faulty", "--no-probe", "--site=srun", "--axis=size=1", QUICK, "--repeat=1"
    )
    (script,) = login.folder.glob("jobs/*/jobs/*/job.sh")
    assert line in script.read_text().splitlines()
    assert not list(login.folder.rglob("not-executed-by-saih"))


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds:.0f} s"
        time.sleep(0.1)


# Slurm ends a job of one minute after 65 to 89 s: 100 s is past that, and within the two minutes of the next try.
SLOW = ["sweep", "faulty", "--no-probe", "--site=srun", "--repeat=1", "--axis=fault=slow"]
SLOW += ["--set=slow_s=100,seconds=0,steps=1,warmup=0"]


@pytest.fixture
def quiet_cluster(slurm_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """In a folder of short name: Slurm makes sockets below it, and their paths have at most 108 letters."""
    with cluster(tmp_path_factory.mktemp("quiet"), nodes=1) as running:
        yield running


@pytest.mark.timeout(900)
def test_whatever_happens_every_point_is_measured_once_or_explained(
    login: LoginNode, quiet_cluster: Cluster, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """One slurmd killed, one job requeued, one cancelled, slurmctld restarted twice, saih killed; one job out of time.

    The last on a cluster of its own: for some minutes after its restart a controller does not enforce time limits.
    """
    site = login.folder / "sites" / "srun.yaml"
    site.write_text(site.read_text() + "job_minutes: 2\n")
    sweep = [
        "sweep",
        "faulty",
        "--no-probe",
        "--site=srun",
        "--repeat=1",
        "--axis=amount=" + ",".join(map(str, range(48))),
    ]
    sweep.append("--set=step_ms=700,seconds=0,steps=3,warmup=1")
    cluster_ = login.cluster
    undisturbed = LoginNode(tmp_path / "undisturbed", quiet_cluster)
    timed_out = undisturbed.start(*SLOW)

    driver = login.start(*sweep)
    wait_until(
        lambda: len(jobs_of(login, "amount", "RUNNING")) >= 3 and len(measured(login, "amount")) >= 3, "three jobs"
    )
    running = jobs_of(login, "amount", "RUNNING")
    first, second, third = sorted(running)[:3]
    faults = []
    cluster_.kill_node(running[first])
    faults.append("slurmd killed")
    cluster_.run("scontrol", "requeue", second)
    cluster_.run("scontrol", "update", f"JobId={second}", "StartTime=now")
    faults.append("job requeued")
    cluster_.run("scancel", third)
    faults.append("job cancelled")
    cluster_.restart_controller()
    faults.append("slurmctld restarted under saih")
    driver.kill()
    driver.wait()
    faults.append("saih killed")
    cluster_.restart_controller()
    faults.append("slurmctld restarted")
    before = measured(login, "amount")

    driver = login.start(*sweep)
    wait_until(lambda: "down" in cluster_.run("sinfo", "-h", "-o", "%t") or driver.poll() is not None, "node down", 90)
    output, _ = driver.communicate(timeout=280)
    assert driver.returncode in (0, 1), output

    after = measured(login, "amount")
    assert {name: after[name] for name in before} == before
    (results,) = login.folder.glob("results/faulty-amount-*.h5")
    points = store.load(results)
    assert len(points) == points["id"].nunique() == 48
    lost = points[points["status"] != "measured"]
    packed = {value["id"] for value in read_json(home_of(login, third) / "pack.json")["points"]}
    assert set(lost["id"]) <= packed, "only points of the job that somebody cancelled"
    assert set(lost["kind"]) <= {"cancelled"}
    assert lost["reason"].str.contains("job ended as CANCELLED").all()

    output, _ = timed_out.communicate(timeout=400)
    assert timed_out.returncode == 0, output
    assert list(store.load(undisturbed.results())["status"]) == ["measured"]
    ends = [read_json(path)["cause"] for path in sorted(undisturbed.folder.glob("jobs/*/jobs/*/ended.json"))]
    assert ends in (["timeout", ""], ["timeout", "timeout", ""])  # a busy machine may need the third try
    faults.append("time limit exceeded")
    kinds = points["kind"].replace("", "measured").value_counts().to_dict()
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    tell(f"survived {len(faults)} faults ({', '.join(faults)}): {counts}")


def measured(login: LoginNode, axis: str) -> dict[str, int]:
    paths = login.folder.glob(f"jobs/faulty-{axis}-*/points/*/measurement.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in paths}


def home_of(login: LoginNode, number: str) -> Path:
    """The folder of a job by Slurm's number."""
    ids = {path.parent: read_json(path)["id"] for path in login.folder.glob("jobs/*/jobs/*/submitted.json")}
    return next(home for home, name in ids.items() if name.split()[0] == number)


def jobs_of(login: LoginNode, axis: str, state: str) -> dict[str, str]:
    """Job number -> node of the jobs of a sweep in this state."""
    lines = login.cluster.run("squeue", "-h", f"--states={state}", "--format=%A %N %j").splitlines()
    found = [line.split() for line in lines if f"saih-faulty-{axis}-" in line]
    return {fields[0]: fields[1] for fields in found if len(fields) == 3}


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PENDING", State("queued", detail="PENDING")),
        ("REQUEUED", State("queued", detail="REQUEUED")),
        ("RUNNING", State("running", detail="RUNNING", nodes=("n1", "n2"))),
        ("COMPLETING", State("running", detail="COMPLETING", nodes=("n1", "n2"))),
        ("COMPLETED", State("ended", detail="COMPLETED", nodes=("n1", "n2"))),
        ("FAILED", State("ended", detail="FAILED", nodes=("n1", "n2"))),
        ("CANCELLED by 1000", State("ended", "cancelled", "CANCELLED", ("n1", "n2"))),
        ("CANCELLED+", State("ended", "cancelled", "CANCELLED", ("n1", "n2"))),
        ("PREEMPTED", State("ended", "preempted", "PREEMPTED", ("n1", "n2"))),
        ("NODE_FAIL", State("ended", "node-fail", "NODE_FAIL", ("n1", "n2"))),
        ("BOOT_FAIL", State("ended", "boot-fail", "BOOT_FAIL", ("n1", "n2"))),
        ("TIMEOUT", State("ended", "timeout", "TIMEOUT", ("n1", "n2"))),
        ("OUT_OF_MEMORY", State("ended", "out-of-memory", "OUT_OF_MEMORY", ("n1", "n2"))),
    ],
)
def test_slurms_words_become_states(word: str, state: State) -> None:
    assert slurm.state_of(word, "n[1-2]") == state


def test_why_a_job_waits_is_told() -> None:
    assert slurm.state_of("PENDING", "", "PartitionTimeLimit").detail == "PENDING (PartitionTimeLimit)"
    assert slurm.state_of("PENDING", "", "None").detail == "PENDING"
    assert slurm.state_of("RUNNING", "n1", "None") == State("running", detail="RUNNING", nodes=("n1",))


def test_a_job_held_because_its_node_could_not_start_it_is_tried_elsewhere() -> None:
    """Slurm requeues it with a hold, and there it stays for ever."""
    held = slurm.state_of("PENDING", "", "launch failed requeued held")
    assert held == State("ended", "boot-fail", "PENDING (launch failed requeued held)")
    assert slurm.state_of("PENDING", "", "Resources").phase == "queued"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("", ()),
        ("(null)", ()),
        ("None assigned", ()),
        ("n1", ("n1",)),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("n[08-11,15],gpu-7", ("n08", "n09", "n10", "n11", "n15", "gpu-7")),
        ("r1n[1-2],r2n[1,3]", ("r1n1", "r1n2", "r2n1", "r2n3")),
    ],
)
def test_node_lists_expand(nodes: str, names: tuple[str, ...]) -> None:
    assert expand(nodes) == names
