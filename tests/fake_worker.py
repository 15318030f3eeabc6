"""A worker for engine tests: no model, but the state a real one keeps, and tokens that nobody gets
right by accident.

Its cache maps a slot to the token and position stored there. The next token is a hash of the whole
context as read through the row's block table, so a page that is mixed up, shared wrongly or freed
early is noticed at once or changes the tokens. `expected_tokens` says what they must be.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np

from nanovllm.core.step import RowStart, StepInput, StepOutput
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import LogprobLines
from nanovllm.sampling_params import SamplingParams

VOCAB = 16
EOS = (0,)
# With this stop token, which is never drawn, the engine can't tell when a sequence ends; one that
# expects none to go on (mean_output=0) admits too many, and preempts.
NEVER = VOCAB
MAX_MODEL_LEN = 48


def context_hashes(tokens: Iterable[int]) -> list[int]:
    """A hash of each prefix; [0] is that of none. Python's hash of ints is the same everywhere."""
    return list(accumulate(tokens, lambda digest, token: hash((digest, token)), initial=0))


def draw(digest: int, seed: int, forbidden: Iterable[int], vocab: int) -> int:
    """The token after a context."""
    while (token := hash((digest, seed)) % vocab) in forbidden:
        digest += 1
    return token


def expected_tokens(
    prompt: list[int],
    params: SamplingParams,
    eos_ids: tuple[int, ...] = EOS,
    max_model_len: int = MAX_MODEL_LEN,
    vocab: int = VOCAB,
    seed: int = 0,
) -> tuple[list[int], str]:
    """A request's tokens and finish reason, from its definition alone."""
    stops = {*(() if params.ignore_eos else eos_ids), *(params.stop_token_ids or ())}
    output: list[int] = []
    while True:
        digest = context_hashes(prompt + output)[-1]
        banned = {*eos_ids, *stops} if len(output) < params.min_tokens else ()
        output.append(draw(digest, seed, banned, vocab))
        if output[-1] in stops:
            return output, "stop"
        if len(output) == params.max_tokens or len(prompt) + len(output) == max_model_len:
            return output, "length"


def expected_rank(digest: int) -> int:
    """Of a scored token after a context."""
    return digest % 2**20


def logprob_lines(lines: Iterable[tuple[int, list[int], list[float]]]) -> np.ndarray:
    """As of LogprobLines, of ranks, token ids and logprobs."""
    packed = []
    for rank, token_ids, logprobs in lines:
        bits = np.array(logprobs, np.float32).view(np.int32)
        packed.append([rank, *chain.from_iterable(zip(token_ids, bits, strict=True))])
    return np.array(packed, np.int32)


@dataclass
class Row:
    start: RowStart
    block_table: list[int] = field(default_factory=list)
    last_token: int | None = None
    history: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Query:
    row: Row
    position: int
    tokens: list[int]
    samples: bool

    @property
    def end(self) -> int:
        return self.position + len(self.tokens)


@dataclass(frozen=True)
class Pending:
    worker: "FakeWorker"
    number: int
    output: StepOutput

    def result(self) -> StepOutput:
        self.worker.fail_on("result", self.number)
        return self.output


