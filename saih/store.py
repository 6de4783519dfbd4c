"""The only user of HDF5: gathers a sweep's measurements into one results file and reads it back.

Format 1 of a results file (documented in results/README.md):

    /            attributes: saih_format = 1, sweep (JSON: what was asked, planned, pruned, with which ceilings)
                 and its SHA-256
    /points/*    one 1-D dataset a column, one entry a point: identity, status, parameters, predictions, check numbers
    /samples/*   one 1-D dataset a column, one entry a rank and step: point (row of /points), rank, step, warmup,
                 <phase>_s for each phase, units, flop, moved_bytes
    /ranks/*     one entry a rank of a point: host, set-up and check time, peak memory, bytes read
    /environments  JSON strings; points/environment is the row

Each group, and /environments, has an attribute sha256 of its content: a file that decays is not believed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from saih import power
from saih.core import FORMAT, PHASES, Point
from saih.energy import Energy
from saih.environment import MACHINE_KEYS
from saih.errors import SaihError
from saih.files import blamed_on, check_record, digest, read_record
from saih.jobs import FAILURE_KEYS, MEASUREMENT_KEYS, SWEEP_KEYS, SweepFolder
from saih.power import JobEnergy, PowerLog

TABLES = ("points", "samples", "ranks")
NOT_STORED = ("points", "pruned")
"""Keys of sweep.json that are rows of /points instead."""
UNITS = {"_s": "s", "_bytes": "B", "flop": "FLOP", "_j": "J", "_hz": "Hz"}


def gather(folder: SweepFolder, results: Path, mixed: bool = False, log: PowerLog | None = None) -> Path:
    """Collect what is measured, failed, pruned and missing into `results`/<sweep>.h5; returns its path.

    Energy is what the jobs read themselves, what the scheduler counted, and what `log`, a power meter's file, says.
    Written aside, compared with the frames it was made from, then renamed. Raises SaihError where measurements come
    from different machines or versions (unless `mixed`), or the results folder cannot be written.
    """
    sweep = folder.asked()
    frames, environments = _collect(folder, sweep, log)
    if not mixed:
        _refuse_mixture(environments)
    path = results / f"{folder.path.name}.h5"
    try:
        results.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=results, prefix=f".{path.name}.")
    except OSError as error:
        raise SaihError(f"{results}: results cannot be written there ({error.strerror})") from None
    os.close(handle)
    try:
        _write(Path(aside), sweep, frames, environments)
        _compare(Path(aside), frames)
        Path(aside).chmod(0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def load(path: Path | str) -> pd.DataFrame:
    """The flat table: one row a point. `attrs` holds "sweep" (dict) and "environments" (list of dict).

    Raises SaihError for a file that is missing, damaged, not HDF5, or of another format number.
    """
    with _open(Path(path)) as file:
        frame = _load_table(file, "points")
        with _table("attribute sweep"):
            text = file.attrs["sweep"]
            _verify(_sha256([text]), file.attrs.get("sweep_sha256"))
            keys = [key for key in SWEEP_KEYS if key not in NOT_STORED]
            frame.attrs["sweep"] = check_record(json.loads(text), "its content", FORMAT, keys)
        with _table("environments"):
            stored = file["environments"]
            texts = list(stored.asstr()[:])
            _verify(_sha256(texts), stored.attrs.get("sha256"))
            frame.attrs["environments"] = [json.loads(each) for each in texts]
        return frame


def load_samples(path: Path | str) -> pd.DataFrame:
    """Raw samples: one row a rank and step; `point` is the row of the flat table; `step_s` is the sum of the phases."""
    with _open(Path(path)) as file:
        frame = _load_table(file, "samples")
    unknown = [f"{phase}_s" for phase in PHASES if f"{phase}_s" not in frame]  # in files from before they had a name
    frame = frame.assign(**dict.fromkeys(unknown, 0.0))
    frame["step_s"] = frame[[f"{phase}_s" for phase in PHASES]].sum(axis=1)
    return frame


def load_ranks(path: Path | str) -> pd.DataFrame:
    """One row a rank of a point: host, memory, bytes read."""
    with _open(Path(path)) as file:
        return _load_table(file, "ranks")


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """The file, read-only; every error while it is read becomes a SaihError that names it."""
    if not path.is_file():
        raise SaihError(f"{path}: no such results file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise SaihError(f"{path}: not a whole HDF5 file ({error})") from None
    with file:
        try:
            with _table("file"):
                number = file.attrs.get("saih_format")
                missing = [name for name in (*TABLES, "environments") if name not in file]
            if number != FORMAT:
                raise SaihError(f"format {str(number)[:40]}, this saih reads format {FORMAT}; gather the sweep again")
            if missing:
                raise SaihError(f"damaged: {', '.join(missing)} missing; gather the sweep again")
            yield file
        except SaihError as error:
            raise SaihError(f"{path}: {error}") from None


@contextmanager
def _table(name: str) -> Iterator[None]:
    """Whatever goes wrong in here is damage to this part of the file: HDF5 reports it in many ways."""
    try:
        yield
    except Exception as error:
        what = error if isinstance(error, SaihError) else f"{type(error).__name__}: {error}"
        raise SaihError(f"{name}: damaged ({what}); gather the sweep again") from None


def _collect(
    folder: SweepFolder, sweep: Mapping[str, Any], log: PowerLog | None
) -> tuple[dict[str, pd.DataFrame], list[dict[str, Any]]]:
    others = power.of_scheduler(folder, sweep)
    environments: dict[str, int] = {}
    distinct: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    samples: dict[str, list[np.ndarray]] = {name: [] for name in _sample_columns()}
    for planned in sweep["points"]:
        with blamed_on(folder.sweep_file):
            row = _planned_row(sweep, planned)
            home = folder.points / Point.from_json(planned["point"]).folder
        outcome, failure = home / "measurement.json", home / "failure.json"
        if outcome.exists():
            measurement = read_record(outcome, FORMAT, MEASUREMENT_KEYS)
            _append_samples(samples, len(points), home, measurement)
            with blamed_on(outcome):
                ranks += _rank_rows(len(points), measurement)
                row |= {"status": "measured", "ranks": int(measurement["ranks"]), "began": str(measurement["began"])}
                row |= {f"check_{name}": float(value) for name, value in measurement["check"].items()}
                rates = measurement.get("beside_flop_per_s", {})  # of points that asked for it
                row |= {f"beside_{name}_flop_per_s": float(rate) for name, rate in rates.items()}
                row |= _energy_row(measurement, others.get(planned["point"]["id"]), log)
                row["notes"] = "\n".join(measurement.get("notes", ()))
                row["environment"] = _intern(dict(measurement["environment"]), environments, distinct)
        elif failure.exists():
            told = read_record(failure, FORMAT, FAILURE_KEYS)
            row |= {"status": "failed", "kind": told["kind"], "reason": told["reason"], "log_tail": told["log_tail"]}
        else:
            row |= {"status": "missing", "kind": "missing", "reason": "not run yet"}
        points.append(row)
    for planned in sweep["pruned"]:
        with blamed_on(folder.sweep_file):
            row = _planned_row(sweep, planned)
            points.append(row | {"status": "pruned", "kind": planned["kind"], "reason": planned["reason"]})
    frames = {
        "points": _tidy(pd.DataFrame(points)),
        "samples": pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in samples.items()}),
        "ranks": _tidy(pd.DataFrame(ranks, columns=["point", "rank", "host"] if not ranks else None)),
    }
    return frames, distinct


def _energy_row(measurement: Mapping[str, Any], scheduler: JobEnergy | None, log: PowerLog | None) -> dict[str, Any]:
    """energy_<source>_j, _window_s, _hz, _scope and _how, of each source there is."""
    found = [Energy(source, **told) for source, told in measurement.get("energy", {}).items()]
    timed = measurement.get("timed")  # of newer measurements
    if timed is not None:
        found += [] if scheduler is None else [scheduler.of_window(*timed)]
        metered = log.of_window(*timed) if log else None
        found += [metered] if metered else []
    row: dict[str, Any] = {"timed_begin_s": float(timed[0]), "timed_end_s": float(timed[1])} if timed else {}
    for each in found:
        name = f"energy_{each.source}"
        row |= {f"{name}_j": each.joule, f"{name}_window_s": each.window_s, f"{name}_hz": each.hz}
        row |= {f"{name}_scope": each.scope, f"{name}_how": each.how}
    return row


def _planned_row(sweep: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    point = planned["point"]
    sizes = {axis["name"]: {rung["label"]: rung["size"] for rung in axis["rungs"]} for axis in sweep["axes"]}
    row: dict[str, Any] = {name: point[name] for name in ("id", "cell", "workload", "repeat", "seed")}
    row |= {"status": "", "kind": "", "reason": "", "log_tail": "", "notes": "", "environment": -1}
    for axis, label in point["labels"].items():
        row |= {f"label_{axis}": label, f"size_{axis}": sizes[axis][label]}
    row |= {f"param_{name}": value for name, value in point["params"].items()}
    return row | {f"predicted_{name}": float(value) for name, value in planned["predicted"].items()}


def _sample_columns() -> list[str]:
    return ["point", "rank", "step", "warmup", *(f"{phase}_s" for phase in PHASES), "units", "flop", "moved_bytes"]


def _append_samples(samples: dict[str, list[np.ndarray]], row: int, home: Path, measurement: Mapping[str, Any]) -> None:
    path = home / "samples.npz"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SaihError(
            f"{path}: cannot be read ({error.strerror}); remove its folder and run the sweep again"
        ) from None
    if hashlib.sha256(content).hexdigest() != measurement["samples_sha256"]:
        raise SaihError(f"{path}: damaged, its checksum differs; remove its folder and run the sweep again")
    with blamed_on(path), np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for warmup in (True, False):
            phase_s = arrays["warmup_phase_s" if warmup else "phase_s"]
            ranks, steps, _ = phase_s.shape
            count = ranks * steps
            done = {
                name: np.full(count, np.nan) if warmup else arrays[name].reshape(count)
                for name in _sample_columns()[-3:]
            }
            told = zip(
                PHASES, np.moveaxis(phase_s, -1, 0).reshape(phase_s.shape[-1], count), strict=False
            )  # older ones have fewer
            columns = {
                "point": np.full(count, row),
                "rank": np.repeat(np.arange(ranks), steps),
                "step": np.tile(np.arange(steps), ranks),
                "warmup": np.full(count, warmup),
                **{f"{phase}_s": np.zeros(count) for phase in PHASES},
                **{f"{phase}_s": seconds for phase, seconds in told},
                **done,
            }
            for name, values in columns.items():
                samples[name].append(values)


def _rank_rows(row: int, measurement: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for rank, host in enumerate(measurement["hosts"]):
        values = {name: column[rank] for name, column in measurement["per_rank"].items()}
        yield {"point": row, "rank": rank, "host": host} | values


def _intern(value: dict[str, Any], known: dict[str, int], distinct: list[dict[str, Any]]) -> int:
    key = digest(value)
    if key not in known:
        known[key] = len(distinct)
        distinct.append(value)
    return known[key]


def _refuse_mixture(environments: list[dict[str, Any]]) -> None:
    for key in MACHINE_KEYS:
        seen = sorted({str(found.get(key)) for found in environments})
        if len(seen) > 1:
            raise SaihError(
                f"the measurements differ in {key}: {' and '.join(seen)}; measure again with --fresh, "
                "or mix them knowingly with --mixed"
            )


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Text columns hold text, with "" for missing; all others numbers, with NaN for missing."""
    for name in frame.columns:
        values = frame[name]
        if not pd.api.types.is_numeric_dtype(values):
            text = values.map(lambda value: isinstance(value, str)).any()
            frame[name] = values.fillna("").map(_plain) if text else values.astype(np.float64)
    return frame


