"""Log-likelihoods of given texts: what is to be scored after what, and what came of it.

LLM.loglikelihood and loglikelihood_rolling call it; a sequence that scores runs in the engine like
any other, and ends after its prompt. Texts are divided as in EleutherAI's lm-eval, whose numbers
these are to equal.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from sys import maxsize
from typing import Any, NamedTuple

from nanovllm import prompts
from nanovllm.outputs import Loglikelihood, SampleLogprobs

TokenIds = Sequence[int]


class Scored(NamedTuple):
    """Tokens, and the position from which on they are scored, at least 1."""

    token_ids: TokenIds
    start: int


def tokenize_pairs(
    pairs: Any, tokenizer: Any, vocab_size: int, max_model_len: int
) -> list[Scored]:
    """Context and continuation of every pair, tokenized together.

    Raises:
        TypeError: not pairs of two texts or two lists of token ids.
        ValueError: a pair has nothing to score, or is too long.
    """
    pairs = list(pairs) if isinstance(pairs, Sequence) and not isinstance(pairs, str) else pairs
    if not isinstance(pairs, list):
        raise TypeError(f"pairs must be a list of (context, continuation), got {pairs!r:.80}")
    pairs = [_checked(pair, i) for i, pair in enumerate(pairs)]
    wholes = [_join(*pair) for pair in pairs]
    known = tokenizer, vocab_size, maxsize
    # A context without tokens stands for what begins every text.
    contexts = [context or [_prefix(tokenizer)] for context, _ in pairs]
    heads = prompts.normalize(contexts, *known, kind="context")
    result = []
    for i, (head, whole) in enumerate(
        zip(heads, prompts.normalize(wholes, *known, kind="pair"), strict=True)
    ):
        token_ids = whole.token_ids
        if not pairs[i][0] and (whole.text is None or token_ids[0] != head.token_ids[0]):
            token_ids = head.token_ids + token_ids
        start = len(head.token_ids)
        if start >= len(token_ids):
            raise ValueError(f"pair {i}: its continuation adds no token to its context")
        if len(token_ids) > max_model_len + 1:
            raise ValueError(
                f"pair {i} has {len(token_ids)} tokens; max_model_len={max_model_len} allows "
                f"{max_model_len + 1}: shorten its context or raise max_model_len"
            )
        result.append(Scored(token_ids, start))
    return result