class FakeWorker:
    """An Executor. Steps run when submitted, in order, as on a device stream.

    Args:
        num_blocks, block_size, max_num_seqs, max_num_batched_tokens: the engine's.
        fail_on: called with (stage, number of the step) and may raise. The stages are "submit"
            (nothing has run), "stored" (the step stored its tokens but has not sampled), "result".
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab: int = VOCAB,
        fail_on: Callable[[str, int], None] = lambda stage, number: None,
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.vocab = vocab
        self.fail_on = fail_on
        self.steps: list[StepInput] = []
        self.rows: dict[int, Row] = {}
        self.cache: dict[int, tuple[int, int]] = {}  # slot -> token, position
        # Keys and values depend on all tokens before theirs: slot -> hash of them.
        self.contexts: dict[int, int] = {}
        self.num_stored = 0

    def submit(self, step: StepInput) -> Pending:
        number = len(self.steps)
        self.steps.append(step)
        self.fail_on("submit", number)
        self._check_shape(step)
        self._start_rows(step)
        self._open_pages(step)
        queries = self._queries(step)
        self._check_writers(step, queries)
        self._store(queries)
        self.fail_on("stored", number)
        token_ids = self._sample(queries)
        scores = self._scores(step, queries)
        return Pending(self, number, StepOutput(token_ids, self._logprobs(queries), scores))

    def _check_shape(self, step: StepInput) -> None:
        rows, lens = step.rows.tolist(), step.query_lens.tolist()
        assert rows and min(lens) > 0 and sum(lens) <= self.max_num_batched_tokens
        assert len(set(rows)) == len(rows) <= self.max_num_seqs
        assert len(step.decode_blocks[0]) == len(step.decode_positions) == len(step.decode_rows)
        assert {start.row for start in step.starts} <= {chunk.row for chunk in step.chunks}

    def _start_rows(self, step: StepInput) -> None:
        for start in step.starts:
            assert 0 <= start.row < self.max_num_seqs
            assert start.block_tables[0].dtype == np.int32
            table = start.block_tables[0].tolist()
            assert all(0 <= page < self.num_blocks for page in table)
            assert (len(start.token_ids) > 0) == start.params.needs_history
            self.rows[start.row] = Row(start, table, history=list(start.token_ids))

    def _open_pages(self, step: StepInput) -> None:
        assert step.decode_blocks[0].dtype == np.int32
        columns = (step.decode_rows, step.decode_positions, step.decode_blocks[0])
        for row, position, page in np.stack(columns, axis=1).tolist():
            table = self.rows[row].block_table
            # Just those whose last page is full open one.
            assert (page >= 0) == (position == len(table) * self.block_size)
            if page >= 0:
                assert page < self.num_blocks
                table.append(page)

    def _queries(self, step: StepInput) -> list[Query]:
        queries = []
        for number, position in zip(step.decode_rows, step.decode_positions.tolist(), strict=True):
            row = self.rows[number]
            assert row.last_token is not None, "a decode in a row that has not sampled"
            queries.append(Query(row, position, [row.last_token], samples=True))
        for chunk in step.chunks:
            row = self.rows[chunk.row]
            queries.append(Query(row, chunk.position, list(chunk.token_ids), chunk.samples))
        return queries

    def _check_writers(self, step: StepInput, queries: list[Query]) -> None:
        """Whoever stores into a page is the only one that ever does while others hold it. Those
        that start with this step may share what it stores."""
        started = {start.row for start in step.starts}
        holders: dict[int, list[Row]] = {}
        for query in queries:
            row = query.row
            num_shared = row.start.num_cached_tokens // self.block_size
            for i, page in enumerate(row.block_table):
                if i >= num_shared or row.start.row not in started:
                    holders.setdefault(page, []).append(row)
        for query in queries:
            for position in range(query.position, query.end):
                if position >= query.row.start.num_cached_tokens:
                    page = self._slot(query.row, position) // self.block_size
                    assert holders[page] == [query.row], f"page {page} has two writers"

    def _store(self, queries: list[Query]) -> None:
        stored: list[tuple[Query, int, int]] = []
        for query in queries:
            for position, token in enumerate(query.tokens, query.position):
                if position >= query.row.start.num_cached_tokens:
                    slot = self._slot(query.row, position)
                    self.cache[slot] = token, position
                    stored.append((query, position, slot))
        hashes = {id(query): context_hashes(self._read(query)) for query in queries}
        for query, position, slot in stored:
            self.contexts[slot] = hashes[id(query)][position]
        self.num_stored += len(stored)

    def _sample(self, queries: list[Query]) -> list[int]:
        output = []
        for query in queries:
            row, context = query.row, self._read(query)
            assert context[query.position :] == query.tokens, "a shared page holds other tokens"
            hashes = context_hashes(context)
            for position in range(query.end):
                assert self.contexts[self._slot(row, position)] == hashes[position], (
                    f"position {position} reads keys and values of another context"
                )
            if query.samples:
                forbidden = row.start.stop_token_ids if query.end < row.start.min_len else ()
                row.last_token = draw(hashes[-1], row.start.seed, forbidden, self.vocab)
                output.append(row.last_token)
                if row.start.params.needs_history:
                    assert row.history == context
                    row.history.append(row.last_token)
        return output

    def _logprobs(self, queries: list[Query]) -> LogprobLines | None:
        """What says to which token of which sequence it belongs."""
        asking = [q for q in queries if q.samples and q.row.start.params.logprobs is not None]
        if not asking:
            return None
        lines = [(q.end, [q.row.last_token, *range(20)], [-q.end] * 21) for q in asking]
        return LogprobLines(logprob_lines(lines))

    def _scores(self, step: StepInput, queries: list[Query]) -> LogprobLines | None:
        """Ranks that say what is before each token."""
        lines, width = [], 1 + max((scoring.num_top for scoring in step.scorings), default=0)
        for scoring in step.scorings:
            query = queries[step.num_decodes + scoring.chunk]
            assert scoring.token_ids and 0 <= scoring.offset < len(query.tokens)
            assert scoring.offset + len(scoring.token_ids) <= len(query.tokens)
            known = query.tokens[scoring.offset + 1 :]
            assert all(a == b for a, b in zip(scoring.token_ids, known, strict=False))
            first = query.position + scoring.offset + 1
            hashes = context_hashes(self._read(query))[first:]
            lines += [
                (token, expected_rank(digest))
                for token, digest in zip(scoring.token_ids, hashes, strict=False)
            ]
        if not lines:
            return None
        whole = [(rank, [token, *range(width - 1)], [-rank] * width) for token, rank in lines]
        return LogprobLines(logprob_lines(whole))

    def _read(self, query: Query) -> list[int]:
        """The row's tokens up to the end of its query."""
        tokens = []
        for position in range(query.end):
            slot = self._slot(query.row, position)
            assert slot in self.cache, f"position {position} reads slot {slot}, never stored"
            token, stored_position = self.cache[slot]
            assert stored_position == position, (
                f"position {position} reads slot {slot}, which holds position {stored_position}"
            )
            tokens.append(token)
        return tokens

    def _slot(self, row: Row, position: int) -> int:
        index, offset = divmod(position, self.block_size)
        assert index < len(row.block_table), f"position {position} is beyond the block table"
        return row.block_table[index] * self.block_size + offset


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    enable_prefix_caching: bool = True,
    mixed_tokens: int | None = None,
    mixed_keys: int = 2**62,
    depth: int = 1,
    mean_output: int = 256,
    detokenizer: Detokenizer | None = None,
) -> Engine:
    """An engine over a FakeWorker, which is its `executor`."""
    limits = (num_blocks, block_size, max_num_seqs, max_num_batched_tokens)
    engine = Engine(
        FakeWorker(*limits),
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        mixed_tokens=mixed_tokens,
        mixed_keys=mixed_keys,
        depth=depth,
        detokenizer=detokenizer,
    )
    engine.scheduler.mean_output = mean_output
    return engine


