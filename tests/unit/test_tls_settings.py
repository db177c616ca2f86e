"""Files of TLS that cannot be used end in one clear line, before anything listens."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.scp.upper.tls import acceptor_context, check_tls, requestor_context
from tests.support.certificates import Authority
from tests.support.dicom_tools import require_tool

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    Authority.make(folder).issue("sphere")
    Authority.make(folder / "other")
    (folder / "notes.txt").write_text("no PEM")
    command = [require_tool("openssl"), "pkey", "-in", folder / "ca.key", "-aes128", "-passout", "pass:x", "-out"]
    subprocess.run([*command, folder / "locked.key"], check=True)
    return folder


GOOD = {"tls_port": 2762, "tls_certificate": "sphere.pem", "tls_key": "ca.key", "tls_ca": "ca.pem"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tls_certificate": ""}, "tls_certificate: a TLS port needs a certificate"),
        ({"tls_certificate": "none.pem"}, r"tls_certificate: .*none.pem cannot be read: No such file"),
        ({"tls_certificate": "notes.txt"}, "not a certificate in PEM and its key"),
        ({"tls_key": "other/ca.key"}, r"not a certificate in PEM and its key \(key values mismatch\)"),
        ({"tls_key": "locked.key"}, "the key has a password"),
        ({"tls_ca": ""}, 'tls_client = "required" needs the CAs of the peers'),
        ({"tls_ca": "notes.txt"}, "holds no certificates in PEM"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, changed: dict[str, Any], message: str) -> None:
    settings = from_dict({"dimse": {**GOOD, **changed}}, base=folder)
    with pytest.raises(SettingsError, match=message):
        acceptor_context(settings.dimse)


def test_files_are_relative_to_the_settings_file(folder: Path) -> None:
    peer = {"name": "p", "ae_title": "P", "host": "h", "tls": True, "tls_ca": "other/ca.pem"}
    settings = from_dict({"dimse": GOOD, "peers": [peer]}, base=folder)
    assert acceptor_context(settings.dimse) is not None
    assert settings.peers[0].tls_ca == str(folder / "other" / "ca.pem")
    assert requestor_context(settings.peers[0], settings).check_hostname
    assert acceptor_context(from_dict({}, base=folder).dimse) is None


def test_a_peer_s_ca_that_is_not_there(folder: Path) -> None:
    peer = Peer(name="p", ae_title="P", host="h", tls=True, tls_ca=str(folder / "none.pem"))
    settings = from_dict({}, base=folder)
    with pytest.raises(SettingsError, match=r"none\.pem cannot be read"):
        requestor_context(peer, settings)
    with pytest.raises(SettingsError, match=r"none\.pem cannot be read"):
        check_tls(settings.model_copy(update={"peers": (peer,)}))
