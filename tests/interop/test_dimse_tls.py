"""TLS with DCMTK on the other side, in both roles; who is let in, and what does not hold up the others."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sphere.cli import main
from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp import client
from sphere.scp.upper.requestor import PeerSilent
from tests.support.certificates import Authority, Certificate
from tests.support.dicom_tools import part10_dataset, require_tool, run_tool, running_storescp
from tests.support.ports import free_port
from tests.support.raw_peer import RawPeer
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import dataset_of, make_instance

pytestmark = pytest.mark.interop


@dataclass(frozen=True)
class Keys:
    """Certificates of a hospital, and of strangers."""

    ca: Authority
    ours: Certificate
    theirs: Certificate
    expired: Certificate
    elsewhere: Certificate
    strange_ca: Authority
    stranger: Certificate

    def dcmtk(self, shown: Certificate | None = None) -> list[str]:
        """The options of a DCMTK program that shows a certificate, by default its own."""
        shown = shown or self.theirs
        return ["+tls", str(shown.key), str(shown.path), "+cf", str(self.ca.path)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    ca, strange = Authority.make(folder / "ca"), Authority.make(folder / "strange")
    return Keys(
        ca, ca.issue("sphere"), ca.issue("modality"), ca.issue("expired", days=-1),
        ca.issue("elsewhere", host="DNS:elsewhere.example"), strange, strange.issue("stranger"),
    )  # fmt: skip


def with_tls(keys: Keys, **more: Any) -> dict[str, Any]:
    """Settings of an archive with a TLS port."""
    certificate = {"tls_certificate": str(keys.ours.path), "tls_key": str(keys.ours.key), "tls_ca": str(keys.ca.path)}
    return {"port": free_port(), "tls_port": free_port(), **certificate, **more}


@pytest.fixture(scope="module")
def receiver(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    peers = [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": free_port(), "tls": True}]
    tables = {"dimse": with_tls(keys, artim_s=3.0), "peers": peers}
    with running_receiver(tmp_path_factory.mktemp("archive"), tables) as running:
        yield running


def on_tls(receiver: Receiver, **more: Any) -> Peer:
    """The receiver's TLS port as a peer."""
    return receiver.peer.model_copy(update={"port": receiver.settings.dimse.tls_port, "tls": True, **more})


@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_echoscu_in_every_profile(receiver: Receiver, keys: Keys, profile: str) -> None:
    run = run_tool("echoscu", *keys.dcmtk(), profile, "-v", "127.0.0.1", receiver.settings.dimse.tls_port)
    assert run.returncode == 0 and "Received Echo Response (Success)" in run.stdout, run.stdout


def test_storescu_and_both_ports(receiver: Receiver, keys: Keys, tmp_path: Path) -> None:
    """From data sets of a few bytes to one that is larger than every buffer."""
    sizes = (0, 20_000, 3 << 20)
    files = [make_instance(tmp_path / f"{n}.dcm", EncapsulatedDocument=bytes(size)) for n, size in enumerate(sizes)]
    before = len(receiver.members())
    run = run_tool("storescu", *keys.dcmtk(), "-R", "127.0.0.1", receiver.settings.dimse.tls_port, *files)
    assert run.returncode == 0, run.stdout
    members = receiver.members()[before:]
    assert [receiver.dataset_bytes(record) for record in members] == [dataset_of(path) for path in files]
    assert client.echo(receiver.peer, settings=receiver.settings) > 0  # the port without TLS


