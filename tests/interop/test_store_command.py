"""`sphere store`: from files and from the archive, again after a failure, and what could not be sent."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydicom.data import get_testdata_file
from pynetdicom import AE, evt

from sphere.cli import main
from sphere.conf.peers import Peer
from sphere.scp import client
from sphere.template import render
from tests.support.dicom_tools import part10_dataset, running_storescp
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, dataset_of, make_instance

pytestmark = pytest.mark.interop


def config_of(folder: Path, port: int) -> Path:
    """The settings file of an archive in `folder` that knows peer `dest` on `port`."""
    peer = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "sphere.toml"
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in peer.items())
    config.write_text(f"{render({})}\n[[peers]]\n{lines}")
    return config


def call(config: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), "store", "dest", *map(str, arguments)])


@contextmanager
def peer_that(port: int, answer: Any) -> Iterator[list[str]]:
    """A peer by pynetdicom with its status by SOP Instance UID; gives those that it was sent."""
    seen: list[str] = []

    def handle(event: Any) -> int:
        seen.append(str(event.request.AffectedSOPInstanceUID))
        status: int = answer(event, seen)
        return status

    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, "1.2.840.10008.1.2.1")
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)])
    assert server is not None
    try:
        yield seen
    finally:
        server.shutdown()


def some(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [make_instance(folder / f"{n}.dcm", SOPInstanceUID=f"1.2.{n}") for n in range(1, count + 1)]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    port = free_port()
    files = some(tmp_path / "files", 8)
    config = config_of(tmp_path / "archive", port)
    with peer_that(port, lambda event, seen: 0x0000 if len(seen) <= 3 else 0xC001) as seen:
        result = call(config, *files)
        assert result.exit_code == 1
        assert "3 sent, 5 failed" in result.output
        rows = [line for line in result.output.splitlines() if "status 0xC001" in line]
        assert [row.split()[0] for row in rows] == [str(path) for path in files[3:]]
        assert len(seen) == 8  # such a status is final: no second try
    with peer_that(port, lambda event, seen: 0x0000) as seen:
        result = call(config, *files)
        assert (result.exit_code, seen) == (0, [f"1.2.{n}" for n in range(4, 9)]), result.output
        assert "5 sent, 0 failed, 3 sent by an earlier call" in result.output
        assert "8 sent, 0 failed (" in call(config, *files).output  # it had got to its end
    assert not (tmp_path / "archive" / "state" / "sending").exists()


def test_a_file_that_was_changed_is_sent_again(tmp_path: Path) -> None:
    port = free_port()
    files = some(tmp_path / "files", 3)
    config = config_of(tmp_path / "archive", port)
    with peer_that(port, lambda event, seen: 0xC001 if seen[-1] == "1.2.3" else 0x0000) as seen:
        assert call(config, *files).exit_code == 1
        make_instance(files[0], SOPInstanceUID="1.2.1", PatientName="Longer^Name^Now")
        call(config, *files)
        assert seen == ["1.2.1", "1.2.2", "1.2.3", "1.2.1", "1.2.3"]
        call(config, "--again", *files)
        assert seen[5:] == ["1.2.1", "1.2.2", "1.2.3"]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    port, stderr = free_port(), Stream()
    config = config_of(tmp_path / "archive", port)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    files = [str(path) for path in some(tmp_path / "files", 3)]
    with peer_that(port, lambda event, seen: 0x0000), pytest.raises(SystemExit, match=r"^0$"):
        main(["--config", str(config), "store", "dest", *files])
    text = stderr.getvalue()
    assert ("3/3" in text and "MB/s" in text) if terminal else text == ""


def test_what_may_work_later_is_tried_again(tmp_path: Path, settings: Any) -> None:
    port, pauses = free_port(), []
    peer = Peer(name="dest", ae_title="DEST", host="127.0.0.1", port=port)
    files = some(tmp_path / "files", 4)

    def answer(event: Any, seen: list[str]) -> int:
        if seen == ["1.2.1", "1.2.2"]:
            event.assoc.abort()
        return 0xA700 if seen == ["1.2.1", "1.2.2", "1.2.3"] else 0x0000

    with peer_that(port, answer) as seen:
        results = list(client.store(peer, files, settings=settings, tries=3, sleep=pauses.append))
    assert all(result.stored for result in results) and len(results) == 4
    assert seen == ["1.2.1", "1.2.2", "1.2.3", "1.2.4", "1.2.2", "1.2.3"]
    assert pauses == [1.0]


def test_a_peer_that_is_gone_ends_it(tmp_path: Path) -> None:
    config = config_of(tmp_path / "archive", free_port())
    result = call(config, "--tries", "1", *some(tmp_path / "files", 2))
    assert result.exit_code == 1
    assert "0 sent, 2 failed" in result.output and "cannot connect" in result.output


@contextmanager
def archive(base: Path, files: Sequence[Path], *options: str) -> Iterator[tuple[Receiver, Path, Path]]:
    """An archive that holds `files`; its settings file, and the folder of a storescp started with `options`."""
    with running_storescp(base / "out", *options) as port:
        config = config_of(base / "archive", port)
        with running_receiver(base / "archive") as receiver:
            results = client.store(receiver.peer, files, settings=receiver.settings)
            assert all(result.stored for result in results)
            yield receiver, config, base / "out"


def test_from_the_archive_by_query(tmp_path: Path) -> None:
    """Straight from the bundles, byte for byte, catalogued or not."""
    files = [
        make_instance(tmp_path / f"{n}.dcm", StudyInstanceUID=f"1.{n}", StudyDate=f"2024010{n}", Modality=modality)
        for n, modality in enumerate(["CT", "MR", "CT", "CT", "CT", "MR"], 1)
    ]
    with archive(tmp_path, files) as (_, config, out):
        result = call(config, "--where", "StudyDate=20240103-", "--where", "Modality=CT")
        assert result.exit_code == 0 and "3 sent, 0 failed" in result.output, result.output
        sent = sorted(part10_dataset(path.read_bytes()) for path in out.iterdir())
        assert sent == sorted(dataset_of(files[n - 1]) for n in (3, 4, 5))
        assert "0 sent, 0 failed" in call(config, "--where", "PatientID=NOBODY").output
        assert "6 sent, 0 failed" in call(config, "--all").output


def until_noted(folder: Path, count: int) -> None:
    """Wait for so many lines of what was sent."""
    deadline = time.monotonic() + 60
    while sum(path.read_text().count("\n") for path in folder.glob("*.sent")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL while the fourth is under way: what was answered before is not sent again."""
    port = free_port()
    folder = tmp_path / "files"
    some(folder, 8)
    config = config_of(tmp_path / "archive", port)
    fourth, killed = threading.Event(), threading.Event()

    def hold(event: Any, seen: list[str]) -> int:
        if len(seen) == 4:
            fourth.set()
            killed.wait(60)
        return 0x0000

    command = [sys.executable, "-m", "sphere.cli", "--config", str(config), "store", "dest", str(folder)]
    with peer_that(port, hold) as seen:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert fourth.wait(60)
            until_noted(tmp_path / "archive" / "state" / "sending", 3)
        finally:
            process.kill()
            process.wait()
            killed.set()
        assert len(seen) == 4
        result = call(config, folder)
    assert result.exit_code == 0 and "5 sent, 0 failed, 3 sent by an earlier call" in result.output, result.output
    assert seen[3:4] == seen[4:5] and sorted(set(seen)) == [f"1.2.{n}" for n in range(1, 9)] and len(seen) == 9


