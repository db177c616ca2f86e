"""Which version of an instance is shown, and what is said of the others."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere.ingest.records import MemberRecord
from sphere.jobs.plan import Known, plan
from sphere.jobs.versions import Policy, order, place, settle

pytestmark = pytest.mark.unit

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def member(digest: str, second: float, offset: int = 0, *, uid: str = "1.2", bundle: str = "b") -> MemberRecord:
    """A member of which only the digest and the place in time matter."""
    return MemberRecord(
        bundle=bundle,
        offset=offset,
        length=10,
        dataset_offset=0,
        SOPInstanceUID=uid,
        SOPClassUID="",
        StudyInstanceUID="1",
        SeriesInstanceUID="1.1",
        TransferSyntaxUID="",
        sha256=digest,
        received_at=NOON + timedelta(seconds=second),
        source_aet="",
        origin="",
    )


CASES = {
    # arrivals (digest, second), policy: digest shown, pairs (kept, other) of conflicts
    "one": ([("a", 0)], "keep-first", "a", []),
    "same bytes": ([("a", 0), ("a", 1)], "replace", "a", []),
    "first kept": ([("a", 0), ("b", 1), ("c", 2)], "keep-first", "a", [("a", "b"), ("a", "c")]),
    "newest shown": ([("a", 0), ("b", 1), ("c", 2)], "replace", "c", [("b", "a"), ("c", "b")]),
    "old version sent again": ([("a", 0), ("b", 1), ("a", 2)], "replace", "b", [("b", "a")]),
    "out of order": ([("b", 1), ("a", 0)], "keep-first", "a", [("a", "b")]),
}


@pytest.mark.parametrize(("arrivals", "policy", "shown", "pairs"), CASES.values(), ids=CASES)
def test_settle(arrivals: list[tuple[str, float]], policy: Policy, shown: str, pairs: list[tuple[str, str]]) -> None:
    settled = settle("1.2", [member(digest, second, i) for i, (digest, second) in enumerate(arrivals)], policy)
    assert settled.winner.sha256 == shown
    assert [(row["kept_sha256"], row["other_sha256"]) for row in settled.conflicts] == pairs


arrivals = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=12)


@given(arrivals, st.sampled_from(["keep-first", "replace"]), st.randoms())
def test_settled_piece_by_piece_is_settled_at_once(
    found: list[tuple[str, int]], policy: Policy, chance: random.Random
) -> None:
    """What is kept between runs (the winner, and both sides of each conflict) is all that a later run needs."""
    members = [member(digest, second, offset) for offset, (digest, second) in enumerate(found)]
    left = list(members)
    chance.shuffle(left)
    by_place = {place(record): record for record in left}
    state: set[MemberRecord] = set()
    while left:
        state |= {left.pop() for _ in range(min(len(left), chance.randint(1, 3)))}
        settled = settle("1.2", state, policy)
        sides = {
            (row[f"{side}_bundle"], row[f"{side}_offset"]) for row in settled.conflicts for side in ("kept", "other")
        }
        state = {settled.winner, *(by_place[side] for side in sides if side in by_place)}
    assert settled == settle("1.2", members, policy)


def test_plan_sorts_out() -> None:
    known = {uid: Known("a", order(member("a", 5, 5, uid=uid))) for uid in ("same", "earlier", "other", "again")}
    records = [
        member("x", 0, 0, uid="new"),
        member("x", 1, 1, uid="new"),
        member("x", 0, 2, uid="two"),
        member("y", 0, 3, uid="two"),
        member("z", 0, 4, uid=""),
        member("a", 5, 5, uid="again"),
        member("a", 6, 6, uid="same"),
        member("a", 4, 7, uid="earlier"),
        member("b", 9, 8, uid="other"),
    ]
    result = plan(records, known)
    assert sorted(record.offset for record in result.new) == [0, 4]
    assert sorted(record.offset for record in result.contested) == [2, 3, 7, 8]
    assert [record.offset for record in result.present] == [5]
    assert {first: [copy.offset for copy in copies] for first, copies in result.copies.items()} == {("b", 0): [1]}
    assert result.duplicates == 1
