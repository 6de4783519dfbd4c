"""The command line: what it loads, what it prints, and one clear line with exit status 2 for every mistake."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from saih import __version__, cli, discover, site, store
from tests.synthetic import Scenario, make

OWN_MODULES = ("compare", "project", "accept", "bundle", "verify", "export")
"""Verbs that have a module each in saih.verbs."""
VERBS = (
    *("list", "generate", "sweep", "status", "resume", "cancel", "gather", "claims", "report", "probe", "site"),
    *OWN_MODULES,
)
SITE = """\
device: cpu
device_name: Z80
gpus_per_node: 2
threads_per_rank: 1
node_memory_gib: 8
time_budget: 20
repeat: 2
peak: {flop_per_s: {fp32: 1.0e+11}, memory_bytes_per_s: 1.0e+10}
"""
LOADED = """
import contextlib, io, json, sys
from saih import cli
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    status = cli.main(json.loads(sys.argv[1]))
    assert status == 0
assert out.getvalue()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with a site of known size; the command line's signal handler does not outlive the test."""
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "small.yaml").write_text(SITE)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def loaded(*words: str) -> set[str]:
    """Top-level modules in a process that ran these words."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps(words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What these words print; on status 2, their one line on stderr."""
    try:
        found = cli.main(words)
    except SystemExit as stop:
        found = int(stop.code or 0)
    captured = capsys.readouterr()
    assert found == status, captured.err
    if status != 2:
        return captured.out
    assert re.fullmatch(r"saih: [^\n]+\n", captured.err), captured.err
    return captured.err.removeprefix("saih: ").rstrip("\n")


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["--version"]])
def test_help_loads_next_to_nothing(words: list[str]) -> None:
    heavy = {"torch", "numpy", "pandas", "h5py", "matplotlib", "scipy", "jinja2", "yaml", "pydantic", "rich"}
    assert not loaded(*words) & heavy


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--json"],
        ["list", "cosmoflow"],
        ["sweep", "--axis=data,model", "--site=small", "--dry-run"],
        ["status"],
    ],
)
def test_planning_never_loads_torch(words: list[str]) -> None:
    assert not loaded(*words) & {"torch", "matplotlib", "h5py"}


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    overview = " ".join(said(capsys, "--help").split())
    for verb in VERBS:
        home = importlib.import_module(f"saih.verbs.{verb}") if verb in OWN_MODULES else cli
        function = cli.list_ if verb == "list" else getattr(home, verb)
        summary = " ".join(function.__doc__.split())
        assert summary in overview
        help_text = said(capsys, verb, "--help")
        assert summary in " ".join(help_text.split())
        assert verb not in OWN_MODULES or f"example: saih {verb} " in " ".join(help_text.split())
    assert set(re.findall(r"^    ([a-z]+)", said(capsys, "--help"), re.MULTILINE)) == set(VERBS)
    assert said(capsys, "--version") == f"saih {__version__}\n"


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        text = said(capsys, verb, "--help")
        options = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
        assert options
        for option in options:
            name, *explained = option.split(maxsplit=1)
            assert explained or name == "-h", option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("list cosmoflw", "unknown workload 'cosmoflw'; did you mean cosmoflow"),
        ("list --site=smal", "unknown site 'smal'; did you mean small"),
        ("sweep cosmoflw --axis=data", "unknown workload 'cosmoflw'; did you mean cosmoflow"),
        ("sweep --axis=dta", "unknown axis 'dta'; did you mean data"),
        ("sweep --axis=data=33", "unknown rung of axis data '33'"),
        ("sweep --axis=gpus=many", "gpus must be a whole number, not 'many'"),
        ("sweep --axis=gpus=0", "gpus must be at least 1, not 0"),
        ("sweep --axis=width", "name its values: width=A,B"),
        ("sweep --axis=data --set=widht=3", "unknown parameter 'widht'; did you mean width"),
        ("sweep --axis=data --set=seconds=nan", "seconds must be a number, not 'nan'"),
        ("sweep --axis=data --set=width=99999999999999999999", "width must be a whole number"),
        ("sweep --axis=data --site=nowhere", "unknown site 'nowhere'"),
        ("sweep --axis=data --site=sites/no.yaml", "site file sites/no.yaml does not exist"),
        ("sweep", "a sweep needs an axis; cosmoflow has: data, model"),
        ("sweep --axis", "argument --axis: expected one argument; see: saih sweep --help"),
        ("sweep --axis=", "an axis has no name"),
        ("sweep --axis==3", "an axis has no name"),
        ("sweep --axis=data,,model", "an axis has no name"),
        ("sweep --axis=data --axis=data=32", "--axis data is given twice"),
        ("sweep --axis=data --set=width", "write --set NAME=VALUE"),
        ("sweep --axis=data --set=mesh=32", "axis data already sets mesh"),
        ("sweep --axis=data --time-budget=soon", "--time-budget 'soon': write a number of seconds"),
        ("sweep --axis=data --time-budget=", "--time-budget '': write a number of seconds"),
        ("sweep --axis=data --time-budget=-5m", "--time-budget '-5m': write a number of seconds"),
        ("sweep --axis=data --repeat=-1", "argument --repeat: must be a whole number of at least 1, not '-1'"),
        ("sweep --axis=data --repeat=0", "argument --repeat: must be a whole number of at least 1, not '0'"),
        ("sweep --axis=data --repeat=x", "argument --repeat: must be a whole number of at least 1, not 'x'"),
        ("sweep --axis=data --seed=-1", "argument --seed: must be a whole number of at least 0, not '-1'"),
        ("sweep --axis=data --seed=9999999999999999999999", "argument --seed: must be a whole number"),
        ("sweep bad.yaml", "bad.yaml:2: unknown key 'axs'; did you mean axes"),
        ("sweep odd.yaml", "odd.yaml: not valid YAML"),
        ("sweep missing.yaml", "missing.yaml: cannot be read"),
        ("sweep --axis=data=512 --set=width=64 --site=small --no-probe", "no point of this sweep fits"),
        ("status nothing", "unknown sweep 'nothing'; valid: none"),
        ("gather nothing", "unknown sweep 'nothing'; valid: none"),
        ("claims missing.h5", "missing.h5: no such results file"),
        ("report missing.h5", "missing.h5: no such results file"),
        ("claims bad.yaml", "bad.yaml: not a whole HDF5 file"),
        ("report bad.yaml", "bad.yaml: not a whole HDF5 file"),
        ("claims sites", "sites: no such results file"),
        ("probe --site=nowhere", "unknown site 'nowhere'"),
        ("measure", "argument VERB: invalid choice: 'measure'"),
        ("", "the following arguments are required: VERB"),
        ("sweep --axis=data --fast", "unrecognized arguments: --fast"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (workplace / "bad.yaml").write_text("workload: cosmoflow\naxs: {data: }\n")
    (workplace / "odd.yaml").write_text("axes: {data: [32]}\0\n")
    assert message in said(capsys, *words.split(), status=2)
    assert not list(workplace.glob("jobs/*")), "something was started"


@pytest.mark.parametrize("verb", ["claims", "report"])
def test_results_files_that_are_damaged_or_of_another_format(
    workplace: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    with h5py.File("other.h5", "w") as file:
        file.attrs["saih_format"] = 99
        file["x"] = range(10_000)
    with h5py.File("foreign.h5", "w"):
        pass
    whole = (workplace / "other.h5").read_bytes()
    (workplace / "short.h5").write_bytes(whole[: len(whole) // 2])
    (workplace / "empty.h5").write_bytes(b"")
    for name, message in {
        "other.h5": "format 99, this saih reads format 1",
        "foreign.h5": "format None, this saih reads format 1",
        "short.h5": "not a whole HDF5 file",
        "empty.h5": "not a whole HDF5 file",
    }.items():
        assert message in said(capsys, verb, name, status=2)
    assert not list(workplace.glob("reports/*"))


@pytest.mark.parametrize("folder", ["jobs", "results", "reports"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (workplace / folder).write_text("in the way")
    words = ["sweep", "--axis=data=16", "--site=small", "--no-probe"]
    assert f"{workplace / folder}: cannot be written" in said(capsys, *words, status=2)
    assert (workplace / folder).read_text() == "in the way"
    assert not list(workplace.glob("jobs/*"))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"rates": {}}'])
def test_damaged_ceilings_are_named(workplace: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (workplace / "results").mkdir()
    (workplace / "results" / "ceilings-small.json").write_text(content)
    for words in (["list", "--site=small"], ["sweep", "--axis=data=16", "--site=small", "--dry-run"]):
        assert said(capsys, *words, status=2).startswith("results/ceilings-small.json: ")


@pytest.fixture
def results() -> Path:
    """A whole results file; its sweep is jobs/synthetic-sweep."""
    return store.gather(make(Path("jobs"), Scenario(workload="cosmoflow")), Path("results"))


@pytest.mark.parametrize(
    "damage",
    ["no sweep", "broken sweep", "no column", "no columns", "integer environments", "one number"],
)
def test_damage_inside_a_results_file_is_one_line(
    capsys: pytest.CaptureFixture[str], results: Path, damage: str
) -> None:
    said(capsys, "claims", str(results))
    with h5py.File(results, "r+") as file:
        if damage == "no sweep":
            del file.attrs["sweep"]
        elif damage == "broken sweep":
            file.attrs["sweep"] = "{"
        elif damage == "no column":
            del file["points/status"]
        elif damage == "no columns":
            del file["samples"].attrs["columns"]
        elif damage == "one number":
            file["samples/compute_s"][0] = 7.0
        else:
            del file["environments"]
            file["environments"] = [1]
    for verb in ("claims", "report"):
        assert said(capsys, verb, str(results), status=2).startswith(f"{results}: ")


@pytest.mark.parametrize("content", ["{}", "null", "[]", '{"format": 99}', '{"format": 1}', "{"])
@pytest.mark.parametrize("name", ["sweep.json", "measurement.json"])
def test_damaged_records_are_one_line(
    capsys: pytest.CaptureFixture[str], results: Path, name: str, content: str
) -> None:
    victim = next(Path("jobs").rglob(name))
    victim.write_text(content)
    assert said(capsys, "gather", "synthetic-sweep", status=2).startswith(f"{victim}: ")
    if name == "sweep.json":
        assert said(capsys, "status", "synthetic-sweep", status=2).startswith(f"{victim}: ")


@pytest.mark.parametrize("content", ["{}", "null", '{"format": 99}', "{"])
def test_a_damaged_sweep_is_a_line_among_the_others(
    capsys: pytest.CaptureFixture[str], results: Path, content: str
) -> None:
    for name in ("a", "z"):
        make(Path("jobs"), Scenario(), name)
    Path("jobs/synthetic-sweep/sweep.json").write_text(content)
    first, bad, last = said(capsys, "status").splitlines()
    assert first == "a: 4 measured"
    assert bad.startswith("synthetic-sweep: jobs/synthetic-sweep/sweep.json: ")
    assert last == "z: 4 measured"


@pytest.mark.parametrize(
    "name", ["synthetic-sweep", "synthetic-sweep/", "jobs/synthetic-sweep/", "./jobs/synthetic-sweep"]
)
def test_a_sweep_can_be_named_by_its_folder(
    workplace: Path, capsys: pytest.CaptureFixture[str], results: Path, name: str
) -> None:
    assert said(capsys, "gather", name) == "results/synthetic-sweep.h5\n"
    assert said(capsys, "status", str(workplace / "jobs" / "synthetic-sweep")) == "synthetic-sweep: 4 measured\n"


def test_a_page_cannot_take_the_place_of_a_folder(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    Path("pages").mkdir()
    assert said(capsys, "report", str(results), "-o", "pages", status=2) == "pages: is a folder; name a file"
    assert not list(Path("pages").iterdir())


@pytest.mark.parametrize("verb", ["list", "sweep", "status", "resume", "gather", "probe"])
def test_only_what_goes_on_is_told_to_be_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(options: object) -> int:
        raise OSError(28, "No space left on device", "somewhere/a\nb")

    full.__doc__ = "Fails."
    monkeypatch.setattr(cli, "list_" if verb == "list" else verb, full)
    words = [verb, "x"] if verb in ("resume", "gather") else [verb]
    again = "; what was finished is kept, run the same command again" if verb in ("sweep", "resume", "probe") else ""
    assert said(capsys, *words, status=2) == f"somewhere/a b: No space left on device{again}"


def test_a_reader_that_has_seen_enough_is_no_mistake(workplace: Path) -> None:
    """As in `saih list --json | head -1`, where head ends before the first line is written."""
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["list", "--json"], ["list"], ["status"]):
        done = subprocess.run(
            [sys.executable, "-m", "saih.cli", *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    os.close(writing)


def test_names_with_line_breaks_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["list", "a\nb"], ["list", "--site=a\n/b"], ["claims", "a\nb.h5"], ["sweep", "a\nb.yaml"]):
        said(capsys, *words, status=2)


def test_a_mistake_in_a_real_process(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saih.cli", "sweep", "--axis=dta"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("saih: unknown axis 'dta'")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_lists_everything_and_measures_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "--axis=data,model", "--site=small", "--dry-run"]
    text = said(capsys, *words)
    lines = text.splitlines()
    cells = {(data, model) for data in (16, 32, 64, 128, 256, 512) for model in (2, 4, 8, 16, 32, 64)}
    kept = {tuple(map(int, cell)) for cell in re.findall(r"^  data=(\d+) model=w(\d+) .*a step$", text, re.MULTILINE)}
    pruned = re.findall(r"^  pruned data=(\d+) model=w(\d+) +(memory|time|disk): (.+)$", text, re.MULTILINE)
    assert kept | {(int(data), int(model)) for data, model, *_ in pruned} == cells
    assert len(kept) + len(pruned) == len(cells)
    assert kept, "a budget of 20 s keeps something"
    assert {int(data) for data, *_ in pruned} >= {512}
    assert {kind for *_, kind, _ in pruned} >= {"memory", "time"}
    assert all(re.search(r"\d", reason) for *_, reason in pruned)
    assert f"{2 * len(kept)} points ({len(kept)} cells x 2 repeats)" in lines[0]
    assert lines[-1] == "dry run: nothing was started"
    scripts = [Path(line.split()[1]) for line in lines if line.startswith("script")]
    assert scripts
    packed = [point for script in scripts for point in json.loads((script.parent / "pack.json").read_text())["points"]]
    assert len({point["id"] for point in packed}) == len(packed) == 2 * len(kept)
    for script in scripts:
        assert script.read_text().endswith("pack.json\n")
    files = {path.name for path in workplace.rglob("*") if path.is_file()}
    assert files == {"small.yaml", "job.sh", "pack.json"}
    assert said(capsys, *words) == text, "the same command is the same sweep"


def test_list_tells_what_each_rung_costs(capsys: pytest.CaptureFixture[str]) -> None:
    told = {one["name"]: one for one in json.loads(said(capsys, "list", "--json", "--site=small"))}
    assert {"cosmoflow", "ceilings"} <= told.keys()
    cosmoflow = told["cosmoflow"]
    assert [axis["name"] for axis in cosmoflow["axes"]] == ["data", "model"]
    rung = next(rung for rung in cosmoflow["axes"][1]["rungs"] if rung["label"] == "w32")
    assert rung["params"] == {"family": "cosmoflow", "width": 32, "depth": 1}
    assert "vit-h" in {rung["label"] for rung in cosmoflow["axes"][1]["rungs"]} - set(cosmoflow["axes"][1]["usual"])
    assert rung["flop"] > 0
    assert rung["step_s"] > 0
    assert {"nodes", "gpus", "batch", "precision"} <= {each["name"] for each in cosmoflow["parameters"]}
    assert [one["name"] for one in json.loads(said(capsys, "list", "ceilings", "--json"))] == ["ceilings"]
    text = said(capsys, "list", "cosmoflow", "--site=small")
    assert "--axis model alone means w2, w4, w8, w16, w32, w64; any others by name" in text
    assert "--axis data alone" not in text
    assert re.search(r"^ +w32 +.* parameters, .*FLOP a step, .* predicted .* on site small$", text, re.MULTILINE)


def test_status_without_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no sweep yet" in said(capsys, "status")


def test_the_command_is_found_on_the_path() -> None:
    tool = Path(sys.executable).with_name("saih")
    if not tool.exists():
        pytest.skip("saih is not installed here")
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"saih {__version__}\n"


def test_a_site_file_stands_in_its_place_only_if_it_can_be_used(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = ["site", "init", "here", "--scheduler=local", "-o"]
    assert "my site.yaml: a site's name has only letters" in said(capsys, *init, "my site.yaml", status=2)
    monkeypatch.setattr(discover, "render", lambda _: "nodes: none\n")
    assert "nodes: " in said(capsys, *init, "here.yaml", status=2)
    assert not list(workplace.glob("*.yaml"))
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert "wrote here.yaml" in said(capsys, *init, "here.yaml")
    assert site.load("here.yaml").name == "here"
