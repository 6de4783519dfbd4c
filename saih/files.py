"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from saih.errors import SaihError


def write_atomic(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Write `path` through `write(file)`; a crash or a full disk leaves the old file, or none.

    Raises OSError as the file system reports it, always naming `path`; the unfinished copy is removed.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(aside).chmod(0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as JSON, atomically."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()), durable)


def write_json_once(path: Path, value: Any) -> bool:
    """Write `value` as JSON if nobody has written `path` yet; whether it was us."""
    own = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    write_json(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> Any:
    """The JSON value in `path`; SaihError if it cannot be read or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SaihError(f"{path}: cannot be read as JSON ({error})") from None


def read_record(path: Path, number: int, keys: Collection[str]) -> dict[str, Any]:
    """The JSON object in `path`, which must state format `number` and have `keys`; SaihError says what it lacks."""
    return check_record(read_json(path), str(path), number, keys)


def check_record(value: Any, place: str, number: int, keys: Collection[str]) -> dict[str, Any]:
    """`value`, if it is an object of format `number` with all of `keys`; SaihError naming `place` otherwise."""
    if not isinstance(value, dict):
        raise SaihError(f"{place}: damaged: must be an object, not {str(value)[:40]!r}")
    if "format" not in value:
        raise SaihError(f"{place}: damaged: it states no format")
    if isinstance(value["format"], bool) or value["format"] != number:
        raise SaihError(f"{place}: format {str(value['format'])[:40]}, this saih reads format {number}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise SaihError(f"{place}: damaged: {', '.join(missing)} missing")
    return value


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """What goes wrong while the content of `path` is taken apart becomes a SaihError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{error} missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise SaihError(f"{path}: damaged ({what})") from None


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`, or raise SaihError(busy). The kernel lets go when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SaihError(busy) from None
        yield


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
