"""What many tests share."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from hypothesis import settings

from tests.cluster.slurm import PROGRAMS, Cluster, cluster, missing_programs

settings.register_profile("saih", deadline=None)  # how fast a machine is says nothing about the rule
settings.load_profile("saih")


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does, so that what they started is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture
def require() -> Callable[[str], str]:
    """`require("chromium")` is the path of a program; where it is missing the test is skipped, or fails if CI=true."""

    def find(tool: str) -> str:
        path = shutil.which(tool)
        if path is None and os.environ.get("CI") == "true":
            pytest.fail(f"{tool} is not installed, and CI must not skip this test")
        if path is None:
            pytest.skip(f"{tool} is not installed")
        return path

    return find


def package(name: str, whole_module: bool = False) -> ModuleType:
    """The package of this name; where it lacks the test (or its module) is skipped, or fails if CI=true."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"package {name} is not installed, and CI must not skip this test: pip install 'saih[test]'")
        pytest.skip(f"package {name} is not installed", allow_module_level=whole_module)
    return importlib.import_module(name)


@pytest.fixture
def require_package() -> Callable[[str, str], None]:
    """`require_package("horovod", "make horovod")` skips the test where the package is missing, or fails if CI=true."""

    def find(package: str, remedy: str) -> None:
        missing = importlib.util.find_spec(package) is None
        if missing and os.environ.get("CI") == "true":
            pytest.fail(f"{package} is not installed, and CI must not skip this test: {remedy}")
        if missing:
            pytest.skip(f"{package} is not installed: {remedy}")

    return find


@pytest.fixture
def horovod(require_package: Callable[[str, str], None]) -> None:
    require_package("horovod", "make horovod")


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    absent = missing_programs()
    if absent and os.environ.get("CI") == "true":
        pytest.fail(f"{', '.join(absent)} not installed, and CI must not skip these tests")
    if absent:
        pytest.skip(f"Slurm is not installed: {', '.join(absent)} of {', '.join(PROGRAMS)} missing")
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`tell("200 points: 7 calls")` prints a figure below the results, from whichever process found it."""
    return lambda line: record_property("told", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = [value for report in terminalreporter.getreports("passed") for name, value in report.user_properties]
    if told:
        terminalreporter.section("figures")
        for line in told:
            terminalreporter.line(str(line))
