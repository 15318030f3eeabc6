"""What needs the host between a forward and its draws: Python logits processors, and grammars,
whose masks llguidance makes there.

sampler.py hands it the rows that begin and, each step, the logits of those that ask, when the
device has done its part to them. A step is submitted before the host has seen the tokens of the one
before, so a step that draws for such a row waits for them, while its forward runs; other steps
don't (docs/decisions/0017).
"""

from typing import Any

import numpy as np
import torch

from nanovllm.core.step import RowStart
from nanovllm.sampling_params import takes_prompt
from nanovllm.worker.logits import keep_allowed
from nanovllm.worker.upload import Uploader

BANNED = -1e30  # finite, also when divided by a temperature


class HostRow:
    """A row that needs the host: what it was told, and what it has to be told yet.

    Attributes:
        processors: its callables, and whether they take the prompt.
        matcher: where its text stands in its grammar; None: it has none.
        drawn: [1] where its last drawn token is, or will be; None: it was told.
    """

    def __init__(self, start: RowStart):
        params, n = start.params, start.num_prompt_tokens
        self.prompt, self.output = list(start.token_ids[:n]), list(start.token_ids[n:])
        self.processors = [(call, takes_prompt(call)) for call in params.logits_processors or ()]
        self.stop_token_ids = params.stop_token_ids or ()
        self.matcher: Any = None
        self.drawn: np.ndarray | None = None
        if params.grammar is not None:
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
    """Keeps the rows that need the host, and does for them what it has to.

    Args:
        num_rows: rows that there are.
        uploader: to the device of the logits.

    Attributes:
        used, masked: [rows] whether it needs the host, and whether it has a grammar.
        bits: [rows, vocab / 32] int32, the tokens that grammars allow next; made when somebody has
            one.
        written: recorded behind the draws of the last such step; None on a CPU.
        errors: by row, those of this step, whose draws are worth nothing.
    """

    def __init__(self, num_rows: int, uploader: Uploader):
        self.uploader = uploader
        self.used, self.masked = np.zeros(num_rows, bool), np.zeros(num_rows, bool)
        self.rows: dict[int, HostRow] = {}
        self.bits = np.empty((num_rows, 0), np.int32)
        self.written: torch.cuda.Event | None = None
        self.errors: dict[int, Exception] = {}
        self.threads: Any = None

    def start_rows(self, starts: list[RowStart]) -> None:
        """Sequences take over rows."""
        for start in starts:
            row, params = start.row, start.params
            self.used[row], self.masked[row] = params.needs_host, params.grammar is not None
            if params.grammar is not None and not self.bits.size:
                self.bits = np.zeros((len(self.used), params.grammar.num_words), np.int32)
            if params.needs_host:
                self.rows[row] = HostRow(start)
            elif self.rows:
                self.rows.pop(row, None)

    def catch_up(self, rows: np.ndarray) -> None:
        """Before tokens are drawn for these rows: wait for those drawn before, and say which ones
        grammars allow now."""
        own = {row: self.rows[row] for row in rows[self.used[rows]].tolist()}
        if not own:
            return
        self.errors = {}
        if self.written is not None:
            self.written.synchronize()
        told = []
        for row in own.values():
            if row.drawn is not None:
                row.output.append(int(row.drawn[0]))
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

        self.threads = self.threads or LLExecutor()
        if told:
            consume_token_par(self.threads, told)
        matchers = [(row.matcher, number) for number, row in rows.items()]
        fill_next_token_bitmask_par(self.threads, matchers, self.bits)
        bits = self.bits.view(np.uint32)
        for number, row in rows.items():
            if row.matcher.is_error():
                self.errors[number] = ValueError(row.matcher.get_error().split("\n")[0])
            elif row.stop_token_ids and row.matcher.is_accepting():
                for token in row.stop_token_ids:
                    bits[number, token // 32] |= np.uint32(1 << token % 32)

    def apply(self, logits: torch.Tensor, rows: np.ndarray) -> None:
        """Change [n, vocab] float32 of rows, of which some need it, after catch_up. A grammar has
        the last word: where all it allows is forbidden otherwise, it is drawn all the same."""
        for i in np.flatnonzero(self.used[rows]).tolist():
            row = int(rows[i])
            try:
                self.rows[row].process(logits[i])
            except Exception as error:  # the user's code may raise anything
                self.errors.setdefault(row, error)
        masked = np.flatnonzero(self.masked[rows])
        if masked.size:
            new = self.uploader.upload({"index": masked, "bits": self.bits[rows[masked]]})
            own = logits[new["index"]].clamp_(min=BANNED)
            keep_allowed(own, new["bits"])
            logits[new["index"]] = own

    def drawn(self, rows: np.ndarray, token_ids: np.ndarray) -> dict[int, Exception]:
        """A step has drawn for these rows; the tokens are there, or the device writes them to
        there. Returns the step's errors, by place."""
        if not self.rows:
            return {}
        places = np.flatnonzero(self.used[rows]).tolist()
        for i in places:
            self.rows[int(rows[i])].drawn = token_ids[i : i + 1]
        if places and self.uploader.device.type == "cuda":
            self.written = torch.cuda.current_stream().record_event()
        errors, self.errors = self.errors, {}
        return {i: errors[rows[i]] for i in places if rows[i] in errors}
