"""One archive of results and all that they rest on, and the proof that its page says what its results say.

A plain tar whose bytes follow from its content alone: sorted names, no times, no owners. So every byte of it can be
checked: those of files by the manifest's checksums, all others by packing the files again. A checksum proves nothing
against somebody who makes it anew; so the page and the tables are made again from the results, and the results are
gathered again from the job folders, and all of that must be what is inside.

    MANIFEST.json   name, SHA-256 and size of every other file, and what made them
    MANIFEST.sha256 of MANIFEST.json
    results/*.h5  report/*.html  tables/*  environment.json
    jobs/...        scripts, logs and raw samples of the sweep, where they are at hand
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from saih import __version__, export, store
from saih.errors import SaihError
from saih.files import canonical, write_atomic
from saih.jobs import SweepFolder
from saih.report import page

FORMAT = 1
MANIFEST, MANIFEST_SHA256 = "MANIFEST.json", "MANIFEST.sha256"
MOST_BYTES = 4 * 2**30
MOST_FILES = 500_000
MAKERS = ("matplotlib", "numpy", "pandas", "scipy", "jinja2")
"""Of other versions figures may differ in their last digit, so that not each byte of the page is compared."""
JOB_FILES = ("*.json", "*.npz", "*.sh", "*.txt", "*.jsonl")


def bundle(results: Path, jobs: Path, output: Path) -> str:
    """Write the archive of a results file, whole or not at all; its SHA-256. `jobs` has the folders of sweeps."""
    points = store.load(results)
    files: dict[str, bytes] = {f"results/{results.name}": results.read_bytes()}
    files["environment.json"] = _json(points.attrs["environments"])
    files |= _derived(results)
    folder = jobs / str(points.attrs["sweep"]["name"])
    if (folder / "sweep.json").is_file():
        files |= {f"jobs/{name}": content for name, content in _job_files(folder)}
    archive = pack(sealed(files))
    write_atomic(output, lambda file: file.write(archive))
    return _sha256(archive)


def sealed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with the manifest that is theirs."""
    known = {name: {"sha256": _sha256(content), "bytes": len(content)} for name, content in sorted(files.items())}
    made_with = {name: version(name) for name in MAKERS}
    manifest = _json({"format": FORMAT, "saih": __version__, "made_with": made_with, "files": known})
    return {**files, MANIFEST: manifest, MANIFEST_SHA256: f"{_sha256(manifest)}  {MANIFEST}\n".encode()}


def verify(archive: Path) -> list[str]:
    """What is wrong with an archive, a line each that names where; empty where everything holds.

    Raises SaihError where it is no archive of this format. Nothing is written but into a temporary folder.
    """
    files, wrong = altered(_read_file(archive), str(archive))
    (results,) = _results(files, archive)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "results", PurePosixPath(results).name)
        path.parent.mkdir()
        path.write_bytes(files[results])
        try:
            wrong += _against_results(files, path)
            wrong += _against_jobs(files, path, Path(home))
        except SaihError as error:
            wrong.append(f"{results}: {str(error).replace(str(path), '').lstrip(': ')}")
    return wrong


def altered(content: bytes, where: str) -> tuple[dict[str, bytes], list[str]]:
    """The files of an archive, and which of its bytes are not those that were packed, a line each."""
    files = unpack(content, where)
    wrong = _against_manifest(files, where)
    if not wrong and pack(files) != content:
        wrong.append(f"not a byte of a file, and yet not as packed: {_first_difference(files, content)}")
    return files, wrong


