"""Imports point down only, planning never needs torch, the worker little else, and importing anything does nothing."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("saih.errors", "saih.lifeline", "saih.last_words"),
    ("saih.files", "saih.load", "saih.energy"),
    ("saih.core",),
    ("saih.launchers", "saih.workload", "saih.timing", "saih.environment", "saih.yamlfile", "saih.schedulers"),
    ("saih.site", "saih.sweep", "saih.mpi", "saih.weights"),
    ("saih.analysis", "saih.plan"),
    ("saih.catalogue", "saih.dataset", "saih.probe", "saih.refine", "saih.discover"),
    ("saih.jobs",),
    ("saih.power",),
    ("saih.drive", "saih.store"),
    ("saih.check",),
    ("saih.report", "saih.live", "saih.text"),
    ("saih.export",),
    ("saih.bundle",),
    ("saih.verbs",),
    ("saih.cli",),
)
"""From the bottom up: a module imports from layers below its own, and from its own package. A new one goes here."""

WORKER = {"saih.worker"}
WORKER_MAY_USE = {
    "saih.workload",
    "saih.timing",
    "saih.environment",
    "saih.launchers",
    "saih.load",
    "saih.energy",
    "saih.lifeline",
    "saih.last_words",
    "saih.core",
    "saih.files",
    "saih.errors",
}
WORKLOADS_MAY_USE = {"saih.core", "saih.errors", "saih.timing", "saih.files", "saih.mpi"}
OUTSIDE_THE_WORKER = {"h5py", "pandas", "matplotlib", "jinja2", "yaml", "pydantic", "rich", "scipy"}
IMPORT_TORCH = {"saih.timing", "saih.worker"}
"""The only modules of saih that import torch when they are imported."""
STANDARD_LIBRARY_ONLY = {
    "saih.core",
    "saih.errors",
    "saih.files",
    "saih.lifeline",
    "saih.last_words",
    "saih.load",
    "saih.energy",
}
SOLE_USERS = {"h5py": {"saih.store"}, "matplotlib": {"saih.report"}, "jinja2": {"saih.jobs", "saih.report"}}

FORBIDDEN = {
    r"shell\s*=\s*True": "words, not a line of shell",
    r"yaml\.(load|load_all|unsafe_load|full_load)\(": "safe_load",
    r"\b(import|from)\s+(c?[Pp]ickle|dill|shelve|marshal|joblib)\b": "JSON or npz",
    r"allow_pickle\s*=\s*True": "arrays of numbers",
    r"torch\.load\((?![^)]*weights_only\s*=\s*True)": "weights_only=True",
    r"\bos\.(system|popen)\(": "subprocess with a list of words",
    r"(?<![.\w])(eval|exec)\(": "nothing",
    r"\btempfile\.mktemp\(": "mkstemp",
}
"""What no source file may contain -> what to use."""


def sources(*packages: str) -> dict[str, Path]:
    """Dotted name -> file of every module below these packages."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources("saih", "workloads")
SAIH = sorted(name for name in MODULES if name.split(".")[0] == "saih")
WORKLOADS = sorted(name for name in MODULES if name.split(".")[0] == "workloads")


def imports(name: str, deferred: bool = True) -> set[str]:
    """Dotted names that a module imports; without `deferred`, only those it imports when it is itself imported.

    Imports under TYPE_CHECKING never happen and do not count.
    """
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {each for node in _statements(ast.parse(path.read_text()), deferred) for each in _imported(node, package)}