def test_movescu_to_a_destination_with_tls(keys: Keys, tmp_path: Path) -> None:
    """Our certificate is checked by storescp, and its by us. DCMTK 3.6.7's movescu itself has no TLS."""
    files = [
        make_instance(
            tmp_path / f"{n}.dcm", StudyInstanceUID="1.2.3", SOPInstanceUID=f"1.2.3.{n}",
            EncapsulatedDocument=bytes(900_000),
        )
        for n in range(6)
    ]  # fmt: skip
    with running_storescp(tmp_path / "out", *keys.dcmtk()) as port:
        peers = [
            {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port, "tls": True},
            {"name": "plain", "ae_title": "PLAIN", "host": "127.0.0.1", "port": port},
            {"name": "gone", "ae_title": "GONE", "host": "127.0.0.1", "port": port, "tls": True, "tls_ca": "gone.pem"},
        ]
        with running_receiver(tmp_path / "archive", {"dimse": with_tls(keys), "peers": peers}) as receiver:
            assert all(result.stored for result in client.store(on_tls(receiver), files, settings=receiver.settings))
            arguments = ["-S", "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3", "127.0.0.1"]
            run = run_tool("movescu", "-v", "-aem", "DEST", *arguments, receiver.port)
            assert run.returncode == 0, run.stdout
            sent = sorted(part10_dataset(path.read_bytes()) for path in (tmp_path / "out").iterdir())
            assert sent == sorted(dataset_of(path) for path in files)
            run = run_tool("movescu", "-d", "-aem", "PLAIN", *arguments, receiver.port)
            assert "0xa702" in run.stdout.lower(), run.stdout
            run = run_tool("movescu", "-d", "-aem", "GONE", *arguments, receiver.port)  # a file that was removed
            assert "0xa702" in run.stdout.lower() and "cannot be read" in receiver.log, run.stdout


def test_find_move_and_get_with_tls(keys: Keys, receiver: Receiver, tmp_path: Path) -> None:
    path = make_instance(tmp_path / "one.dcm", StudyInstanceUID="1.2.77", EncapsulatedDocument=bytes(400_000))
    peer, settings = on_tls(receiver), receiver.settings
    assert [result.stored for result in client.store(peer, [path], settings=settings)] == [True]
    matches = list(client.find(peer, {"StudyInstanceUID": "1.2.77", "PatientName": ""}, settings=settings))
    assert [match.PatientName for match in matches] == ["Test^Made"]
    kept = Kept()
    *_, last = client.get(peer, {"StudyInstanceUID": "1.2.77"}, settings=settings, store=kept)
    assert (last.status, last.completed, kept.data) == (0, 1, [dataset_of(path)])
    with running_storescp(tmp_path / "out", *keys.dcmtk(), port=settings.peers[0].port):
        *_, last = client.move(peer, {"StudyInstanceUID": "1.2.77"}, settings=settings, destination="DEST")
    assert (last.status, last.completed) == (0, 1)
    [moved] = (tmp_path / "out").iterdir()
    assert part10_dataset(moved.read_bytes()) == dataset_of(path)


