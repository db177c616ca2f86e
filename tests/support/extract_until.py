"""An extraction that ends with SIGKILL: ``python -m tests.support.extract_until SETTINGS_JSON STEP CALL [tombstones]``.

It kills itself when `on_step` is called for the CALLth time with the name STEP. Where there are tombstones to be
followed, Spark has to do before "plan" too.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sphere.conf.settings import Settings
from sphere.jobs.extract import STEPS, run
from sphere.jobs.session import spark_session


def main() -> None:
    """Run, and die on the way."""
    settings = Settings.model_validate_json(sys.argv[1])
    step, left = sys.argv[2], int(sys.argv[3])

    def on_step(name: str, *_: object) -> None:
        nonlocal left
        left -= name == step
        if name == step and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    # Whether it dies before Spark has anything to do.
    early = sys.argv[4:] != ["tombstones"] and STEPS.index(step) < STEPS.index("headers") and left == 1
    spark: Any = None if early else spark_session(settings, app_name="extract until")
    run(spark, settings, on_step=on_step)


if __name__ == "__main__":
    main()
