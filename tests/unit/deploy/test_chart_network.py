"""The rendered NetworkPolicies: a completion passes, and what it does not need does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chart import NAME, NAMESPACE, Rendered, render
from tests.support.network_policies import Network, Peer

COMPONENTS = {
    "head": f"{NAME} head",
    "gateway": f"{NAME} gateway",
    "shard": f"{NAME} shards",
    "expert": f"{NAME}-experts-e01",
    "autoscaler": f"{NAME}-autoscaler",
    "redis": f"{NAME}-redis",
    "test": f"{NAME}-test-completion",
}
OURS = tuple(COMPONENTS)
FOREIGN = Peer(name="a pod beside ours", labels={"app": "x"}, namespace=NAMESPACE)
PROMETHEUS = Peer(name="prometheus", labels={"app": "prometheus"}, namespace="monitoring")
OPERATOR = Peer(
    name="kuberay",
    labels={"app.kubernetes.io/name": "kuberay-operator"},
    namespace="kuberay-system",
)
DNS = Peer(name="dns", labels={"k8s-app": "kube-dns"}, namespace="kube-system")
COLLECTOR = Peer(name="collector", labels={"app": "otel"}, namespace="monitoring")
INTERNET = Peer(name="internet", address="93.184.216.34")
API_SERVER = Peer(name="API server", address="10.96.0.1")

Rule = tuple[str, str, int]
COMPLETION: set[Rule] = {
    *((a, b, 50071) for a in ("head", "gateway", "shard") for b in ("head", "gateway", "shard")),
    ("shard", "expert", 50051),
    ("shard", "expert", 50052),
    *((client, "redis", 6379) for client in ("gateway", "shard", "expert", "autoscaler")),
    ("autoscaler", "expert", 50051),
    ("test", "gateway", 8000),
    ("test", "expert", 50051),
}


class Cluster:
    def __init__(self, rendered: Rendered) -> None:
        self.network = Network(
            policies=list(rendered.all("NetworkPolicy").values()), namespace=NAMESPACE
        )
        templates = dict(rendered.pod_templates())
        self.pods = {
            component: Peer(
                name=component, labels=templates[name]["metadata"]["labels"], namespace=NAMESPACE
            )
            for component, name in COMPONENTS.items()
            if name in templates
        }

    def allows(self, source: Peer | str, target: Peer | str, port: int) -> bool:
        return self.network.allows(self._pod(source), self._pod(target), port)

    def open_among_ours(self, ports: tuple[int, ...]) -> set[Rule]:
        return {
            (source, target, port)
            for source in self.pods
            for target in self.pods
            for port in ports
            if self.allows(source, target, port)
        }

    def _pod(self, peer: Peer | str) -> Peer:
        return self.pods[peer] if isinstance(peer, str) else peer


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster(render(otel={"endpoint": "http://collector.monitoring:4317"}))


def test_among_our_pods_only_the_way_of_a_completion_is_open(cluster: Cluster) -> None:
    ray = {rule for rule in COMPLETION if rule[2] == 50071}
    everywhere = {
        (a, b, port) for a, b, _ in ray for port in (6379, 8000, 8265, 9100, 9101, 50051, 50052)
    }
    ports = (6379, 8000, 8265, 9100, 9101, 9103, 50051, 50052, 50071)
    opened = cluster.open_among_ours(ports)
    # Everybody may reach the gateway, as long as networkPolicy.gatewayFrom is empty.
    from_everybody = {rule for rule in opened if rule[1:] == ("gateway", 8000)}
    inside_ray = {rule for rule in opened if {rule[0], rule[1]} <= {"head", "gateway", "shard"}}
    assert everywhere | ray <= inside_ray
    assert opened - inside_ray - from_everybody == COMPLETION - ray - {("test", "gateway", 8000)}
    # Ray's head and gateways publish nothing to the store but leases; the head has none.
    assert not cluster.allows("head", "redis", 6379)


def test_only_shards_send_frames_to_workers(cluster: Cluster) -> None:
    assert {source for source in OURS if cluster.allows(source, "expert", 50052)} == {"shard"}
    for stranger in (FOREIGN, PROMETHEUS, OPERATOR, INTERNET):
        assert not cluster.allows(stranger, "expert", 50051)
        assert not cluster.allows(stranger, "expert", 50052)


def test_nobody_but_our_pods_reaches_the_store(cluster: Cluster) -> None:
    for stranger in (FOREIGN, PROMETHEUS, OPERATOR, INTERNET):
        assert not cluster.allows(stranger, "redis", 6379)


def test_workers_and_store_keep_others_out_by_themselves(cluster: Cluster) -> None:
    def accepted(target: str, port: int) -> set[str]:
        network, pods = cluster.network, cluster.pods
        return {name for name in OURS if network.accepts(pods[target], pods[name], port)}

    assert accepted("expert", 50052) == {"shard"}
    assert accepted("expert", 50051) == {"shard", "autoscaler", "test"}
    assert accepted("expert", 9100) == set()
    assert accepted("redis", 6379) == {"gateway", "shard", "expert", "autoscaler"}
    assert accepted("autoscaler", 9103) == set()


def test_prometheus_reaches_metrics_and_no_other_port(cluster: Cluster) -> None:
    for component, port in {"expert": 9100, "shard": 9101, "autoscaler": 9103}.items():
        assert cluster.allows(PROMETHEUS, component, port)
        assert not cluster.allows(FOREIGN, component, port)
    assert not cluster.allows(PROMETHEUS, "shard", 8265)
    other = Cluster(render(networkPolicy={"prometheusNamespace": "observability"}))
    assert not other.allows(PROMETHEUS, "expert", 9100)


def test_every_pod_resolves_names_and_reports_traces(cluster: Cluster) -> None:
    for component in OURS:
        pod = cluster.pods[component]
        assert cluster.network.allows(pod, DNS, 53, "UDP")
        assert cluster.allows(pod, DNS, 53)
        expected = component in ("head", "gateway", "shard", "expert", "autoscaler")
        assert cluster.allows(pod, COLLECTOR, 4317) is expected
    without = Cluster(render())
    assert not any(without.allows(component, COLLECTOR, 4317) for component in OURS)


def test_only_the_autoscaler_reaches_the_api_server(cluster: Cluster) -> None:
    assert {each for each in OURS if cluster.allows(each, API_SERVER, 443)} == {"autoscaler"}
    local = Cluster(render(autoscaling={"mode": "none"}))
    assert not any(local.allows(each, API_SERVER, 443) for each in OURS)
    scaling = Cluster(render(shards={"maxReplicas": 2}))
    reaching = {each for each in OURS if scaling.allows(each, API_SERVER, 6443)}
    assert reaching == {"autoscaler", "head"}
    narrow = Cluster(render(networkPolicy={"apiServerCidr": "10.96.0.1/32"}))
    assert narrow.allows("autoscaler", API_SERVER, 443)
    assert not narrow.allows("autoscaler", INTERNET, 443)


def test_the_operator_deploys_through_the_head(cluster: Cluster) -> None:
    assert cluster.allows(OPERATOR, "head", 8265)
    assert not cluster.allows(OPERATOR, "head", 6379)
    assert not cluster.allows(FOREIGN, "head", 8265)
    elsewhere = Cluster(render(networkPolicy={"kuberayNamespace": "ray-operators"}))
    assert not elsewhere.allows(OPERATOR, "head", 8265)


def test_the_gateway_is_open_to_all_or_to_those_named() -> None:
    everybody = Cluster(render())
    assert everybody.allows(FOREIGN, "gateway", 8000)
    assert everybody.allows(INTERNET, "gateway", 8000)
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}}]
    named = Cluster(render(networkPolicy={"gatewayFrom": peers}))
    web = Peer(name="web", labels={}, namespace="web")
    assert named.allows(web, "gateway", 8000)
    assert named.allows("test", "gateway", 8000)
    assert named.allows(PROMETHEUS, "gateway", 8000)
    assert not named.allows(FOREIGN, "gateway", 8000)
    assert not named.allows(INTERNET, "gateway", 8000)
    assert not named.allows(web, "gateway", 8265)


def test_gateways_reach_workers_only_where_there_is_administration() -> None:
    assert not Cluster(render()).allows("gateway", "expert", 50051)
    with_admin = Cluster(render(gateway={"adminKeySecret": "admin"}))
    assert with_admin.allows("gateway", "expert", 50051)
    assert not with_admin.allows("gateway", "expert", 50052)


def test_with_certificates_the_lane_is_closed() -> None:
    secured = Cluster(render(tls={"enabled": True}))
    assert secured.allows("shard", "expert", 50051)
    assert not secured.allows("shard", "expert", 50052)


@pytest.mark.parametrize("source", ["bundled", "download"])
def test_the_internet_is_reached_for_weights_alone(source: str) -> None:
    model = "owner/name" if source == "download" else "models/demo"
    opened = Cluster(
        render(
            model=model,
            weights={"source": source},
            networkPolicy={"apiServerCidr": "10.96.0.1/32"},
        )
    )
    reaching = {each for each in OURS if opened.allows(each, INTERNET, 443)}
    downloading = {"gateway", "shard", "expert"}
    assert reaching == (downloading if source == "download" else set())


def test_an_external_store_is_reached_by_its_range_and_port() -> None:
    values: dict[str, Any] = {
        "redis": {"bundled": False, "host": "store", "port": 6380},
        "networkPolicy": {"redisCidr": "10.1.2.0/24"},
    }
    opened = Cluster(render(**values))
    store = Peer(name="store", address="10.1.2.3")
    for component in ("gateway", "shard", "expert", "autoscaler"):
        assert opened.allows(component, store, 6380)
        assert not opened.allows(component, store, 6379)
        assert not opened.allows(component, Peer(name="other", address="10.1.3.3"), 6380)


def test_policies_can_be_left_out() -> None:
    assert render(networkPolicy={"enabled": False}).all("NetworkPolicy") == {}