def make_sequence(
    prompt: list[int],
    request_id: str = "a",
    max_model_len: int = MAX_MODEL_LEN,
    seed: int = 0,
    targets: list[int] | None = None,
    score_from: int = 1,
    **params,
) -> Sequence:
    params = {"ignore_eos": True, **params}
    return Sequence(
        request_id,
        array("I", prompt),
        SamplingParams(**params),
        seed=seed,
        max_model_len=max_model_len,
        eos_token_ids=EOS,
        targets=targets,
        score_from=score_from,
    )


def take_step(engine: Engine) -> list[Sequence]:
    """Step. Returns the sequences that have news, or raises what the step failed with."""
    news = engine.step()
    if news.error is not None:
        raise news.error
    return news.advanced


def run(engine: Engine, *seqs: Sequence) -> list[Sequence]:
    """Add sequences and step until all is done. Returns the sequences in the order they ended."""
    for seq in seqs:
        engine.add(seq)
    ended = []
    for _ in range(10_000):
        if not engine.has_unfinished:
            assert_idle(engine)
            return ended
        ended += [seq for seq in take_step(engine) if seq.finished]
        check_invariants(engine)
    raise AssertionError("some request never ends")


def assert_right(
    *seqs: Sequence,
    max_model_len: int = MAX_MODEL_LEN,
    cut: tuple[str, ...] = ("abort",),
) -> None:
    """They have their tokens; those that ended by one of `cut` the first of them."""
    for seq in seqs:
        prompt = seq.token_ids[: seq.num_prompt_tokens].tolist()
        tokens, reason = expected_tokens(
            prompt, seq.params, max_model_len=max_model_len, seed=seq.seed
        )
        if seq.finish_reason in cut:
            assert seq.output_token_ids == tokens[: len(seq.output_token_ids)]
        else:
            assert (seq.output_token_ids, seq.finish_reason) == (tokens, reason)
        if seq.logprobs is not None:
            positions = range(seq.num_prompt_tokens, len(seq.token_ids))
            lines, width = seq.logprobs.lines, 1 + seq.params.logprobs
            assert lines.token_ids[:, 0].tolist() == seq.output_token_ids
            assert lines.logprobs.tolist() == [[-p] * width for p in positions]
            assert lines.ranks.tolist() == list(positions)
        if seq.scores is not None:
            num, width, lines = len(seq.scores), seq.scores.width, seq.scores.lines
            assert num == len(seq.targets) or seq.finish_reason in cut
            assert lines.token_ids[:, 0].tolist() == seq.targets[:num].tolist()
            ranks = [expected_rank(h) for h in context_hashes(prompt)[seq.score_from :][:num]]
            assert lines.ranks.tolist() == ranks
            assert lines.logprobs.tolist() == [[-rank] * width for rank in ranks]


