"""The images, built or found, and the compose file's own part running from them."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.compose import Service, load_compose
from tests.support.containers import ContainerEngine, find_engine
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SWITCH = "EXPERTFLEET_IMAGES_CHECK"
BUILD_TIMEOUT_S = 3000.0
READY_TIMEOUT_S = 900.0
LOCAL_BASES = {
    "BASE": "localhost/expertfleet-base:slim",
    "BUILD_BASE": "localhost/expertfleet-base:build",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    engine: ContainerEngine
    tag: str


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    """`build`: both images, in a storage of their own where the engine is podman, and no trace of
    it afterwards. `present`: those that the engine has under the tag TAG."""
    mode = os.environ.get(SWITCH)
    if mode not in ("build", "present"):
        pytest.skip(f"container images are checked by `make images-check` ({SWITCH}=build)")
    command = find_engine()
    if command is None:
        pytest.skip("no container engine: neither a docker daemon nor podman")
    if mode == "present":
        yield Images(engine=ContainerEngine(command), tag=os.environ.get("TAG", "0.1.0"))
        return
    with tempfile.TemporaryDirectory(prefix="expertfleet-images-", dir="/var/tmp") as folder:
        engine = ContainerEngine([*command, *_storage_options(command, Path(folder))])
        tag = f"check-{secrets.token_hex(4)}"
        try:
            _build(engine, tag)
            yield Images(engine=engine, tag=tag)
        finally:
            _remove_images(engine, tag)


class RunningFleet:
    """What compose would start alone (deploy/compose/alone.env), on a network of its own."""

    def __init__(self, images: Images) -> None:
        self.engine = images.engine
        self._prefix = f"expertfleet-{secrets.token_hex(3)}"
        self._services = load_compose(env_file="alone.env", variables={"TAG": images.tag}).services
        self._url = ""

    @property
    def url(self) -> str:
        return self._url

    def service(self, name: str) -> Service:
        return self._services[name]

    def container(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def start(self) -> None:
        """In an order that leaves everybody without what he needs at first."""
        self.engine.run("network", "create", self._prefix)
        order = sorted(self._services, key=lambda name: (name == "valkey", name.startswith("exp")))
        for name in order:
            service = dict(self._services[name])
            if name == "valkey":
                service |= self._store_of_our_own()
            self.engine.start_service(
                name, service, container=self.container(name), network=self._prefix
            )
        self._url = f"http://127.0.0.1:{self.engine.published_port(self.container('serve'), 8000)}"

    def stop(self) -> None:
        for name in self._services:
            self.engine.remove(self.container(name))
        self.engine.attempt("network", "rm", self._prefix)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/readyz", timeout=10).is_success
        except httpx.HTTPError:
            return False

    def holders(self) -> dict[tuple[int, int], set[str]]:
        """Workers that hold each (layer, expert), as the gateway sees them."""
        answer = httpx.get(f"{self._url}/v1/experts", timeout=30).json()
        held: dict[tuple[int, int], set[str]] = {
            (layer, expert): set()
            for layer in range(answer["num_layers"])
            for expert in range(answer["num_experts"])
        }
        for worker in answer["workers"]:
            for layer, expert in worker["slots"]:
                held[layer, expert].add(worker["worker_id"])
        return held

    def logs(self) -> str:
        tails = (f"--- {name}\n{self.engine.logs(self.container(name))}" for name in self._services)
        return "\n".join(tails)

    def _store_of_our_own(self) -> Service:
        """The store's own image may be out of reach; the serving image has the same server."""
        image = self._services["serve"]["image"]
        find = "from services.core.store_server import find_server_binary as f; print(f())"
        options = ["--rm", "--entrypoint", "python"]
        binary = self.engine.run_image(image, "-c", find, options=options)
        return {"image": image, "entrypoint": [binary]}


@pytest.fixture(scope="session")
def fleet(images: Images) -> Iterator[RunningFleet]:
    running = RunningFleet(images)
    try:
        running.start()
        try:
            wait_until(running.is_ready, timeout_s=READY_TIMEOUT_S, what="the gateway is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{running.logs()}") from None
        yield running
    finally:
        running.stop()


def _storage_options(command: list[str], folder: Path) -> list[str]:
    if Path(command[0]).name != "podman":
        return []
    options = [f"--root={folder}/storage", f"--runroot={folder}/run"]
    networks = folder / "networks"
    networks.mkdir()
    return [*options, f"--network-config-dir={networks}"]


def _build(engine: ContainerEngine, tag: str) -> None:
    environment = os.environ | {
        "ENGINE": engine.command[0],
        "ENGINE_OPTIONS": shlex.join(engine.command[1:]),
        "TAG": tag,
    }
    if not {"BASE", "BUILD_BASE"} <= set(os.environ) and not _default_bases_come(engine):
        if shutil.which("mmdebstrap") is None:
            pytest.skip("the images' bases cannot be pulled, and mmdebstrap is not there")
        _call("scripts/images_base.sh", environment)
        environment |= LOCAL_BASES
    _call("scripts/images.sh", environment)


def _default_bases_come(engine: ContainerEngine) -> bool:
    from tests.support.dockerfile import read_dockerfile

    arguments = read_dockerfile().arguments
    try:
        return all(
            engine.attempt("pull", "-q", arguments[name], timeout_s=600).returncode == 0
            for name in ("BASE", "BUILD_BASE")
        )
    except subprocess.TimeoutExpired:
        return False


def _call(script: str, environment: dict[str, str]) -> None:
    """Its output is the test's: a build takes minutes."""
    done = subprocess.run([ROOT / script], env=environment, timeout=BUILD_TIMEOUT_S, cwd=ROOT)
    assert done.returncode == 0, f"{script}: {done.returncode}"


def _remove_images(engine: ContainerEngine, tag: str) -> None:
    if engine.is_podman:  # all of this storage is ours
        engine.attempt("rmi", "--all", "--force", timeout_s=600)
        return
    names = [f"expertfleet/{target}:{tag}" for target in ("serve", "expert")]
    engine.attempt("rmi", "--force", *names, *LOCAL_BASES.values(), timeout_s=600)
