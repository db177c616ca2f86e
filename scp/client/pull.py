"""Lists of what to retrieve, one request each: what of it is already here, and tries with back-off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sphere.catalog.query import Model, Query
from sphere.catalog.schema import Level
from sphere.conf.errors import BadRequest, PeerError, QueryError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.client.query import find
from sphere.scp.client.retrieve import Progress
from sphere.scp.identifier import parse_keys

KEYS: Mapping[Level, tuple[str, ...]] = {
    "PATIENT": ("PatientID",),
    "STUDY": ("StudyInstanceUID",),
    "SERIES": ("StudyInstanceUID", "SeriesInstanceUID"),
    "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
}
BACK_OFF_S = (1.0, 4.0, 15.0)  # seconds before the second and further tries
UIDS_AT_ONCE = 500  # of an identifier: some peers take no value above 64 KiB (PS3.5 6.2)
SUCCESS, WARNING, CANCELLED = 0x0000, 0xB000, 0xFE00


@dataclass(frozen=True, slots=True)
class Target:
    """One request: unique keys of `level`. `sop_classes` are those that are in it, where that is known."""

    level: Level
    keys: Mapping[str, str]
    sop_classes: frozenset[str] = frozenset()

    def __str__(self) -> str:
        value = self.keys[KEYS[self.level][-1]]
        first, *others = value.split("\\")
        return f"{self.level} {first}" + (f" and {len(others)} more" if others else "")


@dataclass(slots=True)
class Outcome:
    """What became of a target; `error` is "" where everything arrived."""

    target: Target
    completed: int = 0
    warning: int = 0
    failed: int = 0
    tries: int = 0
    error: str = ""
    failed_uids: tuple[str, ...] = field(default=())


def read_targets(lines: Iterable[str], level: Level) -> list[Target]:
    """A target for each line of a list: UIDs from the study down to `level`, separated by commas or blanks.

    At level PATIENT a line is a PatientID, which may hold both. Empty lines and what follows # are passed over.
    Raises QueryError for a line with another number of UIDs.
    """
    targets = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        values = [text] if level == "PATIENT" else text.replace(",", " ").split()
        if len(values) != len(KEYS[level]):
            raise QueryError(f"line {number}: level {level} needs {' and '.join(KEYS[level])}")
        targets.append(Target(level, dict(zip(KEYS[level], values, strict=True))))
    return targets


def find_targets(peer: Peer, keys: Mapping[str, str], level: Level, *, settings: Settings) -> list[Target]:
    """The target that `keys` are, if they are unique keys; else what a C-FIND says that match them.

    Raises QueryError for a bad key, BadRequest where the keys match everything that the peer has, and PeerError.
    """
    if not Query.build("IMAGE", parse_keys(keys), empty_values=True, multiple_values=True).predicate():
        raise BadRequest("these keys choose everything that the peer has: give one a value, or --from a list of UIDs")
    names = KEYS[level]
    single = all(value and not set("*?") & set(value) for value in keys.values())
    if single and set(keys) == set(names):
        return [Target(level, dict(keys))]
    model: Model = "PATIENT_ROOT" if level == "PATIENT" else "STUDY_ROOT"
    asked = {**dict.fromkeys(names, ""), **keys}
    found = find(peer, asked, settings=settings, level=level, model=model)
    return [Target(level, {name: str(match.get(name) or asked[name]) for name in names}) for match in found]


class Inventory:
    """What a peer says that it has (C-FIND, down to instances)."""

    def __init__(self, peer: Peer, settings: Settings) -> None:
        self._peer = peer
        self._settings = settings

    def instances(self, target: Target) -> dict[tuple[str, str], dict[str, str]]:
        """SOP Instance UID to SOP Class UID of a target's instances, by study and series; raises PeerError."""
        found = {}
        for study in self._studies(target):
            for series in self._asked(target, "SERIES", {"StudyInstanceUID": study}, "SeriesInstanceUID"):
                keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
                found[study, series] = self._images(target, keys)
        return found

    def _studies(self, target: Target) -> list[str]:
        if target.level == "PATIENT":
            answers = find(
                self._peer, {**target.keys, "StudyInstanceUID": ""}, settings=self._settings,
                level="STUDY", model="PATIENT_ROOT",
            )  # fmt: skip
            return [str(answer.StudyInstanceUID) for answer in answers if "StudyInstanceUID" in answer]
        return target.keys["StudyInstanceUID"].split("\\")

    def _asked(self, target: Target, level: Level, keys: Mapping[str, str], name: str) -> list[str]:
        if name in target.keys:
            return target.keys[name].split("\\")
        answers = find(self._peer, {**keys, name: ""}, settings=self._settings, level=level)
        return [str(answer[name].value) for answer in answers if name in answer]

    def _images(self, target: Target, keys: Mapping[str, str]) -> dict[str, str]:
        asked = {**keys, "SOPInstanceUID": "", "SOPClassUID": ""}
        wanted = set(target.keys["SOPInstanceUID"].split("\\")) if target.level == "IMAGE" else None
        answers = find(self._peer, asked, settings=self._settings, level="IMAGE")
        return {
            str(answer.SOPInstanceUID): str(answer.get("SOPClassUID") or "")
            for answer in answers
            if "SOPInstanceUID" in answer and (wanted is None or str(answer.SOPInstanceUID) in wanted)
        }


