"""`sphere serve` with HTTP: supervised, ready with the others, and stopped cleanly while requests are under way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.serving import ready, running_supervisor

pytestmark = pytest.mark.unit


def test_http_is_a_child_like_the_others(tmp_path: Path) -> None:
    with running_supervisor(tmp_path, workers=1, web=True) as serving:
        state = serving.wait(ready)
        root = f"http://127.0.0.1:{state.web_port}"
        assert httpx.get(f"{root}/readyz").json() == {"status": "ready", "not_ready": []}
        assert httpx.get(f"{root}/dicom-web/studies").status_code == 204
        child = next(child for child in state.children if child.name == "web")
        os.kill(child.pid, signal.SIGKILL)
        serving.wait(lambda state: sum(one.restarts for one in state.children) == 1)
        serving.wait(ready)
        assert 'sphere_restarts{child="web"} 1.0' in httpx.get(f"{root}/metrics").text
        assert serving.stop() == 0


@pytest.mark.parametrize(("auth", "said"), [("remote", 1), ("all", 0)])
def test_it_says_that_clients_of_this_host_need_no_token(
    tmp_path: Path, auth: str, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPHERE_WEB__AUTH", auth)
    with running_supervisor(tmp_path, workers=1, web=True) as serving:
        serving.wait(ready)
        assert serving.stop() == 0
    lines = [line for line in serving.log_path.read_text().splitlines() if "without a token" in line]
    assert len(lines) == said and all('web.auth = "all"' in line for line in lines)


def test_it_says_which_part_does_not_serve(tmp_path: Path) -> None:
    with running_supervisor(tmp_path, workers=2, web=True) as serving:
        state = serving.wait(ready)
        url = f"http://127.0.0.1:{state.web_port}/readyz"
        child = next(child for child in state.children if child.name == "receiver-2")
        os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (answer := httpx.get(url)).status_code == 200:
            assert time.monotonic() < deadline
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "not_ready": ["receiver-2"]})
        serving.wait(ready)
        assert httpx.get(url).status_code == 200
        assert serving.stop() == 0


def test_without_http_nothing_listens_for_it(tmp_path: Path) -> None:
    """`web.enabled = false`: no process, no port."""
    with running_supervisor(tmp_path, workers=1, web=False) as serving:
        state = serving.wait(ready)
        assert state.web_port == 0
        assert [child.name for child in state.children] == ["receiver-1"]
        family = psutil.Process(serving.process.pid)
        ports = {
            one.laddr.port
            for process in (family, *family.children(recursive=True))
            for one in process.net_connections(kind="tcp")
            if one.status == psutil.CONN_LISTEN
        }
        assert ports == {serving.port}
        assert serving.stop() == 0
