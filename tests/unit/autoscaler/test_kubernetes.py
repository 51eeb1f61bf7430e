from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.autoscaler.groups import parse_group
from services.autoscaler.kubernetes import ATTEMPTS, ClusterAccess, KubernetesScaler, in_cluster
from services.core.errors import ConfigurationError, ExpertfleetError, UnavailableError

GROUPS = [parse_group("experts-0=0:1-3"), parse_group("experts-1=1@0-3:1-2")]
Answer = Callable[[httpx.Request], httpx.Response | None]


class ApiServer:
    """A double of the API server's `scale` subresource: optimistic locking, merge patches, and
    whatever `trouble` answers first. Every call is recorded as (verb, path)."""

    def __init__(self, replicas: dict[str, int]) -> None:
        self.replicas = replicas
        self.version = 1
        self.calls: list[tuple[str, str]] = []
        self.headers: list[httpx.Headers] = []
        self.trouble: list[Answer] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        verb = {"GET": "get", "PATCH": "patch"}[request.method]
        self.calls.append((verb, request.url.path))
        self.headers.append(request.headers)
        if self.trouble and (answer := self.trouble.pop(0)(request)) is not None:
            return answer
        parts = request.url.path.split("/")
        assert parts[:7] == ["", "apis", "apps", "v1", "namespaces", "here", "deployments"]
        name, subresource = parts[7:]
        assert subresource == "scale"
        if name not in self.replicas:
            return _status(404, f'deployments.apps "{name}" not found')
        if verb == "patch":
            assert request.headers["content-type"] == "application/merge-patch+json"
            body = json.loads(request.content)
            if body["metadata"]["resourceVersion"] != str(self.version):
                return _status(409, "the object has been modified")
            self.replicas[name] = body["spec"]["replicas"]
            self.version += 1
        return httpx.Response(200, json=self._scale(name))

    def scaler(self, pauses: list[float], token_file: Path | None = None) -> KubernetesScaler:
        async def sleep(seconds: float) -> None:
            pauses.append(seconds)

        access = ClusterAccess(url="https://api", namespace="here", token_file=token_file)
        transport = httpx.MockTransport(self)
        return KubernetesScaler(access, GROUPS, transport=transport, sleep=sleep)

    def _scale(self, name: str) -> dict[str, Any]:
        return {
            "kind": "Scale",
            "metadata": {"name": name, "resourceVersion": str(self.version)},
            "spec": {"replicas": self.replicas[name]},
        }


def _status(code: int, message: str) -> httpx.Response:
    return httpx.Response(code, json={"kind": "Status", "message": message})


async def test_the_group_with_most_of_the_slots_grows_by_one() -> None:
    server = ApiServer({"experts-0": 1, "experts-1": 1})
    name = await server.scaler([]).add_worker([(0, 1), (1, 1), (0, 0)])
    assert name == "experts-1"
    assert server.replicas == {"experts-0": 1, "experts-1": 2}


async def test_a_group_at_its_maximum_is_passed_over_and_none_left_is_an_error() -> None:
    server = ApiServer({"experts-0": 3, "experts-1": 1})
    scaler = server.scaler([])
    assert await scaler.add_worker([(0, 0), (1, 0), (0, 1)]) == "experts-1"
    with pytest.raises(UnavailableError, match="no expert group may grow"):
        await scaler.add_worker([(0, 0), (0, 1)])
    assert server.replicas == {"experts-0": 3, "experts-1": 2}


async def test_the_pod_names_its_deployment_and_the_minimum_is_kept() -> None:
    server = ApiServer({"experts-0": 2, "experts-1": 1})
    scaler = server.scaler([])
    await scaler.remove_worker("experts-0-5d4f8c7b9-x2kq7")
    assert server.replicas["experts-0"] == 1
    with pytest.raises(UnavailableError, match="minimum of 1"):
        await scaler.remove_worker("experts-0-5d4f8c7b9-aaaaa")
    with pytest.raises(UnavailableError, match="none of the expert groups"):
        await scaler.remove_worker("experts-00-5d4f8c7b9-aaaaa")


async def test_a_conflict_a_server_error_and_a_lost_connection_are_tried_again() -> None:
    server = ApiServer({"experts-0": 1, "experts-1": 1})

    def scaled_by_another(_: httpx.Request) -> None:
        server.version += 1
        server.replicas["experts-0"] = 2

    def lost(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    server.trouble = [
        lambda _: _status(503, "starting"),
        lost,
        lambda _: None,
        lambda request: scaled_by_another(request),
    ]
    pauses: list[float] = []
    await server.scaler(pauses).add_worker([(0, 0)])
    assert server.replicas["experts-0"] == 3
    assert pauses == [0.2, 0.4, 0.8]


async def test_attempts_end() -> None:
    server = ApiServer({"experts-0": 1})
    server.trouble = [lambda _: _status(500, "broken")] * 100
    with pytest.raises(UnavailableError, match="could not be scaled"):
        await server.scaler([]).add_worker([(0, 0)])
    assert len(server.calls) == ATTEMPTS


async def test_a_refusal_names_the_permission_and_is_not_tried_again() -> None:
    server = ApiServer({"experts-0": 1})
    server.trouble = [lambda _: _status(403, "forbidden: cannot get deployments/scale")]
    with pytest.raises(
        ExpertfleetError, match=r"403 forbidden.*get and patch on deployments/scale"
    ):
        await server.scaler([]).add_worker([(0, 0)])
    assert len(server.calls) == 1


async def test_only_get_and_patch_of_the_scale_subresource_are_used() -> None:
    server = ApiServer({"experts-0": 1, "experts-1": 1})
    scaler = server.scaler([])
    await scaler.add_worker([(0, 0)])
    await scaler.remove_worker("experts-0-5d4f8c7b9-x2kq7")
    assert {verb for verb, _ in server.calls} == {"get", "patch"}
    assert all(path.endswith("/scale") for _, path in server.calls)


async def test_the_token_is_read_anew_for_every_request(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    server = ApiServer({"experts-0": 1})
    scaler = server.scaler([], token)
    await scaler.add_worker([(0, 0)])
    token.write_text("two")
    await scaler.add_worker([(0, 0)])
    sent = [headers["authorization"] for headers in server.headers]
    assert sent == ["Bearer one"] * 2 + ["Bearer two"] * 2


def test_the_service_account_tells_the_namespace_and_its_absence_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="kubectl proxy"):
        in_cluster(account=tmp_path)
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("fleet-a")
    assert in_cluster(account=tmp_path).namespace == "fleet-a"
    proxy = in_cluster(url="http://127.0.0.1:8001", namespace="n", account=tmp_path)
    assert proxy.token_file is None and proxy.namespace == "n"


@pytest.mark.parametrize("text", ["experts-0", "a=", "a=0:3-1", "a=0:0-1", "a=3-1", "A=0"])
def test_a_group_that_cannot_be_read_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--group"):
        parse_group(text)


def test_a_group_has_experts_layers_and_bounds() -> None:
    group = parse_group("fleet-experts-0=0,2-3@0-15:2-5")
    assert group.holds((15, 2)) and not group.holds((16, 2)) and not group.holds((0, 1))
    assert (group.min_replicas, group.max_replicas) == (2, 5)
