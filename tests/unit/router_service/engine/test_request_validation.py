from __future__ import annotations

from typing import Any

import pytest

from router_service.engine.request_validation import validate_request
from services.core.errors import InvalidRequestError
from services.core.generation import GenerateRequest, SamplingParams


def _request(prompt: tuple[int, ...] = (1, 2), n: int = 1, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 4} | sampling)
    return GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=params, n=n)


def test_a_sound_request_passes() -> None:
    validate_request(
        _request(n=3, top_k=5, logprobs=2, logit_bias={9: -100.0, 0: float("inf")}), vocab_size=10
    )


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"prompt": ()}, "prompt", "empty"),
        ({"prompt": (1, 10)}, "prompt", "token 10 is outside the vocabulary of 10"),
        ({"prompt": (-1, 1)}, "prompt", "token -1"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": 129}, "n", "1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"min_tokens": 5}, "min_tokens", r"max_tokens \(4\)"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"top_k": -1}, "top_k", "-1"),
        ({"top_p": 0.0}, "top_p", "above 0"),
        ({"top_p": 1.1}, "top_p", "1.1"),
        ({"min_p": float("nan")}, "min_p", "nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty", "finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "finite"),
        ({"logprobs": 11}, "logprobs", "0 to 10"),
        ({"logit_bias": {10: 1.0}}, "logit_bias", "token 0 to 9"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias", "nan"),
    ],
)
def test_a_wrong_field_is_named_with_the_value_seen(
    changes: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        validate_request(_request(**changes), vocab_size=10)
    assert caught.value.details["param"] == param
