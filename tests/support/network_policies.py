"""What NetworkPolicies let through, by the rules of the Kubernetes API (v1).

What the API has and this does not know (`except`, `endPort`, named ports, ...) is refused rather
than passed over, for a rule that is misread would be taken to be tighter, or wider, than it is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod, or with an `address` and no labels something outside the cluster."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""
    address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """`policies` are of the namespace `namespace`, which is labelled with its name as all are."""

    policies: Sequence[Policy]
    namespace: str

    def __post_init__(self) -> None:
        for policy in self.policies:
            _check_known(policy["spec"])

    def allows(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection passes: out of the source, and into the target."""
        return self._side("Egress", source, target, port, protocol) and self._side(
            "Ingress", target, source, port, protocol
        )

    def accepts(self, target: Peer, source: Peer, port: int, protocol: str = "TCP") -> bool:
        """Whether the target's own policies let it in, whatever the source's say."""
        return self._side("Ingress", target, source, port, protocol)

    def _side(self, direction: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
        """A pod that no policy of this direction selects is free; else one rule must let it."""
        if pod.address is not None or pod.namespace != self.namespace:
            return True
        selecting = [
            policy["spec"]
            for policy in self.policies
            if direction in policy["spec"]["policyTypes"]
            and _matches(policy["spec"]["podSelector"], pod.labels)
        ]
        key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
        return not selecting or any(
            self._has_peer(rule.get(peers), other) and _has_port(rule.get("ports"), port, protocol)
            for spec in selecting
            for rule in spec.get(key) or ()
        )

    def _has_peer(self, peers: Sequence[Mapping[str, Any]] | None, other: Peer) -> bool:
        return not peers or any(self._is_peer(peer, other) for peer in peers)

    def _is_peer(self, peer: Mapping[str, Any], other: Peer) -> bool:
        if "ipBlock" in peer:
            network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
            return other.address is not None and ipaddress.ip_address(other.address) in network
        if other.address is not None:
            return False
        if "namespaceSelector" in peer:
            labels = {"kubernetes.io/metadata.name": other.namespace}
            if not _matches(peer["namespaceSelector"], labels):
                return False
        elif other.namespace != self.namespace:
            return False
        return _matches(peer.get("podSelector", {}), other.labels)


def _check_known(spec: Mapping[str, Any]) -> None:
    assert spec.keys() <= {"podSelector", "policyTypes", "ingress", "egress"}, spec
    # Kubernetes would take a direction with rules to be meant where types are left out.
    assert {"ingress", "egress"} & spec.keys() <= {kind.lower() for kind in spec["policyTypes"]}
    for key, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(key) or ():
            assert rule.keys() <= {peers, "ports"}, rule
            for port in rule.get("ports") or ():
                assert port.keys() <= {"port", "protocol"}, port
                assert isinstance(port["port"], int), port
            for peer in rule.get(peers) or ():
                known = {"ipBlock"} if "ipBlock" in peer else {"namespaceSelector", "podSelector"}
                assert peer.keys() and peer.keys() <= known, peer
                assert peer.get("ipBlock", {}).keys() <= {"cidr"}, peer


def _has_port(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    return not ports or any(
        each.get("port", port) == port and each.get("protocol", "TCP") == protocol for each in ports
    )


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}, selector
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions") or ():
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True
