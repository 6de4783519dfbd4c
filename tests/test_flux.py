"""Flux: what a real one printed (tests/recorded) becomes states, and jobs ask for what the site says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from saih import jobs, launchers, store
from saih.core import Place
from saih.errors import SaihError
from saih.schedulers import State, flux, job_name
from tests.commands import Commands
from tests.sites import cpu_site
from tests.test_pbs import a_job

RECORDED = Path(__file__).parent / "recorded" / "flux"
JOBS = (RECORDED / "jobs.json").read_text()
IDS = {job["name"].removeprefix("saih-x-"): f"{job['id']} {job['name']}" for job in json.loads(JOBS)["jobs"]}
TOO_BIG = "alloc: unsatisfiable request: need 9 node(s) with 1 cores each, only 4 eligible"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "commands")
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made


def complaint(name: str) -> str:
    return (RECORDED / f"{name}.stderr").read_text()


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("ok", State("ended", "", "COMPLETED", ("n1", "n2"))),
        ("late", State("ended", "timeout", "TIMEOUT (timeout: resource allocation expired)", ("n3",))),
        ("cancelled", State("ended", "cancelled", "CANCELED (cancel)", ("n4",))),
        ("fails", State("ended", "", "FAILED", ("n1",))),
        ("killed", State("ended", "", "FAILED", ("n2",))),
        ("too-big", State("ended", "", f"FAILED ({TOO_BIG})")),
        ("held", State("queued", detail="SCHED")),
        ("never-started", State("ended", "cancelled", "CANCELED (cancel)")),
        ("lost", State("ended", "node-fail", "FAILED (exec: node failure on n4 (rank 3))", ("n4",))),
        (
            "lost-second",
            State("ended", "node-fail", "FAILED (node-failure: node failure on n3 (shell rank 1))", ("n3",)),
        ),
        ("running", State("running", detail="RUN", nodes=("n1",))),
    ],
)
def test_what_flux_said_of_real_jobs(name: str, state: State, commands: Commands) -> None:
    commands.add("flux", JOBS)
    assert flux.states([IDS[name]]) == {IDS[name]: state}


def test_a_prolog_that_fails_is_the_nodes_fault() -> None:
    failed = {"state": "INACTIVE", "result": "FAILED", "nodelist": "n1"}
    prolog = {"occurred": True, "type": "prolog", "note": "prolog exited with exit code=1"}
    assert flux.state_of(failed | {"exception": prolog}).cause == "boot-fail"


def test_states_of_many_are_one_call(commands: Commands) -> None:
    commands.add("flux", JOBS)
    assert list(flux.states(list(IDS.values()))) == list(IDS.values())
    assert commands.calls() == [["flux", "jobs", "--json", *(name.split()[0] for name in IDS.values())]]
    assert flux.states([]) == {}
    assert len(commands.calls()) == 1


def test_a_single_job_comes_without_a_list_around_it(commands: Commands) -> None:
    commands.add("flux", (RECORDED / "single.json").read_text())
    assert flux.states([IDS["ok"]])[IDS["ok"]].detail == "COMPLETED"


def test_a_number_counted_anew_is_another_job(commands: Commands) -> None:
    commands.add("flux", JOBS)
    name = IDS["ok"].split()[0] + " saih-y-000"
    assert flux.states([name]) == {name: State("ended", detail="its number is another job's now")}


def test_a_job_is_unknown_only_where_flux_says_so(commands: Commands) -> None:
    commands.add("flux", JOBS, complaint("unknown"))
    states = flux.states([IDS["running"], "4711 saih-x-a", "471 saih-x-b"])
    assert [state.phase for state in states.values()] == ["running", "ended", "queued"]


@pytest.mark.parametrize("output", ["", '{"jobs": [{"id"', "not json"])
def test_while_the_instance_does_not_answer_nothing_has_happened(output: str, commands: Commands) -> None:
    commands.add("flux", output, complaint("unreachable"), 1)
    assert flux.states([IDS["ok"]]) == {IDS["ok"]: State("queued", detail="the instance does not answer")}


def test_submit_passes_on_who_one_is_and_nothing_else(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.add("flux", "ƒ27kHdpT\n", when="batch")
    commands.add("flux", "42496688128\n")
    script = tmp_path / "it's $HOME\n" / "saih-x" / "jobs" / "007" / "job.sh"
    name = job_name(script.parent)
    assert flux.submit(script) == f"42496688128 {name}"
    batch, to_number = commands.calls()
    assert batch[:3] == ["flux", "batch", f"--job-name={name}"]
    assert batch[-1] == str(script)
    assert [word for word in batch if word.startswith("--env")] == [
        "--env-remove=*",
        f"--env=PATH={commands.folder}:/usr/local/bin:/usr/bin:/bin",
        "--env=HOME",
        "--env=USER",
        "--env=LOGNAME",
    ]
    assert to_number == ["flux", "job", "id", "--to=dec", "ƒ27kHdpT"]


def test_a_refused_job_says_why(commands: Commands, tmp_path: Path) -> None:
    commands.add("flux", "", complaint("refused"), 1)
    with pytest.raises(SaihError, match=r"flux batch refused .*job.sh: flux-batch: ERROR: 'nope' is not a valid queue"):
        flux.submit(tmp_path / "s" / "jobs" / "000" / "job.sh")


def test_an_answer_that_is_no_id_is_an_error(commands: Commands, tmp_path: Path) -> None:
    commands.add("flux", "what?\n")
    with pytest.raises(SaihError, match="flux batch answered what"):
        flux.submit(tmp_path / "s" / "jobs" / "000" / "job.sh")


def test_a_missing_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SaihError, match="flux is not on this machine's PATH"):
        flux.states([IDS["ok"]])


def test_a_lost_job_is_found_by_its_name(commands: Commands) -> None:
    home = Path("jobs/x/jobs")
    name = job_name(home / "held")
    commands.add("flux", (RECORDED / "named.json").read_text(), when=f"--name={name}")
    commands.add("flux", (RECORDED / "nobody.json").read_text())
    assert flux.find(home / "held") == f"{IDS['held'].split()[0]} {name}"
    assert flux.find(home / "000") is None
    assert "-a" in commands.calls()[0]


def test_no_answer_is_not_the_answer_that_there_is_no_such_job(commands: Commands) -> None:
    commands.add("flux", "", "flux-jobs: ERROR: Unable to connect to Flux\n", 1)
    with pytest.raises(SaihError, match="flux does not answer"):
        flux.find(Path("jobs/x/jobs/000"))


def test_cancel_is_one_call(commands: Commands) -> None:
    commands.add("flux")
    flux.cancel([])
    flux.cancel(["1 a", "2 b"])
    assert commands.calls() == [["flux", "cancel", "1", "2"]]


def directives(text: str) -> list[str]:
    """What flux batch reads. A later line of this kind, in a folder's name, made a real one refuse the script."""
    comments = text[: text.index("\nset -eu")].splitlines()
    return [line.removeprefix("# flux: ") for line in comments if line.startswith("# flux:")]


