"""What users pass as prompts and parameters -> one checked list of each. llm.py calls it before
anything runs."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, groupby
from numbers import Integral
from typing import Any, TypedDict

import numpy as np

from nanovllm.frontend.tokens import has_more_tokens
from nanovllm.sampling_params import SamplingParams

# Characters that are tokenized at a time: a tokenizer takes 200 bytes for each.
TEXT_AT_ONCE = 2**20
MAX_BAD_WORDS = 2**16  # numbers of a request's bad words on the device: tokens, and one for each
# Keys of vLLM's prompts that may be there, and ask for nothing.
VLLMS_KEYS = {"multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "cache_salt"}


class TextPrompt(TypedDict):
    """A text as a prompt; vLLM's name for such a dictionary, as the next one's."""

    prompt: str


class _MayHaveText(TypedDict, total=False):
    prompt: str


class TokensPrompt(_MayHaveText):
    """Token ids as a prompt, and their text if it is known."""

    prompt_token_ids: list[int]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's token ids, 32 bits each, and its text if it was given as text."""

    token_ids: "array[int]"
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


def normalize(
    prompts: Any,
    tokenizer: Any,
    vocab_size: int,
    max_model_len: int,
    request_id: str | None = None,
    kind: str = "prompt",
) -> list[TokenizedPrompt]:
    """Every accepted form of prompts as a list; texts are tokenized in batches. A text that is too
    long by its characters is refused before that.

    Args:
        request_id: what errors call a single prompt; None: they count.
        kind: what it is that they count.

    Raises:
        TypeError: a prompt has none of the accepted forms.
        ValueError: a text without a tokenizer, or one that is not valid Unicode; or the model can't
            run the prompt.
    """
    prompts = plain(prompts)
    if is_single(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a string, a list of token ids, a dict or a list of those, "
            f"got {prompts!r:.80}"
        )
    names = [f"{kind} {i}" if request_id is None else f"request {request_id!r}"
             for i in range(len(prompts))]  # fmt: skip
    contents = [
        _content(prompt, name, vocab_size) for prompt, name in zip(prompts, names, strict=True)
    ]
    texts = [content for content in contents if isinstance(content, str)]
    if texts and tokenizer is None:
        raise ValueError(
            "a text prompt needs a tokenizer: skip_tokenizer_init=True takes token ids"
        )
    for content, name in zip(contents, names, strict=True):
        if isinstance(content, str) and len(content) >= max_model_len:
            check_characters(content, name, tokenizer, max_model_len)
    tokenized = tokenize(texts, tokenizer)
    result = []
    for content, name in zip(contents, names, strict=True):
        if isinstance(content, str):
            content = _of_ids(next(tokenized), name, vocab_size, content)
        _check_length(len(content.token_ids), name, max_model_len)
        result.append(content)
    return result


