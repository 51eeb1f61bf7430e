"""Who asks: API keys, and the tenant that follows from one."""

from __future__ import annotations

import hashlib
import hmac

from starlette.requests import Request

from services.core.errors import AuthenticationError


class Authenticator:
    """FastAPI dependency of every `/v1` route; `tenant_of` gives what it found.

    Raises `AuthenticationError` for a request without a known key.
    `api_keys` is the setting's comma-separated list. Without keys everyone is tenant "default";
    with keys a tenant is its key's digest, so that no cache is shared between keys.
    """

    def __init__(self, api_keys: str) -> None:
        keys = [key.strip() for key in api_keys.split(",")]
        self._digests = [_digest(key) for key in keys if key]

    async def __call__(self, request: Request) -> None:
        request.state.tenant = self._tenant(request)

    def _tenant(self, request: Request) -> str:
        if not self._digests:
            return "default"
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError(
                "No API key was given: send the header Authorization: Bearer YOUR_KEY"
            )
        digest = _digest(key.strip())
        # Every key is compared, in constant time each: how long it takes tells nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise AuthenticationError("The API key is not one this gateway knows")
        return digest[:32]


def tenant_of(request: Request) -> str:
    """The tenant of a request that an `Authenticator` has seen."""
    tenant = request.state.tenant
    assert isinstance(tenant, str)
    return tenant


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
