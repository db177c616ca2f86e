"""Records of the audit journal of a web server that runs in this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson

from sphere.catalog.audit import AuditJournal


def recorded(journal: AuditJournal, root: Path, method: str, *, within_s: float = 30) -> list[dict[str, Any]]:
    """What is recorded of requests by this HTTP method, below a local storage's `root`, once there is some.

    A record says how many bytes went out, and so is made when the answer has been sent.
    """
    deadline = time.monotonic() + within_s
    while True:
        journal.flush()
        lines = [line for path in root.glob("audit/**/*.jsonl") for line in path.read_bytes().splitlines()]
        if found := [record for record in map(orjson.loads, lines) if record["method"] == method]:
            return found
        assert time.monotonic() < deadline, f"nothing is recorded of {method}"
        time.sleep(0.01)