def test_goes_on_with_what_a_query_finds(tmp_path: Path) -> None:
    files = [
        make_instance(tmp_path / f"{n}.dcm", SOPInstanceUID=f"1.2.{n}", StudyInstanceUID="1.2") for n in range(1, 6)
    ]
    port = free_port()
    config = config_of(tmp_path / "archive", port)
    with running_receiver(tmp_path / "archive") as receiver:
        assert all(one.stored for one in client.store(receiver.peer, files, settings=receiver.settings))
        where = ("--where", "StudyInstanceUID=1.2")
        with peer_that(port, lambda event, seen: 0x0000 if len(seen) <= 2 else 0xC001) as first:
            result = call(config, *where)
            assert result.exit_code == 1 and "2 sent, 3 failed" in result.output, result.output
        with peer_that(port, lambda event, seen: 0x0000) as second:
            result = call(config, *where)
            assert result.exit_code == 0, result.output
            assert "3 sent, 0 failed, 2 sent by an earlier call" in result.output
    assert sorted(first[:2] + second) == [f"1.2.{n}" for n in range(1, 6)]


def test_what_the_peer_does_not_take_as_it_is(tmp_path: Path) -> None:
    compressed = Path(str(get_testdata_file("MR_small_RLE.dcm", download=False)))
    with archive(tmp_path, [compressed], "+xe") as (_, config, out):
        for what in ([compressed], ["--where", "Modality=MR"]):
            result = call(config, "--as-is", *what)
            assert result.exit_code == 1 and "accepts none of the services" in result.output, result.output
            assert list(out.iterdir()) == []
            assert call(config, *what).exit_code == 0
            [sent] = out.iterdir()
            sent.unlink()


@pytest.mark.parametrize("arguments", [[], ["--where", "PatientID=1", "file.dcm"]])
def test_wrong_calls(tmp_path: Path, arguments: list[str]) -> None:
    result = call(config_of(tmp_path, 104), *arguments)
    assert result.exit_code == 2 and "either PATH..., or --where" in result.output
