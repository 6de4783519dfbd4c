"""Files are whole or absent, and locks end with their holder, on real file systems and with real processes."""

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih.drive import read_events
from saih.errors import SaihError
from saih.files import blamed_on, canonical, digest, locked, read_json, read_record, write_atomic, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
HOLDER = """
import sys, time
from pathlib import Path
from saih.files import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs the right to mount."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_writes_and_replaces(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "deep" / "er" / "a.bin"
    for content in (b"first", b"second, longer", b""):
        write_atomic(path, lambda file, content=content: file.write(content), durable)
        assert path.read_bytes() == content
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("bug"), KeyboardInterrupt(), SystemExit(1)],
    ids=lambda error: type(error).__name__,
)
def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomic(path, writer)
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_nothing_appears_where_the_first_write_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "a.bin", lambda file: file.write(b"x") / 0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, lambda file: file.write(b"new"))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    path = tiny_disk / "a.bin"
    write_atomic(path, lambda file: file.write(b"old" * 1000))
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, lambda file: file.write(bytes(2**20)))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" * 1000
    assert names(tiny_disk) == ["a.bin"]
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    calls = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes"
        calls.append(f"sync {kind}")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(path, lambda file: file.write(b"new"))
    assert calls == ["sync 3 bytes", "rename", "sync folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a.bin", lambda file: file.write(b"x"))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == mode


@given(JSON)
def test_json_survives(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value, durable=False)
    assert read_json(path) == value


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical(backwards) == canonical(value)
    assert digest(backwards) == digest(value)
    assert json.loads(canonical(value)) == value
    assert len(digest(value)) == 64


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_has_no_nan(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": number})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(SaihError, match=r"a\.json: cannot be read as JSON"):
        read_json(path)
    with pytest.raises(SaihError, match=r"b\.json: cannot be read"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "id"', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("null", "damaged: must be an object, not 'None'"),
        ("[1]", r"damaged: must be an object, not '\[1\]'"),
        ("{}", "damaged: it states no format"),
        ('{"id": 1, "time": 2}', "damaged: it states no format"),
        ('{"format": 2, "id": 1, "time": 2}', "format 2, this saih reads format 1"),
        ('{"format": "1", "id": 1, "time": 2}', "format 1, this saih reads"),
        ('{"format": true, "id": 1, "time": 2}', "format True, this saih reads format 1"),
        ('{"format": 1}', "damaged: id, time missing"),
        ('{"format": 1, "time": null}', "damaged: id missing"),
    ],
)
def test_a_record_that_is_not_whole_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(SaihError, match=rf"a\.json: {message}"):
        read_record(path, 1, ("id", "time"))


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"format": 1, "id": None, "time": 2.5, "more": [1]}
    write_json(tmp_path / "a.json", value)
    assert read_record(tmp_path / "a.json", 1, ("id", "time")) == value


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: {}["a"], r"a\.json: damaged \('a' missing\)"),
        (lambda: [][0], r"a\.json: damaged \(IndexError"),
        (lambda: iter(3), r"a\.json: damaged \(TypeError"),
        (lambda: int("x"), r"a\.json: damaged \(ValueError"),
        (lambda: None.keys(), r"a\.json: damaged \(AttributeError"),
    ],
)
def test_content_that_makes_no_sense_is_blamed_on_its_file(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(SaihError, match=message), blamed_on(Path("a.json")):
        mistake()


def test_a_file_cannot_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomic(tmp_path / "page.html", lambda file: file.write(b"x"))
    assert caught.value.filename == str(tmp_path / "page.html")
    assert names(tmp_path) == ["page.html"]


def test_lines_that_are_no_events_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first, second, third = ({"event": "started", "point": name} for name in ("a", "b", "c"))
    half = b'{"event": "meas'
    odd = b'\xff\n\nnull\n3\n[]\n{}\n{"event": "started"}\n{"event": 1, "point": "a"}\n' + b"[" * 100_000 + b"\n"
    events = read_events(path)
    assert next(events) == []
    path.write_bytes(json.dumps(first).encode() + b"\n" + half)
    assert next(events) == [first]
    with open(path, "ab") as file:  # another worker goes on where the disk was full
        file.write(json.dumps(second).encode() + b"\n" + odd + json.dumps(third).encode() + b"\n")
    assert next(events) == [third]
    assert next(events) == []
    assert next(read_events(path)) == [first, third]


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path, "busy"):
        with pytest.raises(SaihError, match=r"^somebody else$"), locked(path, "somebody else"):
            pytest.fail("two holders")
        with locked(tmp_path / "other", "busy"):
            pass
    with pytest.raises(ZeroDivisionError), locked(path, "busy"):
        _ = 1 / 0
    with locked(path, "busy"):
        pass


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SaihError, match="busy"), locked(path, "busy"):
            pytest.fail("two holders")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(path, "busy"):
        pass


def test_children_of_the_holder_do_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "busy"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with locked(path, "busy"):
            pass
    finally:
        child.kill()
        child.wait()