def _statements(tree: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not deferred:
            continue
        yield node
        yield from _statements(node, deferred)


def _imported(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
        return [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES or base == "saih" else base for a in node.names]
    return []


def top(name: str) -> str:
    return name.split(".")[0]


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    """Whether the module is one of these packages or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(name: str) -> int:
    places = [place for place, packages in enumerate(LAYERS) if within(name, packages)]
    assert len(places) == 1, f"{name} must stand in exactly one of LAYERS"
    return places[0]


def own_package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_the_parser_of_imports_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.py"
    path.write_text(
        "import os.path as p, json\nfrom saih import cli, __version__\n"
        "from . import core\nfrom .errors import unknown\n"
        "from saih.core import Point\nif TYPE_CHECKING:\n    import h5py\ndef f():\n    import torch\n"
        "class C:\n    from saih import plan\ntry:\n    import yaml\nexcept ImportError:\n    pass\n"
    )
    monkeypatch.setitem(MODULES, "saih.toy", path)
    now = {"os.path", "json", "saih.cli", "saih.__version__", "saih.core", "saih.errors", "saih.plan", "yaml"}
    assert imports("saih.toy", deferred=False) == now
    assert imports("saih.toy") == now | {"torch"}


@pytest.mark.parametrize("name", [name for name in SAIH if name not in {"saih", *WORKER}])
def test_imports_point_down(name: str) -> None:
    inside = {each for each in imports(name) if top(each) == "saih" and each != "saih.__version__"}
    upward = {
        each
        for each in inside
        if own_package(each) != own_package(name) and (within(each, WORKER) or layer(each) >= layer(name))
    }
    assert not upward


@pytest.mark.parametrize("name", SAIH)
def test_the_root_package_is_used_for_its_version_only(name: str) -> None:
    assert "saih" not in imports(name)
    unknown = {each for each in imports(name) if each not in MODULES and top(each) == "saih"}
    assert unknown <= {"saih.__version__"}


def test_the_root_package_holds_the_version_and_nothing_else() -> None:
    assert not imports("saih")


@pytest.mark.parametrize("name", SAIH)
def test_saih_never_imports_a_workload(name: str) -> None:
    assert not {each for each in imports(name) if top(each) == "workloads"}


def test_there_is_no_cycle() -> None:
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " > ".join([*above, name])
        if name not in finished:
            for each in sorted(imports(name) & MODULES.keys()):
                visit(each, (*above, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def closure(name: str) -> set[str]:
    """The modules of ours that come along when one is imported and used."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each in MODULES and each not in found:
            found.add(each)
            waiting += imports(each)
    return found


def test_the_worker_uses_the_few_modules_it_may() -> None:
    used = closure("saih.worker") - WORKER
    assert used <= WORKER_MAY_USE, used - WORKER_MAY_USE


@pytest.mark.parametrize("name", sorted(closure("saih.worker") | set(WORKLOADS)))
def test_nothing_in_a_job_imports_what_only_planning_and_reports_need(name: str) -> None:
    assert not {top(each) for each in imports(name)} & OUTSIDE_THE_WORKER


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
def test_the_nouns_need_the_standard_library_only(name: str) -> None:
    outside = {each for each in imports(name) if top(each) not in sys.stdlib_module_names}
    assert outside <= STANDARD_LIBRARY_ONLY


@pytest.mark.parametrize("name", [name for name in SAIH if name not in IMPORT_TORCH])
def test_importing_a_planning_module_needs_no_torch(name: str) -> None:
    assert "torch" not in {top(each) for each in imports(name, deferred=False)}


@pytest.mark.parametrize(("library", "users"), SOLE_USERS.items())
def test_libraries_with_one_user(library: str, users: set[str]) -> None:
    found = {name for name in MODULES if library in {top(each) for each in imports(name)}}
    assert {name for name in found if not within(name, users)} == set()


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_see_little_of_saih(name: str) -> None:
    assert {each for each in imports(name) if top(each) == "saih"} <= WORKLOADS_MAY_USE


SYSTEMS = [name.removesuffix(".spec") for name in WORKLOADS if name.endswith(".spec")]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_use_their_own_family_and_no_sibling(name: str) -> None:
    used = {each for each in imports(name) if top(each) == "workloads"}
    family = ".".join(name.split(".")[:2])
    assert all(within(each, (family,)) for each in used), f"{name} imports another family"
    own = next((system for system in SYSTEMS if within(name, (system,))), None)
    for system in SYSTEMS:
        if system != own:
            assert not {each for each in used if within(each, (system,))}, f"{name} imports the system {system}"


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.endswith(".spec")])
def test_specs_import_nothing_heavy(name: str) -> None:
    heavy = {each for each in closure_outside(name) if top(each) not in sys.stdlib_module_names}
    assert not heavy


def closure_outside(name: str) -> set[str]:
    return {each for module in closure(name) for each in imports(module) if each not in MODULES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_sources_have_a_docstring_and_nothing_forbidden(name: str) -> None:
    text = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(text)), "a module says what its one job is"
    for pattern, instead in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert not found, f"{found[0]}: use {instead}" if found else ""


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(x, shell=True)",
        "yaml.load(f)",
        "import pickle",
        "from pickle import loads",
        "np.load(f, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "os.system('ls')",
        "eval(text)",
    ],
)
def test_what_is_forbidden_is_found(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN)


@pytest.mark.parametrize("line", ["yaml.safe_load(f)", "torch.load(path, weights_only=True)", "model.eval()"])
def test_what_is_allowed_is_not(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN)


LOOK_AROUND = """
import contextlib, importlib, io, json, os, signal, sys, threading
names, forbidden = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ImportError(f"{name} is not for jobs")

sys.meta_path.insert(0, Refuse())
import torch

def state():
    handlers = {n: str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "handlers": handlers,
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "fp32": torch.backends.fp32_precision,
        "argv": list(sys.argv),
    }

for name in json.loads(sys.argv[3]):
    importlib.import_module(name)
before = state()
for name in names:
    importlib.import_module(name)
after = state()
assert before == after, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
"""


def import_in_a_process(folder: Path, names: list[str], forbidden: set[str], first: list[str]) -> None:
    words = [json.dumps(names), json.dumps(sorted(forbidden)), json.dumps(first)]
    done = subprocess.run(
        [sys.executable, "-c", LOOK_AROUND, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_anything_does_nothing(tmp_path: Path) -> None:
    """Third-party libraries come first: what they do on import is not ours. Optional ones may be missing."""
    (tmp_path / "work").mkdir()
    outside = {each for name in MODULES for each in imports(name) if each not in MODULES and top(each) != "saih"}
    outside = {each for each in outside if importlib.util.find_spec(top(each))}
    import_in_a_process(tmp_path / "work", sorted(MODULES), set(), sorted(outside))


def test_a_job_runs_without_the_libraries_of_planning_and_reports(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    benches = [name for name in WORKLOADS if name.endswith((".bench", ".spec"))]
    import_in_a_process(
        tmp_path / "work", ["saih.worker", *benches], OUTSIDE_THE_WORKER - {"scipy"}, ["torch.distributed"]
    )