def _plain(value: object) -> str:
    """Text that HDF5 can hold: a log may have bytes in it that are no text, or NUL, which ends a string there."""
    return str(value).replace("\0", "\ufffd").encode(errors="replace").decode()


def _write(path: Path, sweep: Mapping[str, Any], frames: Mapping[str, pd.DataFrame], environments: list[Any]) -> None:
    with h5py.File(path, "w") as file:  # a name of our own, made by mkstemp: nobody else writes here
        file.attrs["saih_format"] = FORMAT
        told = json.dumps({name: value for name, value in sweep.items() if name not in NOT_STORED})
        file.attrs["sweep"], file.attrs["sweep_sha256"] = told, _sha256([told])
        texts = [json.dumps(value, sort_keys=True) for value in environments]
        file.create_dataset("environments", data=texts, dtype=h5py.string_dtype()).attrs["sha256"] = _sha256(texts)
        for name, frame in frames.items():
            group = file.create_group(name)
            group.attrs["columns"] = list(frame.columns)
            group.attrs["sha256"] = _table_sha256(frame)
            for column in frame.columns:
                _write_column(group, column, frame[column])
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _write_column(group: h5py.Group, name: str, values: pd.Series) -> None:
    text = not pd.api.types.is_numeric_dtype(values)
    data = values.to_numpy(dtype=object) if text else values.to_numpy()
    dataset = group.create_dataset(name, data=data, dtype=h5py.string_dtype() if text else None)
    unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), None)
    if unit:
        dataset.attrs["unit"] = unit


