"""Why two ends do not come together, where it is for certificates: gRPC tells its caller too late
or too little (a deadline, a closed socket)."""

from __future__ import annotations

import asyncio
import ssl

from services.core.errors import PeerTlsError, UnavailableError
from services.core.tls import SERVER_NAME, PeerTls

_TIMEOUT_S = 0.5
_SETTINGS = "EXPERTFLEET_TLS_CERT_FILE, _KEY_FILE and _CA_FILE"
_REFUSES_OURS = (
    "refuses our certificate: has it expired, or is it of another authority than "
    "EXPERTFLEET_TLS_CA_FILE there?"
)
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


async def unreachable(
    who: str, endpoint: str, tls: PeerTls | None, *, otherwise: str
) -> UnavailableError:
    """The error of a peer that could not be reached: a `PeerTlsError` that says why, if it is for
    certificates, else an `UnavailableError` with the text `otherwise`. `who` starts the text."""
    why = await why_refused(endpoint, tls)
    if why is None:
        return UnavailableError(otherwise, endpoint=endpoint)
    return PeerTlsError(f"{who} at {endpoint} {why}", endpoint=endpoint)


async def why_refused(
    endpoint: str, tls: PeerTls | None, *, timeout_s: float = _TIMEOUT_S
) -> str | None:
    """What keeps us from the peer at host:port, if it is TLS or the want of it. One connection."""
    host, _, port = endpoint.rpartition(":")
    context = _trusting_all() if tls is None else tls.context()
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                host.strip("[]"), int(port), ssl=context, server_hostname=SERVER_NAME
            )
            if tls is None:
                return f"asks for TLS, and we have no certificate: set {_SETTINGS} here"
            # It looks at our certificate after we are through; gRPC then greets, or just closes.
            if not await reader.read(1):
                return _REFUSES_OURS
    except ssl.SSLCertVerificationError as error:
        return f"shows a certificate that is refused here: {error.verify_message}"
    except ssl.SSLError as error:
        if error.reason in _NOT_TLS:
            if tls is None:
                return None
            return f"speaks plain text, and we speak TLS: set {_SETTINGS} there"
        if tls is None:
            return f"asks for TLS, and we have no certificate: set {_SETTINGS} here"
        return _REFUSES_OURS
    except TimeoutError:
        return None
    except OSError:
        return _REFUSES_OURS if writer is not None and tls is not None else None
    finally:
        if writer is not None:
            writer.transport.abort()
    return None


def _trusting_all() -> ssl.SSLContext:
    """To find out whether a peer speaks TLS; nothing is sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
