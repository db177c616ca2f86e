"""The process that atheris takes over: ``python -m tests.fuzz.engine TARGET [libFuzzer's arguments]``."""

from __future__ import annotations

import logging
import sys
import tracemalloc
import warnings

import atheris

with atheris.instrument_imports(include=["sphere.ingest", "sphere.catalog", "sphere.scp"]):
    from tests.fuzz.targets import TARGETS, TRACED


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if sys.argv[1] in TRACED:
        tracemalloc.start()  # once: each start and stop leaves 8 KiB behind
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
