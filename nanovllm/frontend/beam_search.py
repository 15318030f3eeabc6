"""Beam search: the `beam_width` best continuations of every prompt, found token by token.

LLM.beam_search calls it. In each round every beam is a request for one token, whose
log-probabilities give the candidates; the prefix cache shares the blocks of common beginnings
(docs/decisions/0015). Scores and the end of a search are vLLM's.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from nanovllm.frontend import prompts
from nanovllm.frontend.requests import Requests
from nanovllm.frontend.structured_outputs import Grammar
from nanovllm.frontend.tokens import token_text
from nanovllm.outputs import Logprob, SampleLogprobs
from nanovllm.sampling_params import BeamSearchParams, SamplingParams


@dataclass
class BeamSearchSequence:
    """One continuation.

    Attributes:
        tokens: the prompt's and the generated tokens, with the EOS token that ended them.
        logprobs: for each generated token a dict of token id -> Logprob: the candidates.
        cum_logprob: the sum of the generated tokens' log-probabilities.
        text: the text of all tokens, with special tokens; None without a tokenizer.
        finish_reason: "stop" (EOS) or "length" (max_tokens or max_model_len).
        stop_reason: None.
    """

    tokens: list[int]
    logprobs: SequenceOf[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The answer to one prompt: `beam_width` sequences, the best first; fewer if structured_outputs
    leave fewer."""

    sequences: list[BeamSearchSequence]


Params = SamplingParams | list[SamplingParams]  # the same for all prompts, or each one's
# Runs prompts; returns the log-probabilities of each prompt's tokens.
Run = Callable[[list[list[int]], Params], list[SampleLogprobs]]


class Beam(NamedTuple):
    tokens: list[int]  # with the prompt's
    lines: list[SampleLogprobs]  # one token each
    cum_logprob: float = 0.0
    score: float = 0.0
    ended: bool = False
    grammar: Grammar | None = None  # of what may follow


class Search:
    """One prompt's beams.

    Args:
        prompt: its tokens.
        params: the user's parameters.
        eos_token_ids: tokens that end a beam, unless they are ignored.
        max_model_len: largest number of tokens in a beam.
        grammar: of the generated text; None: any text.
    """

    def __init__(
        self,
        prompt: list[int],
        params: BeamSearchParams,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        grammar: Grammar | None = None,
    ):
        self.params = params
        self.eos_token_ids = eos_token_ids
        self.max_len = min(max_model_len, len(prompt) + params.max_tokens)
        self.beams = [Beam(prompt, [], grammar=grammar)]
        self.ended: list[Beam] = []  # the best of them

    def extend(self, lines: list[SampleLogprobs]) -> None:
        """Extend the beams by their candidates, and keep the best.

        Args:
            lines: for each beam a sampled token and the most likely tokens.
        """
        params, length = self.params, len(self.beams[0].tokens) + 1
        weight = length**params.length_penalty
        eos_weight = (length - 1) ** params.length_penalty  # an EOS doesn't count, as in vLLM
        found: list[tuple[float, float, int, int, bool]] = []
        for i, (beam, line) in enumerate(zip(self.beams, lines, strict=True)):
            [token_ids], [logprobs] = line.lines.token_ids.tolist(), line.lines.logprobs.tolist()
            candidates = dict(zip(token_ids, logprobs, strict=True))
            if beam.grammar is not None:  # the most likely tokens are of all tokens
                allowed = beam.grammar.allows(list(candidates))
                candidates = dict(compress(candidates.items(), allowed))
            for token, logprob in candidates.items():
                cum_logprob = beam.cum_logprob + logprob
                is_eos = token in self.eos_token_ids
                score = cum_logprob / (eos_weight if is_eos else weight)
                ends = is_eos and (not params.ignore_eos or beam.grammar is not None)
                found.append((score, cum_logprob, i, token, ends))
        found.sort(key=lambda candidate: candidate[0], reverse=True)  # stable, as in vLLM
        beams: list[Beam] = []
        ended = self.ended
        for score, cum_logprob, i, token, ends in found:
            beam, into = self.beams[i], ended if ends else beams
            if ends or len(beams) < params.beam_width:
                tokens, kept = [*beam.tokens, token], [*beam.lines, lines[i]]
                grammar = beam.grammar.after(token) if beam.grammar and not ends else None
                into.append(Beam(tokens, kept, cum_logprob, score, ends, grammar))
        self.beams, self.ended = beams, self._best(ended)

    def _best(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=attrgetter("score"), reverse=True)[: self.params.beam_width]

    @property
    def is_done(self) -> bool:
        """Whether the beams can't grow, or none of them can overtake the ended texts."""
        if not self.beams or len(self.beams[0].tokens) == self.max_len:
            return True
        if len(self.ended) < self.params.beam_width:
            return False
        # A sum never rises, so the length alone may raise a score.
        penalty = self.params.length_penalty
        length = self.max_len if penalty > 0 else len(self.beams[0].tokens)
        best = max(beam.cum_logprob for beam in self.beams)
        return self.ended[-1].score >= best / length**penalty

    def output(self, tokenizer: Any) -> BeamSearchOutput:
        text = None if tokenizer is None else partial(token_text, tokenizer)
        sequences = []
        for tokens, lines, cum_logprob, _, ended, _ in self._best(self.ended + self.beams):
            start = len(tokens) - len(lines)
            shown = len(tokens) - (ended and not self.params.include_stop_str_in_output)
            sequences.append(
                BeamSearchSequence(
                    tokens=tokens,
                    logprobs=[
                        line.copy(text, tokens[start:end])[0]
                        for end, line in enumerate(lines, start)
                    ],
                    cum_logprob=cum_logprob,
                    text=tokenizer.decode(tokens[:shown]) if tokenizer else None,
                    finish_reason="stop" if ended else "length",
                )
            )
        return BeamSearchOutput(sequences)


