"""What commands print becomes a site file that loads, on machines of every kind; and the sites that are shipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saih import cli, discover, plan, site
from saih import sweep as language
from saih.errors import SaihError

SINFO = """\
cpu*|up|infinite|100|1-infinite|2|64|2|512000|(null)
gpu|up|1-00:00:00|10|1-8|2|32|2|512000+|gpu:a100:4(S:0-1),nvme:1
gpu|up|1-00:00:00|2|1-8|2|32|2|1024000|gpu:a100:8(S:0-1)
big|up|2:00:00|5|1-infinite|1|72|1|480000|gpu:gh200:4
old|down|30:00|500|1-infinite|2|20|1|190000|gpu:tesla_v100-sxm2-32gb:4
slurm_load_partitions: nonsense
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine whose commands print this; one that is not named is missing."""
    answers: dict[str, str] = {}
    monkeypatch.setattr(discover, "_ask", lambda *words: answers.get(" ".join(words[:2]), answers.get(words[0], "")))
    monkeypatch.setattr(site, "find_gpus", lambda: [])
    return answers


def slurm(machine: dict[str, str], sinfo: str = SINFO) -> None:
    machine["sinfo"] = sinfo
    machine["scontrol show"] = "ClusterName             = delta\nDefMemPerCPU            = 2000\n"
    machine["srun"] = (
        "MPI plugin types are...\n\tnone\n\tpmix\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n"
    )


def written(folder: Path, found: discover.Discovery) -> site.Site:
    path = folder / f"{found.name}.yaml"
    path.write_text(discover.render(found))
    return site.load(str(path))


def test_the_partition_with_gpus_is_described(machine: dict[str, str], tmp_path: Path) -> None:
    slurm(machine)
    found = discover.look(None, None, None)
    described = written(tmp_path, found)
    assert (described.name, described.scheduler, described.submit.partition) == ("delta", "slurm", "gpu")
    assert (described.nodes, described.gpus_per_node, described.threads_per_rank) == (8, 4, 16)
    assert (described.device, described.device_name, described.device_memory_gib) == ("cuda", "NVIDIA A100", 40)
    assert (described.node_memory_gib, described.job_minutes) == (500, 120)
    assert described.peak.flop_per_s["bf16"] == 312e12
    assert described.submit.extra == ("--mem=0",)
    text = discover.render(found)
    assert all("#" in line or line.endswith(":") for line in text.splitlines())
    assert "a guess to check" in re.search("^device_memory_gib.*", text, re.MULTILINE)[0]  # type: ignore[index]


def test_another_partition_on_demand(machine: dict[str, str], tmp_path: Path) -> None:
    slurm(machine)
    old = written(tmp_path, discover.look("v", None, "old"))
    assert (old.name, old.device_name, old.job_minutes) == ("v", "NVIDIA V100 SXM2 32GB", 30)
    assert old.device_memory_gib == 32
    with pytest.raises(SaihError, match=r"unknown partition 'gpus'; did you mean gpu or cpu\?"):
        discover.look(None, None, "gpus")


def test_a_gpu_whose_memory_is_not_known_is_to_be_filled_in(machine: dict[str, str], tmp_path: Path) -> None:
    slurm(machine)
    found = discover.look(None, None, "big")
    assert written(tmp_path, found).device == "cpu"
    assert "gh200" in found.to_do[0]
    filled_in = re.sub(
        r"^(device|gpus_per_node|threads_per_rank): .*\n", "", discover.render(found), flags=re.MULTILINE
    )
    for key, value in {"device": "cuda", "gpus_per_node": 4, "threads_per_rank": 18, "device_memory_gib": 96}.items():
        filled_in = re.sub(rf"^# {key}: .*", f"{key}: {value}", filled_in, flags=re.MULTILINE)
    path = tmp_path / "filled.yaml"
    path.write_text(filled_in)
    assert site.load(str(path)).gpus_per_node == 4


def test_without_a_scheduler_the_machine_is_described(
    machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = written(tmp_path, discover.look("here", None, None))
    assert (local.scheduler, local.device) == ("local", "cpu")
    assert local.environment == site.load("local").environment
    monkeypatch.setattr(site, "find_gpus", lambda: [("NVIDIA H200", 143771 * 2.0**20)] * 2)
    local = written(tmp_path, discover.look("gpus", None, None))
    assert (local.device, local.gpus_per_node, local.device_memory_gib) == ("cuda", 2, 140.4)


@pytest.mark.parametrize(("command", "name"), [("sinfo", "slurm"), ("qstat", "pbs"), ("flux", "flux")])
def test_the_scheduler_that_answers_is_the_one(machine: dict[str, str], command: str, name: str) -> None:
    assert discover.find_scheduler() == "local"
    machine[command] = "something"
    assert discover.find_scheduler() == name


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("(null)", (0, "")),
        ("gpu:4", (4, "")),
        ("gpu:a100:4(S:0-1)", (4, "a100")),
        ("nvme:1,gpu:h100:8(S:0-1,3)", (8, "h100")),
        ("gpu:a100:2,gpu:a100_1g.5gb:14", (14, "a100_1g.5gb")),
        ("gpu", (0, "")),
    ],
)
def test_gres(text: str, gpus: tuple[int, str]) -> None:
    assert discover.parse_gres(text) == gpus


@pytest.mark.parametrize(
    ("gres", "name", "memory"),
    [
        ("a100", "NVIDIA A100", 40),
        ("nvidia_a100-sxm4-80gb", "NVIDIA A100 SXM4 80GB", 80),
        ("nvidia_h100_80gb_hbm3", "NVIDIA H100 80GB HBM3", 79),
        ("H200", "NVIDIA H200", 140),
        ("a100_3g.20gb", "", None),
        ("sim", "NVIDIA SIM", None),
        ("", "", None),
    ],
)
def test_gpu_types_become_parts(gres: str, name: str, memory: float | None) -> None:
    assert discover.gpu_name(gres) == name
    assert site.catalogue_memory_gib(name) == memory


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = days * 1440 + hours * 60 + minutes + seconds / 60
    assert discover.parse_minutes(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == (total or None)
    assert discover.parse_minutes("infinite") is None


@pytest.mark.parametrize(
    ("version", "flavour", "mpi"),
    [
        ("HYDRA build details:\n    Version:    5.0.2", "MPICH", "pmi2"),
        ("mpiexec (OpenRTE) 4.1.4", "Open MPI", "pmix"),
        ("mpirun (Open MPI) 5.0.3", "Open MPI", "pmix"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "Intel MPI", "pmi2"),
        ("mpiexec for PALS 1.2", "Cray MPICH", "pmi2"),
        ("", "", ""),
    ],
)
def test_mpi_flavours(version: str, flavour: str, mpi: str) -> None:
    assert discover.mpi_flavour(version) == flavour
    assert discover.suitable_mpi(flavour, ["pmi2", "pmix"]) == mpi
    assert discover.suitable_mpi(flavour, []) == ""


@given(st.text(), st.text())
def test_whatever_a_machine_says_is_safe_in_the_file(value: str, source: str) -> None:
    found = discover.Discovery(
        "x", [discover.Line("description", value, source), discover.Line("python", None, source)]
    )
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        return
    assert yaml.safe_load(discover.render(found)) == {"description": value}


# ------------------------------------------------------------------------------------------------- shipped sites

DOCUMENTED = {
    "local": [],
    "slurm-gpu": ["--account=YOUR_ACCOUNT", "--partition=YOUR_PARTITION", "--exclusive", "--gpus-per-node=4"],
    "leonardo-booster": ["--account=YOUR_ACCOUNT", "--partition=boost_usr_prod", "--gpus-per-node=4", "--mem=0"],
    "perlmutter-gpu": ["--account=YOUR_ACCOUNT", "--constraint=gpu", "--qos=regular", "--gpus-per-node=4"],
}
"""Options of sbatch that the pages named in each file ask for."""


@pytest.mark.parametrize("name", sorted(path.stem for path in site.SHIPPED.glob("*.yaml")))
def test_shipped_sites_plan_and_ask_for_what_the_centre_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    batch = site.load(name).scheduler != "local"
    words = ["--axis", "nodes=1,2"] if batch else ["--axis", "data=16"]
    assert cli.main(["sweep", *words, "--site", name, "--dry-run"]) == 0
    scripts = sorted(tmp_path.glob("jobs/*/dry-run/*/job.sh"))
    assert len(scripts) >= (2 if batch else 1)
    for option in DOCUMENTED[name] if batch else []:
        for script in scripts:
            assert f"#SBATCH {option}\n" in script.read_text()


def test_every_key_there_is_is_explained_in_the_generic_site() -> None:
    text = (site.SHIPPED / "slurm-gpu.yaml").read_text()
    for key in set(site.SiteFile.model_fields) - {"peak"}:
        assert re.search(rf"^(# )?{key}:", text, re.MULTILINE), key
    for key in site.Submission.model_fields:
        assert re.search(rf"^  (# )?{key}:", text, re.MULTILINE), key


def test_the_smoke_test_fits_every_shipped_site() -> None:
    for path in site.SHIPPED.glob("*.yaml"):
        place = site.load(path.stem)
        shapes: list[language.Scalar] = ["1x1", "2x2"] if place.nodes > 1 else ["1x1"]
        asked = language.make_sweep("smoke", {"shape": shapes}, {}, site=place.name)
        grid = language.points(asked, place.defaults)
        assert not plan.make_plan(asked, "smoke", grid, place, None, Path()).pruned