def pack(files: Mapping[str, bytes]) -> bytes:
    """A tar of these files, sorted; the same bytes wherever and whenever it is made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def unpack(content: bytes, where: str) -> dict[str, bytes]:
    """The files of a tar, in memory. SaihError for anything but plain files with plain relative names, or too much."""
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                _refuse_strange(member, files, where)
                total += member.size
                if total > MOST_BYTES or len(files) >= MOST_FILES:
                    raise SaihError(f"{where}: more than {MOST_BYTES / 2**30:.0f} GiB or {MOST_FILES:,} files inside")
                file = tar.extractfile(member)
                files[member.name] = file.read() if file else b""
                if len(files[member.name]) != member.size:
                    raise SaihError(f"{where}: {member.name} ends too early; the archive is cut short")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise SaihError(f"{where}: not a whole bundle ({error})") from None
    if MANIFEST not in files:
        raise SaihError(f"{where}: no {MANIFEST} inside; saih bundle RESULTS.h5 -o FILE makes a bundle")
    return files


def _refuse_strange(member: tarfile.TarInfo, files: Mapping[str, bytes], where: str) -> None:
    name = member.name
    parts = PurePosixPath(name).parts
    shown = name.encode("unicode_escape").decode()[:200]
    if not member.isreg():
        raise SaihError(f"{where}: {shown} is not a plain file")
    if not name or name.startswith("/") or "\\" in name or ".." in parts or str(PurePosixPath(*parts)) != name:
        raise SaihError(f"{where}: {shown} would lie outside the bundle")
    if name in files:
        raise SaihError(f"{where}: {shown} is inside twice")
    if not 0 <= member.size <= MOST_BYTES:
        raise SaihError(f"{where}: {shown} claims {member.size} bytes")


def _against_manifest(files: Mapping[str, bytes], where: str) -> list[str]:
    """Files that are not those that were packed."""
    wrong = []
    if files.get(MANIFEST_SHA256) != f"{_sha256(files[MANIFEST])}  {MANIFEST}\n".encode():
        wrong.append(f"{MANIFEST}: its checksum differs from {MANIFEST_SHA256}")
    try:
        manifest = json.loads(files[MANIFEST])
        number, known = manifest["format"], {str(name): str(one["sha256"]) for name, one in manifest["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [*wrong, f"{MANIFEST}: damaged ({type(error).__name__}: {error})"]
    if number != FORMAT:
        raise SaihError(f"{where}: format {str(number)[:40]}, this saih reads format {FORMAT}")
    for name in sorted(known.keys() | files.keys() - {MANIFEST, MANIFEST_SHA256}):
        if name not in files:
            wrong.append(f"{name}: missing")
        elif name not in known:
            wrong.append(f"{name}: not in the manifest")
        elif _sha256(files[name]) != known[name]:
            wrong.append(f"{name}: its content changed")
    return wrong


def _against_results(files: Mapping[str, bytes], results: Path) -> list[str]:
    """What the page, the tables and the environment say, against what the results say now."""
    wrong = []
    derived = _derived(results) | {"environment.json": _json(store.load(results).attrs["environments"])}
    same_makers = _made_with(files) == {name: version(name) for name in MAKERS}
    for name, expected in sorted(derived.items()):
        if name not in files:
            wrong.append(f"{name}: missing")
        elif files[name] != expected:
            told = _page_differences if name.endswith(".html") else _line_differences
            found = list(told(files[name], expected))
            if not found and same_makers:
                found = ["its bytes differ from what these results give, though no number that is shown does"]
            wrong += [f"{name}: {each}" for each in found[:5]]
    extra = [name for name in files if name.startswith(("report/", "tables/")) and name not in derived]
    return wrong + [f"{name}: nothing that these results give" for name in sorted(extra)]


def _against_jobs(files: Mapping[str, bytes], results: Path, home: Path) -> list[str]:
    """The results' tables against those gathered again from the job folders inside."""
    prefix = "jobs/"
    inside = {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}
    if not inside:
        return []
    points = store.load(results)
    folder = home / "jobs" / str(points.attrs["sweep"]["name"])
    for name, content in inside.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    again = store.gather(SweepFolder(folder), home / "again", mixed=True)
    wrong = []
    for table, read in {"points": store.load, "samples": store.load_samples, "ranks": store.load_ranks}.items():
        stored, gathered = read(results), read(again)
        known = [name for name in gathered if not str(name).startswith(("energy_slurm_", "energy_meter_"))]
        missing = [str(name) for name in known if name not in stored]
        if len(stored) != len(gathered) or missing:
            wrong.append(
                f"results/{results.name}: table {table} has {len(stored)} rows, the job folders give {len(gathered)}"
                + (f"; columns {', '.join(missing)} are missing" if missing else "")
            )
            continue
        for name in known:
            differing = [
                i for i, (a, b) in enumerate(zip(stored[name], gathered[name], strict=True)) if not _same(a, b)
            ]
            if differing:
                first = differing[0]
                wrong.append(
                    f"results/{results.name}: {table}/{name}, row {first}: {stored[name][first]}, "
                    f"where the job folders give {gathered[name][first]}"
                )
    return wrong


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)))


