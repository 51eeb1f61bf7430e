"""mTLS on every gRPC connection of ours: who listens and who calls show a certificate of one
authority, and who listens shows one for the name `expertfleet`, whatever its address is.

Files that are replaced are taken up: by a server at its next connection, by a client whenever it
makes a channel (gRPC cannot change the certificate of a channel that is there). A connection that
stands is left alone.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from services.core.errors import ConfigurationError
from services.core.settings import Settings

SERVER_NAME = "expertfleet"
"""The name that certificates are for: processes move between addresses, and have many."""

_NAME_OPTION = ("grpc.ssl_target_name_override", SERVER_NAME)
_logger = logging.getLogger(__name__)

ChannelOptions = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files: our certificate (with what leads up to the authority), its key, the authority."""

    cert_file: Path
    key_file: Path
    ca_file: Path


class Certificates(NamedTuple):
    """What the files hold."""

    certificate: bytes
    key: bytes
    authority: bytes


class PeerTls:
    """Our certificate and whom we trust, read anew when a file has changed. Any thread may ask.

    Raises `ConfigurationError` when made from files that cannot be used. If they become so later
    (half of them are new, say), that is logged and those read before stay in use.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._refused = ""
        self._versions = _versions(files)
        self._certificates = _read(files)

    def current(self) -> Certificates:
        with self._lock:
            versions = _versions(self._files)
            if versions != self._versions:
                try:
                    self._certificates = _read(self._files)
                except ConfigurationError as error:
                    if error.message != self._refused:
                        _logger.error("going on with the certificate in use: %s", error.message)
                        self._refused = error.message
                else:
                    _logger.info("took up the certificate in %s", self._files.cert_file)
                    self._versions, self._refused = versions, ""
            return self._certificates

    def context(self) -> ssl.SSLContext:
        """Of a client, for a connection that is not gRPC's. Raises `ConfigurationError`."""
        return _context(self._files)


def peer_tls(settings: Settings) -> PeerTls | None:
    """None where connections are plain. Raises `ConfigurationError` where files cannot be used."""
    cert_file, key_file = settings.tls_cert_file, settings.tls_key_file
    ca_file = settings.tls_ca_file
    if cert_file is None or key_file is None or ca_file is None:
        return None  # all or none: settings see to that
    return PeerTls(TlsFiles(cert_file=cert_file, key_file=key_file, ca_file=ca_file))


def bind_port(server: grpc.aio.Server, address: str, tls: PeerTls | None) -> int:
    """Have `server` listen on host:port; 0 takes a free one. Returns the port.

    Raises `RuntimeError` where it is taken.
    """
    if tls is None:
        return server.add_insecure_port(address)
    shown = tls.current()

    def changed() -> Any:
        """A new `grpc.ServerCertificateConfiguration`, or None: as before. gRPC asks before each
        handshake, on a thread of its own."""
        nonlocal shown
        current = tls.current()
        if current is shown:
            return None
        shown = current
        return _configuration(current)

    credentials = grpc.dynamic_ssl_server_credentials(
        _configuration(shown), changed, require_client_authentication=True
    )
    return server.add_secure_port(address, credentials)


def open_channel(
    endpoint: str, tls: PeerTls | None, options: ChannelOptions = ()
) -> grpc.aio.Channel:
    """A channel to host:port."""
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=[*options])
    current = tls.current()
    credentials = grpc.ssl_channel_credentials(current.authority, current.key, current.certificate)
    return grpc.aio.secure_channel(endpoint, credentials, options=[*options, _NAME_OPTION])


def _configuration(current: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(current.key, current.certificate)], root_certificates=current.authority
    )


def _read(files: TlsFiles) -> Certificates:
    """Raises `ConfigurationError` where a file cannot be read or is not what its setting says."""
    _context(files)
    return Certificates(
        certificate=_bytes(files.cert_file, "tls_cert_file"),
        key=_bytes(files.key_file, "tls_key_file"),
        authority=_bytes(files.ca_file, "tls_ca_file"),
    )


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    _bytes(files.cert_file, "tls_cert_file")
    _bytes(files.key_file, "tls_key_file")
    _bytes(files.ca_file, "tls_ca_file")
    try:
        context.load_cert_chain(files.cert_file, files.key_file)
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"EXPERTFLEET_TLS_CERT_FILE={files.cert_file} and EXPERTFLEET_TLS_KEY_FILE="
            f"{files.key_file} are not a certificate and its key, as PEM ({error.reason})",
            setting="tls_cert_file",
        ) from error
    try:
        context.load_verify_locations(files.ca_file)
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"EXPERTFLEET_TLS_CA_FILE={files.ca_file} is no certificate of an authority, as PEM "
            f"({error.reason})",
            setting="tls_ca_file",
        ) from error
    return context


def _bytes(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"EXPERTFLEET_{setting.upper()}={path} cannot be read: {error.strerror}",
            setting=setting,
        ) from error


def _versions(files: TlsFiles) -> tuple[tuple[int, int] | None, ...]:
    """What tells files from those that were there before, through links too."""
    return tuple(map(_version, (files.cert_file, files.key_file, files.ca_file)))


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
