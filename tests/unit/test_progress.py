"""Bars on a terminal, and nothing of them elsewhere."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from sphere.cli import main
from sphere.jobs.progress import step_bar
from sphere.template import render

pytestmark = pytest.mark.unit


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


STREAMS = pytest.mark.parametrize(("kind", "shown"), [(Terminal, True), (io.StringIO, False)], ids=["terminal", "pipe"])


@STREAMS
def test_of_extraction(monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO], shown: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", kind())
    with step_bar() as on_step:
        on_step("planning")
        on_step("reading headers", 30, 100)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("reading headers" in text and "30/100" in text) if shown else text == ""


@STREAMS
def test_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO], shown: bool) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text(render({}))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", kind())
    files = [str(get_testdata_file(name)) for name in ("CT_small.dcm", "MR_small.dcm")]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--config", str(config), "import", *files])
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("2/2" in text and "MB/s" in text) if shown else text == ""
