"""What the bodies of both completion routes share: sampling, streaming, sessions.

Types are strict, as OpenAI's are: `"5"` is no number. Fields of OpenAI's schema that change nothing
in the answer are taken and ignored; those whose absence would make the answer wrong are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from services.core.generation import MAX_PRIORITY, MIN_PRIORITY

MAX_CHOICES = 1024
"""Choices of one request: prompts x n."""
SESSION_ID_PATTERN = r"^[A-Za-z0-9._:@=+~-]{1,256}$"
_MAX_SESSION_TTL_S = 10 * 365 * 86400.0


def refused(why: str, *, unless: Sequence[object] = ()) -> AfterValidator:
    """Validator of a field that is not served: only null and the values `unless` pass."""

    def check(value: Any) -> Any:
        if value is not None and value not in unless:
            raise PydanticCustomError("unsupported", "{why}", {"why": why})
        return value

    return AfterValidator(check)


def one_of(tag_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Which form a value of several forms has; `expected` is said when it has none of them."""
    return Discriminator(
        tag_of,
        custom_error_type="wrong_form",
        custom_error_message=f"must be {expected}",
    )


def _stop_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<strings>" if isinstance(value, list) else None


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[list[StopString], Field(max_length=16), Tag("<strings>")],
    one_of(_stop_form, "a string or a list of strings"),
]


def conflict(field: str, message: str) -> PydanticCustomError:
    """An error of several fields together, told as one of `field`. Braces are not for `message`."""
    return PydanticCustomError("conflict", message, {"field": field})


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """Fields of `/v1/completions` and `/v1/chat/completions`; the last group is ours."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    max_tokens: int | None = Field(None, ge=1)

    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    session_id: str | None = Field(None, pattern=SESSION_ID_PATTERN)
    session_ttl_s: float | None = Field(None, gt=0, le=_MAX_SESSION_TTL_S)
    priority: int | None = Field(
        None, ge=MIN_PRIORITY, le=MAX_PRIORITY, description="the lower, the earlier; default 0"
    )
    return_token_ids: bool | None = Field(None, description="add token_ids to every choice")
    return_expert_choices: bool | None = Field(
        None, description="add expert_choices to every choice: the experts of each token by layer"
    )

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @property
    def num_choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _fields_agree_with_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "only allowed together with stream=true")
        if self.return_expert_choices and self.stream:
            raise conflict(
                "return_expert_choices", "not supported together with stream=true; leave one out"
            )
        return self
