"""Prompts tokenized as generate's tokenization_kwargs say, vLLM's overrides: cut to a length, with
or without special tokens. LLM calls it only where they are given; prompts.py checks the result."""

from collections.abc import Mapping
from typing import Any

from nanovllm import prompts

KEYS = {"add_special_tokens", "truncate_prompt_tokens", "truncation_side"}


def tokenize(
    prompt_list: Any, tokenizer: Any, max_model_len: int, kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Prompts of any form as token ids, with their text if they had one.

    Args:
        prompt_list: as for LLM.generate.
        tokenizer: None if there is none.
        max_model_len: what truncate_prompt_tokens=-1 leaves room for a token in.
        kwargs: truncate_prompt_tokens: so many are kept; truncation_side: "left" keeps the last
            ones, "right" the first; add_special_tokens: of texts.

    Raises:
        ValueError: an override is unknown or its value won't do.
    """
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
    length = max_model_len - 1 if length == -1 else length
    from_left = (side or getattr(tokenizer, "truncation_side", "right")) == "left"
    special = kwargs.get("add_special_tokens", True)

    prompt_list = prompts.plain(prompt_list)
    result = []
    for prompt in [prompt_list] if prompts.is_single(prompt_list) else prompt_list:
        text, token_ids = None, prompt
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, token_ids = prompt, None
        if isinstance(text, str) and token_ids is None and tokenizer is not None:
            token_ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if token_ids is None:  # prompts.py says what is wrong with it
            result.append(prompt)
            continue
        token_ids = prompts.plain(token_ids)
        if length is not None:
            token_ids = token_ids[-length:] if from_left else token_ids[:length]
        result.append({"prompt": text, "prompt_token_ids": token_ids})
    return result
