"""Tokens to text, in increments that never split a character.

llm.py calls it when a text is wanted; how often makes no difference to the result. It knows
tokenizers only by `decode`.
"""

from dataclasses import dataclass
from typing import Protocol

from nanovllm.engine.sequence import Sequence

NUM_CONTEXT_TOKENS = (
    5  # prompt tokens decoded before the first output token, so that its leading space is kept
)
REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(slots=True)
class _TextState:
    """Text of the tokens before `read`; those from `prefix` on are decoded again as the context of
    the next ones."""

    prefix: int
    read: int
    text: str = ""


class Detokenizer:
    """Incremental decoding with a window of tokens, as in Hugging Face's text-generation-inference:
    the new text is what decode(window + new tokens) adds to decode(window), held back while it ends
    inside a character.

    Args:
        tokenizer: its `decode` turns token ids into text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def text(self, seq: Sequence) -> str:
        """The text of the sequence's output so far, without special tokens and without the token
        that stopped it."""
        state = seq.text
        if not isinstance(state, _TextState):
            start = seq.num_prompt_tokens
            state = seq.text = _TextState(max(0, start - NUM_CONTEXT_TOKENS), start)
        end = len(seq.token_ids) - (seq.finish_reason == "stop")
        if end > state.read:
            window = self._decode(seq.token_ids[state.prefix : state.read])
            longer = self._decode(seq.token_ids[state.prefix : end])
            if seq.finished or not longer.endswith(REPLACEMENT):
                # A prompt may end inside a character, which the output then completes.
                state.text += longer[len(window.rstrip(REPLACEMENT)) :]
                state.prefix, state.read = state.read, end
        return state.text

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
