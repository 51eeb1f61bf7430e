"""More and fewer workers in Kubernetes: the `scale` subresource of an expert group's Deployment.

Two requests are made of the API server and no others, `get` and `patch` of `deployments/scale`, so
this is all that the service account needs. That is too little to justify a Kubernetes client with
its generated models, watches and event loop of its own: httpx speaks it. What is seen of the fleet
comes from the workers' leases, so there is no watch that could be lost.

Kubernetes picks the pod that goes: with equal rank the one that became ready last.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.autoscaler.groups import ExpertGroup, by_coverage
from services.core.errors import ConfigurationError, ExpertfleetError, UnavailableError
from services.core.registry import Slot

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
IN_CLUSTER_URL = "https://kubernetes.default.svc"
ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
_MERGE_PATCH = "application/merge-patch+json"
_CONFLICT = 409
_TOO_MANY = 429
_logger = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterAccess:
    """Where the API server is and how to be let in.

    `token_file` is read for every request, for tokens are rotated; None sends none, as to
    `kubectl proxy`, which is the way in from outside a cluster with any kubeconfig.
    """

    url: str
    namespace: str
    token_file: Path | None = None
    ca_file: Path | None = None


def in_cluster(
    *, url: str | None = None, namespace: str | None = None, account: Path = SERVICE_ACCOUNT
) -> ClusterAccess:
    """With the pod's service account, or with none where `url` names another way in.

    Raises `ConfigurationError` where there is neither.
    """
    if url is not None and not url.startswith("https://"):
        return ClusterAccess(url=url, namespace=namespace or "default")
    token, ca, own_namespace = (account / name for name in ("token", "ca.crt", "namespace"))
    if not token.exists():
        raise ConfigurationError(
            f"no service account at {account}: run in a pod that has one, or give --api-server the "
            "address of a running `kubectl proxy`, such as http://127.0.0.1:8001",
            setting="api_server",
        )
    if namespace is None and own_namespace.exists():
        namespace = own_namespace.read_text().strip()
    return ClusterAccess(
        url=url or IN_CLUSTER_URL,
        namespace=namespace or "default",
        token_file=token,
        ca_file=ca if ca.exists() else None,
    )


class KubernetesScaler:
    """A `WorkerScaler` that keeps each group within its bounds. Close it at the end."""

    def __init__(
        self,
        access: ClusterAccess,
        groups: Sequence[ExpertGroup],
        *,
        timeout_s: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._access = access
        self._groups = tuple(groups)
        self._sleep = sleep
        verify: ssl.SSLContext | bool = True
        if access.ca_file is not None:
            verify = ssl.create_default_context(cafile=str(access.ca_file))
        self._client = httpx.AsyncClient(
            base_url=access.url, timeout=timeout_s, verify=verify, transport=transport
        )

    async def add_worker(self, slots: Sequence[Slot]) -> str:
        """One pod more of the group that holds most of `slots` and is not at its maximum.

        Returns the Deployment's name. Raises `UnavailableError` where none may grow.
        """
        groups = by_coverage(self._groups, slots)
        for group in groups:
            if await self._step(group, +1):
                return group.deployment
        names = ", ".join(group.deployment for group in groups) or "none"
        raise UnavailableError(f"no expert group may grow: those with the slots are {names}")

    async def remove_worker(self, worker_id: str) -> None:
        """One pod less of the group this worker is of. Raises `UnavailableError` where it is of
        none, or its group is at its minimum."""
        group = next((group for group in self._groups if group.has_worker(worker_id)), None)
        if group is None:
            raise UnavailableError(f"{worker_id} is a pod of none of the expert groups")
        if not await self._step(group, -1):
            raise UnavailableError(
                f"{group.deployment} is at its minimum of {group.min_replicas} replicas"
            )

    async def close(self) -> None:
        await self._client.aclose()

    async def _step(self, group: ExpertGroup, by: int) -> bool:
        """Change the replicas by one; false if that would leave the bounds."""
        path = (
            f"/apis/apps/v1/namespaces/{self._access.namespace}/deployments/"
            f"{group.deployment}/scale"
        )
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            scale = await self._request("GET", path)
            if scale is None:
                continue
            replicas = int(scale["spec"].get("replicas", 0)) + by
            if not group.min_replicas <= replicas <= group.max_replicas:
                return False
            # The version makes the server refuse it if someone else scaled in between.
            version = scale["metadata"]["resourceVersion"]
            patch = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
            if await self._request("PATCH", path, patch) is not None:
                return True
        raise UnavailableError(
            f"{group.deployment} could not be scaled in {ATTEMPTS} attempts; see the log"
        )

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The answer; None where trying again is right. Raises on any other refusal."""
        headers = {"accept": "application/json"}
        if self._access.token_file is not None:
            headers["authorization"] = f"Bearer {self._access.token_file.read_text().strip()}"
        if body is not None:
            headers["content-type"] = _MERGE_PATCH
        try:
            response = await self._client.request(method, path, json=body, headers=headers)
        except httpx.TransportError as error:
            _logger.warning("%s %s: %s: %s", method, path, type(error).__name__, error)
            return None
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        text = f"{method} {path}: {response.status_code} {_message(response)}"
        is_passing = response.status_code in (_CONFLICT, _TOO_MANY) or response.is_server_error
        if is_passing:
            _logger.warning("%s", text)
            return None
        raise ExpertfleetError(
            f"{text}; the service account needs get and patch on deployments/scale"
        )


def _message(response: httpx.Response) -> str:
    """What a Status object says, or the first of whatever else came."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
