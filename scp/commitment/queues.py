"""Which reports go out now: those to one requester one after the other, several requesters at once.

A requester that does not answer holds up its own reports only, and is asked more rarely each time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sphere.scp.commitment.transactions import Waiting

BACK_OFF_S = (5.0, 15.0, 60.0, 300.0, 900.0)  # seconds before further tries; the last again and again
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one report: whether the requester answered, and the seconds for which it is not to be tried again, whatever
    its file says."""

    reachable: bool = True
    after_s: float = 0.0


@dataclass(slots=True)
class _Requester:
    """What is known of one with reports."""

    busy: bool = False
    silent: int = 0  # reports that it did not answer, one after the other
    due: float = 0.0  # monotonic time of the next try


@dataclass(slots=True)
class Queues:
    """Calls `report` for what is due, in at most `most` threads at once, and `give_up` for what else is due to a
    requester that did not answer."""

    report: Callable[[Waiting], Outcome]
    give_up: Callable[[Waiting], None]
    most: int
    clock: Callable[[], float] = time.monotonic
    _requesters: dict[str, _Requester] = field(default_factory=dict)
    _later: dict[str, float] = field(default_factory=dict)  # by file, when it may be tried again (monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, waiting: Sequence[Waiting]) -> None:
        """Begin what is due of everything that waits."""
        now, by_requester = time.time(), dict[str, list[Waiting]]()
        with self._lock:
            names = {one.name for one in waiting}
            self._later = {name: due for name, due in self._later.items() if name in names}
            for one in waiting:
                if one.due <= now and self.clock() >= self._later.get(one.name, 0.0):
                    by_requester.setdefault(one.requester, []).append(one)
            heard = {one.requester for one in waiting}
            self._requesters = {name: one for name, one in self._requesters.items() if one.busy or name in heard}
            for name, due in by_requester.items():
                requester = self._requesters.setdefault(name, _Requester())
                free = sum(one.busy for one in self._requesters.values()) < self.most
                if free and not requester.busy and self.clock() >= requester.due:
                    threading.Thread(target=self._run, args=(requester, due), daemon=True, name="report").start()
                    requester.busy = True

    def _run(self, requester: _Requester, due: Sequence[Waiting]) -> None:
        """Report to one requester, until it does not answer."""
        try:
            rest = iter(due)
            for one in rest:
                outcome = self._one(one)
                with self._lock:
                    self._later[one.name] = self.clock() + outcome.after_s
                    requester.silent = 0 if outcome.reachable else requester.silent + 1
                if not outcome.reachable:
                    break
            for one in rest:
                self.give_up(one)
        finally:
            with self._lock:
                if requester.silent:
                    pause_s = BACK_OFF_S[min(requester.silent, len(BACK_OFF_S)) - 1]
                    requester.due = self.clock() + pause_s
                requester.busy = False

    def _one(self, waiting: Waiting) -> Outcome:
        try:
            return self.report(waiting)
        except Exception as error:  # noqa: BLE001  a defect of ours: the others go on
            log.error("report failed by %s", type(error).__name__)
            return Outcome(after_s=BACK_OFF_S[-1])
