"""What crosses the wire between gateway and shard is what was put in."""

from __future__ import annotations

from services.core.generation import (
    GenerateRequest,
    GenerationDelta,
    ResumedChoice,
    SamplingParams,
    TokenLogprob,
)
from services.core.shard_wire import (
    delta_from_proto,
    delta_to_proto,
    request_from_proto,
    request_to_proto,
)


def test_a_request_is_read_as_it_was_written() -> None:
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=(5, 300, 7),
        sampling=SamplingParams(max_tokens=9, temperature=0.5, seed=7, logprobs=0),
        n=2,
        tenant="t",
        session_id="s",
        session_ttl_s=3.0,
        trace_context={"traceparent": "00-1-2-01"},
        resumed=(ResumedChoice(token_ids=(1, 2)), ResumedChoice(is_finished=True)),
        priority=-3,
        return_expert_choices=True,
    )
    assert request_from_proto(request_to_proto(request)) == request


def test_a_delta_is_read_as_it_was_written() -> None:
    whole = GenerationDelta(
        index=1,
        token_ids=(4, 5),
        logprobs=(
            TokenLogprob(token_id=4, logprob=-0.5, top=((4, -0.5), (9, -2.0))),
            TokenLogprob(token_id=5, logprob=-1.5),
        ),
        finish_reason="stop",
        stop_token_id=2,
        num_cached_tokens=16,
        num_restored_tokens=8,
        expert_choices=bytes(range(256)),
    )
    for delta in (whole, GenerationDelta(index=0)):
        assert delta_from_proto(delta_to_proto(delta)) == delta
