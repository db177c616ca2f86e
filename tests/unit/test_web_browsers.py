"""What browsers tell of the page that asks, and what they are told of every answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.web import Web, serving_web, until_closed

pytestmark = pytest.mark.unit

ONE = new_member(slices(1)[0])
STUDY = f"/studies/{ONE.StudyInstanceUID}"
INSTANCE = f"{STUDY}/series/{ONE.SeriesInstanceUID}/instances/{ONE.SOPInstanceUID}"
CACHE = "cache-control"
TYPED = {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"), web={"delete": True})
    land(settings, [ONE])
    extract(settings)
    with serving_web(settings) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "OURS"}, 200),
        ({"origin": "OURS"}, 200),
        (TYPED, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "new-value"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "OURS"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://[bad"}, 403),
        ({"origin": "https-OURS"}, 403),
        ({"origin": ""}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_pages_of_this_origin_ask_without_a_token(
    web: Web, method: str, headers: dict[str, str], status: int
) -> None:
    ours = f"http://127.0.0.1:{web.port}"
    own = {"https-OURS": ours.replace("http", "https"), "OURS": ours}
    headers = {name: own.get(value, value) for name, value in headers.items()}
    response = web.client.request(method, f"{ours}/status/peers", headers=headers)
    assert response.status_code == status
    if status == 403:
        assert response.headers["content-type"] == "application/problem+json"
        assert "another origin" in response.json()["detail"]


def test_who_shows_a_token_may_ask_from_anywhere(web: Web) -> None:
    """A page has the token from its user only, and a browser sends none by itself."""
    secret = web.services.tokens.create("notebook", "reader", None)
    shown = {"authorization": f"Bearer {secret}", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}
    assert web.get("/studies", headers=shown).status_code == 200


@pytest.mark.parametrize(
    ("path", "accept", "status", "kept"),
    [
        ("/dicom-web/studies", "*/*", 200, "no-store"),
        ("/dicom-web/studies?PatientID=nobody", "*/*", 204, "no-store"),
        ("/dicom-web/studies?Nonsense=1", "*/*", 400, "no-store"),
        ("/dicom-web/studies/1.2.3/metadata", "*/*", 404, "no-store"),
        ("/dicom-web/elsewhere", "*/*", 404, "no-store"),
        (f"/dicom-web{STUDY}?accept=application/zip", "*/*", 200, None),
        (f"/dicom-web{STUDY}/metadata", "*/*", 200, None),
        (f"/dicom-web{INSTANCE}", "application/dicom", 200, None),
        (f"/dicom-web{INSTANCE}/frames/1", "*/*", 200, None),
        (f"/dicom-web{INSTANCE}/rendered", "image/png", 200, "private, no-cache"),
        (f"/dicom-web{INSTANCE}/thumbnail", "image/jpeg", 200, "private, no-cache"),
        ("/wado", "*/*", 400, "no-store"),
        ("/annotations", "*/*", 200, "no-store"),
        ("/status", "*/*", 200, "no-store"),
        ("/metrics", "*/*", 200, "no-store"),
        ("/healthz", "*/*", 200, "no-store"),
        ("/openapi.json", "*/*", 200, "no-store"),
        ("/", "*/*", 200, "no-cache"),
        ("/page/style.css", "*/*", 200, "no-cache"),
    ],
)
def test_no_answer_is_kept_guessed_at_or_embedded(
    web: Web, path: str, accept: str, status: int, kept: str | None
) -> None:
    url = f"http://127.0.0.1:{web.port}{path}"
    response = web.client.get(url, headers={"accept": accept})
    assert response.status_code == status, response.text[:200]
    tag = response.headers.get("etag")
    assert response.headers[CACHE] == (kept or ("private, no-cache" if tag else "no-store"))
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert all(len(response.headers.get_list(name)) == 1 for name in (CACHE, "x-content-type-options"))
    if tag:
        again = web.client.get(url, headers={"accept": accept, "if-none-match": tag})
        assert (again.status_code, again.headers[CACHE]) == (304, response.headers[CACHE])


def test_what_is_no_request_is_answered_alike(web: Web) -> None:
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        client.sendall(b"nothing of HTTP\r\n\r\n")
        head = until_closed(client).partition(b"\r\n\r\n")[0].lower()
    assert head.startswith(b"http/1.1 400 ")
    for line in (b"cross-origin-resource-policy: same-origin", b"x-content-type-options: nosniff", b"no-store"):
        assert line in head