def test_what_a_job_asks_for() -> None:
    stated = {"account": "ab1", "partition": "batch", "constraint": "a|b&^c", "exclusive": True}
    site = cpu_site(
        scheduler="flux", nodes=4, device="cuda", threads_per_rank=8, submit=stated | {"extra": ["--setattr=x=#1"]}
    )
    assert directives(jobs.render(replace(a_job(Path("/000")), excluded_nodes=("n3", "n4")), "s", site)) == [
        "--nodes=2",
        "--nslots=8",
        "--cores-per-slot=8",
        "--time-limit=91s",
        "--gpus-per-slot=1",
        "--bank=ab1",
        "--queue=batch",
        "'--requires=(a|b&^c) and -host:n3,n4'",
        "--exclusive",
        "'--setattr=x=#1'",
    ]
    plain = directives(jobs.render(a_job(Path("/000"), nodes=1), "s", cpu_site(scheduler="flux")))
    assert plain == ["--nodes=1", "--nslots=4", "--cores-per-slot=1", "--time-limit=91s"]
    elsewhere = replace(a_job(Path("/000"), nodes=1), excluded_nodes=("n3",))
    assert directives(jobs.render(elsewhere, "s", cpu_site(scheduler="flux")))[4:] == ["--requires=-host:n3"]