def _compare(path: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """The copy must say what the originals said, before anybody relies on it."""
    with _open(path) as file:
        for name, frame in frames.items():
            copy = _read_table(file, name)
            for column in frame.columns:
                if not copy[column].equals(frame[column].astype(copy[column].dtype)):
                    raise SaihError(f"column {name}/{column} did not survive writing; the job folders are untouched")
            _load_table(file, name)


def _load_table(file: h5py.File, name: str) -> pd.DataFrame:
    """A table whose content is what was written; SaihError otherwise."""
    with _table(f"table {name}"):
        frame = _read_table(file, name)
        _verify(_table_sha256(frame), file[name].attrs.get("sha256"))
        return frame


def _read_table(file: h5py.File, name: str) -> pd.DataFrame:
    columns = {}
    for column in file[name].attrs["columns"]:
        data = file[name][column]
        columns[column] = data.asstr()[:] if h5py.check_string_dtype(data.dtype) else data[:]
    return pd.DataFrame(columns)


def _verify(found: str, stored: object) -> None:
    if found != stored:
        raise SaihError("its checksum differs" if stored else "it has no checksum")


def _table_sha256(frame: pd.DataFrame) -> str:
    """SHA-256 over the columns in order: name, type, entries. Numbers are little-endian, texts UTF-8 ended by NUL."""
    total = hashlib.sha256()
    for name in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        values = frame[name].to_numpy() if numeric else frame[name].to_numpy(dtype=object)
        data = values.astype(values.dtype.newbyteorder("<")).tobytes() if numeric else _text(values)
        kind = values.dtype.newbyteorder("<").str if numeric else "text"
        total.update(_text([name, kind]) + data)
    return total.hexdigest()


def _sha256(texts: Iterable[str]) -> str:
    return hashlib.sha256(_text(texts)).hexdigest()


def _text(texts: Iterable[str]) -> bytes:
    return b"".join(text.encode() + b"\0" for text in texts)
