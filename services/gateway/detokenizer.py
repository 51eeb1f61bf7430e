"""Token ids to text, one token at a time, never splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one completion as its tokens arrive.

    `token_text` gives the bytes a token adds. Bytes that may still become a character are held
    back; bytes that cannot become one turn into U+FFFD, as in the Unicode standard's chapter 3.9
    (one per maximal subpart). The concatenated results are the same however tokens are grouped.
    """

    def __init__(
        self, token_text: Callable[[int], bytes], *, strip_leading_space: bool = False
    ) -> None:
        self._token_text = token_text
        self._decoder = _new_utf8_decoder(errors="replace")
        self._strip = strip_leading_space

    def push(self, token_id: int) -> str:
        """The characters that became complete with this token; often several, or none."""
        return self._stripped(self._decoder.decode(self._token_text(token_id)))

    def finish(self) -> str:
        """What is left: U+FFFD if the text ends inside a character, else nothing."""
        return self._stripped(self._decoder.decode(b"", True))

    @property
    def holds_back(self) -> bool:
        """Whether the last tokens ended inside a character."""
        return bool(self._decoder.getstate()[0])

    def _stripped(self, text: str) -> str:
        if not self._strip or not text:
            return text
        self._strip = False
        return text.removeprefix(" ")
