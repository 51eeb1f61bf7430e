"""Security, certificates, the store, telemetry, notes and `helm test`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from expert_service import probe
from services.cli.main import app
from services.core.tls import SERVER_NAME
from tests.support.chart import CHART, NAME, NAMESPACE, VALUES_FILES, Manifest, environment, render

EXTERNAL: dict[str, Any] = {
    "bundled": False,
    "host": "store.example.com",
    "port": 6380,
    "database": 2,
    "tls": True,
    "username": "fleet",
    "passwordSecret": "store",
    "caSecret": "store-ca",
}
OURS = ("experts-e01", "autoscaler")


def containers(template: Manifest) -> list[Manifest]:
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


@pytest.mark.parametrize("file", [None, *VALUES_FILES])
def test_every_pod_meets_the_restricted_standard(file: str | None) -> None:
    for name, template in render(file).pod_templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec["volumes"])
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert "privileged" not in security


@pytest.mark.parametrize("file", [None, *VALUES_FILES])
def test_every_container_bounds_its_memory_and_has_a_place_to_write(file: str | None) -> None:
    for name, template in render(file).pod_templates():
        for container in containers(template):
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"], name
            assert "cpu" in resources["requests"]
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


def test_every_selector_selects_pods_and_every_reference_is_there() -> None:
    rendered = render(gateway={"replicas": 2}, monitoring={"mode": "serviceMonitor"})
    pods = [template["metadata"]["labels"] for _, template in rendered.pod_templates()]
    services = [each["metadata"]["labels"] for each in rendered.all("Service").values()]
    for service in rendered.all("Service").values():
        assert any(service["spec"]["selector"].items() <= labels.items() for labels in pods)
    for monitor in rendered.all("ServiceMonitor").values():
        selector = monitor["spec"]["selector"]["matchLabels"]
        assert sum(selector.items() <= labels.items() for labels in services) == 1
    for deployment in rendered.all("Deployment").values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        assert sum(selector.items() <= each.items() for each in pods) == 1


def test_the_bundled_store_asks_for_a_password_and_forgets_when_it_is_full() -> None:
    rendered = render(redis={"memory": "4Gi"})
    store = rendered.one("Deployment", "redis")["spec"]["template"]["spec"]["containers"][0]
    arguments = dict(zip(store["args"][::2], store["args"][1::2], strict=True))
    assert arguments["--requirepass"] == "$(REDIS_PASSWORD)"
    assert arguments["--maxmemory-policy"] == "allkeys-lru"
    assert environment(store)["MAXMEMORY"] == str(3 * 2**30)
    password = rendered.one("Secret", "redis")["stringData"]["password"]
    assert password.isalnum()
    assert len(password) == 32
    for name in OURS:
        container = rendered.one("Deployment", name)["spec"]["template"]["spec"]["containers"][0]
        url = environment(container)["EXPERTFLEET_REDIS_URL"]
        assert url == f"redis://:$(REDIS_PASSWORD)@{NAME}-redis:6379/0"
        secret = {"secretKeyRef": {"name": f"{NAME}-redis", "key": "password"}}
        assert {"name": "REDIS_PASSWORD", "valueFrom": secret} in container["env"]


def test_a_given_password_is_kept() -> None:
    secret = render(redis={"password": "a-b_c.d~1"}).one("Secret", "redis")
    assert secret["stringData"]["password"] == "a-b_c.d~1"


def test_an_external_store_is_reached_with_tls_password_and_authority() -> None:
    rendered = render(redis=EXTERNAL)
    assert "redis" not in rendered.all("Deployment")
    assert "redis" not in rendered.all("Service")
    assert "redis" not in rendered.all("Secret")
    for name, template in rendered.pod_templates():
        container = template["spec"]["containers"][0]
        if "-test-" in name:
            continue
        variables = environment(container)
        url = urlsplit(variables["EXPERTFLEET_REDIS_URL"])
        assert (url.scheme, url.hostname, url.port) == ("rediss", "store.example.com", 6380)
        assert (url.username, url.password) == ("fleet", "$(REDIS_PASSWORD)")
        assert (url.path, url.query) == ("/2", "ssl_ca_certs=/etc/expertfleet/redis/ca.crt")
        secret = {"secretKeyRef": {"name": "store", "key": "password"}}
        assert {"name": "REDIS_PASSWORD", "valueFrom": secret} in container["env"]
        names = [each["name"] for each in container["env"]]
        assert names.index("REDIS_PASSWORD") < names.index("EXPERTFLEET_REDIS_URL")
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "redis-tls")
        assert mount["mountPath"] == "/etc/expertfleet/redis"
        assert _projected(template, "redis-tls") == {"store-ca": ["ca.crt"]}


def test_an_external_store_may_ask_for_a_certificate() -> None:
    rendered = render(redis=EXTERNAL | {"clientCertSecret": "store-client"})
    url = environment(rendered.expert("e01"))["EXPERTFLEET_REDIS_URL"]
    folder = "/etc/expertfleet/redis"
    expected = {
        "ssl_ca_certs": [f"{folder}/ca.crt"],
        "ssl_certfile": [f"{folder}/tls.crt"],
        "ssl_keyfile": [f"{folder}/tls.key"],
    }
    assert parse_qs(urlsplit(url).query, strict_parsing=True) == expected
    for _, template in rendered.pod_templates():
        if any(each["name"] == "redis-tls" for each in template["spec"].get("volumes", ())):
            files = {"store-ca": ["ca.crt"], "store-client": ["tls.crt", "tls.key"]}
            assert _projected(template, "redis-tls") == files


def test_an_external_store_may_be_without_password_and_tls() -> None:
    rendered = render(redis={"bundled": False, "host": "store"})
    url = environment(rendered.expert("e01"))["EXPERTFLEET_REDIS_URL"]
    assert url == "redis://store:6379/0"


def test_with_certificates_every_process_has_them_and_lanes_are_off() -> None:
    rendered = render(tls={"enabled": True})
    settings = rendered.settings()
    assert settings["EXPERTFLEET_TLS_CERT_FILE"] == "/etc/expertfleet/tls/tls.crt"
    assert settings["EXPERTFLEET_TLS_KEY_FILE"] == "/etc/expertfleet/tls/tls.key"
    assert settings["EXPERTFLEET_TLS_CA_FILE"] == "/etc/expertfleet/tls/ca.crt"
    assert settings["EXPERTFLEET_DISPATCH_LANE"] == "false"
    for name, template in rendered.pod_templates():
        if name in (f"{NAME}-redis", f"{NAME}-test-completion"):
            continue
        (mount,) = (
            m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "tls"
        )
        assert mount == {"name": "tls", "mountPath": "/etc/expertfleet/tls", "readOnly": True}
        (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "tls")
        assert volume["secret"]["secretName"] == f"{NAME}-tls"
    container = rendered.expert("e01")
    assert "lane" not in {port["name"] for port in container["ports"]}
    for probed in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probed]["exec"]["command"] == ["python", "-m", probe.__name__, "health"]


def test_the_settings_name_files_that_are_mounted() -> None:
    rendered = render(tls={"enabled": True})
    named = {
        PurePosixPath(path)
        for name, path in rendered.settings().items()
        if name.startswith("EXPERTFLEET_TLS_")
    }
    # What a Secret of cert-manager has, and the schema's text asks of a given one.
    assert {path.name for path in named} == {"tls.crt", "tls.key", "ca.crt"}
    (mount,) = (m for m in rendered.expert("e01")["volumeMounts"] if m["name"] == "tls")
    assert {str(path.parent) for path in named} == {mount["mountPath"]}
    template = rendered.one("Deployment", "experts-e01")["spec"]["template"]["spec"]
    (volume,) = (v for v in template["volumes"] if v["name"] == "tls")
    # Read by the group that the pod's files belong to, and by nobody else.
    assert volume["secret"]["defaultMode"] == 0o440
    assert template["securityContext"]["fsGroup"] == template["securityContext"]["runAsGroup"]


def test_without_certificates_lanes_are_on_and_nothing_is_mounted() -> None:
    rendered = render()
    assert rendered.settings()["EXPERTFLEET_DISPATCH_LANE"] == "true"
    assert not any("TLS" in name for name in rendered.settings())
    assert not {"Certificate", "Issuer"} & rendered.kinds()


def test_cert_manager_issues_from_an_authority_of_the_release_or_a_given_one() -> None:
    own = render(tls={"enabled": True})
    assert set(own.all("Issuer")) == {"selfsigned", "ca"}
    authority, leaf = own.one("Certificate", "ca"), own.one("Certificate", "tls")
    assert authority["spec"]["isCA"] is True
    assert authority["spec"]["issuerRef"]["name"] == f"{NAME}-selfsigned"
    assert own.one("Issuer", "ca")["spec"]["ca"]["secretName"] == authority["spec"]["secretName"]
    assert leaf["spec"]["issuerRef"] == {"name": f"{NAME}-ca", "kind": "Issuer"}
    assert {"server auth", "client auth"} <= set(leaf["spec"]["usages"])
    # Clients look for this one name, wherever a pod is; the gateway's clients are others.
    assert SERVER_NAME in leaf["spec"]["dnsNames"]
    given = render(tls={"enabled": True, "issuer": "corp", "issuerKind": "ClusterIssuer"})
    assert given.all("Issuer") == {}
    assert set(given.all("Certificate")) == {"tls"}
    issuer = given.one("Certificate", "tls")["spec"]["issuerRef"]
    assert issuer == {"name": "corp", "kind": "ClusterIssuer"}


def test_certificates_may_come_from_a_given_secret() -> None:
    rendered = render(tls={"enabled": True, "source": "secret", "secret": "certs"})
    assert not {"Certificate", "Issuer"} & rendered.kinds()
    (volume,) = (v for v in rendered.ray_pod("shards")["spec"]["volumes"] if v["name"] == "tls")
    assert volume["secret"]["secretName"] == "certs"


def test_prometheus_is_told_by_annotations_or_by_monitors_or_not_at_all() -> None:
    ports = {f"{NAME}-experts-e01": "9100", f"{NAME} shards": "9101", f"{NAME} gateway": "8000"}
    for name, template in render().pod_templates():
        annotations = template["metadata"].get("annotations", {})
        if name in ports:
            assert annotations["prometheus.io/scrape"] == "true"
            assert annotations["prometheus.io/port"] == ports[name]
    monitored = render(monitoring={"mode": "serviceMonitor", "labels": {"release": "kps"}})
    monitors = monitored.all("ServiceMonitor")
    assert set(monitors) == {"gateway", "shard", "expert", "autoscaler"}
    assert all(each["metadata"]["labels"]["release"] == "kps" for each in monitors.values())
    for rendered in (monitored, render(monitoring={"mode": "none"})):
        for _, template in rendered.pod_templates():
            assert "prometheus.io" not in str(template["metadata"].get("annotations"))
    assert render(monitoring={"mode": "none"}).all("ServiceMonitor") == {}


def test_traces_go_where_they_are_told_to() -> None:
    endpoint = "http://collector.monitoring:4317"
    settings = render(otel={"endpoint": endpoint, "sampleRatio": 0.25}).settings()
    assert settings["EXPERTFLEET_OTLP_ENDPOINT"] == endpoint
    assert settings["EXPERTFLEET_TRACE_SAMPLE_RATIO"] == "0.25"
    assert "EXPERTFLEET_OTLP_ENDPOINT" not in render().settings()


def test_dashboards_and_rules_in_the_chart_are_brought_where_asked_for() -> None:
    rendered = render(monitoring={"dashboards": True, "rules": True})
    dashboards = {path.name for path in CHART.glob("dashboards/*.json")}
    brought = {
        key
        for each in rendered.all("ConfigMap").values()
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
        for key in each["data"]
    }
    assert brought == dashboards
    assert len(rendered.all("PrometheusRule")) == len(list(CHART.glob("rules/*.yaml")))
    assert "PrometheusRule" not in render().kinds()


def test_further_settings_reach_every_process() -> None:
    assert (
        render(settings={"max_model_len": "8192"}).settings()["EXPERTFLEET_MAX_MODEL_LEN"] == "8192"
    )


def test_helm_test_asks_a_real_completion_with_a_key_where_one_is_needed() -> None:
    pod = render(gateway={"apiKeysSecret": "keys"}).one("Pod", "test-completion")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    container = pod["spec"]["containers"][0]
    assert container["command"] == ["expertfleet", "complete"]
    assert "complete" in {command.name for command in app.registered_commands}
    assert f"--url=http://{NAME}:8000" in container["args"]
    assert "--api-key=$(API_KEY)" in container["args"]
    secret = {"secretKeyRef": {"name": "keys", "key": "test-key"}}
    assert container["env"] == [{"name": "API_KEY", "valueFrom": secret}]
    keyless = render().one("Pod", "test-completion")["spec"]["containers"][0]
    assert not any("api-key" in argument for argument in keyless["args"])


def test_helm_test_asks_every_worker_for_its_health() -> None:
    rendered = render()
    container = rendered.one("Pod", "test-grpc-health")["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", probe.__name__, "health"]
    service = rendered.one("Service", "experts")
    assert service["spec"]["clusterIP"] == "None"
    endpoint = f"{service['metadata']['name']}.{NAMESPACE}.svc:50051"
    assert container["args"] == ["--every-address", f"--endpoint={endpoint}"]


def test_the_notes_say_what_to_do_next_and_what_is_missing() -> None:
    notes = render().notes
    assert f"helm test -n {NAMESPACE} prod" in notes
    assert f"port-forward service/{NAME} 8000:8000" in notes
    assert "No API key is asked for" in notes
    assert "keeps nothing over a restart" in notes
    quiet = render(gateway={"apiKeysSecret": "keys"}, redis=EXTERNAL).notes
    assert "No API key" not in quiet
    assert "keeps nothing" not in quiet
    assert "Authorization: Bearer" in quiet
    assert "every pod of the cluster may reach" in render(networkPolicy={"enabled": False}).notes


def _projected(template: Manifest, volume: str) -> dict[str, list[str]]:
    """The files that a volume has, by the Secrets that they are of."""
    (found,) = (each for each in template["spec"]["volumes"] if each["name"] == volume)
    return {
        source["secret"]["name"]: [item["path"] for item in source["secret"]["items"]]
        for source in found["projected"]["sources"]
    }
