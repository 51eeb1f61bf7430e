from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from services.core.errors import CheckpointError, InvalidRequestError
from services.gateway.chat_template import ChatTemplate
from tests.unit.gateway.tiny_models import CHAT_TEMPLATE

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, *messages: tuple[str, str]) -> str:
    template = ChatTemplate(source, TOKENS, origin="test")
    return template.render([{"role": role, "content": content} for role, content in messages])


def test_messages_are_rendered_with_the_special_tokens_and_a_generation_prompt() -> None:
    assert render(CHAT_TEMPLATE, ("user", "hi"), ("assistant", "ho"), ("user", "again")) == (
        "<s><user>hi<assistant>ho</s><user>again<assistant>"
    )


def test_a_template_that_refuses_the_messages_is_quoted() -> None:
    with pytest.raises(InvalidRequestError, match="no tools here") as caught:
        render(CHAT_TEMPLATE, ("tool", "42"))
    assert caught.value.details["param"] == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing() }}",
    ],
)
def test_any_error_inside_a_template_is_the_requests(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template refuses"):
        render(source, ("user", "hi"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(source, ("user", "hi"))


def test_message_text_is_data_and_never_template() -> None:
    assert render("{{ messages[0].content }}", ("user", "{{ 1 + 1 }}")) == "{{ 1 + 1 }}"


def test_a_template_has_what_hugging_face_gives_it() -> None:
    source = (
        "{% for m in messages %}\n"
        "  {% if loop.index > 1 %}\n"
        "    {% break %}\n"
        "  {% endif %}\n"
        "{{ m | tojson }} {{ tools is none }} {{ strftime_now('%Y') }}\n"
        "{% endfor %}\n"
    )
    year = datetime.now().astimezone().year
    expected = f'{{"role": "user", "content": "<ü>"}} True {year}\n'
    assert render(source, ("user", "<ü>"), ("user", "2")) == expected


def test_developer_becomes_system_only_where_the_template_does_not_know_it() -> None:
    assert render("{{ messages[0].role }}", ("developer", "x")) == "system"
    knowing = "{# developer #}{{ messages[0].role }}"
    assert render(knowing, ("developer", "x")) == "developer"


def test_a_template_that_is_no_jinja_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(CheckpointError, match=re.escape("somewhere is not valid jinja, line 1")):
        ChatTemplate("{% if %}", {}, origin="somewhere")


def test_the_template_is_found_in_its_file_first_then_in_the_tokenizer_config(
    tmp_path: Path,
) -> None:
    assert ChatTemplate.load(tmp_path, TOKENS) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    loaded = ChatTemplate.load(tmp_path, TOKENS)
    assert loaded is not None and loaded.render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    loaded = ChatTemplate.load(tmp_path, TOKENS)
    assert loaded is not None and loaded.render([]) == "F"
