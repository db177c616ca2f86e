"""Group commit: every job once, one group at a time, errors to exactly their group."""

from __future__ import annotations

import threading

import pytest

from sphere.ingest.groups import GroupCommit, _Waiting

pytestmark = pytest.mark.unit


def run_threads(count: int, target) -> None:  # type: ignore[no-untyped-def]
    threads = [threading.Thread(target=target, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_every_job_is_committed_once_and_groups_do_not_overlap() -> None:
    committed: list[int] = []
    busy = threading.Lock()

    def commit(group: list[int]) -> None:
        assert busy.acquire(blocking=False)
        committed.extend(group)
        busy.release()

    groups = GroupCommit(commit)
    run_threads(16, lambda number: [groups.submit(number * 100 + at) for at in range(100)])
    assert sorted(committed) == list(range(1600))


def test_jobs_that_wait_are_committed_together() -> None:
    started, go = threading.Event(), threading.Event()
    sizes: list[int] = []

    def commit(group: list[int]) -> None:
        sizes.append(len(group))
        started.set()
        go.wait(60)

    groups: GroupCommit[int] = GroupCommit(commit)
    leader = threading.Thread(target=groups.submit, args=(0,))
    leader.start()
    started.wait(60)
    followers = [threading.Thread(target=groups.submit, args=(number,)) for number in range(1, 9)]
    for thread in followers:
        thread.start()
    while len(groups._queue) < 8:
        started.wait(0.001)
    go.set()
    for thread in [leader, *followers]:
        thread.join(60)
    assert sizes == [1, 8]


def test_an_error_reaches_its_group_only() -> None:
    def commit(group: list[int]) -> None:
        if any(job % 2 for job in group):
            raise ValueError(f"group of {len(group)}")

    groups = GroupCommit(commit)
    outcomes: dict[int, bool] = {}

    def send(number: int) -> None:
        try:
            groups.submit(number)
            outcomes[number] = True
        except ValueError:
            outcomes[number] = False

    run_threads(12, send)
    assert len(outcomes) == 12
    assert not any(good for number, good in outcomes.items() if number % 2)
    groups.submit(2)
    with pytest.raises(ValueError, match="group of 1"):
        groups.submit(3)
    groups.submit(4)


def test_an_interrupt_of_the_leader_does_not_leave_the_others_waiting() -> None:
    def commit(group: list[str]) -> None:
        if "interrupt" in group:
            raise KeyboardInterrupt("while leading")

    groups = GroupCommit(commit)
    with pytest.raises(KeyboardInterrupt, match="while leading"):
        groups.submit("interrupt")
    groups.submit("next")


@pytest.mark.parametrize("chosen", [False, True])
def test_an_interrupted_follower_gives_its_turn_to_the_next(chosen: bool) -> None:
    committed: list[int] = []
    groups: GroupCommit[int] = GroupCommit(committed.extend)
    interrupted = _Waiting(1)
    with groups._mutex:
        groups._led = True
        groups._queue.append(interrupted)
        if chosen:
            groups._choose_leader()
    next_one = threading.Thread(target=groups.submit, args=(2,))
    next_one.start()
    while len(groups._queue) < 2:
        threading.Event().wait(0.001)
    groups._give_up(interrupted)
    if not chosen:  # the leader of the moment ends
        with groups._mutex:
            groups._choose_leader()
    next_one.join(60)
    assert committed == [2]
    groups.submit(3)
    assert committed == [2, 3]
