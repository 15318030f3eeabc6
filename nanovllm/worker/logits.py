"""How requests change their logits before a token is sampled: masks, biases, penalties, as in vLLM
and in its order.

sampler.py calls it with the logits of the rows that need it. A step may run before the host has
seen the tokens of the one before, so what depends on generated tokens reads them on the device,
from the rows' history, which the steps that sample them write. The host never waits for the device
here (docs/decisions/0014).
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from nanovllm.worker.record import StepRecord
    from nanovllm.worker.rows import Rows

NO_TOKEN = -1


class LogitsProcessors:
    """Changes the rows' logits.

    Args:
        rows: the state of all rows; methods take the numbers of some, [n].
    """

    def __init__(self, rows: "Rows"):
        self.of = rows

    def columns(self, rows: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """What `apply` needs on the device."""
        of = self.of
        return {
            "rows": rows,
            "positions": positions[:, None],
            "min_len": of.min_len[rows, None],
            "num_prompt_tokens": of.num_prompt_tokens[rows, None],
            "presence": of.presence[rows, None],
            "frequency": of.frequency[rows, None],
            "repetition": of.repetition[rows, None],
        }

    def apply(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Take each step that a row needs; it leaves the logits of the other rows as they are.

        Args:
            logits: [n, vocab] float32, written to.
            positions: [n], of the tokens to be sampled.
            columns: of the same rows.
        """
        of, index, places = self.of, columns["rows"], columns["positions"]
        if of.allowed.used[rows].any():
            keep_allowed(logits, of.allowed.data[index])
        if of.bad_words.used[rows].any():
            words = of.bad_words.data[index]
            begins = begins_of_words(words)
            ban_bad_words(logits, words, begins, self._outputs_for(begins, columns))
        if (positions < of.min_len[rows]).any():
            stops = of.stop_token_ids.data[index]
            ban(logits, stops, (stops != NO_TOKEN) & (places < columns["min_len"]))
        if of.bias.used[rows].any():
            logits.scatter_add_(1, of.bias_ids.data[index].long(), of.bias.data[index])
        is_neutral = (of.presence == 0) & (of.frequency == 0) & (of.repetition == 1)
        if not is_neutral[rows].all():
            num_tokens = int(positions[of.history.used[rows]].max())
            tokens = of.history.data[index, :num_tokens].long()
            place = torch.arange(num_tokens, device=logits.device)
            is_known = place < places
            is_output = is_known & (place >= columns["num_prompt_tokens"])
            logits = penalize(
                logits,
                count(tokens, is_known, of.vocab_size),
                count(tokens, is_output, of.vocab_size),
                *(columns[name] for name in ("repetition", "frequency", "presence")),
            )
        return logits

    def keep(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        token_ids: torch.Tensor,
        record: "StepRecord",
    ) -> None:
        """Sampled tokens join the history of the rows that have one."""
        history = self.of.history
        kept = np.flatnonzero(history.used[rows])
        if kept.size:
            rows, positions = rows[kept], positions[kept]
            history.reserve(int(positions.max()) + 1)
            new = record.upload({"kept": kept, "rows": rows, "positions": positions})
            history.data[new["rows"], new["positions"]] = token_ids[new["kept"]].int()

    def _outputs_for(self, begins: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        """The generated token at the place of each token of a word, if the word's last one came
        next; before the first one stands a number that equals no token."""
        self.of.history.reserve(1)  # no word of several tokens has come yet
        history = self.of.history.data
        places = columns["positions"] + begins - torch.arange(begins.shape[1], device=begins.device)
        # Rows without a history have no words that need it.
        tokens = history[columns["rows"][:, None], places.clamp(0, history.shape[1] - 1)]
        return tokens.masked_fill_(places < columns["num_prompt_tokens"], NO_TOKEN - 1)


def keep_allowed(logits: torch.Tensor, bits: torch.Tensor) -> None:
    """Only tokens whose bit is set can be drawn: [n, vocab / 32] int32, the lowest bit first."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    is_allowed = ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(is_allowed == 0, -torch.inf)


def begins_of_words(words: torch.Tensor) -> torch.Tensor:
    """Where the word of each place begins, [n, m]: behind the last NO_TOKEN before it."""
    behind = torch.arange(1, words.shape[1] + 1, device=words.device)
    ends = torch.where(words == NO_TOKEN, behind, 0).cummax(1).values
    return F.pad(ends[:, :-1], (1, 0))


def ban_bad_words(
    logits: torch.Tensor, words: torch.Tensor, begins: torch.Tensor, outputs: torch.Tensor
) -> None:
    """A token that would complete a word can't be drawn.

    Args:
        words: [n, m], one after another, each the last token first, NO_TOKEN behind it.
        begins: [n, m], where the word of each place begins.
        outputs: [n, m], the generated token that each token of a word is compared with.
    """
    is_last = begins == torch.arange(words.shape[1], device=words.device)
    differs = (words != outputs) & (words != NO_TOKEN) & ~is_last
    num_different = torch.zeros_like(words).scatter_add_(1, begins, differs.int())
    ban(logits, words, is_last & (num_different == 0) & (words != NO_TOKEN))


def ban(logits: torch.Tensor, token_ids: torch.Tensor, is_banned: torch.Tensor) -> None:
    """The tokens ([n, m]) that are banned can't be drawn. 0 is added to all others: a selection
    would have to know their number, and wait for the device."""
    change = torch.zeros_like(token_ids, dtype=logits.dtype).masked_fill_(is_banned, -torch.inf)
    logits.scatter_add_(1, token_ids.clamp(min=0).long(), change)


def count(tokens: torch.Tensor, counts: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """How often each token of the vocabulary is among the tokens that count, [n, vocab]
    float32."""
    zeros = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    return zeros.scatter_add_(1, tokens, counts.float())


def penalize(
    logits: torch.Tensor,
    known: torch.Tensor,
    output: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Penalties on tokens that have occurred: repetition (Keskar et al. 2019) divides a logit above
    0 and multiplies one below; frequency (times each occurrence) and presence are subtracted, as in
    OpenAI's API.

    Args:
        logits: [n, vocab].
        known, output: [n, vocab] how often each token has occurred: anywhere, and in the output.
        repetition, frequency, presence: [n, 1].
    """
    weakened = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(known > 0, weakened, logits)
    return logits.sub_(frequency * output).sub_(presence * (output > 0))
