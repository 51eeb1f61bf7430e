"""What a container's health check asks of a gateway: `python -m services.gateway.probe`.

Exit status 0: it is ready. With --url of anything that answers HTTP, such as a metrics endpoint.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from services.core.errors import ConfigurationError
from services.core.settings import load_settings

READY_PATH = "/readyz"
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.probe")
    parser.add_argument("--url", help="default: readiness of the gateway that the settings name")
    parser.add_argument("--timeout-s", type=float, default=4.0)
    given = parser.parse_args(arguments)
    try:
        url = given.url or ready_url()
        # Proxies are for the outside, and this is the same container.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=given.timeout_s):
            sys.stdout.write(f"{url} answers\n")
    except (OSError, HTTPException, ValueError) as error:
        sys.stderr.write(f"{given.url or 'the gateway'}: {_reason(error)}\n")
        return 1
    except ConfigurationError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def ready_url() -> str:
    """Where the gateway of this container says that it is ready."""
    settings = load_settings()
    host = _WILDCARD_HOSTS.get(settings.host, settings.host)
    netloc = f"[{host}]" if ":" in host else host
    return f"http://{netloc}:{settings.port}{READY_PATH}"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return error.read(1000).decode(errors="replace") or str(error)
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
