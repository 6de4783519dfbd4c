"""Bundles: the same bytes every time, and no byte, number or point of them changes unseen; nothing written outside."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from saih import bundle, cli, export, store
from saih.errors import SaihError
from saih.report import page
from tests.synthetic import Scenario, make

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs/, results/ and bundle.tar of a small sweep with its job folders."""
    home = tmp_path_factory.mktemp("bundle")
    folder = make(home / "jobs", Scenario(repeat=2, jitter=0.05, step_s=lambda params: params["mesh"] / 100))
    (folder.jobs / "0").mkdir(parents=True)
    (folder.jobs / "0" / "job.sh").write_text("#!/bin/bash\n")
    (folder.jobs / "0" / "log.txt").write_text("it ran\n")
    results = store.gather(folder, home / "results")
    bundle.bundle(results, home / "jobs", home / "bundle.tar")
    return home


@pytest.fixture
def files(made: Path) -> Files:
    return bundle.unpack((made / "bundle.tar").read_bytes(), "bundle.tar")


def checked(files: Files, folder: Path) -> list[str]:
    """What verify says of an archive of these files, whose manifest was made for them."""
    archive = folder / "forged.tar"
    archive.write_bytes(bundle.pack(bundle.sealed(plain(files))))
    return bundle.verify(archive)


def plain(files: Files) -> Files:
    return {name: content for name, content in files.items() if not name.startswith("MANIFEST")}


def named(files: Files, ending: str) -> str:
    return next(name for name in files if name.endswith(ending))


