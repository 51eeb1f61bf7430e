"""A stand-in for the hub's HTTP, on loopback: one repository, served from a folder.

It answers what huggingface_hub asks to list and download a model: the model's description, and
HEAD and GET (with ranges) of `resolve` addresses.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `folder` as the repository `model_id`; any other id does not exist.

    `downloads` are the files that were got whole, `header_reads` those of which a range was, both
    in order and with repeats. `gated` answers as for a model whose terms were not accepted.
    """

    def __init__(self, model_id: str, folder: Path, *, gated: bool = False) -> None:
        self.model_id = model_id
        self.folder = folder
        self.gated = gated
        self.downloads: list[str] = []
        self.header_reads: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Stop answering; the port is closed when this returns, and no connection is kept alive."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            if path in (
                f"/api/models/{hub.model_id}",
                f"/api/models/{hub.model_id}/revision/main",
                f"/api/models/{hub.model_id}/revision/{COMMIT}",
            ):
                self._describe()
                return
            for revision in ("main", COMMIT):
                prefix = f"/{hub.model_id}/resolve/{revision}/"
                if path.startswith(prefix):
                    self._send_file(path.removeprefix(prefix))
                    return
            self._refuse("RepoNotFound", 401)

        def _describe(self) -> None:
            names = sorted(path.name for path in hub.folder.iterdir())
            description: dict[str, Any] = {
                "_id": "1",
                "id": hub.model_id,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in names],
            }
            self._send(200, json.dumps(description).encode(), {"Content-Type": "application/json"})

        def _send_file(self, name: str) -> None:
            path = hub.folder / name
            if hub.gated:
                self._refuse("GatedRepo", 403)
                return
            if not path.is_file():
                self._refuse("EntryNotFound", 404)
                return
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(content), len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                hub.header_reads.append(name)
                self._send(206, content[int(first) : end], headers)
                return
            if self.command == "GET":
                hub.downloads.append(name)
            self._send(200, content, headers)

        def _refuse(self, code: str, status: int) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Connection", "close")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
