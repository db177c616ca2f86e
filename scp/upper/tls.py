"""TLS 1.2 and 1.3 with forward secrecy and authenticated encryption (PS3.15 B.12; BCP 195: RFC 8996, RFC 9325)."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final, NoReturn

from sphere.conf.errors import SettingsError
from sphere.conf.peers import Peer
from sphere.conf.settings import Dimse, Settings, Web

CIPHERS: Final = (  # of TLS 1.2 (RFC 9325 4.2); those of 1.3 are all of that kind. SECLEVEL: keys as of 2048 bits RSA
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256:@SECLEVEL=2"
)
CLIENT: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def acceptor_context(dimse: Dimse) -> ssl.SSLContext | None:
    """How the TLS port speaks, None where there is none. Raises SettingsError when a file cannot be used."""
    if not dimse.tls_port:
        return None
    if not dimse.tls_certificate:
        raise SettingsError("dimse.tls_certificate: a TLS port needs a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _profile(context)
    _present(context, dimse)
    context.verify_mode = CLIENT[dimse.tls_client]
    if dimse.tls_client != "none":
        if not dimse.tls_ca:
            raise SettingsError(f'dimse.tls_ca: tls_client = "{dimse.tls_client}" needs the CAs of the peers')
        _trust(context, "dimse.tls_ca", dimse.tls_ca)
    return context


def web_context(web: Web) -> ssl.SSLContext | None:
    """How the HTTP port speaks, None without TLS. Raises SettingsError when a file cannot be used."""
    if not web.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _profile(context)
    _present(context, web, "web")
    return context


def check_tls(settings: Settings) -> None:
    """Raise SettingsError where a file of TLS, ours or for a peer, cannot be used."""
    acceptor_context(settings.dimse)
    web_context(settings.web)
    for peer in settings.peers:
        if peer.tls:
            requestor_context(peer, settings)


def requestor_context(peer: Peer, settings: Settings) -> ssl.SSLContext:
    """How we speak to a peer with TLS. Raises SettingsError when a file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _profile(context)
    context.check_hostname = peer.tls_verify == "name"
    context.verify_mode = ssl.CERT_NONE if peer.tls_verify == "none" else ssl.CERT_REQUIRED
    if settings.dimse.tls_certificate:
        _present(context, settings.dimse)
    authorities = peer.tls_ca or settings.dimse.tls_ca
    if authorities:
        _trust(context, "tls_ca", authorities)
    elif peer.tls_verify != "none":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def why(error: OSError) -> str:
    """A TLS failure in words; without anything that the peer sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or type(error).__name__).replace("_", " ").lower()
    return error.strerror or type(error).__name__


def _profile(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE


def _present(context: ssl.SSLContext, files: Dimse | Web, section: str = "dimse") -> None:
    """Have our certificate shown."""
    certificate, key = files.tls_certificate, files.tls_key or files.tls_certificate
    for name, path in ((f"{section}.tls_certificate", certificate), (f"{section}.tls_key", key)):
        _readable(name, path)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        raise SettingsError(
            f"{section}.tls_certificate, {section}.tls_key: not a certificate in PEM and its key ({why(error)})"
        ) from None


def _trust(context: ssl.SSLContext, name: str, path: str) -> None:
    _readable(name, path)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:
        raise SettingsError(f"{name}: {path} holds no certificates in PEM ({why(error)})") from None


def _readable(name: str, path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise SettingsError(f"{name}: {path} cannot be read: {error.strerror}") from None


def _no_password() -> NoReturn:
    raise SettingsError("tls_key: the key has a password; keep it without one, readable by the service alone")
