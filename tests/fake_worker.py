"""A worker for engine tests: no model, but the state a real one keeps, and tokens that come out
right by no accident.

Its caches, one for each group of layers, map a slot to the token and position stored there and a
hash of the context before. The next token is a hash of the whole context, and everything that a
query sees through the row's block tables must agree with it. So a block that is mixed up, shared
wrongly or freed early is noticed at once or changes the tokens. `expected_tokens` says what they
must be.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np

from nanovllm.core.step import MIXED_STEPS, CacheGroup, RowStart, StepInput, StepOutput
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.policy import FirstComeFirstServed, Policy
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
    block_tables: list[list[int]]  # of each group
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


@dataclass
class Slot:
    """What a slot of a group's cache holds. Keys and values depend on all tokens up to their own,
    so a hash of these stands for them; None: not computed yet, in this step."""

    token: int
    position: int
    context: int | None = None


class FakeWorker:
    """An Executor. Steps run when submitted, in order, as on a device stream.

    Args:
        groups: of layers; a window must be at least 2.
        max_num_seqs, max_num_batched_tokens: the engine's.
        mixed_tokens, mixed_keys: of the largest step with prompts that one launch holds, as a GPU's
            CUDA graphs do; None: steps are launched alike.
        fail_on: called with (stage, number of the step) and may raise. The stages are "submit"
            (nothing has run), "stored" (the step stored its tokens but has not sampled), "result".
    """

    def __init__(
        self,
        groups: tuple[CacheGroup, ...],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab: int = VOCAB,
        mixed_tokens: int | None = None,
        mixed_keys: int = 2**62,
        fail_on: Callable[[str, int], None] = lambda stage, number: None,
    ):
        self.groups, self.block_size = groups, groups[0].block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.mixed_tokens, self.mixed_keys = mixed_tokens, mixed_keys
        self.vocab = vocab
        self.fail_on = fail_on
        self.steps: list[StepInput] = []
        self.rows: dict[int, Row] = {}
        self.caches: list[dict[int, Slot]] = [{} for _ in groups]
        self.num_stored = 0

    def prompt_budget(self, num_decodes: int, waiting: Iterable[tuple[int, int]]) -> int:
        """The rule of worker/executor.py."""
        budget = self.max_num_batched_tokens - num_decodes
        if num_decodes == 0 or self.mixed_tokens is None:
            return budget
        room, num_new = max(0, self.mixed_tokens - num_decodes), 0
        for num_tokens, length in waiting:
            assert 0 < num_tokens <= length
            if num_new < room:
                room = min(room, self.mixed_keys // length)
            num_new += num_tokens
            if num_new > MIXED_STEPS * room:
                return budget
        return min(room, budget)

    def submit(self, step: StepInput) -> Pending:
        number = len(self.steps)
        self.steps.append(step)
        self.fail_on("submit", number)
        self._check_shape(step)
        self._start_rows(step)
        self._open_blocks(step)
        queries = self._queries(step)
        for group in range(len(self.groups)):
            self._check_writers(group, step, queries)
            self._store(group, queries)
        self.num_stored += sum(
            query.end - max(query.position, query.row.start.num_cached_tokens)
            for query in queries
            if query.end > query.row.start.num_cached_tokens
        )
        self.fail_on("stored", number)
        digests = [self._attend(query) for query in queries]
        token_ids = self._sample(queries, digests)
        scores = self._scores(step, queries, digests)
        return Pending(self, number, StepOutput(token_ids, self._logprobs(queries), scores))

    def _check_shape(self, step: StepInput) -> None:
        rows, lens = step.rows.tolist(), step.query_lens.tolist()
        assert rows and min(lens) > 0 and sum(lens) <= self.max_num_batched_tokens
        assert len(set(rows)) == len(rows) <= self.max_num_seqs
        assert len(step.decode_positions) == len(step.decode_rows)
        assert step.decode_blocks.shape == (len(self.groups), len(step.decode_rows))
        assert {start.row for start in step.starts} <= {chunk.row for chunk in step.chunks}

    def _start_rows(self, step: StepInput) -> None:
        for start in step.starts:
            assert 0 <= start.row < self.max_num_seqs
            assert all(table.dtype == np.int32 for table in start.block_tables)
            tables = [table.tolist() for table in start.block_tables]
            for group, table in zip(self.groups, tables, strict=True):
                assert all(0 <= block < group.num_blocks for block in table)
            assert (len(start.token_ids) > 0) == start.params.needs_history
            self.rows[start.row] = Row(start, tables, history=list(start.token_ids))

    def _open_blocks(self, step: StepInput) -> None:
        assert step.decode_blocks.dtype == np.int32
        columns = (step.decode_rows, step.decode_positions, *step.decode_blocks)
        for row, position, *blocks in np.stack(columns, axis=1).tolist():
            tables = self.rows[row].block_tables
            for group, table, block in zip(self.groups, tables, blocks, strict=True):
                # Just the rows whose last block is full open one.
                assert (block >= 0) == (position == len(table) * self.block_size)
                if block >= 0:
                    assert block < group.num_blocks
                    table.append(block)

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

    def _check_writers(self, group: int, step: StepInput, queries: list[Query]) -> None:
        """A row that stores into a block is the only one that ever does while others hold it. Rows
        that start with this step may share what it stores."""
        started = {start.row for start in step.starts}
        holders: dict[int, list[Row]] = {}
        for query in queries:
            row = query.row
            num_shared = row.start.num_cached_tokens // self.block_size
            first_seen = self._first_seen(group, query) // self.block_size
            for i, block in enumerate(row.block_tables[group]):
                if i >= first_seen and (i >= num_shared or row.start.row not in started):
                    holders.setdefault(block, []).append(row)
        for query in queries:
            for position in range(query.position, query.end):
                if position >= query.row.start.num_cached_tokens:
                    block = self._slot(group, query.row, position) // self.block_size
                    assert holders[block] == [query.row], f"block {block} has two writers"

    def _store(self, group: int, queries: list[Query]) -> None:
        """All tokens first, then what depends on others'."""
        cache, stored = self.caches[group], []
        for query in queries:
            for position, token in enumerate(query.tokens, query.position):
                if position >= query.row.start.num_cached_tokens:
                    slot = self._slot(group, query.row, position)
                    cache[slot] = Slot(token, position)
                    stored.append((query.row, position, cache[slot]))
        for row, position, new in stored:
            new.context = 0
            if position:
                before = self._read(group, row, position - 1)
                new.context = hash((before.context, before.token))

    def _attend(self, query: Query) -> list[int]:
        """The hash of the context up to each query token, as each group shows it."""
        found = []
        for group in range(len(self.groups)):
            positions = range(self._first_seen(group, query), query.end)
            slots = [self._read(group, query.row, position) for position in positions]
            digests = [hash((slot.context, slot.token)) for slot in slots]
            tokens = [slot.token for slot in slots]
            assert tokens[-len(query.tokens) :] == query.tokens, "a shared block has other tokens"
            assert positions[0] or slots[0].context == 0
            for before, slot in zip(digests, slots[1:], strict=False):
                assert slot.context == before, "keys and values of another context"
            if query.row.start.params.needs_history:
                assert query.row.history[positions[0] : query.end] == tokens
            found.append(digests[-len(query.tokens) :])
        assert all(digests == found[0] for digests in found)
        return found[0]

    def _sample(self, queries: list[Query], digests: list[list[int]]) -> list[int]:
        output = []
        for query, found in zip(queries, digests, strict=True):
            row = query.row
            if query.samples:
                forbidden = row.start.stop_token_ids if query.end < row.start.min_len else ()
                row.last_token = draw(found[-1], row.start.seed, forbidden, self.vocab)
                output.append(row.last_token)
                if row.start.params.needs_history:
                    assert len(row.history) == query.end
                    row.history.append(row.last_token)
        return output

    def _logprobs(self, queries: list[Query]) -> LogprobLines | None:
        """What says to which token of which sequence it belongs."""
        wanting = [q for q in queries if q.samples and q.row.start.params.logprobs is not None]
        if not wanting:
            return None
        lines = [(q.end, [q.row.last_token, *range(20)], [-q.end] * 21) for q in wanting]
        return LogprobLines(logprob_lines(lines))

    def _scores(
        self, step: StepInput, queries: list[Query], digests: list[list[int]]
    ) -> LogprobLines | None:
        """Ranks that say what is before each token."""
        lines, width = [], 1 + max((scoring.num_top for scoring in step.scorings), default=0)
        for scoring in step.scorings:
            number = step.num_decodes + scoring.chunk
            query = queries[number]
            assert scoring.token_ids and 0 <= scoring.offset < len(query.tokens)
            assert scoring.offset + len(scoring.token_ids) <= len(query.tokens)
            known = query.tokens[scoring.offset + 1 :]
            assert all(a == b for a, b in zip(scoring.token_ids, known, strict=False))
            lines += [
                (token, expected_rank(digest))
                for token, digest in zip(
                    scoring.token_ids, digests[number][scoring.offset :], strict=False
                )
            ]
        if not lines:
            return None
        whole = [(rank, [token, *range(width - 1)], [-rank] * width) for token, rank in lines]
        return LogprobLines(logprob_lines(whole))

    def _first_seen(self, group: int, query: Query) -> int:
        """The first position that a query's first token sees."""
        window = self.groups[group].window
        return 0 if window is None else max(0, query.position - window + 1)

    def _read(self, group: int, row: Row, position: int) -> Slot:
        slot = self._slot(group, row, position)
        found = self.caches[group].get(slot)
        assert found is not None, f"position {position} reads slot {slot}, never stored"
        assert found.position == position, (
            f"position {position} reads slot {slot}, which holds position {found.position}"
        )
        assert found.context is not None, f"position {position} is read before it is computed"
        return found

    def _slot(self, group: int, row: Row, position: int) -> int:
        index, offset = divmod(position, self.block_size)
        table = row.block_tables[group]
        assert index < len(table), f"position {position} is beyond the block table"
        return table[index] * self.block_size + offset


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    windows: tuple[int | None, ...] = (None,),
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    enable_prefix_caching: bool = True,
    mixed_tokens: int | None = None,
    mixed_keys: int = 2**62,
    policy: Policy | None = None,
    depth: int = 1,
    mean_output: int = 256,
    detokenizer: Detokenizer | None = None,
) -> Engine:
    """An engine over a FakeWorker, which is its `executor`; each of the windows is a group."""
    groups = tuple(CacheGroup(num_blocks, block_size, window) for window in windows)
    limits = (max_num_seqs, max_num_batched_tokens)
    engine = Engine(
        FakeWorker(groups, *limits, mixed_tokens=mixed_tokens, mixed_keys=mixed_keys),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        policy=policy,
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
    priority: int = 0,
    caller: str | int = 0,
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
        priority=priority,
        caller=caller,
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
    """All sequences have their tokens; a sequence that one of `cut` ended has the first of them."""
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
    """The sequences that the next step decodes."""
    return engine.scheduler.seqs[engine.scheduler.decodes].tolist()


def check_invariants(engine: Engine) -> None:
    """What holds between any two steps, of which the first may have failed."""
    scheduler, running = engine.scheduler, engine.scheduler.running
    for group in range(len(engine.executor.groups)):
        check_blocks(engine, group)
    check_prefix_cache(engine)

    rows = [seq.row for seq in running]
    assert [scheduler.seqs[row] for row in rows] == list(running)
    assert set(decoding(engine)) <= set(running)
    assert sorted(rows + scheduler.free_rows) == list(range(scheduler.max_num_seqs))
    for column in scheduler.max_len, scheduler.num_slots, scheduler.max_slots:
        assert set(np.flatnonzero(column).tolist()) <= set(rows)
    assert len(engine.pending) <= engine.depth
    # Prompts are computed one after another.
    assert not any(is_prefilling(engine, seq) for seq in list(running)[:-1])
    everything = [*running, *scheduler.waiting]
    unfinished = [*chain(*engine.unfinished.values())]
    if isinstance(scheduler.policy, FirstComeFirstServed):
        # No sequence runs before an older one, across preemptions and failures.
        assert everything == unfinished
    assert set(everything) == set(unfinished)


def check_blocks(engine: Engine, group: int) -> None:
    scheduler, worker = engine.scheduler, engine.executor
    manager, running = scheduler.block_manager, scheduler.running
    size, pool, window = manager.block_size, manager.pools[group], worker.groups[group].window
    tables = {seq: seq.block_tables[group] for seq in running}

    # Every block is free, or held by the sequences that are counted.
    held = {seq: [block for block in table if block >= 0] for seq, table in tables.items()}
    assert all(len(set(blocks)) == len(blocks) for blocks in held.values())
    counts = [0] * pool.num_blocks
    for block in chain(*held.values()):
        counts[block] += 1
    assert counts == pool.ref_counts.tolist()
    assert set(pool.free_blocks) == {block for block, count in enumerate(counts) if count == 0}
    # The blocks without content are reused first.
    has_content = [pool.contents[block] is not None for block in pool.free_blocks]
    assert has_content == sorted(has_content)
    # A block's owner is the only one that holds it.
    for block, row in enumerate(pool.owners.tolist()):
        assert row < 0 or (counts[block] == 1 and block in held[scheduler.seqs[row]])

    written = []
    for seq, table in tables.items():
        # It holds the blocks that its tokens need, and the worker knows them.
        num_tokens = max(num_computed(engine, seq), seq.prefill_end)
        assert len(table) == -(-num_tokens // size)
        assert scheduler.num_slots[seq.row] == len(table) * size
        assert scheduler.max_slots[seq.row] == -(-(seq.max_len - 1) // size) * size
        row = worker.rows[seq.row]
        pairs = list(zip(table, row.block_tables[group], strict=True))
        assert all(block in (-1, known) for block, known in pairs)
        # Blocks are freed when no query sees them any more, and the others are not.
        first_seen = 0
        if window is not None:
            first_seen = max(0, num_computed(engine, seq) - window + 1) // size
            if len(table) > -(-seq.prefill_end // size):  # has opened a block
                assert len(held[seq]) <= 1 - (1 - window) // size
        assert -1 not in table[first_seen:]
        assert held[seq] == table[len(table) - len(held[seq]) :].tolist()
        written += [b for b in table[row.start.num_cached_tokens // size :] if b >= 0]
    # No other sequence stores into a block that one stores into.
    assert len(set(written)) == len(written)

    # A block is as full as its fullest holder's; the rest is counted as empty.
    filled = {}
    for seq, table in tables.items():
        for i, block in enumerate(table):
            tokens = min(max(num_computed(engine, seq) - i * size, 0), size)
            filled[block] = max(filled.get(block, 0), tokens)
    filled.pop(-1, None)
    num_empty = int((scheduler.num_slots - scheduler.num_computed).sum())
    assert num_empty == len(filled) * size - sum(filled.values())


def check_prefix_cache(engine: Engine) -> None:
    """The cache finds exactly the blocks that have content, and knows no other prefix."""
    manager, known = engine.scheduler.block_manager, set()
    for pool in manager.pools:
        found = {manager.prefixes[c]: i for i, c in enumerate(pool.contents) if c is not None}
        assert found == pool.cached
        assert manager.enable_prefix_caching or not found
        known.update(found)
    assert sorted(known) == sorted(manager.prefixes.values())


def assert_idle(engine: Engine) -> None:
    """Nothing is left behind."""
    scheduler = engine.scheduler
    assert not (engine.unfinished or engine.pending or scheduler.running or scheduler.waiting)
    for pool in scheduler.block_manager.pools:
        assert len(pool.free_blocks) == pool.num_blocks
    assert len(scheduler.free_rows) == scheduler.max_num_seqs
    assert not scheduler.num_slots.any()
