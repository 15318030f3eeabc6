"""Prompts tokenized by generate's tokenization_kwargs, vLLM's overrides: cut to a length, with or
without special tokens. LLM calls it for calls that set them; prompts.py checks the result."""

import sys
from collections.abc import Mapping
from typing import Any

from nanovllm.frontend import prompts

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
        max_model_len: truncate_prompt_tokens=-1 keeps one token less.
        kwargs: truncate_prompt_tokens: number of tokens to keep, with the special tokens that a
            text gets; truncation_side: "left", the default, keeps the last tokens, "right" the
            first; add_special_tokens: whether texts get special tokens.

    Raises:
        ValueError, TypeError: an override is unknown or its value is invalid; or a prompt, as in
            prompts.normalize.
    """
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
    length = max_model_len - 1 if length == -1 else length or sys.maxsize
    from_left = side != "right"

    def cut_texts(texts: list[str], **options: Any) -> dict[str, Any]:
        options |= {"add_special_tokens": special, "return_special_tokens_mask": True}
        encoded = tokenizer(texts, **options)
        lines = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        return {"input_ids": [_cut(ids, mask, length, from_left) for ids, mask in lines]}

    cutting = cut_texts if tokenizer is not None else None
    return [
        {
            "prompt": prompt.text,
            "prompt_token_ids": (
                prompt.token_ids[-length:] if from_left else prompt.token_ids[:length]
            ).tolist(),
        }
        for prompt in prompts.normalize(prompt_list, cutting, vocab_size, sys.maxsize)
    ]


def _cut(ids: list[int], is_special: list[int], length: int, from_left: bool) -> list[int]:
    """A text's tokens without some of its own; the special tokens around them stay, as in
    transformers."""
    num_before = next((i for i, special in enumerate(is_special) if not special), len(ids))
    num_after = next((i for i, special in enumerate(reversed(is_special)) if not special), 0)
    num_cut = min(max(0, len(ids) - length), len(ids) - num_before - num_after)
    start = num_before if from_left else len(ids) - num_after - num_cut
    return ids[:start] + ids[start + num_cut :]