def beam_search(
    run: Run,
    requests: Requests,
    prompt_list: Any,
    params: BeamSearchParams,
    use_tqdm: bool,
    concurrency_limit: int | None,
) -> list[BeamSearchOutput]:
    """LLM.beam_search; `requests` has the tokenizer and the limits."""
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {params!r:.80}")
    params = replace(params)  # checked anew
    if concurrency_limit is not None and (
        type(concurrency_limit) is not int or concurrency_limit < 1
    ):
        raise ValueError(
            f"concurrency_limit must be at least 1, or None for all prompts at once, "
            f"got {concurrency_limit!r:.80}"
        )
    checkpoint, max_model_len = requests.checkpoint, requests.max_model_len
    vocab_size = checkpoint.model_config.vocab_size
    tokenized = prompts.normalize(prompt_list, checkpoint.tokenizer, vocab_size, max_model_len)
    grammar = None
    if params.structured_outputs is not None:
        grammar = requests.grammars.compile(params.structured_outputs)
    searches = [
        Search(prompt.token_ids.tolist(), params, checkpoint.eos_token_ids, max_model_len, grammar)
        for prompt in tokenized
    ]
    width = concurrency_limit or max(1, len(searches))
    for start in range(0, len(searches), width):
        _run(run, searches[start : start + width], params, use_tqdm)
    return [search.output(checkpoint.tokenizer) for search in searches]


def _run(run: Run, searches: list[Search], params: BeamSearchParams, use_tqdm: bool) -> None:
    """Run searches to their ends, all beams of a round in one batch."""
    one_token = SamplingParams(
        temperature=params.temperature,
        logprobs=2 * params.beam_width,  # enough if an EOS is among each beam's, as in vLLM
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        structured_outputs=params.structured_outputs,
    )
    for _ in tqdm(range(params.max_tokens), "Beam search", unit="token", disable=not use_tqdm):
        searches = [search for search in searches if not search.is_done]
        if not searches:
            break
        beams = [beam for search in searches for beam in search.beams]
        lines = iter(run([beam.tokens for beam in beams], _each(one_token, beams)))
        for search in searches:
            search.extend([next(lines) for _ in search.beams])


def _each(one_token: SamplingParams, beams: list[Beam]) -> Params:
    """The parameters of beams, with what each one's grammar allows next."""
    if one_token.structured_outputs is None:
        return one_token
    params = [copy(one_token) for _ in beams]
    for own, beam in zip(params, beams, strict=True):
        own.grammar = beam.grammar
    return params
