"""What `bench_query` measured: a line for each question as it is answered, in the report file at once, and one table.

``python -m tests.bench.query_report FILE`` prints the table of what an interrupted run left behind.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from tests.bench.query_client import percentile

TIMES = 3.0
"""How many times as fast as every rival SPHERE is asked to be."""

ASKED: dict[str, str] = {
    "index from nothing, s": "60",
    "nightly batch in the answers, s": "2",
    "memory of who serves, MiB": "2,560",
    "PatientID": "5 / 20",
    "AccessionNumber": "5 / 20",
    "StudyInstanceUID": "5 / 20",
    "QIDO-RS by PatientID": "5 / 20",
    "QIDO-RS by AccessionNumber": "5 / 20",
    "QIDO-RS by StudyInstanceUID": "5 / 20",
    "100 by date and modality": "40",
    "name wild card": "25",
    "series of a study": "",
    "instances of a series": "15",
    "where the bytes of 1,000 are": "50",
    "broad query, first answer, ms": "50",
    "broad query, answers/s": "5,000",
    "16 clients, queries/s": "400",
}
"""Lines of the table, in their order, and what is asked for at 1,000,000 studies: ms as p50 / p99 where no unit is
named."""
_RATES = ("answers/s", "queries/s")


@dataclass
class Line:
    """Times of one question to its last and to its first answer, in ms, and how many answers it had on average."""

    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    answers: float = 0.0

    def __str__(self) -> str:
        p50, p95, p99 = (percentile(self.times, share) for share in (0.5, 0.95, 0.99))
        first = f"  first p99 {percentile(self.firsts, 0.99):6.1f} ms" if self.firsts else ""
        return f"p50 {p50:8.2f}  p95 {p95:8.2f}  p99 {p99:8.2f} ms  {self.answers:8.1f} answers{first}"


@dataclass
class Server:
    """What one server gave, by the lines of ASKED and others: a number, or p50 and p99 in ms."""

    name: str
    studies: int
    ours: bool
    found: dict[str, tuple[float, ...]] = field(default_factory=dict)


class Report:
    """Prints, keeps, and puts side by side; each line is a line of JSON in the file as soon as it is there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.servers: list[Server] = []

    def began(self, heading: str) -> None:
        """A run begins: what the file has from before is no part of it."""
        print(heading, flush=True)
        self._keep({"run": heading})

    def server(self, name: str, studies: int, *, ours: bool = False) -> Server:
        """What comes next is from this one."""
        server = Server(name, studies, ours)
        self.servers.append(server)
        self._keep({"server": name, "studies": studies, "ours": ours})
        return server

    def line(self, server: Server, what: str, line: Line) -> None:
        """The times of a question."""
        shares = [percentile(line.times, share) for share in (0.5, 0.95, 0.99)]
        server.found[what] = (shares[0], shares[2])
        print(f"  {server.name:22} {what:30} {line}", flush=True)
        self._keep({"what": what, "found": server.found[what], "p95": shares[1], "answers": line.answers})

    def number(self, server: Server, what: str, value: float, note: str = "") -> None:
        """A single number, of which the line has the unit."""
        server.found[what] = (value,)
        print(f"  {server.name:22} {what:30} {value:,.2f} {note}", flush=True)
        self._keep({"what": what, "found": (value,), "note": note})

    def _keep(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            at = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}"
            with self._path.open("ab") as file:
                file.write(orjson.dumps({"at": at} | record) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """The last run of a report file."""
        report = cls(None)
        for text in path.read_bytes().splitlines():
            record = orjson.loads(text)
            if "run" in record:
                report.servers = []
            elif "server" in record:
                report.servers.append(Server(record["server"], record["studies"], record["ours"]))
            else:
                report.servers[-1].found[record["what"]] = tuple(record["found"])
        return report

    def table(self) -> str:
        """Every line: what is asked, what each server gave, and how many times as fast SPHERE was, by p50 and by p99,
        with the same questions and with the largest catalog."""
        ours = [server for server in self.servers if server.ours]
        rivals = [server for server in self.servers if not server.ours]
        heads = ["", "asked", *(f"{server.name}, {server.studies:,}" for server in (*ours, *rivals))]
        against = [(rival, us) for rival in rivals for us in _beside(ours)]
        heads += [f"{us.name}, {us.studies:,} : {rival.name}" for rival, us in against]
        rows = [heads]
        for what in ASKED:
            shown = [_shown(server.found.get(what)) for server in (*ours, *rivals)]
            times = [_times(what, us.found.get(what), rival.found.get(what)) for rival, us in against]
            rows.append([what, ASKED[what], *shown, *times])
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(heads), *rows[1:]])

    def slower(self) -> list[str]:
        """Lines on which SPHERE, asked the same, is not TIMES as fast as a rival by p50."""
        same = [server for server in self.servers if server.ours][-1:]
        return [
            f"{what}: {ratio:.1f} x {rival.name}"
            for us in same
            for rival in self.servers
            if not rival.ours
            for what in ASKED
            for ratio in ratios(what, us.found.get(what), rival.found.get(what))[:1]
            if ratio < TIMES
        ]


def _beside(ours: list[Server]) -> list[Server]:
    """The one that was asked the same as the rivals, which is the last, and the one with the largest catalog."""
    largest = max(ours, key=lambda server: server.studies, default=None)
    return ours[-1:] if largest is None or largest is ours[-1] else [ours[-1], largest]


def ratios(what: str, us: tuple[float, ...] | None, them: tuple[float, ...] | None) -> list[float]:
    """How many times as fast we are, by each number that both have."""
    rate = what.endswith(_RATES)
    return [a / b if rate else b / a for a, b in zip(us or (), them or (), strict=False)]


def _times(what: str, us: tuple[float, ...] | None, them: tuple[float, ...] | None) -> str:
    return ", ".join(f"{ratio:.1f}" for ratio in ratios(what, us, them))


def _shown(found: tuple[float, ...] | None) -> str:
    return " / ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in found or ())


def main() -> None:
    """Print the table of a report file."""
    report = Report.read(Path(sys.argv[1]))
    print(report.table())
    print("\n".join(report.slower()))


if __name__ == "__main__":
    main()
