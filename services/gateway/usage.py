"""`usage` as the API tells it."""

from __future__ import annotations

from typing import Any

from services.gateway.generation import Usage


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's fields; `restored_tokens`, those of the cached that a session brought, is ours."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "restored_tokens": usage.restored_tokens,
        },
    }