def _derived(results: Path) -> dict[str, bytes]:
    """What is made of the results: the page and a table in each format."""
    with tempfile.TemporaryDirectory() as home:
        written = page.write(results, Path(home, f"{results.stem}.html")).read_bytes()
    tables = {
        f"tables/{results.stem}.{name}.{ending}": export.export(results, name).encode()
        for name, (ending, _) in export.FORMATS.items()
    }
    return {f"report/{results.stem}.html": written} | tables


def _job_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Of the sweep's folder what says how it was measured; not what was set aside."""
    for place in ("", "points/*", "jobs/*"):
        for pattern in JOB_FILES:
            for path in folder.glob(f"{place}/{pattern}" if place else pattern):
                if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                    yield path.relative_to(folder).as_posix(), path.read_bytes()


def _results(files: Mapping[str, bytes], archive: Path) -> list[str]:
    found = [name for name in files if name.startswith("results/")]
    if len(found) != 1:
        raise SaihError(f"{archive}: {len(found)} results files inside, not one")
    return found


def _made_with(files: Mapping[str, bytes]) -> Any:
    try:
        return json.loads(files[MANIFEST]).get("made_with")
    except (ValueError, AttributeError):
        return None


def _line_differences(found: bytes, expected: bytes) -> Iterator[str]:
    ours, theirs = (each.decode(errors="replace").splitlines() for each in (expected, found))
    if len(ours) != len(theirs):
        yield f"{len(theirs)} lines, the results give {len(ours)}"
    for number, (mine, given) in enumerate(zip(ours, theirs, strict=False), start=1):
        if mine != given:
            yield f"line {number}: {_around(given, mine)!r}, the results give {_around(mine, given)!r}"


def _page_differences(found: bytes, expected: bytes) -> Iterator[str]:
    """Texts of the page, cell by cell and paragraph by paragraph, that are others."""
    ours, theirs = (_texts(each.decode(errors="replace")) for each in (expected, found))
    if len(ours) != len(theirs):
        yield f"{len(theirs)} texts, the results give {len(ours)}"
    for mine, given in zip(ours, theirs, strict=False):
        if mine != given:
            yield f"{_around(given[1], mine[1])!r} (line {given[0]}), the results give {_around(mine[1], given[1])!r}"


def _around(text: str, other: str) -> str:
    """Where two texts begin to differ, with a little before."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, at - 30) : at + 50]


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append((self.getpos()[0], data.strip()))


def _texts(text: str) -> list[tuple[int, str]]:
    parser = _Texts()
    parser.feed(text)
    return parser.found


def _first_difference(files: Mapping[str, bytes], content: bytes) -> str:
    """Near which file the archive's bytes are not those of packing its files."""
    again = pack(files)
    at = next(
        (i for i, (a, b) in enumerate(zip(again, content, strict=False)) if a != b), min(len(again), len(content))
    )
    with tarfile.open(fileobj=io.BytesIO(again)) as tar:
        starts = [(member.offset, member.name) for member in tar]
    name = next((name for offset, name in reversed(starts) if offset <= at), "the end")
    return f"at byte {at}, in the header or padding of {name}"


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise SaihError(f"{path}: no such bundle")
    if path.stat().st_size > 2 * MOST_BYTES:
        raise SaihError(f"{path}: larger than any bundle saih reads")
    return path.read_bytes()


def _json(value: Any) -> bytes:
    return (json.dumps(json.loads(canonical(value)), indent=1) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