def num_computed(engine: Engine, seq: Sequence) -> int:
    """0 where it holds nothing."""
    return int(engine.scheduler.num_computed[seq.row]) if seq.row >= 0 else 0


def is_prefilling(engine: Engine, seq: Sequence) -> bool:
    return num_computed(engine, seq) < seq.prefill_end


def decoding(engine: Engine) -> list[Sequence]:
    """Those that the next step decodes."""
    return engine.scheduler.seqs[engine.scheduler.decodes].tolist()


def check_invariants(engine: Engine) -> None:
    """What holds between any two steps, of which the first may have failed."""
    scheduler, worker = engine.scheduler, engine.executor
    manager, running = scheduler.block_manager, scheduler.running

    # Every page is free, or owned by as many sequences as are counted.
    tables = [seq.block_table for seq in running]
    assert all(len(set(table)) == len(table) for table in tables)
    counts = [0] * manager.num_blocks
    for page in (page for table in tables for page in table):
        counts[page] += 1
    assert counts == manager.ref_counts.tolist()
    assert set(manager.free_blocks) == {page for page, count in enumerate(counts) if count == 0}
    # The pages without content are reused first.
    has_content = [manager.contents[page] is not None for page in manager.free_blocks]
    assert has_content == sorted(has_content)
    # The prefix cache finds exactly the pages that have content.
    keyed = [(key[0], page) for page, key in enumerate(manager.contents) if key]
    assert sorted(keyed) == sorted(manager.cached.items())
    assert manager.enable_prefix_caching or not keyed

    # A page's owner is the only one that holds it.
    owned = [(page, owner) for page, owner in enumerate(manager.owners) if owner]
    assert all(page in owner.block_table and counts[page] == 1 for page, owner in owned)
    for seq in running:
        num_owned = sum(owner is seq for _, owner in owned)
        assert scheduler.num_shared[seq.row] == len(seq.block_table) - num_owned
    ends = [-(-(seq.max_len - 1) // manager.block_size) for seq in running]
    assert scheduler.pages_to_come == sum(ends) - sum(map(len, tables))

    # What a sequence stores itself is in nobody else's hands as something to store.
    written = [
        page
        for seq in running
        for page in seq.block_table[
            worker.rows[seq.row].start.num_cached_tokens // manager.block_size :
        ]
    ]
    assert len(set(written)) == len(written)

    # Nobody holds more pages than its tokens need.
    for seq in running:
        num_tokens = max(num_computed(engine, seq), seq.prefill_end)
        assert len(seq.block_table) == -(-num_tokens // manager.block_size)

    # A page is as full as its fullest holder's; what is left is counted as empty.
    size, filled = manager.block_size, {}
    for seq in running:
        for i, page in enumerate(seq.block_table):
            tokens = min(max(num_computed(engine, seq) - i * size, 0), size)
            filled[page] = max(filled.get(page, 0), tokens)
    assert scheduler.empty_slots == len(filled) * size - sum(filled.values())

    rows = [seq.row for seq in running]
    assert [scheduler.seqs[row] for row in rows] == list(running)
    assert set(decoding(engine)) <= set(running)
    assert sorted(rows + scheduler.free_rows) == list(range(scheduler.max_num_seqs))
    assert len(engine.pending) <= engine.depth
    # First come, first served: nobody runs before an older one, across preemptions and failures.
    assert [*running, *scheduler.waiting] == [*chain(*engine.unfinished.values())]


def assert_idle(engine: Engine) -> None:
    """Nothing is left behind."""
    scheduler = engine.scheduler
    assert not (engine.unfinished or engine.pending or scheduler.running or scheduler.waiting)
    assert scheduler.block_manager.num_free == scheduler.block_manager.num_blocks
    assert len(scheduler.free_rows) == scheduler.max_num_seqs
    assert scheduler.empty_slots == 0
