"""One choice of a completion: from the shard's tokens to text that may be shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.generation import FinishReason, GenerationDelta, TokenLogprob
from services.gateway.detokenizer import Detokenizer
from services.gateway.stop_strings import StopStrings


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLogprob:
    """A token's log-probabilities; `text_offset` is where its text starts in the choice's text."""

    token: TokenLogprob
    text_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceUpdate:
    """What became certain of choice `index` since its last update.

    `token_ids` are the tokens as they were generated, also where their text is still held back.
    `expert_choices` follow those of the update before; see `GenerationDelta`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PlacedLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    expert_choices: bytes = b""

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.logprobs or self.finish_reason)


class Choice:
    """Detokenises, looks for stop strings, and keeps log-probabilities in step with the text.

    A token's log-probabilities are released with the first of its text; those of tokens that begin
    a stop string or lie behind it are dropped. Stop strings are not looked for within the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop_strings)
        self._min_tokens = min_tokens
        self._waiting: deque[PlacedLogprob] = deque()
        self._num_decoded = 0  # characters that came out of the detokeniser
        self._num_shown = 0  # characters that went out in updates
        self._is_begun = False
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_restored_tokens = 0
        self.finish_reason: FinishReason | None = None

    def accept(self, delta: GenerationDelta) -> ChoiceUpdate:
        """Take the shard's next delta. Not to be called once `finish_reason` is set."""
        if not self._is_begun:
            # Of the shard that began it: what another one finds cached is not the client's affair.
            self._is_begun = True
            self.num_cached_tokens = delta.num_cached_tokens
            self.num_restored_tokens = delta.num_restored_tokens
        text, num_taken, is_stopped = self._take_tokens(delta)
        if not is_stopped and delta.finish_reason is not None:
            rest, is_stopped = self._show(self._detokenizer.finish())
            text += rest if is_stopped else rest + self._stops.finish()
            self.finish_reason = delta.finish_reason
        if is_stopped:
            self.finish_reason = "stop"
        self._num_shown += len(text)
        return ChoiceUpdate(
            index=self._index,
            text=text,
            token_ids=delta.token_ids[:num_taken],
            logprobs=self._release_logprobs(is_stopped),
            finish_reason=self.finish_reason,
            expert_choices=delta.expert_choices,
        )

    def _take_tokens(self, delta: GenerationDelta) -> tuple[str, int, bool]:
        """Text to show, tokens taken, and whether a stop string ended the choice."""
        shown: list[str] = []
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if delta.logprobs is not None:
                placed = PlacedLogprob(
                    token=delta.logprobs[position], text_offset=self._num_decoded
                )
                self._waiting.append(placed)
            text, is_stopped = self._show(self._detokenizer.push(token_id))
            shown.append(text)
            if is_stopped:
                return "".join(shown), position + 1, True
        return "".join(shown), len(delta.token_ids), False

    def _show(self, text: str) -> tuple[str, bool]:
        self._num_decoded += len(text)
        if self.num_tokens <= self._min_tokens:
            return text, False
        return self._stops.push(text)

    def _release_logprobs(self, is_stopped: bool) -> tuple[PlacedLogprob, ...]:
        if not self._waiting:
            return ()
        is_all_shown = not is_stopped and (
            self.finish_reason is not None
            or not (self._detokenizer.holds_back or self._stops.holds_back)
        )
        released: list[PlacedLogprob] = []
        while self._waiting and (is_all_shown or self._waiting[0].text_offset < self._num_shown):
            released.append(self._waiting.popleft())
        return tuple(released)
