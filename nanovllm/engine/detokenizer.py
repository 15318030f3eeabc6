"""Tokens to text, in increments that never split a character.

The frontend calls it for each output, the engine after every token of a sequence with stop strings.
The number of calls makes no difference to the text, unless a tokenizer decodes bytes that are no
UTF-8 differently with the bytes after them. It calls nothing of a tokenizer but `decode`.
"""

from typing import Protocol

from nanovllm.engine.sequence import Sequence, TextState
from nanovllm.sampling_params import SamplingParams

MAX_CONTEXT_TOKENS = 32  # of the prompt, if fewer would begin inside a character
REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer(Protocol):
    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str: ...


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
        """The text of the sequence's output so far, cut at the stop string that ended it, and
        without a stop token. While the sequence runs, last characters that may begin a stop string
        are held back (the same number as in vLLM)."""
        params = seq.params
        if not params.detokenize:
            return ""
        state = self._read(seq)
        if isinstance(seq.stop_reason, str) and (found := _first_stop(state, params)):
            end, stop = found
            return state.text[: end if params.include_stop_str_in_output else end - len(stop)]
        if params.stop and not params.include_stop_str_in_output and not seq.finished:
            held_back = max(map(len, params.stop)) - 1
            return state.text[: max(0, len(state.text) - held_back)]
        return state.text

    def check_stop(self, seq: Sequence) -> None:
        """Set finish_reason if the last token completed a stop string."""
        state = self._read(seq)
        num_output = len(seq.token_ids) - seq.num_prompt_tokens
        if num_output > seq.params.min_tokens and (found := _first_stop(state, seq.params)):
            seq.stop_reason, seq.finish_reason = found[1], "stop"
        else:
            seq.text = state._replace(searched=len(state.text))

    def _read(self, seq: Sequence) -> TextState:
        """Decode the new tokens. The text of a token that stops the sequence is left out, unless
        include_stop_str_in_output is set."""
        prefix, read, text, searched = seq.text
        skips_last = seq.token_ids[-1] in seq.stops and not seq.params.include_stop_str_in_output
        end = len(seq.token_ids) - skips_last
        if end <= read:
            return seq.text
        window = self._decode(seq, prefix, read)
        if read == seq.num_prompt_tokens:
            # The prompt's context may begin inside a character; a little earlier it does not.
            first = max(0, read - MAX_CONTEXT_TOKENS)
            while window.startswith(REPLACEMENT) and prefix > first:
                prefix -= 1
                window = self._decode(seq, prefix, read)
        longer = self._decode(seq, prefix, end)
        if not longer.startswith(window):  # the prompt ends inside a character
            window = window.rstrip(REPLACEMENT)
        if seq.finished or not longer.endswith(REPLACEMENT):
            new = longer[len(window) :]
            if new:  # a window of special tokens alone would be no context
                prefix = read
            text, read = text + new, end
        seq.text = TextState(prefix, read, text, searched)
        return seq.text

    def _decode(self, seq: Sequence, start: int, end: int) -> str:
        return self.tokenizer.decode(
            seq.token_ids[start:end].tolist(),
            skip_special_tokens=seq.params.skip_special_tokens,
            spaces_between_special_tokens=seq.params.spaces_between_special_tokens,
        )


def _first_stop(state: TextState, params: SamplingParams) -> tuple[int, str] | None:
    """The first stop string of the list that ends after `searched`: the position of its end, and
    the string."""
    for stop in params.stop or ():
        start = state.text.find(stop, max(0, state.searched + 1 - len(stop)))
        if start >= 0:
            return start + len(stop), stop
    return None