@pytest.mark.parametrize("field", ["qos", "reservation", "gres"])
def test_what_flux_has_no_notion_of_is_refused(field: str) -> None:
    site = cpu_site(scheduler="flux", submit={field: "x"})
    with pytest.raises(
        SaihError, match=rf"site test: scheduler flux has no submit.{field}; valid: account, partition, "
    ):
        jobs.render(a_job(Path("/000"), nodes=1), "s", site)


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("flux", 8)])
def test_a_script_runs_what_was_written_and_nothing_else(
    launcher: str, ranks: int, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through bash, in a folder whose name would start other programs, with stand-ins for all that a job calls."""
    folder = tmp_path / 'it\'s a "test" $(touch oops) `touch oops`; touch oops\n# flux: --queue=evil\ntouch oops'
    (folder / "000").mkdir(parents=True)
    monkeypatch.chdir(folder)
    commands.add("flux", "n7\n", when="hostlist")
    commands.add("flux", "ƒ27kHdpT\n", when="getattr")
    commands.add("flux", "42496688128\n", when="id")
    site = cpu_site(
        scheduler="flux", launcher=launcher, nodes=2, environment={"MINE": "$(touch oops)\n'\"; touch oops"}
    )
    text = jobs.render(a_job(folder / "000"), f"s\n# flux: --queue=evil\n{folder}", site)
    assert not [line for line in directives(text) if "evil" in line]
    granted = {"PATH": f"{commands.folder}:/usr/bin:/bin"}
    subprocess.run(["bash"], input=text, cwd="/", env=granted, text=True, check=True)
    *asked, words = commands.calls()
    assert asked == [
        ["flux", "hostlist", "--nth=0", "instance"],
        ["flux", "getattr", "jobid"],
        ["flux", "job", "id", "--to=dec", "ƒ27kHdpT"],
    ]
    assert words[:4] == ["flux", "run", "--nodes=2", f"--ntasks={ranks}"]
    assert words[-3:] == ["-m", "saih.worker", str(folder / "000" / "pack.json")]
    seen = commands.environment()
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"], seen["MINE"]) == ("n7", "28128", "$(touch oops)\n'\"; touch oops")
    assert seen["PWD"] == str(folder)
    assert not list(tmp_path.rglob("oops"))
    assert not Path("/oops").exists()


def test_a_rank_knows_its_place_from_flux_run() -> None:
    told = {"FLUX_TASK_RANK": "5", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_SIZE": "8", "PMI_RANK": "5", "PMI_SIZE": "8"}
    assert launchers.place(told) == Place(5, 1, 8)


@pytest.mark.skipif(shutil.which("flux") is None, reason="optional, in CI too: no flux here to run a real sweep with")
@pytest.mark.parametrize("launcher", ["flux", "torchrun"])
def test_a_sweep_through_a_real_flux(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "here.yaml").write_text(
        f"scheduler: flux\nlauncher: {launcher}\ndevice: cpu\nnodes: 2\ngpus_per_node: 2\nthreads_per_rank: 1\n"
        "node_memory_gib: 4\nenvironment: {MASTER_ADDR: 127.0.0.1}\n"  # both brokers are on this host
    )
    toys = os.pathsep.join([str(Path(__file__).parent / "toys"), os.environ.get("PYTHONPATH", "")])
    words = ["faulty", "--no-probe", "--site=here", "--axis=nodes=1,2", "--set=gpus=2", "--repeat=1"]
    subprocess.run(
        [
            "flux",
            "start",
            "--test-size=2",
            sys.executable,
            "-m",
            "saih.cli",
            "sweep",
            *words,
            "--set=seconds=0,steps=3",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": toys},
        check=True,
    )
    (results,) = tmp_path.glob("results/*.h5")
    points = store.load(results)
    assert set(points["status"]) == {"measured"}
    assert sorted(points["ranks"]) == [2, 4]
