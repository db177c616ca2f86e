"""What keys cost that no column holds, and fuzzy names: against a key that has a column, in the same run.

    python -m tests.bench.bench_matching [--instances 5000] [--names 1000000]

The catalog is one of small CT slices, a study of 50 each; queries read every candidate, as no other key narrows them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from sphere.catalog.fuzzy import FuzzyName
from sphere.catalog.match import PersonName
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Query
from tests.bench.bench_files import PER_STUDY, fill
from tests.support.extracted import extract
from tests.support.landing import archive

KEYS: dict[str, dict[str, Any]] = {
    "a column (StudyDescription)": {"StudyDescription": "x*"},
    "a sequence (ReferencedStudySequence)": {"ReferencedStudySequence": {"ReferencedSOPInstanceUID": "1.2.3"}},
    "a private tag": {"00291001": "x"},
    "a private tag by its creator": {"00291001,ACME": "x"},
}
LAST = ("smith", "mueller", "garcia", "wang", "tanaka", "petrov", "schmidt", "lopez", "nguyen", "o'neil")
FIRST = ("john", "anna", "maria", "peter", "wei", "yuki", "ivan", "fatima", "jose", "eva")


def fastest(ask: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return min(taken)


def without_columns(queries: Queries, instances: int) -> None:
    """Print what each kind of key costs at STUDY and IMAGE level."""
    for level in ("STUDY", "IMAGE"):
        for label, match in KEYS.items():
            if level == "STUDY" or "StudyDescription" not in match:
                query = Query.build(level, match)  # type: ignore[arg-type]
                took = fastest(lambda query=query: queries.count(query))  # type: ignore[misc]
                print(f"{level:6} {label:40} {1000 * took:8.1f} ms, {1e6 * took / instances:6.1f} us an instance")


def names(count: int) -> None:
    """Print what fuzzy names cost among so many, beside a wild card."""
    chance = random.Random(1)
    made = [f"{chance.choice(LAST)}{number}^{chance.choice(FIRST)}" for number in range(count)]
    with duckdb.connect(config={"threads": 2}) as db:
        db.register("made", pa.table({"n": made}))
        db.execute("CREATE TABLE names AS SELECT n FROM made")
        for label, test in (
            ("wild card  Mueller*", PersonName(("mueller*",))),
            ("fuzzy      muller", FuzzyName.parse("muller")),
            ("fuzzy      jon muller", FuzzyName.parse("jon muller")),
        ):
            assert test is not None
            sql, values = test.sql("n")
            ask = f"SELECT count(*) FROM names WHERE {sql}"
            took = fastest(lambda ask=ask, values=values: db.execute(ask, values).fetchall())  # type: ignore[misc]
            print(f"{label:30} {1000 * took:8.0f} ms of {count:,} names")


def main() -> None:
    """Fill a temporary archive, catalogue it, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=5000)
    parser.add_argument("--names", type=int, default=1_000_000)
    options = parser.parse_args()
    names(options.names)
    with tempfile.TemporaryDirectory() as folder:
        settings = archive(Path(folder))
        fill(settings, options.instances)
        extract(settings)
        print(f"{options.instances} instances, {options.instances // PER_STUDY} studies")
        with open_queries(settings) as queries:
            without_columns(queries, options.instances)


if __name__ == "__main__":
    main()
