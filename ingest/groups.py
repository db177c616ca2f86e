"""Group commit: many threads hand in jobs, one of them at a time does all that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class _Waiting(Generic[Job]):
    """One that came while a group was committed."""

    __slots__ = ("done", "error", "job", "leads", "turn")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.done = False
        self.leads = False  # chosen to commit the next group
        self.error: BaseException | None = None
        self.turn = threading.Lock()  # released when the job is done, or when it is this thread's turn to lead
        self.turn.acquire()


class GroupCommit(Generic[Job]):
    """Calls `commit` with every waiting job, never twice at the same time.

    The thread that finds nobody at work leads: it takes the whole queue and commits it, while later ones queue up for
    the next leader. A thread alone pays for no switch to another thread. What `commit` raises, each job of that group
    raises.
    """

    def __init__(self, commit: Callable[[list[Job]], None]) -> None:
        self._commit = commit
        self._mutex = threading.Lock()
        self._queue: list[_Waiting[Job]] = []
        self._led = False

    def submit(self, job: Job) -> None:
        """Return when `job` was committed; raises what `commit` raised for its group."""
        with self._mutex:
            mine = None
            if self._led:
                mine = _Waiting(job)
                self._queue.append(mine)
            self._led = True
        if mine is None:  # nobody waits, as nobody leads
            try:
                self._commit([job])
            finally:
                with self._mutex:
                    self._choose_leader()
            return
        try:
            mine.turn.acquire()
        except BaseException:  # Ctrl-C in the main thread
            self._give_up(mine)
            raise
        if not mine.done:
            self._lead(mine)
        if mine.error is not None:
            raise mine.error

    def _lead(self, mine: _Waiting[Job]) -> None:
        with self._mutex:
            group, self._queue = self._queue, []
        try:
            self._commit([waiting.job for waiting in group])
        except BaseException as error:  # noqa: BLE001  whatever it is, every thread of the group has to hear of it
            for waiting in group:
                waiting.error = error
        with self._mutex:
            self._choose_leader()
        for waiting in group:
            waiting.done = True
            if waiting is not mine:
                waiting.turn.release()

    def _choose_leader(self) -> None:
        self._led = bool(self._queue)
        if self._led:
            self._queue[0].leads = True
            self._queue[0].turn.release()

    def _give_up(self, mine: _Waiting[Job]) -> None:
        """Take an interrupted job out of the queue; one that is being committed already stays committed."""
        with self._mutex:
            if mine in self._queue:
                self._queue.remove(mine)
                if mine.leads:
                    self._choose_leader()
