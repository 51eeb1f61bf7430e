"""docs/api.md against the application: nothing that can be asked, told or refused is left out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import pytest
from pydantic import BaseModel

from services.core.errors import ExpertfleetError
from services.core.settings import Settings, load_settings
from services.gateway import errors
from services.gateway.app import create_app
from services.gateway.console import contract
from services.gateway.routes.admin import ReplicasBody
from services.gateway.schemas.chat import ChatBody, ChatMessage, ContentPart, ResponseFormat
from services.gateway.schemas.common import StreamOptions
from services.gateway.schemas.completions import CompletionBody
from tests.support.fake_shard import FakeShard, repeats

TEXT = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
BODIES = (
    CompletionBody,
    ChatBody,
    ChatMessage,
    ContentPart,
    ResponseFormat,
    StreamOptions,
    ReplicasBody,
)
VIEWS = [each for each in vars(contract).values() if is_typeddict(each)]
_ROUTE = re.compile(r"`(?:(GET|POST|DELETE) )?(/[^`?]*)`")


def sections() -> dict[str, str]:
    """The text below each heading of the second level."""
    _, *parts = re.split(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def errors_of(kind: type[ExpertfleetError]) -> Iterator[type[ExpertfleetError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from errors_of(below)


def names(text: str) -> set[str]:
    """Words in code, alone (`word`) or as a member ("word"), with what code blocks hold."""
    return set(re.findall(r"[`\"]([a-z_][a-z0-9_]*)[`\"]", text))


@pytest.fixture
def routes(model_folder: Path) -> dict[str, set[str]]:
    """Methods by path."""
    app = create_app(
        load_settings(model="org/tiny"), FakeShard(repeats((5,))), None, model_folder=model_folder
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GET and HEAD of one function have one operation id
        paths = app.openapi()["paths"]
    return {path: {method.upper() for method in methods} for path, methods in paths.items()}


def test_every_route_is_described_and_no_other(routes: dict[str, set[str]]) -> None:
    assert len(routes) > 10
    told = {path for _, path in _ROUTE.findall(TEXT)} - {"/admin"}
    assert told == set(routes)
    for method, path in _ROUTE.findall(TEXT):
        assert not method or method in routes[path], (method, path)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_of_a_request_is_described(body: type[BaseModel]) -> None:
    assert set(body.model_fields) - names(TEXT) == set()


def test_every_field_of_the_table_is_one_that_is_taken() -> None:
    """A field that was renamed must not go on being promised."""
    of_chat = sections()["POST /v1/chat/completions"]
    of_completion = sections()["POST /v1/completions"]
    for text, body in ((of_completion, CompletionBody), (of_chat, ChatBody)):
        told = {
            name
            for row in re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
            for name in re.findall(r"`(\w+)`", row)
        }
        assert told
        assert told <= set(body.model_fields)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_every_member_of_the_fleet_view_is_described(view: Any) -> None:
    assert set(view.__annotations__) - names(sections()["GET /v1/experts"]) == set()


def test_every_error_has_its_code_under_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", sections()["Errors"], flags=re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    # Errors that other modules have are of their own processes, and told to no client.
    of_answers = {ExpertfleetError.__module__, errors.__name__}
    raised = {
        (kind.http_status, kind.code)
        for kind in errors_of(ExpertfleetError)
        if kind.__module__ in of_answers
    }
    assert told - raised == {(405, "method_not_allowed")}
    assert raised - told == set()


def test_the_settings_that_are_named_exist() -> None:
    named = set(re.findall(r"EXPERTFLEET_([A-Z_]+)", TEXT))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_links_within_the_page_and_to_other_pages_lead_somewhere() -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    docs = Path(__file__).parents[3] / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        page, _, fragment = target.partition("#")
        text = (docs / page).read_text() if page else TEXT
        anchors = {anchor(each) for each in re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)}
        assert not fragment or fragment in anchors, target