class Kept:
    """Keeps what a C-GET brings."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def land(self, request: Any) -> Any:
        from sphere.scp.store import StoreAnswer

        self.data.append(b"".join(request.dataset))
        return StoreAnswer(0)


def test_who_is_not_let_in(receiver: Receiver, keys: Keys) -> None:
    port = receiver.settings.dimse.tls_port
    shows = {"stranger": keys.stranger, "expired": keys.expired}
    for name, certificate in shows.items():
        run = run_tool("echoscu", *keys.dcmtk(certificate), "127.0.0.1", port)
        assert run.returncode != 0, name
    run = run_tool("echoscu", "+tla", "-ic", "127.0.0.1", port)
    assert run.returncode != 0
    assert run_tool("echoscu", "127.0.0.1", port).returncode != 0  # no TLS at all
    log = logged(receiver, "no TLS (certificate not accepted", 2)
    for reason in ("certificate not accepted: certificate has expired", "peer did not return a certificate"):
        assert f"no TLS ({reason}" in log, log
    assert run_tool("echoscu", *keys.dcmtk(), "127.0.0.1", port).returncode == 0


@pytest.mark.parametrize("tls_client", ["optional", "none"])
def test_without_a_client_certificate(keys: Keys, tmp_path: Path, tls_client: str) -> None:
    """Also TLS instead of the plain port."""
    port = free_port()
    tables = {"dimse": with_tls(keys, port=port, tls_port=port, tls_client=tls_client)}
    with running_receiver(tmp_path / "archive", tables) as receiver:
        run = run_tool("echoscu", "+tla", "+cf", str(keys.ca.path), "127.0.0.1", port)
        assert run.returncode == 0, run.stdout
        stranger = run_tool("echoscu", *keys.dcmtk(keys.stranger), "127.0.0.1", port)
        assert (stranger.returncode == 0) == (tls_client == "none"), stranger.stdout
        with pytest.raises(PeerError, match=r"aborted the association|did not accept|closed"):
            client.echo(receiver.peer, settings=receiver.settings)


def test_old_versions_and_weak_ciphers_are_refused(receiver: Receiver, keys: Keys) -> None:
    for options in (["-tls1_1"], ["-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"]):
        run = openssl_client(receiver, keys, *options)
        assert run.returncode != 0 and "Cipher is (NONE)" in run.stdout, run.stdout
    for options, cipher in ((["-tls1_2"], "ECDHE-RSA-AES256-GCM-SHA384"), (["-tls1_3"], "TLS_AES_256_GCM_SHA384")):
        assert f"Cipher is {cipher}" in openssl_client(receiver, keys, *options).stdout


def openssl_client(receiver: Receiver, keys: Keys, *options: str) -> subprocess.CompletedProcess[str]:
    command = [require_tool("openssl"), "s_client", "-connect", f"127.0.0.1:{receiver.settings.dimse.tls_port}"]
    command += ["-cert", str(keys.theirs.path), "-key", str(keys.theirs.key), *options]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=60)


def test_handshakes_that_are_not_finished_hold_up_nobody(receiver: Receiver, keys: Keys) -> None:
    """Connections that say nothing, or half a hello, are closed after ARTIM; others are served meanwhile."""
    port = receiver.settings.dimse.tls_port
    slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
    for connection in slow[:10]:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    for _ in range(3):
        client.echo(on_tls(receiver), settings=receiver.settings)
    assert all(not _is_closed(connection) for connection in slow)
    for connection in slow:
        connection.settimeout(30)
        assert connection.recv(100) == b""
        connection.close()
    logged(receiver, "TLS handshake takes too long", 20)


def test_bytes_of_a_record_without_end_are_no_progress(receiver: Receiver, keys: Keys) -> None:
    """After the handshake, one byte after another of the record that holds an A-ASSOCIATE-RQ: closed after ARTIM."""
    context = ssl.create_default_context(cafile=str(keys.ca.path))
    context.load_cert_chain(str(keys.theirs.path), str(keys.theirs.key))
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(coming, going, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", receiver.settings.dimse.tls_port), timeout=30) as connection:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(going.read())
                coming.write(connection.recv(1 << 16))
        connection.sendall(going.read())
        tls.write(bytes(12_000))
        with pytest.raises(OSError, match=r"reset|pipe"):
            for byte in going.read():  # ten minutes long
                connection.sendall(bytes((byte,)))
                time.sleep(0.05)
    logged(receiver, "the peer is silent", 1)


def logged(receiver: Receiver, text: str, times: int) -> str:
    """The log, as soon as `text` is in it so many times: associations are logged when they are over."""
    deadline = time.monotonic() + 20
    while receiver.log.count(text) < times:
        assert time.monotonic() < deadline, receiver.log
        time.sleep(0.05)
    return receiver.log


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_cut_connection_and_hostile_bytes_inside_tls(receiver: Receiver, keys: Keys) -> None:
    context = ssl.create_default_context(cafile=str(keys.ca.path))
    context.load_cert_chain(keys.theirs.path, keys.theirs.key)
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\x04\x00\xff\xff\xff\xff"):
        plain = socket.create_connection(("127.0.0.1", receiver.settings.dimse.tls_port), timeout=20)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as inside:
            inside.sendall(sent)
            answer = RawPeer(inside).receive()
            assert answer is None or answer[0] == 0x07
    client.echo(on_tls(receiver), settings=receiver.settings)


@pytest.mark.parametrize(
    ("shown", "more", "message"),
    [
        ("stranger", {}, "certificate not accepted: (self-signed|unable to get local issuer)"),
        ("expired", {"tls_verify": "ca"}, "certificate not accepted: certificate has expired"),
        ("elsewhere", {}, "certificate not accepted: IP address mismatch"),
        ("elsewhere", {"tls_verify": "ca"}, ""),
        ("stranger", {"tls_verify": "none"}, ""),
        ("ours", {}, ""),
    ],
)
def test_what_we_check_of_a_peer(
    keys: Keys, settings: Settings, tmp_path: Path, shown: str, more: dict[str, Any], message: str
) -> None:
    certificate: Certificate = getattr(keys, shown)
    trusted = settings.model_copy(
        update={
            "dimse": settings.dimse.model_copy(
                update={
                    "tls_ca": str(keys.ca.path),
                    "tls_certificate": str(keys.theirs.path),
                    "tls_key": str(keys.theirs.key),
                }
            )
        }
    )
    with running_storescp(tmp_path / "peer", *keys.dcmtk(certificate)) as port:
        peer = Peer(name="tls", ae_title="TLS", host="127.0.0.1", port=port, tls=True, **more)
        if message:
            with pytest.raises(PeerError, match=rf"peer TLS at 127.0.0.1:{port}: no TLS \({message}"):
                client.echo(peer, settings=trusted)
        else:
            assert client.echo(peer, settings=trusted) > 0


def test_a_peer_without_tls(keys: Keys, settings: Settings, tmp_path: Path) -> None:
    """One that speaks DICOM at once, and one that says nothing."""
    with running_storescp(tmp_path / "peer") as port, pytest.raises(PeerError, match="no TLS"):
        client.echo(Peer(name="p", ae_title="P", host="127.0.0.1", port=port, tls=True), settings=settings)
    short = settings.model_copy(update={"dimse": settings.dimse.model_copy(update={"artim_s": 0.5})})
    with silent() as port, pytest.raises(PeerSilent, match="does not answer"):
        client.echo(Peer(name="p", ae_title="P", host="127.0.0.1", port=port, tls=True), settings=short)


@contextmanager
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_command_line(receiver: Receiver, keys: Keys, tmp_path: Path) -> None:
    """Every verb of the service class user, with the CA in an option."""
    config = tmp_path / "sphere.toml"
    config.write_text(
        '[storage]\nroot = "file:storage"\n'
        f'[dimse]\ntls_certificate = "{keys.theirs.path}"\ntls_key = "{keys.theirs.key}"\n'
    )
    written_out = f"SPHERE@127.0.0.1:{receiver.settings.dimse.tls_port}"
    one = ("-k", "StudyInstanceUID=1.2.78")
    path = make_instance(tmp_path / "one.dcm", StudyInstanceUID="1.2.78")

    def call(verb: str, *arguments: str | Path) -> Any:
        return CliRunner().invoke(main, ["--config", str(config), verb, written_out, *map(str, arguments)])

    def checked(verb: str, *arguments: str | Path) -> str:
        result = call(verb, *arguments, "--tls-ca", keys.ca.path)
        assert result.exit_code == 0, result.output
        return str(result.output)

    checked("echo")
    refused = call("echo", "--tls")
    assert refused.exit_code == 1 and "certificate not accepted" in refused.output
    assert call("echo", "--tls-verify", "none").exit_code == 0
    assert "1 sent, 0 failed" in checked("store", path)
    assert "1.2.78" in checked("find", *one)
    assert "1 instances sent, 0 failed" in checked("get", *one)
    assert len(list((tmp_path / "storage").rglob("*.tar"))) == 1
    with running_storescp(tmp_path / "out", *keys.dcmtk(), port=receiver.settings.peers[0].port):
        assert "1 instances sent, 0 failed" in checked("move", "--to", "DEST", *one)
    assert len(list((tmp_path / "out").iterdir())) == 1
    for verb, more in (("store", [path]), ("find", one), ("get", one), ("move", ["--to", "DEST", *one])):
        assert call(verb, "--tls", *more).exit_code == 1, verb
