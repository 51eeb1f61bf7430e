"""The rendered NetworkPolicies as one table: who may reach whom at which port, and nothing else.

What is open is listed here by hand, from what the processes do; every other combination of pods,
strangers and ports must be closed. Ports are those that any container names, those of the strangers
below, and some that nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest

from tests.support.chart import NAME, NAMESPACE, Rendered, render
from tests.support.network_policies import Network, Peer

RAY = ("head", "gateway", "shard")
USES_STORE = ("gateway", "shard", "expert", "autoscaler")
TRACES = (*RAY, "expert", "autoscaler")
POD_NAMES = {
    "head": f"{NAME} head",
    "gateway": f"{NAME} gateway",
    "shard": f"{NAME} shards",
    "expert": f"{NAME}-experts-e01",
    "autoscaler": f"{NAME}-autoscaler",
    "redis": f"{NAME}-redis",
    "test": f"{NAME}-test-completion",
}
UNUSED_PORTS = (1, 22, 8080, 31999, 50070, 65535)
OUTSIDE_PORTS = (53, 443, 6443, 4317, 6380, 9090)

Link = tuple[str, str, int]


class Scene:
    """A release's pods, and strangers: inside and outside of the cluster."""

    def __init__(self, rendered: Rendered) -> None:
        policies = list(rendered.all("NetworkPolicy").values())
        self.network = Network(policies=policies, namespace=NAMESPACE)
        self.ports = sorted({*_container_ports(rendered), *UNUSED_PORTS, *OUTSIDE_PORTS})
        templates = dict(rendered.pod_templates())
        labels = {
            component: templates[name]["metadata"]["labels"]
            for component, name in POD_NAMES.items()
            if name in templates
        }
        self.ours = tuple(labels)
        self.peers = {
            component: Peer(name=component, labels=of_pod, namespace=NAMESPACE)
            for component, of_pod in labels.items()
        } | {peer.name: peer for peer in _strangers(labels)}

    def links(self) -> set[Link]:
        """Everything that is open from or to a pod of the release. TCP, and for names UDP too."""
        return {
            (source, target, port)
            for source, target, port in product(self.peers, self.peers, self.ports)
            if {source, target} & set(self.ours)
            and self.network.allows(self.peers[source], self.peers[target], port)
        }


STRANGERS = (
    "pod beside",
    "pod elsewhere",
    "shard of another release",
    "shard in another namespace",
    "prometheus",
    "operator",
    "dns",
    "collector",
    "internet",
    "API server",
)
ADDRESSES = {"internet": "93.184.216.34", "API server": "10.96.0.1"}


def _strangers(ours: dict[str, dict[str, str]]) -> Iterator[Peer]:
    shard = ours["shard"]
    labels = {
        "shard of another release": shard | {"app.kubernetes.io/instance": "another"},
        "shard in another namespace": shard,
        "operator": {"app.kubernetes.io/name": "kuberay-operator"},
    }
    namespaces = {
        "pod beside": NAMESPACE,
        "shard of another release": NAMESPACE,
        "prometheus": "monitoring",
        "collector": "telemetry",
        "operator": "kuberay-system",
        "dns": "kube-system",
    }
    for name in STRANGERS:
        if name in ADDRESSES:
            yield Peer(name=name, address=ADDRESSES[name])
        else:
            yield Peer(
                name=name,
                labels=labels.get(name, {"app": name}),
                namespace=namespaces.get(name, "elsewhere"),
            )


def _container_ports(rendered: Rendered) -> set[int]:
    return {
        port["containerPort"]
        for _, template in rendered.pod_templates()
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }


def expected_links(
    ports: Sequence[int],
    *,
    lanes: bool = True,
    admin: bool = False,
    bundled_store: bool = True,
    ray_scales: bool = False,
    gateway_from: Sequence[str] = STRANGERS,
) -> set[Link]:
    """What a release with an autoscaler of pods and a trace collector at port 4317 has open."""
    return {
        # A completion: who asks, gateway to shard and Ray's own talk, shard to worker
        *((client, "gateway", 8000) for client in (*gateway_from, "test", *RAY)),
        *product(RAY, RAY, ports),
        ("shard", "expert", 50051),
        *([("shard", "expert", 50052)] if lanes else []),
        # Leases and sessions
        *(
            product(USES_STORE, ["redis"], [6379])
            if bundled_store
            else product(USES_STORE, ADDRESSES, [6380])
        ),
        # Loading, draining, health
        ("autoscaler", "expert", 50051),
        ("test", "expert", 50051),
        *([("gateway", "expert", 50051)] if admin else []),
        # Pods are scaled, and Ray's are asked for, through the API server, which is an address
        *product(["autoscaler"], ADDRESSES, [443, 6443]),
        *(product(["head"], ADDRESSES, [443, 6443]) if ray_scales else ()),
        # Operations
        ("prometheus", "expert", 9100),
        ("prometheus", "shard", 9101),
        ("prometheus", "autoscaler", 9103),
        ("prometheus", "gateway", 8000),
        *product(["operator"], ["head"], [8265, 8000]),
        # Wherever the collector and the cluster's name server are
        *product(TRACES, STRANGERS, [4317]),
        *product(_components(bundled_store), STRANGERS, [53]),
    }


