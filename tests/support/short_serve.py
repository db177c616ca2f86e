"""`sphere serve` that has less patience; a main module, which children read as well."""

from __future__ import annotations

from sphere import cli, serve
from sphere.ingest import shipping

serve.JOB_PATIENCE_S = 3.0
shipping.STUCK_S = 2.0

if __name__ == "__main__":
    cli.main()
