"""The bytes of text that each token of a vocabulary stands for: byte-level, or SentencePiece-like with byte fallback.

Legend: v vocabulary.
"""

import re
from typing import Any, NamedTuple

import tokenizers

from orogen.config.checks import ConfigError

SPACE = "▁"  # stands for a space in SentencePiece-like vocabularies
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Embeddings of released models have at most 2**18 rows; a file with a larger id would only fill the memory.
MAX_TOKENS = 2**24


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary. Source: GPT-2, encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


class TokenBytes(NamedTuple):
    """The bytes that each id of a vocabulary stands for.

    text_v: the bytes of each id, empty for specials and for ids without a token. tokens: the ids that are tokens.
    fallback_of_byte: the id of each byte's own token in a vocabulary with byte fallback, else empty.
    """

    text_v: list[bytes]
    tokens: frozenset[int]
    fallback_of_byte: dict[int, int]


def check_ids(backend: tokenizers.Tokenizer) -> None:
    """Raises ConfigError for a vocabulary without tokens, or with an id that would fill the memory."""
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < MAX_TOKENS:
        raise ConfigError(f"the tokenizer's largest id is {largest}; expected 0 to {MAX_TOKENS - 1}")


def token_bytes(backend: tokenizers.Tokenizer, model: dict[str, Any]) -> TokenBytes:
    """Reads a vocabulary; `model` is the part of that name in the tokenizer's file.

    Raises ConfigError if a token stands for no bytes: the vocabulary is neither byte-level nor has byte fallback.
    """
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            raise ConfigError(f"the tokenizer has {affix} {model[affix]!r}; expected a byte-level vocabulary")
    fallback = bool(model.get("byte_fallback"))
    text_v = [b""] * (max(vocabulary.values()) + 1)
    fallback_of_byte: dict[int, int] = {}
    for token, token_id in vocabulary.items():
        if fallback and (spelled := BYTE_TOKEN.fullmatch(token)):
            fallback_of_byte[int(spelled[1], 16)] = token_id
            text_v[token_id] = bytes.fromhex(spelled[1])
        elif token_id in added:
            content = token.replace(SPACE, " ") if fallback else token
            text_v[token_id] = b"" if added[token_id].special else content.encode()
        elif fallback:
            text_v[token_id] = token.replace(SPACE, " ").encode()
        else:
            text_v[token_id] = _byte_level(token, token_id)
    return TokenBytes(text_v, frozenset(vocabulary.values()), fallback_of_byte)


def _byte_level(token: str, token_id: int) -> bytes:
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        expected = "a byte-level vocabulary, or one with byte fallback"
        raise ConfigError(f"token {token_id} is {token!r}: expected {expected}") from None


def decoded(data: bytes, *, one_by_one: bool) -> str:
    """The text of UTF-8 bytes, with U+FFFD for invalid ones; `one_by_one`: for every byte, as the ByteFallback decoder
    does for a run of byte tokens."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(data) if one_by_one else data.decode("utf-8", errors="replace")
