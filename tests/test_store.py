"""The results file: what goes in comes out, nothing is mixed unasked, damage is named, other tools can read it."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from saih import store
from saih.core import PHASES, Params, Point
from saih.errors import SaihError
from tests.synthetic import ENVIRONMENT, Outcome, Scenario, make


def step_s(params: Params) -> float:
    return 1e-3 * float(params["mesh"]) * float(params["width"])


def some_go_wrong(point: Point) -> Outcome:
    if point.labels == {"data": "32", "model": "w8"}:
        return Outcome("pruned", "memory", "needs 99 GiB a rank; 1 GiB there")
    if point.labels == {"data": "16", "model": "w8"}:
        return Outcome("failed", "out-of-memory", "RuntimeError: no", "the log's last words")
    return Outcome("missing") if point.labels == {"data": "32", "model": "w4"} and point.repeat else Outcome()


@pytest.fixture
def scenario() -> Scenario:
    return Scenario(step_s=step_s, repeat=2, jitter=0.1, outcome=some_go_wrong, params={"gpus": 2})


@pytest.fixture
def results(tmp_path: Path, scenario: Scenario) -> Path:
    return store.gather(make(tmp_path / "jobs", scenario), tmp_path / "results")


def test_what_was_measured_comes_back(results: Path) -> None:
    points, samples, ranks = store.load(results), store.load_samples(results), store.load_ranks(results)
    assert points.groupby(["label_data", "label_model"])["status"].agg(list).to_dict() == {
        ("16", "w4"): ["measured", "measured"],
        ("16", "w8"): ["failed", "failed"],
        ("32", "w4"): ["measured", "missing"],
        ("32", "w8"): ["pruned", "pruned"],
    }
    assert set(points.loc[points["status"] == "failed", "log_tail"]) == {"the log's last words"}
    assert set(points.loc[points["status"] == "pruned", "reason"]) == {"needs 99 GiB a rank; 1 GiB there"}
    measured = points.index[points["status"] == "measured"]
    assert set(samples["point"]) == set(ranks["point"]) == set(measured)
    for row in measured:
        mine = samples[(samples["point"] == row) & ~samples["warmup"]]
        expected = step_s({"mesh": points.loc[row, "param_mesh"], "width": points.loc[row, "param_width"]})
        repeat = 0.1 * (2 * points.loc[row, "repeat"] - 1)
        np.testing.assert_allclose(
            mine[mine["rank"] == 1]["step_s"], expected * (1 + repeat + 0.1 * np.linspace(-1, 1, 5))
        )
        assert len(mine) == 2 * 5
    assert (ranks["host"] == "n1").all()
    assert points.attrs["sweep"]["axes"][0]["name"] == "data"
    assert points.attrs["environments"] == [ENVIRONMENT]
    assert (points.loc[measured, "environment"] == 0).all()
    assert points.loc[measured, "check_relative_error"].tolist() == [1e-6] * len(measured)


def test_missing_numbers_stay_missing(results: Path) -> None:
    points, samples = store.load(results), store.load_samples(results)
    unmeasured = points[points["status"] != "measured"]
    assert unmeasured[["ranks", "check_relative_error"]].isna().all(axis=None)
    assert samples.loc[samples["warmup"], ["units", "flop", "moved_bytes"]].isna().all(axis=None)
    assert store.load_ranks(results)["device_peak_bytes"].isna().all()


def test_the_job_folders_stay_and_gathering_again_gives_the_same(tmp_path: Path, scenario: Scenario) -> None:
    folder = make(tmp_path / "jobs", scenario)
    first = store.load(store.gather(folder, tmp_path / "results"))
    again = store.load(store.gather(folder, tmp_path / "results"))
    assert first.equals(again)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["synthetic-sweep.h5"]


@pytest.mark.parametrize("warmup", [0, 2])
def test_samples_of_workers_that_knew_fewer_phases_are_gathered(warmup: int, tmp_path: Path) -> None:
    before = Scenario(warmup=warmup, phases=PHASES[:-1])
    samples = store.load_samples(store.gather(make(tmp_path / "jobs", before), tmp_path / "results"))
    timed = samples[~samples["warmup"].astype(bool)]
    assert len(samples) - len(timed) == warmup * samples["point"].nunique()
    assert (samples[f"{PHASES[-1]}_s"] == 0).all()
    assert timed["compute_s"].to_numpy() == pytest.approx(0.8)
    assert timed["step_s"].to_numpy() == pytest.approx(1.0)


def test_plain_hdf5_tools_read_it(results: Path, require: Callable[[str], str]) -> None:
    with h5py.File(results) as file:
        assert file["points/id"].shape == file["points/status"].shape
        assert file["samples/compute_s"].attrs["unit"] == "s"
        assert {f"{phase}_s" for phase in PHASES} <= set(file["samples"])
    words = [require("h5dump"), "-d", "/points/status", str(results)]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "measured" in told.stdout


def test_different_machines_or_versions_are_refused_unless_told(tmp_path: Path) -> None:
    def environment(point: Point) -> Mapping[str, Any]:
        return ENVIRONMENT | ({"torch": "3.0"} if point.labels["data"] == "32" else {"host": "n2"})

    folder = make(tmp_path / "jobs", Scenario(environment=environment))
    with pytest.raises(SaihError, match=r"differ in torch: 2\.0 and 3\.0.*--mixed"):
        store.gather(folder, tmp_path / "results")
    assert not list(tmp_path.glob("results/*.h5"))
    assert len(store.load(store.gather(folder, tmp_path / "results", mixed=True)).attrs["environments"]) == 2


def test_different_hosts_of_one_kind_are_one_machine(tmp_path: Path) -> None:
    folder = make(tmp_path / "jobs", Scenario(environment=lambda point: ENVIRONMENT | {"host": point.id}))
    assert len(store.load(store.gather(folder, tmp_path / "results")).attrs["environments"]) == 4


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_samples_are_named_and_not_gathered(tmp_path: Path, scenario: Scenario, damage: str) -> None:
    folder = make(tmp_path / "jobs", scenario)
    victim = next(folder.points.glob("*/samples.npz"))
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(SaihError, match=r"samples\.npz"):
        store.gather(folder, tmp_path / "results")
    assert not list(tmp_path.glob("results/*"))


def test_a_gather_that_fails_leaves_the_old_results(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "jobs", scenario)
    path = store.gather(folder, tmp_path / "results")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("_write_column", "_compare"):
        with monkeypatch.context() as patched:
            patched.setattr(store, step, full)
            with pytest.raises(OSError, match="No space"):
                store.gather(folder, tmp_path / "results")
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_copy_that_differs_is_not_trusted(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = store._write_column

    def off_by_one(group: Any, name: str, values: Any) -> None:
        honest(group, name, values + 1 if name == "compute_s" else values)

    monkeypatch.setattr(store, "_write_column", off_by_one)
    with pytest.raises(SaihError, match="samples/compute_s did not survive"):
        store.gather(make(tmp_path / "jobs", scenario), tmp_path / "results")


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_file_is_one_clear_error(results: Path, keep: int) -> None:
    content = results.read_bytes()
    results.write_bytes(content[:keep] if keep >= 0 else content[: len(content) * 9 // 10])
    with pytest.raises(SaihError, match=r"synthetic-sweep\.h5"):
        store.load(results)


def no_sweep(file: h5py.File) -> None:
    del file.attrs["sweep"]


def broken_sweep(file: h5py.File) -> None:
    file.attrs["sweep"] = '{"format": 1'


def edited_sweep(file: h5py.File) -> None:
    file.attrs["sweep"] = file.attrs["sweep"].replace("testbed", "testbad")


def no_column(file: h5py.File) -> None:
    del file["points/status"]


def no_columns(file: h5py.File) -> None:
    del file["points"].attrs["columns"]


def fewer_columns(file: h5py.File) -> None:
    columns = [name for name in file["points"].attrs["columns"] if name != "status"]
    file["points"].attrs["columns"] = columns


def renamed_columns(file: h5py.File) -> None:
    names = list(file["samples"].attrs["columns"])
    there, here = names.index("input_s"), names.index("other_s")
    names[there], names[here] = names[here], names[there]
    file["samples"].attrs["columns"] = names


def other_length(file: h5py.File) -> None:
    del file["points/seed"]
    file["points/seed"] = [0]


def dataset_for_group(file: h5py.File) -> None:
    del file["ranks"]
    file["ranks"] = [0]


def integer_environments(file: h5py.File) -> None:
    del file["environments"]
    file["environments"] = [1, 2]


def edited_environments(file: h5py.File) -> None:
    file["environments"][0] = "{}"


def no_checksum(file: h5py.File) -> None:
    del file["samples"].attrs["sha256"]


def one_number(file: h5py.File) -> None:
    file["samples/compute_s"][3] = file["samples/compute_s"][3] * (1 + 1e-12)


def one_text(file: h5py.File) -> None:
    file["points/status"][0] = "missing"


def missing_number(file: h5py.File) -> None:
    file["ranks/host_peak_bytes"][0] = np.nan


def no_table(file: h5py.File) -> None:
    del file["samples"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_sweep, "attribute sweep: damaged"),
        (broken_sweep, "attribute sweep: damaged"),
        (edited_sweep, "attribute sweep: damaged .its checksum differs"),
        (no_column, "table points: damaged .*status"),
        (no_columns, "table points: damaged .*columns"),
        (fewer_columns, "table points: damaged .its checksum differs"),
        (renamed_columns, "table samples: damaged .its checksum differs"),
        (other_length, "table points: damaged"),
        (dataset_for_group, "table ranks: damaged"),
        (integer_environments, "environments: damaged"),
        (edited_environments, "environments: damaged .its checksum differs"),
        (no_checksum, "table samples: damaged .it has no checksum"),
        (one_number, "table samples: damaged .its checksum differs"),
        (one_text, "table points: damaged .its checksum differs"),
        (missing_number, "table ranks: damaged .its checksum differs"),
        (no_table, "damaged: samples missing"),
    ],
)
def test_damage_is_named_with_file_and_table(results: Path, damage: Callable[[h5py.File], None], message: str) -> None:
    with h5py.File(results, "r+") as file:
        damage(file)
    with pytest.raises(SaihError, match=rf"synthetic-sweep\.h5: {message}"):
        everything(results)


def test_a_sweep_of_other_content_is_refused(results: Path) -> None:
    for told in ({"format": 2}, {"format": 1}, [1]):
        text = json.dumps(told)
        with h5py.File(results, "r+") as file:
            file.attrs["sweep"], file.attrs["sweep_sha256"] = text, store._sha256([text])
        with pytest.raises(SaihError, match=r"synthetic-sweep\.h5: attribute sweep: damaged"):
            store.load(results)


def everything(path: Path) -> list[Any]:
    frames = [store.load(path), store.load_samples(path), store.load_ranks(path)]
    return [*[frame.to_dict("list") for frame in frames], frames[0].attrs]


def test_no_flipped_byte_goes_unnoticed(results: Path) -> None:
    """Anywhere in the file: it is refused, or what it says is what was measured."""
    whole = results.read_bytes()
    with h5py.File(results) as file:
        start = file["samples/compute_s"].id.get_offset()
        names = [name for table in store.TABLES for name in (f"{table}/{each}" for each in file[table])]
        data = [(file[name].id.get_offset(), file[name].id.get_storage_size()) for name in names]
    chance = random.Random(0)  # noqa: S311
    inside = [chance.randrange(begin, begin + size) for begin, size in data if begin and size]
    anywhere = [chance.randrange(len(whole)) for _ in range(60)]
    truth = repr(everything(results))
    refused = []
    for place in [start, *inside, *anywhere]:
        results.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        try:
            assert repr(everything(results)) == truth, place
        except SaihError as error:
            assert "synthetic-sweep.h5: " in str(error)  # noqa: PT017
            refused.append(place)
    assert {start, *inside} <= set(refused)


def test_the_checksum_is_the_documented_one(results: Path) -> None:
    """results/README.md, followed without saih."""
    with h5py.File(results) as file:
        for table in store.TABLES:
            total = hashlib.sha256()
            for name in file[table].attrs["columns"]:
                values = file[table][name][:]
                kind = "text" if values.dtype == object else values.dtype.str
                total.update(name.encode() + b"\0" + kind.encode() + b"\0")
                total.update(b"".join(each + b"\0" for each in values) if kind == "text" else values.tobytes())
            assert file[table].attrs["sha256"] == total.hexdigest()


REFERENCES = sorted((Path(__file__).parent.parent / "results" / "reference").glob("*.h5"))


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_the_reference_results_are_whole(path: Path) -> None:
    assert all(everything(path))


@pytest.mark.parametrize("content", ["{}", "null", "[]", '{"format": 1}', '{"format": 99}', "{"])
@pytest.mark.parametrize("name", ["measurement.json", "failure.json", "sweep.json"])
def test_a_damaged_record_is_named_and_not_gathered(
    tmp_path: Path, scenario: Scenario, name: str, content: str
) -> None:
    folder = make(tmp_path / "jobs", scenario)
    victim = next(folder.path.rglob(name))
    victim.write_text(content)
    with pytest.raises(SaihError, match=rf"^{re.escape(str(victim))}: "):
        store.gather(folder, tmp_path / "results")
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("measurement.json", "check", None),
        ("measurement.json", "check", {"error": "small"}),
        ("measurement.json", "hosts", 3),
        ("measurement.json", "per_rank", {"setup_s": []}),
        ("measurement.json", "environment", "here"),
        ("measurement.json", "ranks", None),
        ("sweep.json", "points", [{}]),
        ("sweep.json", "points", None),
        ("sweep.json", "pruned", [{"point": 3}]),
        ("sweep.json", "axes", [3]),
    ],
)
def test_a_record_with_a_senseless_value_is_named(
    tmp_path: Path, scenario: Scenario, name: str, key: str, value: object
) -> None:
    folder = make(tmp_path / "jobs", scenario)
    victim = next(folder.path.rglob(name))
    victim.write_text(json.dumps(json.loads(victim.read_text()) | {key: value}))
    with pytest.raises(SaihError, match=rf"^{re.escape(str(victim))}: damaged"):
        store.gather(folder, tmp_path / "results")


def test_a_log_that_is_no_text_is_kept_as_far_as_it_is(tmp_path: Path) -> None:
    """A node that dies may leave NULs in its log; HDF5 text ends at the first one."""
    tail = "last words\0\0\ud800 end"
    failed = Scenario(outcome=lambda point: Outcome("failed", "died", "gone", tail))
    points = store.load(store.gather(make(tmp_path / "jobs", failed), tmp_path / "results"))
    assert set(points["log_tail"]) == {"last words\ufffd\ufffd? end"}


def test_other_files_and_other_formats_are_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(SaihError, match="no such results file"):
        store.load(tmp_path / "nothing.h5")
    text = tmp_path / "text.h5"
    text.write_text("hello")
    with pytest.raises(SaihError, match="not a whole HDF5 file"):
        store.load(text)
    with h5py.File(results, "r+") as file:
        file.attrs["saih_format"] = 99
    with pytest.raises(SaihError, match="format 99, this saih reads format 1"):
        store.load(results)


def test_a_results_folder_that_cannot_be_written_is_named(tmp_path: Path, scenario: Scenario) -> None:
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(SaihError, match="results cannot be written"):
        store.gather(make(tmp_path / "jobs", scenario), tmp_path / "results")


def test_the_results_file_can_be_read_by_others(results: Path) -> None:
    assert results.stat().st_mode & 0o444 == 0o444
