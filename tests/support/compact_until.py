"""A compaction that ends with SIGKILL: ``python -m tests.support.compact_until SETTINGS_JSON STEP CALL``.

It kills itself when `on_step` is called for the CALLth time with the name STEP.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from sphere.conf.settings import Settings
from sphere.jobs.compact import run
from tests.support.dying import killed_at


def main() -> None:
    """Run, and die on the way."""
    settings = Settings.model_validate_json(sys.argv[1])
    on_step = killed_at(sys.argv[2], int(sys.argv[3]))
    run(settings, after=timedelta(), vacuum=timedelta(), on_step=on_step)


if __name__ == "__main__":
    main()
