"""Tokens to text, in increments that never split a character.

llm.py calls it when a text is wanted; how often makes no difference to the result,
unless a tokenizer decodes bytes that are no UTF-8 differently with what follows them. It knows
tokenizers only by `decode`.
"""

from array import array
from typing import Protocol

from nanovllm.engine.sequence import Sequence

MAX_CONTEXT_TOKENS = 32  # of the prompt, where fewer would begin inside a character
REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


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
        end = len(seq.token_ids) - (seq.finish_reason == "stop")
        if end > state.read:
            window = self._decode(seq.token_ids[state.prefix : state.read])
            if state.read == seq.num_prompt_tokens:
                # The prompt's context may begin inside a character; a little earlier it does not.
                first = max(0, state.read - MAX_CONTEXT_TOKENS)
                while window.startswith(REPLACEMENT) and state.prefix > first:
                    state.prefix -= 1
                    window = self._decode(seq.token_ids[state.prefix : state.read])
            longer = self._decode(seq.token_ids[state.prefix : end])
            if not longer.startswith(window):  # the prompt ends inside a character
                window = window.rstrip(REPLACEMENT)
            if seq.finished or not longer.endswith(REPLACEMENT):
                new = longer[len(window) :]
                state.text += new
                if new:  # a window of special tokens alone would be no context
                    state.prefix = state.read
                state.read = end
        return state.text

    def _decode(self, token_ids: "array[int]") -> str:
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
