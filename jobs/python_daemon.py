"""The daemon from which Spark forks its Python workers (``spark.python.daemon.module``): PySpark's own, made ready.

Before every task a worker invalidates Python's import caches. Up to Python 3.12 that reads the directories of all zip
files on the path anew, here Spark's own JAR and PySpark's archive of 1,300 files: 0.2 s for a task that does nothing
(cpython issue 103200, SPARK-54744). These do not change while Spark runs.
"""

from __future__ import annotations

import gc
import zipimport

from pyspark import daemon

from sphere.conf import logs


def main() -> None:
    """Serve forks until Spark closes standard input."""
    zipimport.zipimporter.invalidate_caches = lambda self: None  # type: ignore[method-assign]
    logs.quiet(everything=True)
    import sphere.jobs.headers  # noqa: F401  what the tasks import is there once, before the forks

    gc.freeze()  # workers collect garbage after every task, and need not look at modules
    daemon.manager()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
