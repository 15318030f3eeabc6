"""What a tokenizer's tokens are made of: the text and the bytes that one stands for, and how long a
text of a number of tokens can be. requests.py and openai_format.py ask about single tokens,
prompts.py about long texts.

It reads the parts of a fast tokenizer (tokenizer.json); of others it knows no bytes and no bound.
"""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

# Parts of a tokenizer that never make one place in a text of two or more, and drop none.
KEEPING = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace"),
    *("ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split", "UnicodeScripts"),
}

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
SPACE = "\u2581"  # sentencepiece's sign for a space
PIECE = 2**20  # characters that are normalized at a time: that takes 16 bytes for each byte
SEAM = 64  # bytes that pieces may have more than their whole: what would compose across an end


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in the tokens of byte-level BPE (GPT-2's)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()


def token_text(tokenizer: Any, before: list[int], token_id: int) -> str:
    """The text of a token as log-probabilities show it. Of a character that is made of several
    tokens all but the last have "", and the last one has the whole, as in vLLM.

    Args:
        before: the last tokens before it.
    """
    text = _own_text(tokenizer, token_id)
    if REPLACEMENT not in text:
        return text
    for start in reversed(range(len(before))):
        whole = tokenizer.decode([*before[start:], token_id])
        if REPLACEMENT not in (whole[:1], whole[-1:]):
            end = len(before)
            while end > start and _own_text(tokenizer, before[end - 1]).endswith(REPLACEMENT):
                end -= 1
            shown = tokenizer.decode(before[start:end]) if end > start else ""
            return whole.removeprefix(shown)
    return "" if text.endswith(REPLACEMENT) else text


def _own_text(tokenizer: Any, token_id: int) -> str:
    text = tokenizer.decode([token_id])
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is not None and token.startswith(SPACE):  # at a text's beginning sentencepiece strips
        text = " " * (len(token) - len(token.lstrip(SPACE))) + text.lstrip(" ")
    return text


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of a text that a token stands for; they may begin or end inside a character."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is not None and token_id not in tokenizer.added_tokens_decoder:
        if _parts_of(tokenizer).is_byte_level and BYTES.keys() >= set(token):
            return bytes(BYTES[char] for char in token)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(match[1])
    return _own_text(tokenizer, token_id).encode()


def has_more_tokens(text: str, tokenizer: Any, num_tokens: int) -> bool:
    """Whether a text has more tokens than that, as its length alone shows: no token stands for more
    of it than the vocabulary's longest. False: it may have."""
    parts = _parts_of(tokenizer)
    if parts.longest is None:
        return False
    normalizer, length = tokenizer.backend_tokenizer.normalizer, 0
    for start in range(0, len(text), PIECE):
        piece = text[start : start + PIECE]
        if normalizer is not None:
            piece = normalizer.normalize_str(piece)
        if parts.is_byte_level:
            length += len(piece.encode().translate(None, delete=parts.unknown))
        else:
            length += len(piece)
        if length - SEAM * (start // PIECE) > parts.longest * num_tokens:
            return True
    return False


class _Parts(NamedTuple):
    """What matters of a tokenizer's parts: the length of the longest token, in bytes of a text if
    it is_byte_level, else in characters, None if a token may stand for any length; and the bytes
    that no token has, which are dropped."""

    is_byte_level: bool
    longest: int | None
    unknown: bytes


@lru_cache(maxsize=4)
def _parts_of(tokenizer: Any) -> _Parts:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _Parts(False, None, b"")
    is_byte_level = any(part["type"] == "ByteLevel" for part in _flat(backend.decoder))
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder.values()
    unknown = bytes(byte for char, byte in BYTES.items() if char not in vocab)
    model = backend.model
    has_bytes = model.__class__.__name__ == "BPE" and (
        is_byte_level
        or (model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)))
    )
    parts = [*_flat(backend.normalizer), *_flat(backend.pre_tokenizer)]
    is_bounded = (
        has_bytes
        and all(map(_keeps_all, parts))
        and not any(token.lstrip or token.rstrip for token in added)
    )
    lengths = [*map(len, vocab), *(len(str(token).encode()) for token in added)]
    return _Parts(is_byte_level, max(lengths) if is_bounded else None, unknown)


def _flat(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer and the parts of it, as tokenizer.json has them."""
    found, left = [], [] if part is None else [json.loads(part.__getstate__())]
    while left:
        found.append(state := left.pop())
        for name in ("normalizers", "pretokenizers", "decoders"):
            left += state.get(name, ())
    return found


def _keeps_all(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":  # a space by another sign
        pattern = part["pattern"].get("String")
        return pattern is not None and len(pattern) == len(part["content"]) == 1
    return part["type"] in KEEPING and part.get("behavior") != "Removed"