def tokenize(texts: list[str], tokenizer: Any, **options: Any) -> Iterator[list[int]]:
    """The tokens of each text. Texts are tokenized in batches: what the tokenizer makes beside
    tokens takes memory."""
    ends = zip(accumulate(map(len, texts)), texts, strict=True)
    for _, batch in groupby(ends, lambda end_and_text: end_and_text[0] // TEXT_AT_ONCE):
        batch_texts = [text for _, text in batch]
        options |= {"return_attention_mask": False, "verbose": False}
        yield from tokenizer(batch_texts, **options)["input_ids"]


def check_characters(
    text: str, name: str, tokenizer: Any, max_model_len: int, num_more: int = -1
) -> None:
    """Raises ValueError for a text whose length shows that it has more tokens than max_model_len +
    num_more: a prompt needs room for one token."""
    num_tokens = max_model_len + num_more
    if has_more_tokens(text, tokenizer, num_tokens):
        raise ValueError(
            f"{name} has {len(text)} characters, too many for the {num_tokens} tokens that "
            f"max_model_len={max_model_len} allows: shorten it or raise max_model_len"
        )


def plain(value: Any) -> Any:
    """Arrays and tensors as lists, whose integers are Python's. Bytes are refused, they are no
    list."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {value!r:.80}")
    return value.tolist() if hasattr(value, "tolist") else value


def _content(prompt: Any, name: str, vocab_size: int) -> str | TokenizedPrompt:
    """A text that is still to be tokenized, or token ids."""
    if isinstance(prompt, Mapping):
        text, token_ids = prompt.get("prompt"), plain(prompt.get("prompt_token_ids"))
        good = isinstance(text, str | None) and not isinstance(token_ids, str)
        asking = {k for k, v in prompt.items() if not (k in VLLMS_KEYS and v in (None, {}, ""))}
        if not asking <= {"prompt", "prompt_token_ids"} or not good or text is token_ids:
            raise TypeError(
                f"{name}: a dict prompt is {{'prompt': text}} or {{'prompt_token_ids': list of "
                f"token ids}}, got {prompt!r:.80}"
            )
        if token_ids is not None:
            return _of_ids(token_ids, name, vocab_size, text)
        prompt = text
    prompt = plain(prompt)
    if not isinstance(prompt, str):
        return _of_ids(prompt, name, vocab_size)
    check_unicode(prompt, name)
    return prompt


def check_unicode(text: str, name: str) -> None:
    """Tokenizers would not say which text it was. Raises ValueError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


def _of_ids(value: Any, name: str, vocab_size: int, text: str | None = None) -> TokenizedPrompt:
    """A prompt of token ids, which are checked without a look at each from Python: a batch may have
    millions. A bool is noticed where it is the first."""
    if not isinstance(value, Sequence) or (len(value) and isinstance(value[0], bool)):
        raise _not_a_prompt(value, name)
    try:
        token_ids = array("I", value)  # three times as fast as "i"
    except TypeError:
        raise _not_a_prompt(value, name) from None
    except OverflowError:  # negative or beyond 32 bits
        is_inside = False
    else:
        is_inside = not token_ids or np.asarray(token_ids).max() < vocab_size
    if not is_inside:
        if not all(isinstance(token, Integral) for token in value):
            raise _not_a_prompt(value, name)
        wrong = next(token for token in value if not 0 <= token < vocab_size)
        raise ValueError(f"{name} has the token id {wrong}, outside [0, {vocab_size})")
    return TokenizedPrompt(token_ids, text)


def _not_a_prompt(value: Any, name: str) -> TypeError:
    return TypeError(f"{name} must be a string or a list of token ids, got {value!r:.80}")


def _check_length(num_tokens: int, name: str, max_model_len: int) -> None:
    if num_tokens == 0:
        raise ValueError(f"{name} is empty: it must have at least one token")
    if num_tokens >= max_model_len:
        raise ValueError(
            f"{name} has {num_tokens} tokens; max_model_len={max_model_len} allows "
            f"{max_model_len - 1}, so that one can be generated: shorten it or raise max_model_len"
        )


def match_params(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """A checked copy of each prompt's parameters; a single one serves all.

    Raises:
        TypeError: not SamplingParams.
        ValueError: the numbers of parameters and prompts differ.
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


def match_priorities(priority: Any, num_prompts: int) -> list[int]:
    """A priority for each prompt.

    Raises:
        TypeError: not a list of whole numbers.
        ValueError: a priority is needed for each prompt.
    """
    if not isinstance(priority, Sequence) or not all(type(p) is int for p in priority):
        raise TypeError(f"priority must be a list of whole numbers, got {priority!r:.80}")
    if len(priority) != num_prompts:
        raise ValueError(f"{num_prompts} prompts but {len(priority)} priorities: one each")
    return list(priority)


def bind_params(
    params: SamplingParams, vocab_size: int, tokenizer: Any, max_model_len: int
) -> None:
    """What can be checked and made of parameters where vocabulary and tokenizer are known.

    Raises:
        ValueError: a token id is outside the vocabulary; stop or bad_words without a tokenizer; or
            bad_words have too many tokens.
    """
    if params.stop and tokenizer is None:
        raise ValueError(
            "stop needs a tokenizer: after skip_tokenizer_init=True there is stop_token_ids"
        )
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token in getattr(params, name) or ():
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} has the token id {token}, outside [0, {vocab_size})")
    if params.bad_words:
        if tokenizer is None:
            raise ValueError(
                "bad_words need a tokenizer, and skip_tokenizer_init=True: leave one of them out"
            )
        max_tokens = min(params.max_tokens or max_model_len, max_model_len - 1)
        words = _bad_words_token_ids(params.bad_words, tokenizer, max_tokens)
        if words and max(map(max, words)) >= vocab_size:
            raise ValueError(
                f"bad_words have tokens outside the model's vocabulary of {vocab_size}"
            )
        params.bad_words_token_ids = words


def _bad_words_token_ids(words: list[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """The tokens of each word at the beginning of a text, after a space, and after a line's end; of
    white space also before a letter, where many tokenizers split it. (vLLM leaves out all but the
    first if it has another number of tokens.) A word that the output has no room for is left
    out."""
    line_end, letter = tokenize(["\n", "a"], tokenizer, add_special_tokens=False)
    texts: list[str] = []
    around: list[tuple[list[int], list[int]]] = []  # tokens before and after the word
    for word in words:
        check_unicode(word, f"bad_words: {word!r:.80}")
        word = word.lstrip() or word  # white space alone is a word too
        if has_more_tokens(word, tokenizer, max_tokens):
            continue
        # Sentencepiece writes a word without a space in no other place than after a line's end.
        texts += [word, f" {word}", f"\n{word}"]
        around += [([], []), ([], []), (line_end, [])]
        if word.isspace():
            texts.append(f"{word}a")
            around.append(([], letter))
    result: dict[tuple[int, ...], None] = {}
    tokenized = tokenize(texts, tokenizer, add_special_tokens=False)
    for text, (before, after), token_ids in zip(texts, around, tokenized, strict=True):
        if not token_ids:
            raise ValueError(f"bad_words has {text!r:.80}, which the tokenizer makes no token of")
        start, end = len(before), len(token_ids) - len(after)
        if token_ids[:start] != before or token_ids[end:] != after:
            continue
        token_ids = token_ids[start:end]
        if 0 < len(token_ids) <= max_tokens:
            result[tuple(token_ids)] = None
    size = sum(len(word) + 1 for word in result)
    if size > MAX_BAD_WORDS:
        raise ValueError(
            f"bad_words have {size - len(result)} tokens in {len(result)} spellings, with and "
            f"without a space; tokens and spellings may be {MAX_BAD_WORDS}: leave some words out"
        )
    return [list(word) for word in result]


def _copy(params: SamplingParams) -> SamplingParams:
    """The caller may go on changing its own; what it set after construction is checked here."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {params!r:.80}")
    copied = copy(params)
    copied.__post_init__()
    if copied.logits_processors:
        context = copy_context()  # the engine's thread calls them
        copied.logits_processors = [InContext(call, context) for call in copied.logits_processors]
    return copied


class InContext:
    """A callable that runs in the context variables of the thread that gave it. Another process
    gets the callable alone."""

    def __init__(self, call: Callable[..., Any], context: Context):
        self.__wrapped__ = call  # whose signature counts
        self.context = context

    def __call__(self, *args: Any) -> Any:
        return self.context.run(self.__wrapped__, *args)

    def __reduce__(self) -> Any:
        return copy, (self.__wrapped__,)
