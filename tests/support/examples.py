"""How many generated examples a test tries: few in each run, many where one has an hour (`make test-long`)."""

from __future__ import annotations

import os
from typing import Final

FACTOR: Final = int(os.environ.get("SPHERE_TEST_EXAMPLES") or 1)
"""How many times as many as a test says."""
LONG: Final = FACTOR > 1
"""Whether they are others with each run where they are always the same else."""


def examples(count: int) -> int:
    """For `max_examples` of hypothesis."""
    return count * FACTOR
