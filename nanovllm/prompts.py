"""What users pass as prompts and parameters -> one checked list of each. llm.py calls it before
anything runs."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's token ids, and its text if it was given as text."""

    token_ids: list[int]
    text: str | None = None


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt: a string, a dictionary, or a list of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and (isinstance(prompts[0], Integral) and not isinstance(prompts[0], bool))
    )


def normalize(prompts: Any, tokenizer: Any) -> list[TokenizedPrompt]:
    """Every accepted form of prompts as a list; texts are tokenized in one batch.

    Raises:
        TypeError: a prompt has none of the accepted forms.
        ValueError: a text without a tokenizer, or one that is not valid Unicode.
    """
    prompts = plain(prompts)
    if is_single(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a string, a list of token ids, a dict or a list of those, "
            f"got {prompts!r:.80}"
        )
    contents = [_content(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    texts = [content for content in contents if isinstance(content, str)]
    if texts and tokenizer is None:
        raise ValueError(
            "a text prompt needs a tokenizer: skip_tokenizer_init=True takes token ids"
        )
    options = {"return_attention_mask": False, "verbose": False}
    tokenized = iter(tokenizer(texts, **options)["input_ids"] if texts else [])
    return [
        TokenizedPrompt(list(next(tokenized)), content) if isinstance(content, str) else content
        for content in contents
    ]


def plain(value: Any) -> Any:
    """Arrays and tensors as lists, whose integers are Python's. Bytes are refused, they are no
    list."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {value!r:.80}")
    return value.tolist() if hasattr(value, "tolist") else value


def _content(prompt: Any, name: str) -> str | TokenizedPrompt:
    """A text that is still to be tokenized, or token ids."""
    if isinstance(prompt, Mapping):
        text, token_ids = prompt.get("prompt"), plain(prompt.get("prompt_token_ids"))
        good = isinstance(text, str | None) and not isinstance(token_ids, str)
        if not set(prompt) <= {"prompt", "prompt_token_ids"} or not good or text is token_ids:
            raise TypeError(
                f"{name}: a dict prompt is {{'prompt': text}} or {{'prompt_token_ids': list of "
                f"token ids}}, got {prompt!r:.80}"
            )
        if token_ids is not None:
            return TokenizedPrompt(_checked_ids(token_ids, name), text)
        prompt = text
    prompt = plain(prompt)
    if not isinstance(prompt, str):
        return TokenizedPrompt(_checked_ids(prompt, name))
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return prompt


def _checked_ids(value: Any, name: str) -> list[int]:
    if isinstance(value, Sequence):
        if set(map(type, value)) == {int}:
            return list(value)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in value):
            return [int(token) for token in value]  # numpy's integers
    raise TypeError(f"{name} must be a string or a list of token ids, got {value!r:.80}")


def check(prompt: TokenizedPrompt, name: str, vocab_size: int, max_model_len: int) -> None:
    """Raise ValueError unless the model can run the prompt."""
    token_ids = prompt.token_ids
    if not token_ids:
        raise ValueError(f"{name} is empty: it must have at least one token")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} has the token id {wrong}, outside [0, {vocab_size})")
    if len(token_ids) >= max_model_len:
        raise ValueError(
            f"{name} has {len(token_ids)} tokens; max_model_len={max_model_len} allows "
            f"{max_model_len - 1}, so that one can be generated: shorten it or raise max_model_len"
        )


def match_params(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """A checked copy of each prompt's parameters; a single one serves all.

    Raises:
        TypeError: not SamplingParams.
        ValueError: as many parameters as prompts are needed.
    """
    if isinstance(params, SamplingParams):
        return [_copy(params)] * num_prompts
    if not isinstance(params, Sequence):
        raise TypeError(
            f"sampling_params must be SamplingParams or a list of them, got {params!r:.80}"
        )
    if len(params) != num_prompts:
        raise ValueError(
            f"{num_prompts} prompts but {len(params)} sampling_params: one for all, or one each"
        )
    return [_copy(p) for p in params]


def _copy(params: SamplingParams) -> SamplingParams:
    """The caller may go on changing its own; what it set after construction is checked here."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r:.80}")
    params = copy.copy(params)
    params.__post_init__()
    return params
