"""The report of `make bench-query`: what an interrupted run leaves behind, and the times beside the rivals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.query_report import ASKED, Line, Report

pytestmark = pytest.mark.unit


def filled(path: Path) -> Report:
    report = Report(path)
    report.began("a run")
    for name, studies, ours, key_ms, rate in (
        ("SPHERE", 1_000_000, True, 0.4, 5000.0),
        ("Orthanc", 900, False, 4.0, 200.0),
        ("SPHERE, same questions", 1_000, True, 0.5, 500.0),
    ):
        server = report.server(name, studies, ours=ours)
        report.line(server, "PatientID", Line([key_ms] * 99 + [2 * key_ms], answers=1.0))
        report.number(server, "16 clients, queries/s", rate)
    return report


def test_what_was_measured_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    report = Report(path)
    report.began("an earlier run")
    report.number(report.server("SPHERE", 10, ours=True), "index from nothing, s", 1.0)
    assert Report.read(path).servers == report.servers
    report = filled(path)
    assert Report.read(path).servers == report.servers  # the last run only


def test_times_as_fast(tmp_path: Path) -> None:
    report = filled(tmp_path / "report.jsonl")
    lines = {line.split(" | ")[0].strip("| "): line for line in report.table().splitlines()}
    assert set(ASKED) <= set(lines)
    assert lines["PatientID"].endswith("| 4.00 / 8.00 | 8.0, 8.0 | 10.0, 10.0 |")
    assert lines["16 clients, queries/s"].endswith("| 2.5 | 25.0 |")
    assert report.slower() == ["16 clients, queries/s: 2.5 x Orthanc"]
