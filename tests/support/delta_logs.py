"""What jobs have delta-rs read of the logs of tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deltalake import DeltaTable

from sphere.jobs import opened


def tell_of_logs(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str, str], None]) -> None:
    """From now on `tell` hears of each log that is "opened" or "brought up to date", and of which table it is."""

    class Told(DeltaTable):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            tell("opened", self._name())

        def update_incremental(self) -> None:
            tell("brought up to date", self._name())
            super().update_incremental()

        def _name(self) -> str:
            return self.table_uri.rstrip("/").rpartition("/")[2]

    monkeypatch.setattr(opened, "DeltaTable", Told)
