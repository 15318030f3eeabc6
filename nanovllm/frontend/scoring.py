"""Log-likelihoods of given texts: from texts to the tokens to score, and from lines to results.

LLM.loglikelihood and loglikelihood_rolling call it; its sequences run in the engine like any other.
Texts are divided as in EleutherAI's lm-eval, so that results can be compared with published ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from sys import maxsize
from typing import Any, NamedTuple

from nanovllm.frontend import prompts
from nanovllm.outputs import Loglikelihood, SampleLogprobs
from nanovllm.sampling_params import SamplingParams

# The parameters of a sequence that scores. The token that it generates is thrown away.
PARAMS = SamplingParams(
    temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=1
)


class Scored(NamedTuple):
    """Tokens, and the position of the first one that is scored, at least 1."""

    token_ids: Sequence[int]
    start: int


def from_pairs(pairs: Any, tokenizer: Any, vocab_size: int, max_model_len: int) -> list[Scored]:
    """Context and continuation of each pair. Spaces between them belong to the continuation, whose
    tokens are the tokens of both texts together after the context's. An empty context is the token
    that begins texts.

    Raises:
        TypeError: not pairs of two texts or of two lists of token ids.
        ValueError: a pair has nothing to score, or is too long; or as of prompts.normalize.
    """
    pairs = prompts.plain(pairs)
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise TypeError(f"pairs must be a list of (context, continuation), got {pairs!r:.80}")
    heads, wholes = [], []
    for i, pair in enumerate(pairs):
        context, continuation = _two_alike(pair, i)
        whole = context + continuation
        if isinstance(whole, str) and len(whole) > max_model_len:
            prompts.check_characters(whole, f"pair {i}", tokenizer, max_model_len, num_more=1)
        heads.append(context.rstrip() if isinstance(context, str) else context)
        if not heads[-1]:
            heads[-1] = [first_token(tokenizer)]
            whole = whole if isinstance(whole, str) else heads[-1] + whole
        wholes.append(whole)
    known = tokenizer, vocab_size, maxsize
    tokenized = prompts.normalize(wholes, *known, kind="pair")
    result = []
    for i, head in enumerate(prompts.normalize(heads, *known, kind="context of pair")):
        token_ids = tokenized[i].token_ids
        if isinstance(wholes[i], str) and head.text is None and token_ids[:1] != head.token_ids:
            token_ids = head.token_ids + token_ids
        start = len(head.token_ids)
        if start >= len(token_ids):
            raise ValueError(f"pair {i} has nothing to score: its continuation adds no token")
        if len(token_ids) > max_model_len + 1:
            raise ValueError(
                f"pair {i} has {len(token_ids)} tokens; max_model_len={max_model_len} allows "
                f"{max_model_len + 1}: shorten its context or raise max_model_len"
            )
        result.append(Scored(token_ids, start))
    return result


def from_texts(
    texts: Any, tokenizer: Any, vocab_size: int, max_model_len: int
) -> list[list[Scored]]:
    """Each text as windows that score every token once, the first after the token that begins
    texts.

    Raises:
        TypeError, ValueError: as of prompts.normalize.
    """
    result: list[list[Scored]] = []
    for text in prompts.normalize(texts, tokenizer, vocab_size, maxsize, kind="text"):
        token_ids, first = text.token_ids.tolist(), first_token(tokenizer)
        if text.text is None or token_ids[0] != first:
            token_ids.insert(0, first)
        if len(token_ids) == 1:
            raise ValueError(f"text {len(result)} has nothing to score: it has one token")
        result.append(list(_windows(token_ids, max_model_len)))
    return result


def _windows(token_ids: list[int], length: int) -> Iterator[Scored]:
    """All tokens but the first, `length` at a time, each window with the longest context that
    fits."""
    for start in range(1, len(token_ids), length):
        end = min(start + length, len(token_ids))
        first = max(0, end - length - 1)
        yield Scored(token_ids[first:end], start - first)


def read(lines: SampleLogprobs) -> Loglikelihood:
    """The log-likelihood in one sequence's lines, which have the most likely token beside each."""
    token_ids, logprobs = lines.lines.token_ids, lines.lines.logprobs
    return Loglikelihood(
        token_ids[:, 0].tolist(),
        logprobs[:, 0].tolist(),
        is_greedy=bool((token_ids[:, 0] == token_ids[:, 1]).all()),
    )


def join(parts: Iterable[Loglikelihood]) -> Loglikelihood:
    """The log-likelihood of windows, one after another."""
    whole = Loglikelihood([], [], is_greedy=True)
    for part in parts:
        whole.token_ids += part.token_ids
        whole.logprobs += part.logprobs
        whole.is_greedy &= part.is_greedy
    return whole


def first_token(tokenizer: Any) -> int:
    """The token before a text without context: BOS, or else EOS."""
    for name in ("bos_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return token
    raise ValueError(
        "without a context there must be a token that begins texts, and there is no tokenizer with "
        "BOS or EOS: give a context of one token or more"
    )


def _two_alike(pair: Any, number: int) -> tuple[Any, Any]:
    """Two texts, or two lists."""
    pair = prompts.plain(pair)
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        context, continuation = parts = [prompts.plain(part) for part in pair]
        if all(isinstance(part, str) for part in parts):
            return context, continuation
        if all(isinstance(part, Sequence) and not isinstance(part, str) for part in parts):
            return list(context), list(continuation)
    raise TypeError(
        f"pair {number} must be (context, continuation), two texts or two lists of token ids, "
        f"got {pair!r:.80}"
    )
