"""Random schedules: whatever arrives, is aborted or fails when, every request ends with its tokens.

NANOVLLM_FUZZ=20000 runs that many schedules with fresh random seeds; without it the schedules are
the same every time.
"""

import os
from collections import Counter
from itertools import count

import pytest
from fake_worker import (
    NEVER,
    FakeWorker,
    assert_idle,
    assert_right,
    check_invariants,
    decoding,
    make_engine,
    make_sequence,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine.policy import FirstComeFirstServed, Priority, RoundRobin
from nanovllm.engine.sequence import Sequence

FUZZ = int(os.environ.get("NANOVLLM_FUZZ", "0"))


def fuzz(max_examples):
    return settings(
        max_examples=FUZZ or max_examples,
        derandomize=not FUZZ,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class FailNext:
    """Fails once, at the armed stage of the next step that gets there."""

    def __init__(self):
        self.armed = None

    def __call__(self, stage, number):
        if self.armed and self.armed[0] == stage:
            (_, error), self.armed = self.armed, None
            raise error


# Of the groups of layers: one that sees all, two of which one has a window, or windows alone.
SEEN = st.integers(2, 24)
WINDOWS = st.one_of(
    st.just((None,)), st.tuples(st.none(), SEEN), st.tuples(SEEN), st.tuples(SEEN, st.none(), SEEN)
)
POLICIES = [FirstComeFirstServed, FirstComeFirstServed, Priority, RoundRobin]


@st.composite
def engines(draw):
    """Engine options, and the longest sequence that they allow for."""
    block_size = draw(st.integers(1, 8))
    max_model_len = draw(st.integers(2, 40))
    max_num_seqs = draw(st.integers(1, 6))
    smallest = -(-max_model_len // block_size)
    return max_model_len, dict(
        block_size=block_size,
        windows=draw(WINDOWS),
        policy=draw(st.sampled_from(POLICIES))(),
        num_blocks=smallest + draw(st.sampled_from([0, 1, smallest // 2, smallest, 3 * smallest])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 0, 1, 3, 10, 50])),
        enable_prefix_caching=draw(st.integers(0, 4)) > 0,
        mixed_tokens=draw(st.none() | st.integers(0, 20)),
        mixed_keys=draw(st.sampled_from([2**62, 400, 50])),
        depth=draw(st.integers(1, 2)),
        mean_output=draw(st.sampled_from([0, 0, 8, 256])),
    )


# A prompt is a cut of one of a few texts, and perhaps a tail of its own: hits abound.
TEXTS = ([1, 2] * 20, [1] * 40, [1, 2] * 6 + [2] * 28)
REQUESTS = st.tuples(
    st.sampled_from(TEXTS),
    st.sampled_from([1, 3, 4, 7, 8, 12, 16, 24, 39]),
    st.lists(st.integers(1, 2), max_size=3),
    st.sampled_from([1, 3, 8, 16, None]),  # max_tokens
    st.sampled_from([0, 0, 0, 1, 4]),  # min_tokens
    st.sampled_from([True, True, False]),  # ignore_eos
    st.sampled_from([None, [NEVER], [NEVER], [3, 4, 5]]),  # stop_token_ids
    st.integers(0, 1),  # seed
    st.sampled_from([1, 1, 1, 2, 4]),  # samples
    # The log-probabilities of known tokens: none, the prompt's, those from a position on.
    st.sampled_from([None, None, None, "prompt", 1, 4, 9]),
)
NO_EVENTS = [("step", 0)] * 24
ABORTS = [("abort", back) for back in (1, 1, 2, 2, 3, 4, 6, 8)]
FAILURES = [
    ("fail", stage, error)
    for stage in ("submit", "stored", "result")
    for error in (RuntimeError, KeyboardInterrupt)
]
# A request arrives, something happens, some steps run; and so on.
SCHEDULES = st.lists(
    st.tuples(REQUESTS, st.sampled_from(NO_EVENTS + ABORTS + FAILURES), st.integers(0, 6)),
    min_size=4,
    max_size=24,
)


@pytest.fixture(scope="module", autouse=True)
def small_constants():
    """So that sequences take their log-probabilities many times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.engine.recent_logprobs.NUM_LINES", 3)
        yield


class Run:
    """Carries a schedule out, and checks everything that holds between steps."""

    def __init__(self, max_model_len, options):
        self.max_model_len = max_model_len
        self.caching = options["enable_prefix_caching"]
        self.engine = make_engine(**options)
        self.worker: FakeWorker = self.engine.executor
        self.worker.fail_on = self.failure = FailNext()
        self.seqs, self.delivered = [], []
        self.num_errors = 0

    def play(self, schedule):
        for request, (event, *args), num_steps in schedule:
            self.add(*request)
            getattr(self, event)(*args)
            self.step(num_steps)
        while self.engine.has_unfinished:
            assert len(self.worker.steps) < 5000, "some request never ends"
            self.step()
        assert_idle(self.engine)
        assert_right(*self.seqs, max_model_len=self.max_model_len, cut=("abort", "error"))
        assert self.num_errors > 1 or all(seq.finish_reason != "error" for seq in self.seqs)
        ended = [seq for seq in self.seqs if seq.finish_reason != "abort"]
        assert Counter(self.delivered) == Counter(ended)
        assert self.caching or not self.engine.metrics.cached_tokens

    def add(
        self,
        text,
        length,
        tail,
        max_tokens,
        min_tokens,
        ignore_eos,
        stop_token_ids,
        seed,
        n,
        scored,
    ):
        prompt = (text[:length] + tail)[: self.max_model_len - 1]
        scores = {} if scored is None else dict(prompt_logprobs=length % 3)
        if isinstance(scored, int):
            score_from = min(scored, len(prompt))
            scores |= dict(score_from=score_from, targets=[*prompt[score_from:], 7])
        # The ids of requests that ended come back.
        request_id = next(i for i in map(str, count()) if i not in self.engine.unfinished)
        samples = [
            make_sequence(
                prompt,
                request_id=request_id,
                max_model_len=self.max_model_len,
                seed=seed + index,
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens or min_tokens),
                ignore_eos=ignore_eos,
                stop_token_ids=stop_token_ids,
                logprobs=length % 4 if seed else None,
                presence_penalty=seed,  # the worker gets the tokens so far
                priority=length % 3,
                caller=len(self.seqs) % 4,
                **scores,
            )
            for index in range(n)
        ]
        Sequence.join(samples)
        self.engine.add_batch(samples)
        self.seqs += samples

    def step(self, times=1):
        for _ in range(times):
            decodes, num_steps = decoding(self.engine), len(self.worker.steps)
            news = self.engine.step()
            assert set(news.ended) <= set(news.advanced)
            self.delivered += news.ended
            if news.error is not None:
                assert not self.failure.armed
                self.num_errors += 1
            elif len(self.worker.steps) > num_steps:
                self.check_all_decoded(decodes)
            check_invariants(self.engine)

    def check_all_decoded(self, decodes):
        num_decodes = self.worker.steps[-1].num_decodes
        preempted = sum(seq.row < 0 and not seq.finished for seq in decodes)
        assert len(decodes) - preempted <= num_decodes <= len(decodes)

    def abort(self, back):
        self.engine.abort(self.seqs[-min(back, len(self.seqs))].samples)
        check_invariants(self.engine)

    def fail(self, stage, error):
        self.failure.armed = stage, error


@fuzz(3000)
@given(engines(), SCHEDULES)
def test_every_schedule_gives_the_right_tokens(engine, schedule):
    Run(*engine).play(schedule)


CERTAIN = st.lists(
    st.tuples(
        st.sampled_from(TEXTS),
        st.integers(1, 39),  # prompt tokens
        st.lists(st.integers(1, 2), max_size=3),
        st.sampled_from([1, 3, 8, 16, 30]),  # max_tokens
        st.sampled_from([1, 1, 3]),  # samples
        st.integers(0, 6),  # steps until the next
        st.sampled_from([None, None, "prompt", 5]),
    ),
    min_size=4,
    max_size=24,
)


@st.composite
def engines_of_small_steps(draw):
    """Engines whose steps have little room for prompts beside decodes, but much budget."""
    max_num_seqs, block_size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 2]))
    return 40, dict(
        block_size=block_size,
        windows=draw(WINDOWS),
        policy=draw(st.sampled_from(POLICIES))(),
        num_blocks=40 // block_size * draw(st.sampled_from([2, 3])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=200,
        enable_prefix_caching=draw(st.booleans()),
        mixed_tokens=max_num_seqs + draw(st.integers(0, 8)),
        depth=draw(st.integers(1, 2)),
    )


@fuzz(1000)
@given(engines() | engines_of_small_steps(), CERTAIN)
def test_nobody_is_preempted_where_lengths_are_certain(engine, requests):
    run = Run(*engine)
    run.play([
        ((text, length, tail, max_tokens, 0, True, None, 0, n, scored), ("step", 0), num_steps)
        for text, length, tail, max_tokens, n, num_steps, scored in requests
    ])  # fmt: skip
    assert run.engine.metrics.preemptions == 0
