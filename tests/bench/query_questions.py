"""What `bench_query` asks any server: random questions about studies that it has, and how their answers are timed."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from tests.bench.hospital import DAYS, KINDS, Hospital
from tests.bench.query_client import association, looping, question, together
from tests.bench.query_report import Line, Report, Server

STUDY_KEYS = ("PatientName", "PatientID", "StudyDate", "ModalitiesInStudy", "AccessionNumber", "StudyInstanceUID")
KEYS = ("PatientID", "AccessionNumber", "StudyInstanceUID")
BROAD = 10_000
WARM = 3
"""Questions of each kind that warm caches up, at any server, and are not in the figures."""

Makers = dict[str, Callable[[], bytes]]


class Questions:
    """Random questions about some of the studies of a hospital, for a server that has `held` studies of it (these)."""

    def __init__(self, hospital: Hospital, studies: Sequence[int], *, held: int = 0, seed: int = 3) -> None:
        self._h = hospital
        self._studies = studies
        self._held = held or len(studies)
        self._chance = random.Random(seed)

    def makers(self) -> Makers:
        """A maker of one encoded identifier for each kind of question."""
        study = self._study
        return {
            "PatientID": lambda: study(PatientID=self.value("PatientID")),
            "AccessionNumber": lambda: study(AccessionNumber=self.value("AccessionNumber")),
            "StudyInstanceUID": lambda: study(StudyInstanceUID=self.value("StudyInstanceUID")),
            "100 by date and modality": lambda: study(StudyDate=self._days(100), ModalitiesInStudy="MR"),
            "name wild card": lambda: study(PatientName=self._name()),
            "series of a study": self._series,
            "instances of a series": self._instances,
        }

    def broad(self) -> bytes:
        """Studies of a range of dates, about BROAD of them."""
        return self._study(StudyDate=self._days(BROAD, share=1.0))

    def qido(self, keyword: str) -> str:
        """A path of QIDO-RS for studies with that value of some study."""
        return f"/dicom-web/studies?{keyword}={self.value(keyword)}"

    def _study(self, **match: str) -> bytes:
        return question("STUDY", dict.fromkeys(STUDY_KEYS, "") | match)

    def _pick(self) -> int:
        return int(self._chance.choice(self._studies))

    def value(self, keyword: str) -> str:
        """That of some study."""
        return str(self._h.study_values[keyword][self._pick()].as_py())

    def _name(self) -> str:
        family, _, given = self.value("PatientName").partition("=")[0].partition("^")
        return f"{family.lower()}^{given[:1]}*"

    def _days(self, answers: int, *, share: float = KINDS[1].share) -> str:
        """A range of dates in which about so many studies are: whole days, so rarely fewer."""
        spread = int(self._h.day[self._studies[-1]] - self._h.day[self._studies[0]] + 1)
        width = min(spread, max(1, math.ceil(answers * spread / (self._held * share))))
        first = int(self._h.day[self._studies[0]]) + self._chance.randrange(spread - width + 1)
        low, high = (np.datetime64("2004-01-01") + min(DAYS - 1, day) for day in (first, first + width - 1))
        return f"{str(low).replace('-', '')}-{str(high).replace('-', '')}"

    def _series(self) -> bytes:
        keys = ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription")
        return question("SERIES", dict.fromkeys(keys, "") | {"StudyInstanceUID": self.value("StudyInstanceUID")})

    def _instances(self) -> bytes:
        uid = self.value("StudyInstanceUID")
        keys = {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{uid}.1", "SOPInstanceUID": "", "InstanceNumber": ""}
        return question("IMAGE", keys)


def over_dimse(
    server: Server, port: int, ae_title: str, asked: Questions, options: argparse.Namespace, report: Report
) -> None:
    """Put all questions to a server over C-FIND."""
    makers = asked.makers()
    with association(port, ae_title) as requested:
        for what, make in makers.items():
            line, total = Line(), 0
            for turn in range(options.repeat + WARM):
                found = requested.ask(make())
                if turn >= WARM:
                    line.times.append(found.last_s * 1000)
                    line.firsts.append(found.first_s * 1000)
                    total += found.answers
            line.answers = total / options.repeat
            report.line(server, what, line)
        broad = min((requested.ask(asked.broad()) for _ in range(3)), key=lambda one: one.last_s)
    report.number(server, "broad query, first answer, ms", broad.first_s * 1000, f"of {broad.answers:,}")
    report.number(server, "broad query, answers/s", broad.answers / broad.last_s)
    mix = [makers[what]() for what in KEYS for _ in range(200)]
    rate = together(port, ae_title, mix, clients=16, seconds=options.seconds)
    report.number(server, "16 clients, queries/s", rate)


def beside_broad(server: Server, port: int, asked: Questions, repeat: int, report: Report) -> None:
    """PatientID while two other clients loop queries of 10,000 answers; which receivers they have is as it comes."""
    line, total = Line(), 0
    make = asked.makers()["PatientID"]
    broad = [asked.broad() for _ in range(20)]
    with association(port, "SPHERE") as requested, looping(port, "SPHERE", broad, clients=2) as answers:
        before, began = answers.value, time.perf_counter()
        for _ in range(repeat):
            found = requested.ask(make())
            line.times.append(found.last_s * 1000)
            line.firsts.append(found.first_s * 1000)
            total += found.answers
            time.sleep(0.01)  # a lookup now and then, whatever the others are at
        rate = (answers.value - before) / (time.perf_counter() - began)
    line.answers = total / repeat
    report.line(server, "PatientID, 2 ask broadly", line)
    report.number(server, "answers/s for them", rate)
