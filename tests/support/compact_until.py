"""A compaction that ends with SIGKILL: ``python -m tests.support.compact_until SETTINGS_JSON STEP CALL``.

It kills itself when `on_step` is called for the CALLth time with the name STEP.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

from sphere.conf.settings import Settings
from sphere.jobs.compact import run


def main() -> None:
    """Run, and die on the way."""
    settings = Settings.model_validate_json(sys.argv[1])
    step, left = sys.argv[2], int(sys.argv[3])

    def on_step(name: str, *_: object) -> None:
        nonlocal left
        left -= name == step
        if name == step and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    run(settings, after=timedelta(), vacuum=timedelta(), on_step=on_step)


if __name__ == "__main__":
    main()
