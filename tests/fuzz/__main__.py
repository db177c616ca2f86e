"""Coverage-guided fuzzing with atheris (libFuzzer): ``python -m tests.fuzz [TARGET|all] [SECONDS]``.

It starts from tests/fuzz/corpus and runs each target for SECONDS. An input that fails is written to
tests/fuzz/corpus/TARGET as crash-… (or oom-…, timeout-…), where a unit test runs it from then on.
``python -m tests.fuzz seeds`` writes the corpus' generated part anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("pdus", "commands", "identifiers", "headers", "bundles", "multipart", "metadata", "parameters")
MAX_INPUT = 4096  # bytes
MEMORY_MB = 1024  # of the whole process; beyond it an input has failed
INPUT_S = 60  # seconds for one input, generous: the machine may be busy


def fuzz(name: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """Run one target in a process of its own; its status is 0 where nothing was found, its output libFuzzer's.

    A shell stands between: what a process needed at most (getrusage(2), libFuzzer's limit) counts the process that
    started it by vfork(2) and exec(2) too, and whoever runs tests may have needed more than the limit.
    """
    with tempfile.TemporaryDirectory(prefix="sphere-fuzz-") as found:
        return subprocess.run(
            ["/bin/sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-m", "tests.fuzz.engine", name, found,
             str(CORPUS / name), f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}",
             f"-rss_limit_mb={MEMORY_MB}", f"-timeout={INPUT_S}",
             f"-artifact_prefix={CORPUS / name}{os.sep}", "-print_final_stats=1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command line; the status is 1 where a target failed, 2 where the arguments are wrong."""
    name, seconds, *more = [*arguments, *("all", "60")[len(arguments) :]]
    if name == "seeds" and not arguments[1:]:
        write_seeds()
        return 0
    if name not in (*NAMES, "all") or not seconds.isdigit() or more:
        print(f"usage: python -m tests.fuzz [{'|'.join(NAMES)}|all] [SECONDS]", file=sys.stderr)
        return 2
    failed = [one for one in (NAMES if name == "all" else (name,)) if not _run(one, int(seconds))]
    return bool(failed)


def _run(name: str, seconds: int) -> bool:
    """Fuzz, and say on one line what came of it; the whole output where something was found."""
    run = fuzz(name, max(1, seconds))
    stats = dict(re.findall(r"^stat::(\w+): +(\d+)$", run.stdout, re.MULTILINE))
    executed, new = stats.get("number_of_executed_units", "?"), stats.get("new_units_added", "?")
    outcome = "nothing found" if run.returncode == 0 else f"FAILED with status {run.returncode}"
    print(
        f"{name:12} {executed:>9} inputs, {new:>5} of new coverage, {stats.get('peak_rss_mb', '?')} MB: {outcome}",
        flush=True,
    )
    if run.returncode:
        print(run.stdout)
    return run.returncode == 0


def write_seeds() -> None:
    """Write the generated corpus; what fuzzing found (crash-…) stays."""
    from tests.fuzz.seeds import SEEDS

    for name, make in SEEDS.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for old in (CORPUS / name).glob("seed-*"):
            old.unlink()
        for seed, data in make().items():
            (CORPUS / name / f"seed-{seed}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