def test_a_bundle_is_whole_and_the_same_every_time(made: Path, files: Files, tmp_path: Path) -> None:
    assert bundle.verify(made / "bundle.tar") == []
    again = bundle.bundle(made / "results" / "synthetic-sweep.h5", made / "jobs", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (made / "bundle.tar").read_bytes()
    assert len(again) == 64
    kinds = {re.sub(r"[^/]+$", "*", name) for name in files}
    assert {"results/*", "report/*", "tables/*", "jobs/jobs/0/*", "*"} <= kinds
    assert sum(name.endswith("samples.npz") for name in files) == 8
    assert {"jobs/jobs/0/job.sh", "jobs/jobs/0/log.txt", "jobs/sweep.json", "environment.json"} <= files.keys()


def test_other_programs_read_it(made: Path, files: Files, tmp_path: Path) -> None:
    with tarfile.open(made / "bundle.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_every_flipped_byte_is_seen_and_named(made: Path) -> None:
    """Bytes of files, of headers, of the padding between, spread over the whole archive."""
    content = (made / "bundle.tar").read_bytes()
    for place in [*range(0, len(content), 1511), *range(0, 512, 7), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        try:
            _, wrong = bundle.altered(bytes(damaged), "bundle.tar")
        except SaihError:
            continue  # so badly damaged that it is no archive any more: said in words, too
        assert wrong, f"byte {place}"


@pytest.mark.parametrize("ending", [".h5", ".html", ".cells.csv", "samples.npz", "log.txt", "MANIFEST.json"])
def test_a_flipped_byte_of_a_file_is_named_after_the_file(
    made: Path, files: Files, tmp_path: Path, ending: str
) -> None:
    name = named(files, ending if ending != ".cells.csv" else ".csv.csv")
    changed = bytearray(files[name])
    changed[len(changed) // 2] ^= 1
    archive = tmp_path / "flipped.tar"
    archive.write_bytes(bundle.pack({**files, name: bytes(changed)}))
    wrong = bundle.verify(archive)
    assert any(each.startswith(f"{name}: its c") for each in wrong), wrong


def test_a_number_edited_in_the_page_is_named_though_the_manifest_is_made_anew(files: Files, tmp_path: Path) -> None:
    name = named(files, ".html")
    text = files[name].decode()
    number = re.search(r'<td class="measured-value">([0-9.]+)</td>', text)
    assert number
    edited = text[: number.start(1)] + "99.9" + text[number.end(1) :]
    wrong = checked({**files, name: edited.encode()}, tmp_path)
    assert any(each.startswith(f"{name}: '99.9' (line ") and f"'{number[1]}'" in each for each in wrong), wrong


def test_a_number_edited_in_a_table_is_named(files: Files, tmp_path: Path) -> None:
    name = named(files, ".csv.csv")
    lines = files[name].decode().splitlines(keepends=True)
    lines[2] = lines[2].replace(",measured,", ",measured,7", 1)
    wrong = checked({**files, name: "".join(lines).encode()}, tmp_path)
    assert [each.split(":")[0] for each in wrong] == [name]
    assert "line 3" in wrong[0]


def rewritten(files: Files, folder: Path, change: Callable[[dict[str, pd.DataFrame]], None]) -> Path:
    """The results file with other tables and checksums that fit them."""
    name = named(files, ".h5")
    old = folder / "old.h5"
    old.write_bytes(files[name])
    points = store.load(old)
    samples = store.load_samples(old).drop(columns="step_s")
    tables = {"points": points, "samples": samples, "ranks": store.load_ranks(old)}
    change(tables)
    path = folder / Path(name).name
    with h5py.File(old) as file:
        sweep = dict(points.attrs["sweep"])
        assert file.attrs["saih_format"] == 1
    store._write(path, sweep, tables, points.attrs["environments"])
    return path


def without_a_point(tables: dict[str, pd.DataFrame]) -> None:
    last = len(tables["points"]) - 1
    tables["points"] = tables["points"].iloc[:last]
    tables["samples"] = tables["samples"][tables["samples"]["point"] != last].reset_index(drop=True)
    tables["ranks"] = tables["ranks"][tables["ranks"]["point"] != last].reset_index(drop=True)


def a_faster_step(tables: dict[str, pd.DataFrame]) -> None:
    tables["samples"].loc[7, "compute_s"] /= 2


def test_a_point_removed_from_the_results_is_seen(files: Files, tmp_path: Path) -> None:
    path = rewritten(files, tmp_path, without_a_point)
    wrong = checked({**files, named(files, ".h5"): path.read_bytes()}, tmp_path)
    assert any(each.startswith("report/synthetic-sweep.html: ") for each in wrong)
    assert any("tables/synthetic-sweep.json.json: " in each for each in wrong)
    assert "results/synthetic-sweep.h5: table points has 7 rows, the job folders give 8" in wrong


@pytest.mark.parametrize(
    ("change", "told"),
    [(without_a_point, "table points has 7 rows"), (a_faster_step, "samples/compute_s, row 7: ")],
)
def test_who_makes_page_tables_and_manifest_anew_is_given_away_by_the_raw_files(
    files: Files, tmp_path: Path, change: Callable[[dict[str, pd.DataFrame]], None], told: str
) -> None:
    path = rewritten(files, tmp_path, change)
    forged = {**files, named(files, ".h5"): path.read_bytes()}
    forged[named(files, ".html")] = page.write(path, tmp_path / path.with_suffix(".html").name).read_bytes()
    for name, (ending, _) in export.FORMATS.items():
        forged[f"tables/{path.stem}.{name}.{ending}"] = export.export(path, name).encode()
    (wrong, *_) = checked(forged, tmp_path)
    assert wrong.startswith(f"results/synthetic-sweep.h5: {told}")


def test_a_raw_file_taken_out_is_seen(files: Files, tmp_path: Path) -> None:
    victim = named(files, "measurement.json")
    wrong = checked({name: content for name, content in files.items() if name != victim}, tmp_path)
    assert wrong


def test_a_results_file_without_its_jobs_can_be_bundled(made: Path, tmp_path: Path) -> None:
    bundle.bundle(made / "results" / "synthetic-sweep.h5", tmp_path / "none", tmp_path / "b.tar")
    assert bundle.verify(tmp_path / "b.tar") == []


def strange(name: str = "x", content: bytes = b"", times: int = 1, **attributes: object) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for key, value in attributes.items():
            setattr(member, key, value)
        for _ in range(times):
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (strange("../outside", b"x"), "would lie outside"),
        (strange("/etc/outside", b"x"), "would lie outside"),
        (strange("a/../../outside", b"x"), "would lie outside"),
        (strange("a//b", b"x"), "would lie outside"),
        (strange("..\\outside", b"x"), "would lie outside"),
        (strange("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain file"),
        (strange("hard", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "is not a plain file"),
        (strange("device", type=tarfile.CHRTYPE), "is not a plain file"),
        (strange("x", b"x", times=2), "is inside twice"),
        (strange("x", b"x"), "no MANIFEST.json inside"),
        (b"", "not a whole bundle"),
        (b"no tar at all" * 100, "not a whole bundle"),
        (strange("x", b"x" * 5000)[:2000], "is cut short|not a whole bundle|ends too early"),
    ],
)
def test_a_strange_archive_is_refused_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    Path("bad.tar").write_bytes(content)
    assert cli.main(["verify", "bad.tar"]) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["bad.tar"]


def test_what_would_fill_the_memory_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (made / "bundle.tar").read_bytes()
    monkeypatch.setattr(bundle, "MOST_BYTES", 100_000)
    with pytest.raises(SaihError, match=r"inside|claims"):
        bundle.unpack(content, "bundle.tar")
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "MOST_FILES", 3)
    with pytest.raises(SaihError, match="files inside"):
        bundle.unpack(content, "bundle.tar")


def test_the_verbs_say_it_by_exit_status(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert cli.main(["bundle", "results/synthetic-sweep.h5", "-o", "two.tar"]) == 0
    digest = capsys.readouterr().out.split()[-1]
    assert cli.main(["verify", "two.tar"]) == 0
    assert capsys.readouterr().out.split()[-1] == digest
    content = bytearray(Path("two.tar").read_bytes())
    content[content.index(b"it ran")] ^= 1
    Path("two.tar").write_bytes(content)
    assert cli.main(["verify", "two.tar"]) == 1
    assert "WRONG    jobs/jobs/0/log.txt: its content changed\n" in capsys.readouterr().out
    assert cli.main(["verify", "missing.tar"]) == 2


def test_tables_are_compared_with_missing_numbers_being_equal() -> None:
    assert bundle._same(float("nan"), np.float64("nan"))
    assert not bundle._same(1.0, float("nan"))