def missing(target: Target, there: Mapping[tuple[str, str], Mapping[str, str]], here: set[str]) -> list[Target]:
    """What of a target to ask for: all of it where nothing of it is here, else the instances that are not."""
    every = {uid for uids in there.values() for uid in uids}
    classes = frozenset(name for uids in there.values() for name in uids.values() if name)
    if not every & here:
        return [replace(target, sop_classes=classes)]
    targets = []
    for (study, series), uids in there.items():
        left = sorted(uids.keys() - here)
        for start in range(0, len(left), UIDS_AT_ONCE):
            values = (study, series, "\\".join(left[start : start + UIDS_AT_ONCE]))
            targets.append(Target("IMAGE", dict(zip(KEYS["IMAGE"], values, strict=True)), classes))
    return targets


def retrieve(
    target: Target,
    ask: Callable[[Target], Iterator[Progress]],
    *,
    on_progress: Callable[[Progress], None],
    tries: int,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Ask for a target, again where nothing of it came or the association was lost, with growing pauses."""
    outcome = Outcome(target)
    for number in range(tries):
        if number:
            sleep(BACK_OFF_S[min(number, len(BACK_OFF_S)) - 1])
        outcome = Outcome(target, tries=number + 1)
        try:
            for progress in ask(target):
                on_progress(progress)
                _note(outcome, progress)
        except PeerError as error:
            outcome.error = str(error)
            continue
        if not outcome.error or outcome.completed or outcome.warning:
            break
    return outcome


def _note(outcome: Outcome, progress: Progress) -> None:
    outcome.completed, outcome.failed = progress.completed, progress.failed
    outcome.warning, outcome.failed_uids = progress.warning, progress.failed_uids
    if progress.pending or progress.status == SUCCESS or (progress.status == WARNING and not progress.failed):
        outcome.error = ""
        return
    what = {WARNING: f"{progress.failed} instances failed", CANCELLED: "cancelled by the peer"}
    said = what.get(progress.status, f"status 0x{progress.status:04X}")
    outcome.error = said + (f" ({progress.comment})" if progress.comment else "")


def failures(outcomes: Sequence[Outcome]) -> list[dict[str, str | int]]:
    """One row for each target that failed, with the instances where the peer named them."""
    return [
        {
            "what": str(outcome.target),
            "completed": outcome.completed + outcome.warning,
            "failed": outcome.failed,
            "tries": outcome.tries,
            "why": outcome.error,
            "instances": " ".join(outcome.failed_uids[:10]) + (" ..." if len(outcome.failed_uids) > 10 else ""),
        }
        for outcome in outcomes
        if outcome.error
    ]
