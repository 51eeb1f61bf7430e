"""The console's page and what belongs to it: a few small files, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from starlette.responses import Response

ASSETS = Path(__file__).parent / "assets"
INDEX = "index.html"
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked again each time, answered 304: after an upgrade no page mixes old and new files.
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    content: bytes
    content_type: str
    etag: str

    def answer(self, if_none_match: str | None) -> Response:
        """304 where the asker has it already."""
        headers = _HEADERS | {"etag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers | {"content-type": self.content_type})


def load_pages(folder: Path = ASSETS) -> Mapping[str, Page]:
    """All files of the folder by their path in it, such as "app.js". What is not there at the
    start is never served, whatever is asked for; nor is what has an unknown ending."""
    pages = {}
    for path in sorted(folder.rglob("*")):
        content_type = _TYPES.get(path.suffix)
        if path.is_file() and content_type is not None:
            content = path.read_bytes()
            pages[path.relative_to(folder).as_posix()] = Page(
                content=content,
                content_type=content_type,
                etag=f'"{blake2b(content, digest_size=12).hexdigest()}"',
            )
    return pages
