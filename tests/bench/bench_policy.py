"""What policy costs an instance on its way in, in microseconds of one thread: rules, and looking for copies.

python -m tests.bench.bench_policy [INSTANCES]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere.catalog.known import KnownInstances
from sphere.catalog.service import QueryService
from sphere.conf.loading import from_dict
from sphere.ingest.members import NewMember, with_digest
from sphere.scp.policy import Policy
from tests.support.extracted import extract
from tests.support.landing import land, new_member, slices

WITHOUT_HEADER = [{"calling_ae": "CT*", "sop_class": "CTImageStorage", "action": "tag", "collection": "a"}] * 5
WITH_HEADER = [*WITHOUT_HEADER, {"keys": {"PatientID": "TRIAL*"}, "action": "tag", "collection": "b"}]


def timed(what: str, members: Iterable[NewMember], call: Callable[[NewMember], Any]) -> None:
    """Print the time of a call, and the time without the first one."""
    times = []
    for member in members:
        began = time.perf_counter()
        call(member)
        times.append(1e6 * (time.perf_counter() - began))
    rest = sorted(times[1:])
    median, mean = rest[len(rest) // 2], sum(rest) / len(rest)
    print(f"{what:<52} first {times[0]:8.0f} us, then median {median:6.1f}, mean {mean:6.1f}")


def main() -> None:
    """Measure on an archive in a temporary folder, one study catalogued and one not."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    members = [with_digest(replace(new_member(data), source_aet="CT1")) for data in slices(count)]
    fresh = [with_digest(new_member(data)) for data in slices(count, seed=2, study=2)]
    with tempfile.TemporaryDirectory() as folder:
        settings = from_dict({}, base=Path(folder))
        for name, rules in (("no rules", []), ("5 rules without keys", WITHOUT_HEADER), ("and a key", WITH_HEADER)):
            policy = Policy(from_dict({"rules": rules}, base=Path(folder)))
            timed(f"rules: {name}", members, lambda member, policy=policy: policy.admit(member, via="dimse"))
        land(settings, members)
        extract(settings)
        with QueryService(settings) as finder:
            finder._indexes.current()
            known = KnownInstances(settings, finder)

            def meet(member: NewMember, sender: str) -> None:
                known.meet(member.SOPInstanceUID, member.StudyInstanceUID, member.sha256, sender=sender)

            timed("copies: instances of a new study", fresh, lambda member: meet(member, "one"))
            timed("copies: another association, the same study", fresh, lambda member: meet(member, "two"))
            senders = iter(map(str, range(count)))
            timed("copies: an association for each instance", fresh, lambda member: meet(member, next(senders)))
            timed("copies: a catalogued study sent again, bytes read", members, lambda member: meet(member, "three"))


if __name__ == "__main__":
    main()