def _components(bundled_store: bool) -> list[str]:
    return [name for name in POD_NAMES if bundled_store or name != "redis"]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it stands": ({}, {}),
    "certificates": ({"tls": {"enabled": True}}, {"lanes": False}),
    "administration": ({"gateway": {"adminKeySecret": "admin"}}, {"admin": True}),
    "shards scale": ({"shards": {"maxReplicas": 3}}, {"ray_scales": True}),
    "named clients": (
        {
            "networkPolicy": {
                "gatewayFrom": [{"podSelector": {"matchLabels": {"app": "pod beside"}}}]
            }
        },
        {"gateway_from": ("pod beside",)},
    ),
    "external store": (
        {"redis": {"bundled": False, "host": "store", "port": 6380}},
        {"bundled_store": False},
    ),
}


def _scene(**values: Any) -> Scene:
    return Scene(render(otel={"endpoint": "http://collector.telemetry:4317"}, **values))


@pytest.mark.parametrize("case", CASES)
def test_what_the_product_needs_is_open_and_nothing_else(case: str) -> None:
    values, changes = CASES[case]
    scene = _scene(**values)
    links, expected = scene.links(), expected_links(scene.ports, **changes)
    assert sorted(expected - links) == []
    assert sorted(links - expected) == []


@pytest.mark.parametrize("values", [{}, {"tls": {"enabled": True}}], ids=["plain", "mTLS"])
def test_a_completion_finds_every_hop_open(values: dict[str, Any]) -> None:
    scene = _scene(**values)
    frames = 50051 if values else 50052
    hops: list[Link] = [
        ("gateway", "dns", 53),
        ("shard", "dns", 53),
        ("expert", "dns", 53),
        # Leases, by which gateway, shard and workers find each other
        ("expert", "redis", 6379),
        ("shard", "redis", 6379),
        ("gateway", "redis", 6379),
        # Ray's cluster store, and its processes among themselves
        ("gateway", "head", 6379),
        ("shard", "head", 6379),
        ("head", "shard", 31999),
        # The request: the shard's port for gateways is a free one
        ("pod elsewhere", "gateway", 8000),
        ("gateway", "shard", 50070),
        ("shard", "expert", 50051),
        ("shard", "expert", frames),
        # What it leaves behind
        ("gateway", "collector", 4317),
        ("shard", "collector", 4317),
        ("expert", "collector", 4317),
        ("prometheus", "gateway", 8000),
    ]
    links = scene.links()
    assert [hop for hop in hops if hop not in links] == []
    assert all(
        scene.network.allows(scene.peers[pod], scene.peers["dns"], 53, "UDP") for pod in scene.ours
    )


@pytest.mark.parametrize("case", CASES)
def test_no_pod_of_the_release_is_left_out_of_default_deny(case: str) -> None:
    """Those included that only hooks make. Taking every other policy away closes them all."""
    rendered = render(**CASES[case][0])
    denial = rendered.one("NetworkPolicy", "default-deny")
    network = Network(policies=[denial], namespace=NAMESPACE)
    stranger = Peer(name="stranger", labels={"app": "x"}, namespace=NAMESPACE)
    pods = dict(rendered.pod_templates())
    assert len(pods) >= 9
    for name, template in pods.items():
        pod = Peer(name=name, labels=template["metadata"]["labels"], namespace=NAMESPACE)
        assert not network.allows(stranger, pod, 8000), name
        assert not network.allows(pod, stranger, 8000), name
        assert not network.allows(stranger, pod, 53), name


def test_every_port_that_a_rule_names_is_one_that_somebody_listens_on() -> None:
    rendered = render(tls={"enabled": False}, gateway={"adminKeySecret": "admin"})
    listening = _container_ports(rendered)
    named = {
        port["port"]
        for policy in rendered.all("NetworkPolicy").values()
        for rule in policy["spec"].get("ingress") or ()
        for port in rule.get("ports") or ()
    }
    assert named <= listening
    assert {8000, 50051, 50052, 9100, 9101, 9103, 6379} <= named


def test_the_gateway_metrics_are_scraped_where_only_named_clients_may_come() -> None:
    peers = [{"podSelector": {"matchLabels": {"app": "web"}}}]
    scene = _scene(networkPolicy={"gatewayFrom": peers, "prometheusNamespace": "monitoring"})
    assert ("prometheus", "gateway", 8000) in scene.links()
