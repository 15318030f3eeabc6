"""What needs the host between a forward and its draws: Python logits processors, and grammars,
whose masks llguidance makes there.

sampler.py calls it with the logits of the rows that need it, when the device has done its part to
them. A step is submitted before the host has seen the tokens of the one before, so a step that
draws for such a row waits for them, while its forward runs; other steps don't
(docs/decisions/0017).
"""

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanovllm.core.step import NO_WAY_ON, RowStart
from nanovllm.sampling_params import takes_prompt
from nanovllm.worker.logits import keep_allowed
from nanovllm.worker.record import StepRecord

if TYPE_CHECKING:
    from nanovllm.worker.rows import Rows

logger = logging.getLogger(__name__)

BANNED = -1e30  # finite, also when divided by a temperature


class HostRow:
    """A row that needs the host: the tokens that it was told.

    Attributes:
        processors: its callables, and whether they take the prompt.
        matcher: where its text stands in its grammar; None: it has none.
        has_ended: whether its grammar was found to have no way on.
        drawn: the step that sampled its last token, and the token's index there; None: the row was
            told.
    """

    def __init__(self, start: RowStart):
        params, n = start.params, start.num_prompt_tokens
        self.prompt, self.output = list(start.token_ids[:n]), list(start.token_ids[n:])
        self.processors = [(call, takes_prompt(call)) for call in params.logits_processors or ()]
        self.stop_token_ids = params.stop_token_ids or ()
        self.matcher: Any = None
        self.num_words = 0  # of a mask
        self.has_ended = False
        self.drawn: tuple[StepRecord, int] | None = None
        if params.grammar is not None:
            self.num_words = params.grammar.num_words
            self.matcher = params.grammar.matcher.deep_copy()
            # Of several EOS tokens, after ignore_eos, the first is the last that it takes.
            self.matcher.try_consume_tokens(self.output)

    def process(self, logits: torch.Tensor) -> None:
        """Have its callables change [vocab] float32."""
        for i, (call, with_prompt) in enumerate(self.processors):
            prompt = (list(self.prompt),) if with_prompt else ()
            result = call(*prompt, list(self.output), logits)
            if not isinstance(result, torch.Tensor):
                raise TypeError(f"logits_processors[{i}] must return a tensor, not {result!r:.80}")
            form = (result.shape, result.dtype, result.device)
            if form != (logits.shape, logits.dtype, logits.device):
                raise ValueError(
                    f"logits_processors[{i}] must return {logits.dtype} of shape "
                    f"{tuple(logits.shape)} on {logits.device}, not {result.dtype} of shape "
                    f"{tuple(result.shape)} on {result.device}"
                )
            if result is not logits:
                logits.copy_(result)


class HostProcessors:
    """Does for the rows that need the host what it has to.

    Args:
        rows: the state of all rows; methods take the numbers of some, [n].

    Attributes:
        bits: [rows, vocab / 32] int32, the tokens that grammars allow next; made when a row has
            one.
        errors: by row, of this step, whose draws are worth nothing.
    """

    def __init__(self, rows: "Rows"):
        self.of = rows
        self.bits = np.empty((0, 0), np.int32)
        self.errors: dict[int, BaseException] = {}
        # llguidance's threads, and the process that they are in.
        self.threads: Any = None
        self.threads_of = 0

    def catch_up(self, rows: np.ndarray) -> None:
        """Before tokens are sampled for these rows: wait for the ones sampled before, and have
        grammars say which tokens they allow now."""
        self.errors = {}
        own = {row: self.of.on_host[row] for row in rows[self.of.needs_host[rows]].tolist()}
        told = []
        for row in own.values():
            if row.drawn is not None:
                record, index = row.drawn
                record.wait()
                row.output.append(int(record.token_ids[index]))
                row.drawn = None
                # A stopped one has ended, or failed.
                if row.matcher is not None and not row.matcher.is_stopped():
                    told.append((row.matcher, row.output[-1]))
        masked = {number: row for number, row in own.items() if row.matcher is not None}
        if masked:
            self._fill_masks(masked, told)

    def _fill_masks(self, rows: dict[int, HostRow], told: list[tuple[Any, int]]) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

        if self.threads is None or self.threads_of != os.getpid():  # a forked process has none
            self.threads, self.threads_of = LLExecutor(), os.getpid()
        if told:
            consume_token_par(self.threads, told)
        if not self.bits.size:
            num_words = next(iter(rows.values())).num_words
            self.bits = np.zeros((len(self.of.has_grammar), num_words), np.int32)
        matchers = [(row.matcher, number) for number, row in rows.items()]
        fill_next_token_bitmask_par(self.threads, matchers, self.bits)
        bits = self.bits.view(np.uint32)
        for number, row in rows.items():
            if row.matcher.is_error():
                error = row.matcher.get_error().split("\n")[0]
                if not error.startswith(NO_WAY_ON):
                    self.errors[number] = ValueError(error)
                elif not row.has_ended:
                    # As in vLLM. The mask has EOS alone.
                    row.has_ended = True
                    logger.warning(
                        "a grammar has no way on after %d tokens: its request ends there",
                        len(row.output),
                    )
            elif row.stop_token_ids and row.matcher.is_accepting():
                for token in row.stop_token_ids:
                    bits[number, token // 32] |= np.uint32(1 << token % 32)

    def apply(self, logits: torch.Tensor, rows: np.ndarray, record: StepRecord) -> None:
        """Change [n, vocab] float32 of rows, of which some need it, after catch_up. A grammar has
        the last word: where other options forbid all that it allows, it decides."""
        for i in np.flatnonzero(self.of.needs_host[rows]).tolist():
            row = int(rows[i])
            try:
                self.of.on_host[row].process(logits[i])
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # the user's code may raise anything
                self.errors.setdefault(row, error)
        masked = np.flatnonzero(self.of.has_grammar[rows])
        if masked.size:
            new = record.upload({"index": masked, "bits": self.bits[rows[masked]]})
            own = logits[new["index"]].clamp_(min=BANNED)
            keep_allowed(own, new["bits"])
            logits[new["index"]] = own

    def keep(self, rows: np.ndarray, indices: np.ndarray, record: StepRecord) -> None:
        """Note where these rows' sampled tokens are, or will be, and the step's errors.

        Args:
            indices: [n] the rows' indices among the step's sampled tokens.
        """
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            if row in self.of.on_host:
                self.of.on_host[row].drawn = record, index
            if row in self.errors:
                record.errors[index] = self.errors[row]
