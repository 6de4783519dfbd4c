"""PBS: what a real one printed (tests/recorded) becomes states, and jobs ask for what the site says."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from saih import jobs
from saih.core import COMMON, Job, Point
from saih.errors import SaihError
from saih.schedulers import State, job_name, pbs
from tests.commands import Commands
from tests.sites import cpu_site

RECORDED = Path(__file__).parent / "recorded" / "pbs"
QSTAT = (RECORDED / "qstat.txt").read_text()
NAMES = (
    *("ok", "late", "cancelled", "held", "never-started", "fails", "killed"),
    *("too-big", "lost", "requeued", "preempted", "running"),
)
NUMBERS = (*range(49, 60), 61)
IDS = {name: f"{number}.pbs0 saih-x-{name}" for number, name in zip(NUMBERS, NAMES, strict=True)}
RAN = "Job run at Mon Nov 23 at 09:16 on"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "commands")
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made


@pytest.fixture
def qstat(commands: Commands) -> Commands:
    commands.add("qstat", QSTAT)
    return commands


def complaint(name: str) -> str:
    return (RECORDED / f"{name}.stderr").read_text()


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("ok", State("ended", "", f"exit status 0: {RAN} (n1:ncpus=1)+(n2:ncpus=1) and finished", ("n1", "n2"))),
        (
            "late",
            State("ended", "timeout", f"exit status -29: {RAN} (n1:ncpus=1) and exceeded resource walltime", ("n1",)),
        ),
        (
            "cancelled",
            State("ended", "cancelled", f"exit status 0: {RAN} (n1:ncpus=1) and terminated by root@pbs0", ("n1",)),
        ),
        ("held", State("queued", detail="H")),
        ("never-started", State("ended", "cancelled", "exit status none: ")),
        ("fails", State("ended", "", f"exit status 3: {RAN} (n2:ncpus=1) and failed", ("n2",))),
        ("killed", State("ended", "", f"exit status 137: {RAN} (n2:ncpus=1) and failed", ("n2",))),
        ("too-big", State("queued", detail="Can Never Run: Not enough total nodes available")),
        ("lost", State("ended", "node-fail", f"exit status -20: {RAN} (n4:ncpus=1)", ("n4",))),
        ("requeued", State("queued", detail="Not Running: Insufficient amount of resource: host")),
        (
            "preempted",
            State("ended", "preempted", f"exit status 0: {RAN} (n3:ncpus=2) and terminated by Scheduler@pbs0", ("n3",)),
        ),
        ("running", State("running", detail="running", nodes=("n1", "n2"))),
    ],
)
def test_what_qstat_said_of_real_jobs(name: str, state: State, qstat: Commands) -> None:
    assert pbs.states([IDS[name]]) == {IDS[name]: state}


def test_states_of_many_are_one_call(qstat: Commands) -> None:
    assert list(pbs.states(list(IDS.values()))) == list(IDS.values())
    assert qstat.calls() == [["qstat", "-x", "-f", *(f"{number}.pbs0" for number in NUMBERS)]]
    assert pbs.states([]) == {}
    assert len(qstat.calls()) == 1


@pytest.mark.parametrize(
    ("attributes", "cause"),
    [
        ({"Exit_status": "-27"}, "out-of-memory"),
        ({"Exit_status": "-30"}, "node-fail"),
        ({"Exit_status": "-3"}, "boot-fail"),
        (
            {"Exit_status": "271", "Resource_List.walltime": "00:02:00", "resources_used.walltime": "00:02:32"},
            "timeout",
        ),
        ({"Exit_status": "271", "Resource_List.walltime": "01:00:00", "resources_used.walltime": "00:02:32"}, ""),
        ({"Exit_status": "0", "Resource_List.walltime": "00:02:00", "resources_used.walltime": "00:02:03"}, ""),
        ({"Exit_status": "1"}, ""),
        ({"Exit_status": "271", "substate": "91"}, "cancelled"),
    ],
)
def test_ends_that_could_not_be_recorded(attributes: dict[str, str], cause: str) -> None:
    assert pbs.state_of({"job_state": "F", "substate": "93", "exec_host": "n1/0*2+n2/0*2"} | attributes).cause == cause


def test_a_number_counted_anew_is_another_job(qstat: Commands) -> None:
    name = "49.pbs0 saih-y-000"
    assert pbs.states([name]) == {name: State("ended", detail="its number is another job's now")}


def test_a_job_is_unknown_only_where_qstat_says_so(commands: Commands) -> None:
    commands.add("qstat", QSTAT, complaint("unknown"), 153)
    states = pbs.states([IDS["running"], "99999.pbs0 saih-x-a", "9999.pbs0 saih-x-b"])
    assert [state.phase for state in states.values()] == ["running", "ended", "queued"]


@pytest.mark.parametrize("output", ["", "Job Id: 49.pbs0\n    Job_Na", "\x00\x01", "{not json"])
def test_while_the_server_does_not_answer_nothing_has_happened(output: str, commands: Commands) -> None:
    commands.add("qstat", output, complaint("unreachable"), 255)
    assert pbs.states([IDS["running"]])[IDS["running"]].phase != "running"
    assert pbs.states([IDS["late"]]) == {IDS["late"]: State("queued", detail="the server does not answer")}


def test_without_history_an_end_is_what_qstat_says_of_it(commands: Commands) -> None:
    commands.add("qstat", "", complaint("no-history"), when="-x")
    commands.add("qstat", QSTAT.replace("Job Id: 49.pbs0", "Job Id: 1.pbs0"), complaint("finished"), 35)
    states = pbs.states([IDS["ok"], IDS["held"]])
    assert states == {
        IDS["ok"]: State("ended", detail="forgotten by the scheduler"),
        IDS["held"]: State("queued", detail="H"),
    }
    assert [words[1] for words in commands.calls()] == ["-x", "-f"]


def test_submit(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("qsub", "61.pbs0\n")
    script = tmp_path / "it's $HOME\n" / "saih-x" / "jobs" / "007" / "job.sh"
    name = job_name(script.parent)
    assert pbs.submit(script) == f"61.pbs0 {name}"
    assert commands.calls() == [["qsub", "-C", "#PBS", "-N", name, str(script)]]
    assert commands.environment()["PWD"] == "/"  # noqa: S105 (a folder)


@pytest.mark.parametrize(("output", "status"), [("", 170), ("61.pbs0\n", 1), ("what?\n", 0), ("", 0)])
def test_a_refused_job_says_why(output: str, status: int, commands: Commands, tmp_path: Path) -> None:
    commands.add("qsub", output, "qsub: Unknown queue\n", status)
    with pytest.raises(SaihError, match=r"qsub refused .*000/job.sh: qsub: Unknown queue"):
        pbs.submit(tmp_path / "s" / "jobs" / "000" / "job.sh")


def test_a_missing_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SaihError, match="qstat is not on this machine's PATH"):
        pbs.states([IDS["ok"]])


def test_a_lost_job_is_found_by_its_name(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "me")
    home = Path("jobs/x/jobs")
    name = job_name(home / "held")
    commands.add("qselect", "9.pbs0\n" + (RECORDED / "qselect.txt").read_text(), when=name)
    commands.add("qselect", "")
    assert pbs.find(home / "held") == f"52.pbs0 {name}"
    assert pbs.find(home / "000") is None
    assert commands.calls()[0] == ["qselect", "-x", "-u", "me", "-N", name]


def test_no_answer_is_not_the_answer_that_there_is_no_such_job(commands: Commands) -> None:
    commands.add("qselect", "", (RECORDED / "unreachable.stderr").read_text(), 1)
    with pytest.raises(SaihError, match="qselect does not answer"):
        pbs.find(Path("jobs/x/jobs/000"))


def test_cancel_is_one_call(commands: Commands) -> None:
    commands.add("qdel")
    pbs.cancel([])
    pbs.cancel(["1.pbs0 a", "2.pbs0 b"])
    assert commands.calls() == [["qdel", "1.pbs0", "2.pbs0"]]


def a_job(folder: Path, nodes: int = 2) -> Job:
    known = {parameter.name: parameter.default for parameter in COMMON} | {"nodes": nodes, "gpus": 4}
    return Job(str(folder), "000", (Point("toy", known),), nodes, 4, 90.2)


def directives(text: str) -> list[str]:
    """What qsub reads: up to the first line that is no comment. A real one took no notice of a later `#PBS -q evil`."""
    comments = text[: text.index("\nset -eu")].splitlines()
    return [line.removeprefix("#PBS ") for line in comments if line.startswith("#PBS")]


def test_what_a_job_asks_for() -> None:
    stated = {"account": "ab1", "partition": "R77", "constraint": "cpu=milan", "gres": "mem=64gb:fs=1"}
    site = cpu_site(
        scheduler="pbs",
        nodes=4,
        device="cuda",
        threads_per_rank=8,
        submit=stated | {"exclusive": True, "extra": ["-mn"]},
    )
    text = jobs.render(replace(a_job(Path("/000")), excluded_nodes=("n3",)), "s", site)
    assert directives(text) == [
        "-S /bin/bash",
        "-l select=2:ncpus=32:mpiprocs=4:ompthreads=8:ngpus=4:cpu=milan:mem=64gb:fs=1",
        "-l place=scatter:exclhost",
        "-l walltime=91",
        "-j oe",
        "-o /dev/null",
        "-r y",
        "-A ab1",
        "-q R77",
        "-mn",
    ]
    assert "# PBS cannot be told to leave out n3" in text
    plain = directives(jobs.render(a_job(Path("/000"), nodes=1), "s", cpu_site(scheduler="pbs")))
    assert plain[1:3] == ["-l select=1:ncpus=4:mpiprocs=4:ompthreads=1", "-l place=scatter"]
    assert len(plain) == 7


@pytest.mark.parametrize("field", ["qos", "reservation"])
def test_what_pbs_has_no_notion_of_is_refused(field: str) -> None:
    site = cpu_site(scheduler="pbs", submit={field: "x"})
    with pytest.raises(
        SaihError, match=rf"site test: scheduler pbs has no submit.{field}; valid: account, partition, "
    ):
        jobs.render(a_job(Path("/000"), nodes=1), "s", site)


@pytest.mark.parametrize(
    ("launcher", "started"), [("torchrun", ["-n", "2", "-ppn", "1"]), ("mpiexec", ["-n", "8", "-ppn", "4"])]
)
def test_a_script_runs_what_was_written_and_nothing_else(
    launcher: str, started: list[str], commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through bash, in a folder whose name would start other programs, with stand-ins for all that a job calls."""
    folder = tmp_path / 'it\'s a "test" $(touch oops) `touch oops`; touch oops\n#PBS -q evil\ntouch oops'
    folder.mkdir()
    (folder / "000").mkdir()
    monkeypatch.chdir(folder)
    commands.add("mpiexec")
    monkeypatch.setattr("saih.launchers._mpiexec", lambda of_open_mpi: "mpiexec")
    nodes = tmp_path / "nodes"
    nodes.write_text("n7\nn7\nn9\nn9\n")
    site = cpu_site(scheduler="pbs", launcher=launcher, nodes=2, environment={"MINE": "$(touch oops)\n'\"; touch oops"})
    text = jobs.render(a_job(folder / "000"), f"s\n#PBS -q evil\n{folder}", site)
    assert not [line for line in directives(text) if "evil" in line]
    granted = {"PATH": f"{commands.folder}:/usr/bin:/bin", "PBS_NODEFILE": str(nodes), "PBS_JOBID": "41007.pbs0"}
    subprocess.run(["bash"], input=text, cwd="/", env=granted, text=True, check=True)
    (words,) = commands.calls()
    assert words[1:5] == started
    assert words[-3:] == ["-m", "saih.worker", str(folder / "000" / "pack.json")]
    seen = commands.environment()
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"], seen["MINE"]) == ("n7", "21007", "$(touch oops)\n'\"; touch oops")
    assert seen["PWD"] == str(folder)
    assert not list(tmp_path.rglob("oops"))
    assert not Path("/oops").exists()
