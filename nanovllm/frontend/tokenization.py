"""Prompts tokenized by generate's tokenization_kwargs, vLLM's overrides: cut to a length, with or
without special tokens. LLM calls it for calls that set them; prompts.py checks the result."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.frontend import prompts

MARGIN = 1000  # tokens next to where a text was cut, which may be others than the whole text's
KEYS = {"add_special_tokens", "truncate_prompt_tokens", "truncation_side"}


def tokenize(
    prompt_list: Any,
    tokenizer: Any,
    vocab_size: int,
    max_model_len: int,
    kwargs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Prompts of any form as token ids, with their text if they had one.

    Args:
        prompt_list: as for LLM.generate.
        tokenizer, vocab_size: as for prompts.normalize.
        max_model_len, kwargs: as for Cutter.

    Raises:
        ValueError, TypeError: as Cutter; or for a prompt, as prompts.normalize.
    """
    cutter = Cutter(tokenizer, max_model_len, kwargs)
    encode = cutter if tokenizer is not None else None
    return [
        {"prompt": prompt.text, "prompt_token_ids": cutter.cut(prompt.token_ids).tolist()}
        for prompt in prompts.normalize(prompt_list, encode, vocab_size, sys.maxsize)
    ]


class Cutter:
    """Tokenizes texts by tokenization_kwargs, called as transformers' tokenizers.

    Args:
        tokenizer: transformers'.
        max_model_len: truncate_prompt_tokens=-1 keeps one token less.
        kwargs: truncate_prompt_tokens: number of tokens to keep, with the special tokens that a
            text gets; truncation_side: "left", the default, keeps the last tokens, "right" the
            first; add_special_tokens: whether texts get special tokens.

    Raises:
        ValueError, TypeError: an override is unknown or its value is invalid.
    """

    def __init__(self, tokenizer: Any, max_model_len: int, kwargs: Mapping[str, Any]):
        if not isinstance(kwargs, Mapping):
            raise TypeError(f"tokenization_kwargs must be a dict, got {kwargs!r:.80}")
        if unknown := kwargs.keys() - KEYS:
            raise ValueError(
                f"tokenization_kwargs {', '.join(sorted(unknown))}: not supported; "
                f"supported: {', '.join(sorted(KEYS))}"
            )
        length, side = kwargs.get("truncate_prompt_tokens"), kwargs.get("truncation_side")
        if length is not None and (type(length) is not int or length == 0 or length < -1):
            raise ValueError(f"truncate_prompt_tokens must be at least 1, or -1, got {length!r}")
        if length is not None and length >= max_model_len:
            raise ValueError(
                f"truncate_prompt_tokens={length} leaves no room for a token in "
                f"max_model_len={max_model_len}"
            )
        if side not in (None, "left", "right"):
            raise ValueError(f"truncation_side must be 'left' or 'right', got {side!r}")
        special = kwargs.get("add_special_tokens", True)
        if not isinstance(special, bool):
            raise TypeError(f"add_special_tokens must be True or False, got {special!r}")
        self.tokenizer, self.add_special_tokens = tokenizer, special
        self.length = max_model_len - 1 if length == -1 else length or sys.maxsize
        self.from_left = side != "right"

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        options |= {"return_special_tokens_mask": True}
        options = {"add_special_tokens": self.add_special_tokens, **options}
        size = prompts.TEXT_AT_ONCE
        while True:
            # Of a long text an end that has enough tokens will do: far from the cut they are the
            # whole text's.
            parts = [text[-size:] if self.from_left else text[:size] for text in texts]
            encoded = self.tokenizer(parts, **options)
            found = encoded["input_ids"]
            if all(
                part == text or len(ids) >= self.length + MARGIN
                for part, text, ids in zip(parts, texts, found, strict=True)
            ):
                masks = encoded["special_tokens_mask"]
                return {"input_ids": list(map(self.cut, found, masks))}
            size *= 4

    def cut(self, ids: Any, is_special: Sequence[int] = (0,)) -> Any:
        """Tokens without the surplus; special ones around them stay, as in transformers."""
        num_before = next((i for i, special in enumerate(is_special) if not special), len(ids))
        num_after = next((i for i, special in enumerate(reversed(is_special)) if not special), 0)
        num_cut = min(max(0, len(ids) - self.length), len(ids) - num_before - num_after)
        start = num_before if self.from_left else len(ids) - num_after - num_cut
        return ids[:start] + ids[start + num_cut :]
