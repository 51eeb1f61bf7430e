"""The bytes each token stands for, read from the decoder that `tokenizer.json` describes.

Working on bytes makes incremental detokenisation exact and O(1) a token, and gives the `bytes` of
OpenAI's log-probabilities. The decoders of the Mixtral and Mistral families are covered: byte-level
BPE (GPT-2's byte alphabet) and SentencePiece-like pieces with byte fallback (`<0xNN>`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

from services.core.errors import UnsupportedModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token id -> bytes, remembered once computed.

    `strips_leading_space`: the decoder drops one space at the very start of a text, because the
    encoder put it there. Raises `UnsupportedModelError` for a decoder of another family.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        spec = json.loads(decoder.__getstate__()) if decoder is not None else None
        self._piece_bytes, self.strips_leading_space = _read_decoder(spec)
        self._special = {
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._text_bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> bytes:
        """What the token adds to a text: nothing for special tokens and ids without a piece."""
        known = self._text_bytes.get(token_id)
        if known is None:
            known = b"" if token_id in self._special else self.piece(token_id)
            self._text_bytes[token_id] = known
        return known

    def piece(self, token_id: int) -> bytes:
        """The token's own bytes; special tokens are spelled out (`</s>`)."""
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)


def _read_decoder(spec: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """The piece -> bytes function of a decoder, and whether it strips a leading space."""
    steps = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = strips = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                strips = start > 0
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                strips = step.get("prepend_scheme", "always") != "never"
            case _:
                raise _unsupported(step)
    if not steps:
        raise _unsupported(spec)
    if byte_level:
        return _byte_level_piece, strips

    def piece_bytes(piece: str) -> bytes:
        if byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return piece_bytes, strips


def _unsupported(spec: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tokenizer.json has the decoder {spec!r}; only byte-level and SentencePiece-like decoders "
        "(Replace, ByteFallback, Fuse, Strip, Metaspace) are served",
        file="tokenizer.json",
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, take the code
    points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + position): byte for position, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def _byte_level_piece(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:  # an added token that is written in plain text
        return piece.encode()
