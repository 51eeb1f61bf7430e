"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.schemas.common import GenerationBody, conflict, one_of, refused


class ContentPart(BaseModel):
    """One part of a message; only text is served."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> ContentPart:
        if self.type != "text":
            raise PydanticCustomError(
                "unsupported", "content of type {kind}; only text is", {"kind": repr(self.type)}
            )
        if self.text is None:
            raise conflict("text", "required in a part of type text")
        return self


def _content_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[ContentPart], Field(min_length=1), Tag("<parts>")],
    one_of(_content_form, "a string or a list of text parts"),
]


class ChatMessage(BaseModel):
    """One message. Which roles may follow which is for the model's chat template to say."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[Any, refused("use tool_calls")] = None
    audio: Annotated[Any, refused("only text is served")] = None

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees: content is one string, absent fields are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self._text()}
        for field in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        return message

    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or "" for part in self.content)

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise conflict("content", f"required in a message of role {self.role}")
        return self


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str

    @model_validator(mode="after")
    def _is_text(self) -> ResponseFormat:
        if self.type != "text":
            raise PydanticCustomError(
                "unsupported", "only type 'text' is, not {kind}", {"kind": repr(self.type)}
            )
        return self


_NO_TOOLS = refused("tool calling is not served", unless=[[]])
_NO_TOOL_CHOICE = refused("tool calling is not served", unless=["none", "auto"])


class ChatBody(GenerationBody):
    """See OpenAI's reference of the chat completions API for the fields."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    tools: Annotated[Any, _NO_TOOLS] = None
    functions: Annotated[Any, _NO_TOOLS] = None
    tool_choice: Annotated[Any, _NO_TOOL_CHOICE] = None
    function_call: Annotated[Any, _NO_TOOL_CHOICE] = None
    audio: Annotated[Any, refused("only text is served")] = None
    modalities: Annotated[Any, refused("only text is served", unless=[["text"]])] = None
    web_search_options: Annotated[Any, refused("there is no web search")] = None
    moderation: Annotated[Any, refused("there is no moderation")] = None
    reasoning_effort: Annotated[
        Any, refused("the model has no reasoning mode", unless=["none"])
    ] = None
    verbosity: Annotated[Any, refused("the model cannot be told", unless=["medium"])] = None
    parallel_tool_calls: Any = None
    prediction: Any = None

    @property
    def requested_tokens(self) -> int | None:
        """The limit on the completion; None: what fits the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives to report for each token, None when log-probabilities are off."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "only allowed together with logprobs=true")
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise conflict("max_tokens", "differs from max_completion_tokens; set one of them")
        return self
