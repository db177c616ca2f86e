"""Orthanc with SQLite and with PostgreSQL beside SPHERE: every line of `bench_query` that they can answer."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sphere.conf.settings import Settings
from tests.bench.hospital import Hospital
from tests.bench.query_client import Web
from tests.bench.query_questions import KEYS, WARM, Questions, over_dimse
from tests.bench.query_report import Line, Report, Server
from tests.bench.query_servers import Ports, load, orthanc, orthanc_study, postgres


def qido(port: int, asked: Questions, repeat: int, keep: Callable[[str, Line], None]) -> None:
    """Single keys over the QIDO-RS of a server."""
    client = Web(port)
    for keyword in KEYS:
        keep(f"QIDO-RS by {keyword}", _over_http(client, lambda: asked.qido(keyword), repeat))  # noqa: B023  at once
    client.close()


def _over_http(client: Web, path: Callable[[], str], repeat: int, counted: bytes = b'"0020000D"') -> Line:
    line, total = Line(), 0
    for turn in range(repeat + WARM):
        found = client.ask(path(), counted=counted)
        if turn >= WARM:
            line.times.append(found.last_s * 1000)
            total += found.answers
    line.answers = total / repeat
    return line


def rivals(settings: Settings, hospital: Hospital, options: argparse.Namespace, report: Report) -> list[int]:
    """Both Orthancs, each on what it loads of a catalog within --load seconds; gives the studies that the last has."""
    known: list[int] = []
    numbers = {uid: number for number, uid in enumerate(hospital.study_uid.to_pylist())}
    with _folder(options.rivals_folder) as folder:
        for name, start in (("Orthanc + SQLite", _sqlite), ("Orthanc + PostgreSQL", _postgresql)):
            with start(folder) as ports:
                began = time.monotonic()
                first = hospital.study_uid[int(hospital.large()[0])].as_py()
                loaded = load(ports.dicom, settings, folder / f"{name}.json", seconds=options.load, first=first)
                print(
                    f"\n{name}: {len(loaded.studies):,} studies, {loaded.instances:,} instances loaded in "
                    f"{loaded.seconds:.0f} s, {time.monotonic() - began:.0f} of them now",
                    flush=True,
                )
                known = sorted(numbers[uid] for uid in loaded.studies)
                server = report.server(name, len(known))
                _ask(server, ports, hospital, known, options, report)
    return known


def _ask(
    server: Server,
    ports: Ports,
    hospital: Hospital,
    known: Sequence[int],
    options: argparse.Namespace,
    report: Report,
) -> None:
    asked = Questions(hospital, known)
    over_dimse(server, ports.dicom, "ORTHANC", asked, options, report)
    qido(ports.http, asked, options.repeat, lambda what, line: report.line(server, what, line))
    large = int(hospital.large()[0])
    uid, patient = (str(hospital.study_values[name][large].as_py()) for name in ("StudyInstanceUID", "PatientID"))
    client = Web(ports.http)
    path = f"/studies/{orthanc_study(patient, uid)}/instances"  # each with its file's name and size
    line = _over_http(client, lambda: path, min(options.repeat, 20), counted=b'"FileUuid"')
    client.close()
    report.line(server, "where the bytes of 1,000 are", line)


@contextmanager
def _sqlite(folder: Path) -> Iterator[Ports]:
    with orthanc(folder / "sqlite") as ports:
        yield ports


@contextmanager
def _postgresql(folder: Path) -> Iterator[Ports]:
    with postgres(folder / "postgres") as database, orthanc(folder / "postgresql", postgresql=database) as ports:
        yield ports


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """Where the rivals' databases are, and what each was given: temporary, or kept for the next time."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="bench-query-") as name:
        yield Path(name)
