"""Sites: what a file leaves out is looked up on a machine that the test makes up, and mistakes are named by line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from saih import site
from saih.errors import SaihError
from saih.site import GIB, catalogue_peak, nominal_cpu_peak

CPUINFO = """\
processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model name\t: {name}
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse2 {flags}

processor\t: 1
model name\t: not this one
cpu MHz\t\t: 1.0
"""
Machine = Callable[..., None]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, on a machine without GPUs."""
    home = tmp_path / "home"
    (home / "sites").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return home


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Makes this machine look like another one: its /proc and /sys come from a folder."""
    root = tmp_path / "root"

    def path(*parts: str) -> Path:
        whole = Path(*parts)
        return root / whole.relative_to("/") if whole.parts[1:2] in (("proc",), ("sys",)) else whole

    def pretend(
        cpuinfo: str, cores: int = 8, memory_gib: int = 64, limit: str = "max", base_khz: int | None = None
    ) -> None:
        files = {
            "proc/cpuinfo": cpuinfo,
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": f"{limit}\n",
        }
        if base_khz:
            files["sys/devices/system/cpu/cpu0/cpufreq/base_frequency"] = f"{base_khz}\n"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        site._cpuinfo.cache_clear()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory_gib * 2**18}.__getitem__)

    monkeypatch.setattr(site, "Path", path)
    monkeypatch.setattr(site, "SHIPPED", Path(site.SHIPPED))
    site._cpuinfo.cache_clear()
    yield pretend
    site._cpuinfo.cache_clear()


def cpu(
    flags: str, vendor: str = "GenuineIntel", family: int = 6, mhz: object = 2000.0, name: str = "Xeon(R) 9"
) -> str:
    return CPUINFO.format(flags=flags, vendor=vendor, family=family, mhz=mhz, name=name)


def fake_nvidia_smi(tmp_path: Path, *lines: str, status: int = 0) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    output = "".join(f"echo '{line}'\n" for line in lines)
    tool.write_text(
        f'#!/bin/sh\ncase "$1" in --query-gpu=name,memory.total) ;; *) exit 9 ;; esac\n{output}exit {status}\n'
    )
    tool.chmod(0o755)


def test_the_local_site_is_this_machine(machine: Machine) -> None:
    machine(cpu("avx2 avx512f"), cores=6, memory_gib=48)
    local = site.load("local")
    assert (local.name, local.scheduler, local.launcher, local.device) == ("local", "local", "torchrun", "cpu")
    assert (local.nodes, local.gpus_per_node, local.threads_per_rank) == (1, 6, 1)
    assert (local.node_memory_gib, local.device_memory_gib) == (48, 8)
    assert local.device_name == "Xeon(R) 9"
    assert local.repeat == 3
    assert local.environment["MALLOC_TRIM_THRESHOLD_"] == "-1"
    assert local.peak.flop_per_s == {"fp32": 2e9 * 64}


@pytest.mark.parametrize(("limit", "gib"), [("max", 64), (str(10 * GIB), 10), (str(2**62), 64), ("", 64)])
def test_a_control_group_may_allow_less_memory(machine: Machine, limit: str, gib: int) -> None:
    machine(cpu("avx2"), memory_gib=64, limit=limit)
    assert site.memory_bytes() == gib * GIB


def test_an_older_control_group_may_allow_less_memory(machine: Machine, tmp_path: Path) -> None:
    machine(cpu("avx2"), memory_gib=64)
    (tmp_path / "root/proc/self/cgroup").write_text("5:cpu:/\n4:memory:/slurm/job_7\n")
    limit = tmp_path / "root/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes"
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{3 * GIB}\n")
    assert site.memory_bytes() == 3 * GIB


def test_a_driver_that_fails_is_not_a_machine_without_gpus(machine: Machine, tmp_path: Path) -> None:
    machine(cpu("avx2"))
    fake_nvidia_smi(tmp_path, "Failed to initialize NVML: Driver/library version mismatch", status=18)
    with pytest.raises(SaihError, match=r"nvidia-smi fails here .*version mismatch.*CUDA_VISIBLE_DEVICES="):
        site.load("local")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_are_not_asked_for(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    machine(cpu("avx2"))
    fake_nvidia_smi(tmp_path, "broken", status=18)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert site.load("local").device == "cpu"


def test_one_machine_is_not_several_nodes(machine: Machine, workplace: Path) -> None:
    machine(cpu("avx2"))
    (workplace / "sites" / "two.yaml").write_text("nodes: 2\n")
    with pytest.raises(SaihError, match="scheduler local has this one machine, not 2 nodes"):
        site.load("two")


def test_what_a_file_states_is_not_looked_up(machine: Machine, workplace: Path) -> None:
    machine(cpu("avx2"), cores=8, memory_gib=64)
    (workplace / "sites" / "two.yaml").write_text("gpus_per_node: 2\nnode_memory_gib: 10\ndevice_name: Z80\n")
    two = site.load("two")
    assert (two.gpus_per_node, two.threads_per_rank) == (2, 4)
    assert (two.node_memory_gib, two.device_memory_gib, two.device_name) == (10, 5, "Z80")
    assert two.peak.flop_per_s == {"fp32": 4 * 2e9 * 32}


@pytest.mark.parametrize(
    ("info", "threads", "peak"),
    [
        (cpu("avx2"), 4, {"fp32": 4 * 2e9 * 32}),
        (cpu("avx2 avx512f"), 1, {"fp32": 2e9 * 64}),
        (cpu("avx2 avx512f avx512_bf16"), 1, {"fp32": 2e9 * 64, "bf16": 2e9 * 128}),
        (cpu("avx2 avx512f avx512_bf16 amx_bf16", mhz=2500), 2, {"fp32": 5e9 * 64, "bf16": 5e9 * 2048}),
        # Zen 4 (family 25) splits 512-bit operations in two; Zen 5 (26) does not
        (cpu("avx2 avx512f avx512_bf16", "AuthenticAMD", 25), 1, {"fp32": 2e9 * 32, "bf16": 2e9 * 64}),
        (cpu("avx2 avx512f avx512_bf16", "AuthenticAMD", 26), 1, {"fp32": 2e9 * 64, "bf16": 2e9 * 128}),
    ],
)
def test_nominal_peak_of_a_processor(machine: Machine, info: str, threads: int, peak: dict[str, float]) -> None:
    machine(info)
    found = nominal_cpu_peak(threads)
    assert found.flop_per_s == peak
    assert found.source.startswith(f"nominal: {threads} core")
    assert "no boost" in found.source


def test_the_stated_base_clock_counts_not_the_present_one(machine: Machine) -> None:
    machine(cpu("avx2", mhz=3900.0), base_khz=2400000)
    assert nominal_cpu_peak(1).flop_per_s == {"fp32": 2.4e9 * 32}


@pytest.mark.parametrize("info", ["", cpu("sse4_2"), "processor : 0\nBogoMIPS : 50\nFeatures : fp asimd sve\n"])
def test_an_unknown_processor_has_no_peak(machine: Machine, info: str) -> None:
    machine(info)
    assert nominal_cpu_peak(4).flop_per_s == {}
    assert "unknown processor" in nominal_cpu_peak(4).source
    assert site.load("local").peak.memory_bytes_per_s is None


@pytest.mark.parametrize(
    ("part", "fp32", "bf16", "memory", "source"),
    [
        ("NVIDIA H200", 67e12, 989.4e12, 4.8e12, "H200"),
        ("NVIDIA H100 80GB HBM3", 67e12, 989.4e12, 3.35e12, "H100 SXM"),
        ("NVIDIA H100 PCIe", 51.2e12, 756.5e12, 2.0e12, "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12, 2.039e12, "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", 19.5e12, 312e12, 1.555e12, "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", 19.5e12, 312e12, 1.555e12, "A100 40GB"),
        ("Tesla V100-SXM2-16GB", 15.7e12, None, 0.9e12, "V100"),
    ],
)
def test_catalogue(part: str, fp32: float, bf16: float | None, memory: float, source: str) -> None:
    peak = catalogue_peak(part)
    assert (peak.flop_per_s["fp32"], peak.flop_per_s.get("bf16"), peak.memory_bytes_per_s) == (fp32, bf16, memory)
    assert source in peak.source


@pytest.mark.parametrize("part", ["NVIDIA GeForce RTX 4090", "NVIDIA GH200 480GB", "AMD Instinct MI300X", "", "H2000"])
def test_a_part_that_is_not_in_the_catalogue(part: str) -> None:
    peak = catalogue_peak(part)
    assert peak.flop_per_s == {}
    assert peak.memory_bytes_per_s is None
    assert "not in the catalogue; state peak in the site file" in peak.source


def test_gpus_make_a_cuda_site(machine: Machine, tmp_path: Path) -> None:
    machine(cpu("avx2"), cores=16)
    fake_nvidia_smi(tmp_path, "NVIDIA A100-SXM4-80GB, 81920", "NVIDIA A100-SXM4-80GB, 81920")
    local = site.load("local")
    assert (local.device, local.device_name) == ("cuda", "NVIDIA A100-SXM4-80GB")
    assert (local.gpus_per_node, local.threads_per_rank, local.device_memory_gib) == (2, 8, 80)
    assert local.node_memory_gib == 64
    assert local.peak.flop_per_s["bf16"] == 312e12


def test_a_site_file_can_insist_on_the_processor(machine: Machine, tmp_path: Path, workplace: Path) -> None:
    machine(cpu("avx2"))
    fake_nvidia_smi(tmp_path, "NVIDIA H200, 143771")
    (workplace / "sites" / "cpu.yaml").write_text("device: cpu\n")
    assert (site.load("cpu").device, site.load("cpu").device_name) == ("cpu", "Xeon(R) 9")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["No devices were found"], 0),
        ([], 0),
        (["NVIDIA GB10, [N/A]"], 0),
    ],
)
def test_without_a_usable_gpu_the_site_is_a_processor(
    machine: Machine, tmp_path: Path, lines: list[str], status: int
) -> None:
    machine(cpu("avx2"))
    fake_nvidia_smi(tmp_path, *lines, status=status)
    assert site.find_gpus() == []
    assert site.load("local").device == "cpu"


def test_a_cuda_site_is_described_where_no_gpu_is_visible(machine: Machine, workplace: Path) -> None:
    machine(cpu("avx2"))
    cluster = workplace / "sites" / "cluster.yaml"
    cluster.write_text("device: cuda\n")
    with pytest.raises(SaihError, match=r"sites/cluster\.yaml: .*gpus_per_node and device_memory_gib must be stated"):
        site.load("cluster")
    cluster.write_text("device: cuda\ngpus_per_node: 4\ndevice_memory_gib: 80\nnode_memory_gib: 512\n")
    assert "not in the catalogue" in site.load("cluster").peak.source
    cluster.write_text(cluster.read_text() + "device_name: NVIDIA H100 80GB HBM3\n")
    assert site.load("cluster").peak.memory_bytes_per_s == 3.35e12


def test_a_stated_peak_wins(machine: Machine, tmp_path: Path, workplace: Path) -> None:
    machine(cpu("avx2"))
    fake_nvidia_smi(tmp_path, "NVIDIA H200, 143771")
    (workplace / "sites" / "own.yaml").write_text("peak:\n  flop_per_s: {bf16: 5.0e+14}\n  source: measured by us\n")
    assert site.load("own").peak.flop_per_s == {"bf16": 5e14}


def test_a_users_own_site_wins(machine: Machine, workplace: Path) -> None:
    machine(cpu("avx2"))
    (workplace / "sites" / "local.yaml").write_text("description: mine\nrepeat: 7\n")
    (workplace / "elsewhere.yaml").write_text("description: by path\n")
    assert (site.load("local").description, site.load("local").repeat) == ("mine", 7)
    assert site.load("elsewhere.yaml").description == "by path"
    assert site.load("./elsewhere.yaml").name == "elsewhere"
    assert site.names() == sorted({"local"} | {path.stem for path in site.SHIPPED.glob("*.yaml")})


def test_an_unknown_site_comes_with_those_there_are(workplace: Path) -> None:
    (workplace / "sites" / "juwels.yaml").write_text("{}\n")
    with pytest.raises(SaihError, match=r"unknown site 'jewels'; did you mean juwels\? valid: juwels, .*local"):
        site.load("jewels")
    with pytest.raises(SaihError, match=r"site file sites/nowhere\.yaml does not exist"):
        site.load("sites/nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: 1\ngpu_per_node: 2\n", r":2: unknown key 'gpu_per_node'; did you mean gpus_per_node"),
        ("nodes: many\n", r":1: nodes: .* valid integer.*, not 'many'"),
        ("\nnodes: 0\n", r":2: nodes: .*greater than 0, not 0"),
        ("device: tpu\n", r":1: device: .*'auto', 'cpu' or 'cuda', not 'tpu'"),
        ("node_memory_gib: -4\n", r":1: node_memory_gib: .*greater than 0"),
        ("peak:\n  flops: {fp32: 1.0}\n", r":2: unknown key 'flops'; did you mean flop_per_s"),
        ("peak:\n  flop_per_s: {fp32: 0}\n", r":2: peak\.flop_per_s\.fp32: .*greater than 0"),
        ("peak:\n  flop_per_s:\n    fp32: fast\n", r":3: peak\.flop_per_s\.fp32: .*valid number.*, not 'fast'"),
        ("environment:\n  A: [1]\n", r":2: environment\.A: .*valid string"),
        ("environment:\n  A: x\n  B C: x\n", r":3: environment\.B C: .*A-Za-z_.*'B C'"),
        ("environment:\n  A;touch oops: x\n", r":2: environment\.A;touch oops: "),
        ("environment:\n  2A: x\n", r":2: environment\.2A: "),
        ('environment:\n  "A\\n": x\n', r":2: environment\.A\n: "),
        ("setup: module load gcc\n", r":1: setup: .*valid list"),
        ("a: b: c\n", r":1: not valid YAML"),
        ("# nothing\n", r": must be a mapping of keys; valid: description, scheduler"),
    ],
)
def test_a_mistake_in_a_site_file_is_named_with_its_line(workplace: Path, text: str, message: str) -> None:
    (workplace / "sites" / "bad.yaml").write_text(text)
    with pytest.raises(SaihError, match=rf"^sites/bad\.yaml{message}"):
        site.load("bad")


def test_numbers_can_be_environment_values(machine: Machine, workplace: Path) -> None:
    machine(cpu("avx2"))
    (workplace / "sites" / "env.yaml").write_text("environment: {OMP_PROC_BIND: close, N: 1}\ndefaults: {batch: 4}\n")
    assert site.load("env").environment == {"OMP_PROC_BIND": "close", "N": "1"}
    assert site.load("env").defaults == {"batch": 4}
    assert type(site.load("env").defaults["batch"]) is int


def test_a_site_name_is_a_plain_word(workplace: Path) -> None:
    for name in ("my site.yaml", "-x.yaml", "a;b.yaml"):
        (workplace / name).write_text("{}\n")
        with pytest.raises(SaihError, match=r"only letters, digits and \. - _; rename the file"):
            site.load(f"./{name}")
