"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, Tag, model_validator

from services.gateway.schemas.common import MAX_CHOICES, GenerationBody, conflict, one_of, refused


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    forms = {str: "<texts>", int: "<tokens>", list: "<token lists>"}
    return forms.get(type(value[0]))


TokenIds = Annotated[list[int], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Tag("<token lists>")],
    one_of(
        _prompt_form,
        "a string, a list of strings, a list of token ids or a list of such lists, not empty",
    ),
]


class CompletionBody(GenerationBody):
    """See OpenAI's reference of the legacy completions API for the fields."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    suffix: Annotated[Any, refused("the model cannot fill in the middle", unless=[""])] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        prompt = self.prompt
        is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
        return cast("list[str] | list[list[int]]", [prompt] if is_single else prompt)

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.num_choices_per_prompt:
            raise conflict("best_of", "not supported unless equal to n; use n")
        if self.echo and self.logprobs is not None:
            raise conflict("echo", "not supported together with logprobs; leave one out")
        if len(self.prompts) * self.num_choices_per_prompt > MAX_CHOICES:
            raise conflict("prompt", f"prompts x n must not exceed {MAX_CHOICES}")
        return self
