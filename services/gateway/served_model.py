"""The model as the gateway knows it: name, limits, tokeniser and chat template; no weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import InvalidRequestError
from services.core.model_config import ModelConfig, load_model_config
from services.core.settings import Settings
from services.gateway.chat_template import ChatTemplate, Message
from services.gateway.detokenizer import Detokenizer
from services.gateway.errors import ModelNotFoundError
from services.gateway.sampling import check_token_ids
from services.gateway.tokenizer import TextTokenizer

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`max_model_len` bounds prompt + completion; `created` is Unix seconds."""

    name: str
    config: ModelConfig
    max_model_len: int
    tokenizer: TextTokenizer | None
    chat_template: ChatTemplate | None
    created: int

    @classmethod
    def load(cls, settings: Settings, folder: Path) -> ServedModel:
        """Read configuration and tokeniser from `folder`. Raises `CheckpointError`."""
        config = load_model_config(folder)
        tokenizer = TextTokenizer.load(folder)
        special_tokens = _special_tokens(config, tokenizer) if tokenizer else {}
        return cls(
            name=settings.served_model_name or served_name(settings.model),
            config=config,
            max_model_len=longest_context(config, settings),
            tokenizer=tokenizer,
            chat_template=ChatTemplate.load(folder, special_tokens) if tokenizer else None,
            created=int(time.time()),
        )

    def check_name(self, name: str | None) -> None:
        """Raise `ModelNotFoundError` unless `name` is this model's; None stands for any."""
        if name is not None and name != self.name:
            raise ModelNotFoundError(
                f"The model {name!r} does not exist here; {self.name!r} is served", param="model"
            )

    async def encode_text(self, text: str, *, param: str) -> tuple[int, ...]:
        """Token ids of a completion's prompt, with what the tokeniser's post-processor adds."""
        return await self._encode(text, add_special_tokens=True, param=param)

    async def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation. The template writes its own BOS, so none is added."""
        self._require_tokenizer(param="messages")
        if self.chat_template is None:
            raise InvalidRequestError(
                f"The checkpoint of {self.name!r} has no chat template (chat_template.jinja or "
                "chat_template in tokenizer_config.json); use /v1/completions",
                param="messages",
            )
        text = self.chat_template.render(messages)
        return await self._encode(text, add_special_tokens=False, param="messages")

    def check_prompt(self, token_ids: tuple[int, ...], *, param: str) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidRequestError(f"{param}: the prompt has no tokens", param=param)
        check_token_ids(token_ids, self.config.vocab_size, param=param)
        return token_ids

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of token ids that start a text; empty without a tokeniser."""
        detokenizer = self.detokenizer(())
        pieces = [detokenizer.push(token_id) for token_id in token_ids]
        return "".join(pieces) + detokenizer.finish()

    def detokenizer(self, prompt_token_ids: tuple[int, ...]) -> Detokenizer:
        """For text that follows `prompt_token_ids`; it is empty without a tokeniser."""
        if self.tokenizer is None:
            return Detokenizer(lambda _: b"")
        token_bytes = self.tokenizer.token_bytes
        starts_text = token_bytes.strips_leading_space and not any(
            token_bytes.text(token_id) for token_id in reversed(prompt_token_ids)
        )
        return Detokenizer(token_bytes.text, strip_leading_space=starts_text)

    async def _encode(self, text: str, *, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        tokenizer = self._require_tokenizer(param=param)
        token_ids = await tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.check_prompt(token_ids, param=param)

    def _require_tokenizer(self, *, param: str) -> TextTokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"The checkpoint of {self.name!r} has no tokenizer.json, so text cannot be taken; "
                "send the prompt as token ids to /v1/completions",
                param=param,
            )
        return self.tokenizer


def served_name(model: str) -> str:
    """ "models/demo" -> "demo", "mistralai/Mixtral-8x7B-v0.1" -> "Mixtral-8x7B-v0.1"."""
    return Path(model).resolve().name if Path(model).exists() else Path(model).name


def _special_tokens(config: ModelConfig, tokenizer: TextTokenizer) -> dict[str, str]:
    """Those of `tokenizer_config.json`; BOS and EOS, where it has none, by the model's ids."""
    eos_token_id = config.eos_token_ids[0] if config.eos_token_ids else None
    by_id = {"bos_token": config.bos_token_id, "eos_token": eos_token_id}
    tokens = {
        name: tokenizer.token_bytes.piece(token_id).decode()
        for name, token_id in by_id.items()
        if token_id is not None
    }
    return tokens | dict(tokenizer.special_tokens)


def longest_context(config: ModelConfig, settings: Settings) -> int:
    """Tokens that prompt and completion may have: the model's, the setting's, the KV cache's."""
    dtype = config.dtype if settings.dtype == "auto" else settings.dtype
    block_bytes = settings.block_size * config.kv_bytes_per_token(_DTYPE_BYTES[dtype])
    kv_tokens = settings.kv_cache_bytes // block_bytes * settings.block_size
    return min(
        config.max_position_embeddings,
        kv_tokens,
        config.max_position_embeddings
        if settings.max_model_len is None
        else settings.max_model_len,
    )
