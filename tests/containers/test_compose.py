"""The compose files: what starts, with which settings, and that all they name is there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from expert_service.__main__ import _parser as worker_parser
from expert_service.slots import parse_indices
from services.cli.main import app
from services.core.checkpoints.hub import find_model
from services.core.model_config import load_model_config
from services.core.settings import Settings
from services.gateway import probe
from tests.support.chart import CHART, render, yaml
from tests.support.compose import COMPOSE_FILE, FOLDER, GPU_FILE, bind_mounts, load_compose

ROOT = Path(__file__).parents[2]
OURS = {"valkey", "serve", "autoscaler", "expert-0", "expert-1", "expert-2", "expert-3"}
OBSERVABILITY = {"otel-collector", "jaeger", "prometheus", "grafana"}
WORKERS = sorted(name for name in OURS if name.startswith("expert-"))


def worker_arguments(service: dict[str, Any]) -> argparse.Namespace:
    return worker_parser().parse_args(service["command"])


def scrape_targets() -> Iterator[tuple[str, int]]:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    for job in config["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            host, _, port = target.partition(":")
            yield host, int(port)


def test_everything_starts_from_a_clean_clone() -> None:
    assert set(load_compose().services) == OURS | OBSERVABILITY


def test_our_part_runs_alone_and_sends_no_traces() -> None:
    alone = load_compose(env_file="alone.env")
    assert set(alone.services) == OURS
    for name in OURS - {"valkey"}:
        assert alone.services[name]["environment"]["EXPERTFLEET_OTLP_ENDPOINT"] == ""


def test_a_profile_of_the_shell_wins() -> None:
    assert set(load_compose(variables={"COMPOSE_PROFILES": ""}).services) == OURS


@pytest.mark.parametrize("files", [(COMPOSE_FILE,), (COMPOSE_FILE, GPU_FILE)], ids=["cpu", "gpu"])
def test_every_file_that_is_mounted_exists(files: tuple[Path, ...]) -> None:
    for name, service in load_compose(*files).all_services.items():
        for target, source in bind_mounts(service).items():
            assert source.exists() or source.parent == CHART, f"{name}: {target} is {source}"
            assert source.is_relative_to(ROOT)


def test_named_volumes_are_declared() -> None:
    compose = load_compose()
    named = {
        volume.split(":")[0]
        for service in compose.all_services.values()
        for volume in service.get("volumes", [])
        if "/" not in volume.split(":")[0]
    }
    assert named == set(compose.volumes)


def test_images_that_are_pulled_have_a_full_name_and_a_version() -> None:
    for name, service in load_compose().all_services.items():
        image = service["image"]
        if image.startswith("expertfleet/"):
            continue
        repository, _, tag = image.rpartition(":")
        assert repository.startswith("docker.io/"), name
        assert any(each.isdigit() for each in tag), f"{name}: {image}"
        assert "latest" not in tag, name


def test_our_images_are_the_charts() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = yaml.safe_load((CHART / "values.yaml").read_text())["image"]
    serve, expert = (f"{images[each]}:{chart['appVersion']}" for each in ("serve", "expert"))
    services = load_compose().services
    assert services["serve"]["image"] == services["autoscaler"]["image"] == serve
    assert {services[name]["image"] for name in WORKERS} == {expert}
    on_gpus = load_compose(COMPOSE_FILE, GPU_FILE).services
    suffix = images["cudaTagSuffix"]
    assert on_gpus["serve"]["image"] == on_gpus["autoscaler"]["image"] == serve + suffix
    assert {on_gpus[name]["image"] for name in WORKERS} == {expert + suffix}


def test_every_image_of_ours_is_built_by_one_service() -> None:
    for files in ((COMPOSE_FILE,), (COMPOSE_FILE, GPU_FILE)):
        services = load_compose(*files).services
        ours = {s["image"] for s in services.values() if s["image"].startswith("expertfleet/")}
        built = [service["image"] for service in services.values() if "build" in service]
        assert sorted(built) == sorted(ours)


def test_builds_find_their_dockerfile_and_target() -> None:
    for service in load_compose().services.values():
        if build := service.get("build"):
            context = (FOLDER / build["context"]).resolve()
            assert context == ROOT
            stages = (context / build["dockerfile"]).read_text()
            assert f" AS {build['target']}\n" in stages
            assert service["image"].split(":")[0] == f"expertfleet/{build['target']}"


def test_every_variable_is_a_setting_that_takes_the_value() -> None:
    fields = {f"EXPERTFLEET_{name.upper()}" for name in Settings.model_fields}
    for service in load_compose(COMPOSE_FILE, GPU_FILE).services.values():
        ours = {k: v for k, v in service.get("environment", {}).items() if "EXPERTFLEET" in k}
        assert set(ours) <= fields
        values = {name.removeprefix("EXPERTFLEET_").lower(): v for name, v in ours.items()}
        Settings.model_validate(values)


def test_the_workers_hold_every_expert_of_the_demo_model_once() -> None:
    config = load_model_config(find_model(str(ROOT / "models/demo")).folder)
    held: list[int] = []
    for name in WORKERS:
        arguments = worker_arguments(load_compose().services[name])
        assert arguments.worker_id == name
        assert arguments.layers is None
        held += parse_indices(arguments.experts, setting="experts")
    assert sorted(held) == list(range(config.num_local_experts))


def test_workers_listen_where_the_charts_do() -> None:
    manifest = render().expert("e01")
    ports = {port["name"]: port["containerPort"] for port in manifest["ports"]}
    for name in WORKERS:
        service = load_compose().services[name]
        arguments = worker_arguments(service)
        assert (arguments.port, arguments.metrics_port) == (ports["grpc"], ports["metrics"])
        assert service["environment"]["EXPERTFLEET_LANE_PORT"] == str(ports["lane"])
        assert arguments.host == "0.0.0.0"


def test_our_services_are_as_restricted_as_the_charts_pods() -> None:
    for name in OURS:
        service = load_compose().services[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_service_comes_back_when_it_ends() -> None:
    for name, service in load_compose().all_services.items():
        assert service["restart"] == "unless-stopped", name
        assert "depends_on" not in service, name


def test_the_store_is_the_charts() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["redis"]
    store = load_compose().services["valkey"]
    assert store["image"] == f"docker.io/{values['image']}"
    (container,) = render().one("Deployment", "redis")["spec"]["template"]["spec"]["containers"]
    assert store["entrypoint"] == container["command"]
    common = container["args"][: container["args"].index("--maxmemory")]
    assert store["command"][: len(common)] == common


def test_commands_are_what_the_command_line_takes() -> None:
    command = get_command(app)
    for name in ("serve", "autoscaler"):
        subcommand, *arguments = load_compose().services[name]["command"]
        context = command.make_context("expertfleet", [subcommand, *arguments])
        found = command.commands[subcommand]  # type: ignore[attr-defined]
        with context:
            found.make_context(subcommand, arguments, parent=context)


def test_prometheus_asks_each_process_where_it_answers() -> None:
    services = load_compose().services
    serve, autoscaler = services["serve"], services["autoscaler"]
    assert serve["environment"]["EXPERTFLEET_METRICS_HOST"] == "0.0.0.0"
    assert "--metrics-host=0.0.0.0" in autoscaler["command"]
    wanted = {(name, worker_arguments(services[name]).metrics_port) for name in WORKERS}
    wanted |= {("serve", int(serve["environment"]["EXPERTFLEET_METRICS_PORT"])), ("serve", 8000)}
    port = next(each for each in autoscaler["command"] if "--metrics-port" in each)
    wanted |= {("autoscaler", int(port.partition("=")[2]))}
    assert set(scrape_targets()) == wanted


def test_prometheus_reads_the_charts_rules() -> None:
    prometheus = load_compose().services["prometheus"]
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (pattern,) = config["rule_files"]
    folder, _, files = pattern.rpartition("/")
    assert (bind_mounts(prometheus)[folder], files) == (CHART / "rules", "*.yaml")


def test_spans_go_to_the_collector_and_from_there_to_jaeger() -> None:
    services = load_compose().services
    collector = yaml.safe_load((FOLDER / "otel-collector.yaml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    for name in OURS - {"valkey"}:
        endpoint = services[name]["environment"]["EXPERTFLEET_OTLP_ENDPOINT"]
        assert endpoint == f"http://otel-collector:{port}"
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= set(collector[kind])
    assert collector["exporters"]["otlp"]["endpoint"].partition(":")[0] in services


def test_grafana_shows_the_charts_dashboards_from_both_sources() -> None:
    mounts = bind_mounts(load_compose().services["grafana"])
    providers = yaml.safe_load((FOLDER / "grafana/dashboards.yaml").read_text())["providers"]
    assert mounts[providers[0]["options"]["path"]] == CHART / "dashboards"
    sources = yaml.safe_load((FOLDER / "grafana/datasources.yaml").read_text())["datasources"]
    for source in sources:
        host = source["url"].removeprefix("http://").partition(":")[0]
        assert host in load_compose().services
    exemplars = sources[0]["jsonData"]["exemplarTraceIdDestinations"][0]
    assert exemplars["datasourceUid"] in {source["uid"] for source in sources}


def test_only_this_machine_reaches_published_ports() -> None:
    for service in load_compose().all_services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_with_gpus_shard_and_workers_each_ask_for_one() -> None:
    services = load_compose(COMPOSE_FILE, GPU_FILE, variables={"GPU_EXPERT_2": "3"}).services
    for name in ("serve", *WORKERS):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == (["3"] if name == "expert-2" else ["0"])
        assert services[name]["environment"]["EXPERTFLEET_DEVICE"] == "cuda"
        if "build" in services[name]:
            assert services[name]["build"]["args"] == {"DEVICE": "cuda"}


def test_the_autoscalers_health_check_asks_its_own_metrics() -> None:
    test = load_compose().services["autoscaler"]["healthcheck"]["test"]
    assert test[:4] == ["CMD", "python", "-m", probe.__name__]
    assert "--url=http://127.0.0.1:9103/metrics" in test
