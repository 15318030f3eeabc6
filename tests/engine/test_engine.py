"""The engine over a fake worker: the right tokens however they are scheduled, and who runs when."""

import subprocess
import sys
from contextlib import suppress

import pytest
from fake_worker import (
    EOS,
    NEVER,
    assert_right,
    check_invariants,
    expected_tokens,
    is_prefilling,
    make_engine,
    make_sequence,
    num_computed,
    run,
    take_step,
)

from nanovllm.core.metrics import Observations
from nanovllm.engine.metrics_reader import read_metrics
from nanovllm.outputs import SampleLogprobs
from nanovllm.sampling_params import SamplingParams

both_depths = pytest.mark.parametrize("depth", [1, 2])


PREEMPTING = dict(num_blocks=12, mean_output=0)


def unpredictable(*prompts, **params):
    return sequences(*prompts, stop_token_ids=[NEVER], **params)


def sequences(*prompts, **params):
    return [make_sequence(prompt, str(i), **params) for i, prompt in enumerate(prompts)]


def step_until(engine, condition):
    while not condition():
        assert engine.has_unfinished
        take_step(engine)
        check_invariants(engine)


def test_the_engine_imports_no_torch():
    code = "import sys, nanovllm.engine.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The same tokens however they are scheduled

PROMPTS = {
    "one": [[1, 2, 3, 4, 5]],
    "one token": [[1], [2], [1]],
    "distinct": [[i, *range(2 + 3 * i)] for i in range(1, 7)],
    "identical, of whole blocks": [[1, 2, 3, 4, 5, 6, 7, 8]] * 6,
    "identical, with part of a block": [[1, 2, 3, 4, 5, 6]] * 6,
    "prefixes of each other": [[1, 2, 3] * n for n in (1, 4, 8, 2, 8, 3)],
    "longest": [[1] * 47, [1] * 46, [2] * 47],
}
OPTIONS = {
    "roomy": {},
    "small budget": dict(max_num_batched_tokens=4),
    "one at a time": dict(max_num_seqs=1, max_num_batched_tokens=5),
    "smallest cache": dict(num_blocks=12, mean_output=0),
    "blocks of one token": dict(block_size=1, num_blocks=60, mean_output=0),
    "no prefix caching": dict(enable_prefix_caching=False, num_blocks=20),
}


@both_depths
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_tokens_are_right(prompts, options, depth):
    engine = make_engine(depth=depth, **options)
    for _ in "cold", "warm":
        seqs = unpredictable(*prompts, max_tokens=14)
        run(engine, *seqs)
        assert_right(*seqs)
        if not engine.scheduler.block_manager.enable_prefix_caching:
            assert engine.metrics.cached_tokens == 0


# Prefix hits


def test_cached_tokens_are_those_of_the_full_blocks_before_the_last_token():
    engine = make_engine(max_num_seqs=1)
    seqs = sequences([1] * 10, [1] * 10, [1] * 7 + [2], [1] * 8, [1] * 9, max_tokens=1)
    run(engine, *seqs)
    assert [seq.num_cached_tokens for seq in seqs] == [0, 8, 4, 7, 8]
    assert engine.metrics.cached_tokens == 27
    assert engine.metrics.prefill_tokens == 10 + 2 + 4 + 1 + 1


def test_requests_of_one_step_share_what_it_computes():
    engine = make_engine()
    seqs = sequences([1] * 8, [1] * 8, [1] * 9, max_tokens=3)
    run(engine, *seqs)
    assert_right(*seqs)
    assert engine.executor.steps[0].query_lens.tolist() == [8, 1, 1]
    assert [seq.num_cached_tokens for seq in seqs] == [0, 7, 8]


def test_a_fully_cached_prompt_stores_nothing():
    engine = make_engine()
    run(engine, make_sequence([1] * 8, max_tokens=1))
    num_stored = engine.executor.num_stored
    seq = make_sequence([1] * 8, max_tokens=1)
    run(engine, seq)
    assert_right(seq)
    assert seq.num_cached_tokens == 7 and engine.executor.num_stored == num_stored


@both_depths
def test_generated_tokens_are_hit_by_the_next_turn(depth):
    engine = make_engine(depth=depth)
    first = make_sequence([1, 2, 3], max_tokens=10)
    run(engine, first)
    second = make_sequence([*first.token_ids, 5, 6], max_tokens=3)
    run(engine, second)
    assert_right(first, second)
    assert second.num_cached_tokens == 12  # the last token was never computed


def test_num_cached_tokens_is_that_of_the_first_admission():
    engine = make_engine(**PREEMPTING)
    seqs = unpredictable([1] * 6, [2] * 6, max_tokens=30)
    run(engine, *seqs)
    assert engine.metrics.preemptions > 0 and engine.metrics.cached_tokens > 0
    assert [seq.num_cached_tokens for seq in seqs] == [0, 0]


# Who starts when

ROWS = dict(num_blocks=1000, max_num_seqs=24, max_num_batched_tokens=64)


def starts_of_steps(engine, seqs):
    """Run, and give how many sequences each step started that started any."""
    for seq in seqs:
        engine.add(seq)
    while engine.unfinished:
        take_step(engine)
        check_invariants(engine)
        step = engine.metrics.last_step
        assert bool(step.stopped_by) == bool(step.waiting)
    assert_right(*seqs)
    return [len(step.starts) for step in engine.executor.steps if step.starts]


def ending_one_by_one(count, waiting):
    """Sequences that end in one step after another, and some that wait for their rows."""
    return [
        make_sequence([i % 7 + 1, i // 7 + 1], str(i), max_tokens=min(i, count) + 1)
        for i in range(count + waiting)
    ]


@both_depths
def test_a_free_row_is_taken_in_the_next_step(depth):
    engine = make_engine(depth=depth, **ROWS)
    seqs = ending_one_by_one(24, 10)
    assert starts_of_steps(engine, seqs) == [24, *[1] * 10]


def test_sequences_that_wait_for_the_budget_start_in_the_next_step():
    engine = make_engine(mixed_tokens=0, **ROWS)
    seqs = sequences(*([i + 1] * 8 for i in range(12)), max_tokens=4)
    assert starts_of_steps(engine, seqs) == [8, 4]
    assert [len(step.starts) for step in engine.executor.steps[:2]] == [8, 4]


# Prompts in steps of one launch, which have few tokens beside decodes

MIXED = ROWS | dict(max_num_batched_tokens=200, mixed_tokens=20)


def prefills_of_steps(engine, *seqs, after=3):
    """Tokens of prompts that each step computes, beside sequences that decode already."""
    for i in range(after):
        engine.add(make_sequence([i + 1], f"first {i}", max_tokens=200))
    take_step(engine)
    for seq in seqs:
        engine.add(seq)
    prefills = []
    while any(len(seq.token_ids) == seq.num_prompt_tokens for seq in seqs):
        take_step(engine)
        check_invariants(engine)
        prefills.append(engine.metrics.last_step.prefill_tokens)
    return [n for n in prefills if n]


@both_depths
def test_a_prompt_comes_in_pieces_of_such_steps_unless_they_would_be_many(depth):
    def pieces(*seqs, **options):
        return prefills_of_steps(make_engine(depth=depth, **MIXED | options), *seqs)

    assert pieces(make_sequence([5] * 60, "a")) == [17, 17, 17, 9]
    longer, *others = sequences([5] * 69, [6] * 9, [7] * 50, max_tokens=20)
    assert pieces(longer) == [69]
    assert pieces(make_sequence([4] * 60, "b"), *others) == [60 + 9 + 50]
    assert pieces(make_sequence([5] * 60, "a"), mixed_tokens=None) == [60]


@both_depths
def test_tokens_in_the_prefix_cache_do_not_make_a_step_large(depth):
    engine = make_engine(depth=depth, **MIXED)
    run(engine, make_sequence([5] * 200, "before", max_tokens=1, max_model_len=300))
    seqs = [make_sequence([5] * 200 + [i], str(i), max_model_len=300) for i in range(8)]
    assert prefills_of_steps(engine, *seqs) == [8]


@pytest.mark.parametrize(("num_blocks", "first"), [(44, 17), (90, 20 + 3 * 45)])
def test_sequences_that_may_have_no_blocks_do_not_make_a_step_large(num_blocks, first):
    engine = make_engine(**MIXED | dict(num_blocks=num_blocks))
    seqs = sequences([5] * 20, *([i] * 45 for i in range(6, 9)), max_tokens=9)
    assert prefills_of_steps(engine, *seqs)[0] == first


def test_prompts_beside_no_decodes_take_the_whole_budget():
    prompt = make_sequence([5] * 150, "a")
    assert prefills_of_steps(make_engine(**MIXED), prompt, after=0) == [150]


def test_long_prompts_come_in_smaller_pieces_or_at_once():
    def pieces(mixed_keys, *seqs):
        return prefills_of_steps(make_engine(**MIXED, mixed_keys=mixed_keys), *seqs)

    assert pieces(60 * 15, make_sequence([5] * 60, "a")) == [15, 15, 15, 15]
    assert pieces(60 * 11, make_sequence([5] * 60, "a")) == [60]
    assert pieces(59, make_sequence([5] * 60, "a")) == [60]
    for mixed_keys, expected in (60 * 14, [65]), (60 * 17, [5 + 12, 16, 16, 16]):
        behind = make_sequence([6] * 5, "b"), make_sequence([5] * 60, "a")
        assert pieces(mixed_keys, *behind) == expected


@both_depths
def test_a_step_that_the_executor_keeps_small_says_so(depth):
    engine = make_engine(depth=depth, **MIXED)
    prefills_of_steps(engine, *sequences([5] * 20, [6] * 20, max_tokens=9))
    steps = metrics_of_steps(engine, make_sequence([7] * 30, "b", max_tokens=1))
    assert steps[0].stopped_by == "prompt_budget" and steps[0].prefill_tokens < 17


@both_depths
def test_no_sequence_waits_for_long_though_a_few_start_in_every_step(depth):
    """The rows are few, and prompts of a few tokens have gone first."""
    engine = make_engine(depth=depth, **ROWS | dict(max_num_batched_tokens=2000, mixed_tokens=26))
    for i in range(20):
        engine.add(make_sequence([i + 1], f"first {i}", max_tokens=500))
    shorts = [make_sequence([i % 7 + 1], f"short {i}", max_tokens=3) for i in range(60)]
    late = [make_sequence([30] * 100, f"late {i}", max_tokens=100) for i in range(3)]
    for seq in shorts + late:
        engine.add(seq)
    step_until(engine, lambda: all(seq.finished for seq in shorts))
    started = len(engine.executor.steps)
    step_until(engine, lambda: all(len(seq.token_ids) > 100 for seq in late))
    assert len(engine.executor.steps) - started <= 8 + 4


# What is counted


def metrics_of_steps(engine, *seqs):
    """Run, and collect what last_step says after each step."""
    for seq in seqs:
        engine.add(seq)
    steps = []
    while engine.unfinished:
        take_step(engine)
        steps.append(engine.metrics.last_step)
    return steps


@pytest.mark.parametrize(
    ("options", "stopped_by"),
    [
        (dict(max_num_seqs=2, max_num_batched_tokens=4), "max_num_batched_tokens"),
        (dict(max_num_seqs=2), "max_num_seqs"),
        (dict(num_blocks=5), "blocks"),
        (dict(), ""),
    ],
)
def test_a_step_says_what_kept_others_out(options, stopped_by):
    engine = make_engine(**options)
    steps = metrics_of_steps(engine, *sequences([1] * 7, [2] * 7, [3] * 7, max_tokens=2))
    assert steps[0].stopped_by == stopped_by
    assert steps[-1].stopped_by == ""
    assert (steps[0].running, steps[0].waiting) == (
        {"max_num_batched_tokens": 1, "max_num_seqs": 2, "blocks": 2, "": 3}[stopped_by],
        {"max_num_batched_tokens": 2, "max_num_seqs": 1, "blocks": 1, "": 0}[stopped_by],
    )


def test_a_prompt_cut_by_the_budget_is_stopped_by_it_though_nobody_waits():
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=4)
    steps = metrics_of_steps(engine, make_sequence([1] * 6, max_tokens=2))
    assert [step.stopped_by for step in steps] == ["max_num_batched_tokens", "", ""]
    assert [(step.prefill_tokens, step.decode_tokens) for step in steps] == [(4, 0), (2, 0), (0, 1)]


def test_a_step_that_preempts_says_so():
    engine = make_engine(num_blocks=5, mean_output=0)
    steps = metrics_of_steps(engine, *unpredictable([1] * 7, [2] * 7, max_tokens=6))
    [preempting] = [step for step in steps if step.preemptions]
    assert preempting.stopped_by == "preemption"
    assert (preempting.running, preempting.waiting, preempting.preemptions) == (1, 1, 1)
    assert engine.metrics.preemptions == 1


def test_a_step_that_preempts_says_so_though_others_wait_for_rows():
    engine = make_engine(mixed_tokens=0, mean_output=0, **ROWS | dict(num_blocks=46))
    prompts = [[i % 7 + 1, i] for i in range(26)]
    steps = metrics_of_steps(engine, *unpredictable(*prompts, max_tokens=6))
    preempting = [step.stopped_by for step in steps if step.preemptions]
    assert preempting and set(preempting) == {"preemption"}
    assert "max_num_seqs" in [step.stopped_by for step in steps]


def test_kv_cache_waste_is_the_share_of_empty_slots_over_all_steps():
    engine = make_engine()  # blocks of 4 tokens
    steps = metrics_of_steps(engine, make_sequence([1] * 6, max_tokens=4))
    # 6, 7, 8 and 9 tokens lie in 2, 2, 2 and 3 blocks.
    assert [(step.empty_slots, step.block_slots) for step in steps] == [
        (2, 8),
        (1, 8),
        (0, 8),
        (3, 12),
    ]
    assert engine.metrics.kv_cache_waste == 6 / 36


def test_a_shared_block_is_counted_once():
    engine = make_engine()
    [step] = metrics_of_steps(engine, *sequences([1] * 8, [1] * 8, max_tokens=1))
    assert (step.empty_slots, step.block_slots, step.cached_tokens) == (0, 8, 7)


# Who runs when


@both_depths
def test_a_small_cache_preempts_the_youngest_and_everyone_ends_right(depth):
    engine = make_engine(**PREEMPTING, depth=depth)
    seqs = unpredictable(*[[i] * 5 for i in range(1, 6)], max_tokens=30)
    ended = run(engine, *seqs)  # its invariants include that no sequence runs before an older one
    assert_right(*seqs)
    assert engine.metrics.preemptions > 0
    assert ended == seqs


@both_depths
def test_a_long_prompt_is_not_overtaken(depth):
    engine = make_engine(num_blocks=12, max_num_batched_tokens=8, depth=depth)
    long, *short = sequences([1] * 40, *[[i] for i in range(2, 12)], max_tokens=8)
    ended = run(engine, make_sequence([3] * 20, "first", max_tokens=20), long, *short)
    assert_right(*ended)
    times = [seq.metrics.first_token_time for seq in (long, *short)]
    assert times == sorted(times)


@both_depths
def test_max_num_seqs_caps_the_residents(depth):
    engine = make_engine(max_num_seqs=3, depth=depth)
    seqs = sequences(*[[i] * 4 for i in range(8)], max_tokens=4)
    run(engine, *seqs)
    assert_right(*seqs)
    assert max(len(step.rows) for step in engine.executor.steps) == 3


@both_depths
def test_a_long_prompt_does_not_stop_decodes(depth):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=4, depth=depth)
    decoding, long = sequences([1, 2], [3] * 40, max_tokens=40)
    engine.add(decoding)
    step_until(engine, lambda: num_computed(engine, decoding) > 2)
    num_steps = len(engine.executor.steps)
    engine.add(long)
    step_until(engine, lambda: long.output_token_ids)
    steps = engine.executor.steps[num_steps:]
    assert len(steps) >= 40 // 3 and {step.query_lens[0] for step in steps} == {1}
    assert all(step.num_decodes >= 1 for step in steps)
    assert {step.query_lens.sum() for step in steps[:13]} == {4}  # the budget, used up
    run(engine)
    assert_right(decoding, long)


# Where a request ends


@both_depths
@pytest.mark.parametrize(
    "num_prompt, params", [(5, dict(max_tokens=9)), (40, dict(max_tokens=None))]
)
def test_an_end_by_length_computes_nothing_beyond_it(num_prompt, params, depth):
    engine = make_engine(depth=depth)
    seq = make_sequence([1] * num_prompt, **params)
    run(engine, seq)
    assert_right(seq)
    assert seq.finish_reason == "length"
    assert engine.metrics.decode_tokens == len(seq.output_token_ids) - 1
    assert engine.metrics.prefill_tokens == num_prompt


@both_depths
def test_an_end_by_stop_is_overrun_by_depth_minus_one_steps(depth):
    engine = make_engine(depth=depth)
    stop = expected_tokens([1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=6))[0][5]
    seq = make_sequence([1, 2, 3], stop_token_ids=[stop], max_tokens=None)
    run(engine, seq)
    assert_right(seq)
    assert seq.finish_reason == "stop"
    overrun = engine.metrics.decode_tokens - (len(seq.output_token_ids) - 1)
    assert overrun == depth - 1


PROMPT = [1, 2, 3]
# What the prompt continues with; EOS is among it.
FREE = expected_tokens(PROMPT, SamplingParams(ignore_eos=True, max_tokens=None))[0]
AT_EOS = FREE.index(EOS[0])
OTHER = FREE[4]
AT_OTHER = FREE.index(OTHER)


@both_depths
@pytest.mark.parametrize(
    "params, num_tokens, reason, stop_reason",
    [
        (dict(ignore_eos=False, max_tokens=None), AT_EOS + 1, "stop", None),
        (dict(max_tokens=None), 45, "length", None),  # max_model_len is 48
        (dict(max_tokens=100), 45, "length", None),
        (dict(max_tokens=3), 3, "length", None),
        (dict(max_tokens=1), 1, "length", None),
        (dict(stop_token_ids=[OTHER], max_tokens=None), AT_OTHER + 1, "stop", OTHER),
        (dict(stop_token_ids=[OTHER], max_tokens=AT_OTHER + 1), AT_OTHER + 1, "stop", OTHER),
        (dict(stop_token_ids=[*EOS], max_tokens=None), AT_EOS + 1, "stop", 0),
        (dict(stop_token_ids=[*EOS], ignore_eos=False, max_tokens=None), AT_EOS + 1, "stop", None),
    ],
)
def test_where_and_why_it_ends(params, num_tokens, reason, stop_reason, depth):
    seq = make_sequence(PROMPT, **params)
    run(make_engine(depth=depth), seq)
    assert seq.output_token_ids == FREE[:num_tokens]
    assert (seq.finish_reason, seq.stop_reason) == (reason, stop_reason)


@both_depths
@pytest.mark.parametrize("min_tokens", [AT_OTHER, AT_OTHER + 1, 20])
def test_no_stop_token_is_drawn_before_min_tokens(min_tokens, depth):
    seq = make_sequence(
        PROMPT, min_tokens=min_tokens, stop_token_ids=[OTHER], ignore_eos=False, max_tokens=None
    )
    run(make_engine(depth=depth), seq)
    assert_right(seq)
    assert not {OTHER, *EOS} & set(seq.output_token_ids[:min_tokens])
    # The first token that is free to stop it does, if it is one that the prompt continues with.
    assert min_tokens != AT_OTHER or seq.output_token_ids == FREE[: AT_OTHER + 1]


# Aborts

STATES = {
    "unscheduled": lambda engine, seq: True,
    "waiting": lambda engine, seq: len(engine.scheduler.running) == 2 and seq.row < 0,
    "prefilling": lambda engine, seq: num_computed(engine, seq) > 0 and is_prefilling(engine, seq),
    "in flight": lambda engine, seq: (
        0 < num_computed(engine, seq) == seq.prefill_end and not seq.output_token_ids
    ),
    "decoding": lambda engine, seq: len(seq.output_token_ids) == 3,
    "preempted": lambda engine, seq: seq.output_token_ids and seq.row < 0,
}


# Between the steps of an engine of depth 1 nothing is in flight.
STATES_AT_DEPTHS = [
    (state, depth) for state in STATES for depth in (1, 2) if (state, depth) != ("in flight", 1)
]


@pytest.mark.parametrize("state, depth", STATES_AT_DEPTHS)
def test_abort(state, depth):
    engine = make_engine(
        max_num_seqs=2, max_num_batched_tokens=6, num_blocks=13, mean_output=0, depth=depth
    )
    others = unpredictable([1] * 10, [4] * 3, max_tokens=36)
    seq = make_sequence([2] * 11, "again", stop_token_ids=[NEVER], max_tokens=34)
    queue = [*others, seq] if state == "waiting" else [others[0], seq, others[1]]
    for each in queue:
        engine.add(each)
    step_until(engine, lambda: STATES[state](engine, seq))
    num_tokens = len(seq.token_ids)
    engine.abort([seq])
    engine.abort(sequences([1]))  # never added
    check_invariants(engine)
    again = make_sequence([3] * 11, "again", max_tokens=20)
    run(engine, again)
    assert_right(*others, again)
    assert seq.finish_reason == "abort" and len(seq.token_ids) == num_tokens
    engine.abort([seq, again])
    assert again.finish_reason == "length"


def test_every_token_is_reported_once_but_the_aborted_never():
    engine = make_engine(depth=2)
    seqs = sequences([1], [2], [3], max_tokens=5)
    for seq in seqs:
        engine.add(seq)
    engine.step()
    engine.abort([seqs[1]])
    reported = []
    while engine.has_unfinished:
        reported += take_step(engine)
    assert [reported.count(seq) for seq in seqs] == [5, 0, 5]
    times = seqs[0].metrics
    assert times.arrival_time < times.first_token_time < times.finished_time


# Failures


@both_depths
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["submit", "stored", "result"])
def test_a_failed_step_leaves_the_engine_usable(stage, error, depth):
    for failing in range(10):
        engine = make_engine(max_num_batched_tokens=8, **PREEMPTING, depth=depth)
        worker = engine.executor

        def fail_on(at, number, worker=worker, failing=failing):
            if (at, number) == (stage, failing):
                worker.fail_on = lambda stage, number: None
                raise error("out of luck")

        worker.fail_on = fail_on
        seqs = unpredictable([1] * 8, [2] * 20, [1] * 8, [3], max_tokens=12)
        for seq in seqs:
            engine.add(seq)
        with pytest.raises(error, match="out of luck"):
            while engine.has_unfinished:
                take_step(engine)
        check_invariants(engine)
        run(engine, make_sequence([1] * 9, "later"))
        assert_right(*seqs)


# Admission by the peak of what is to come


def crowd(**params):
    """Far more than 40 blocks hold at a time: 60 requests of 8 + 4 to 39 tokens."""
    return [
        make_sequence([i, *range(7)], str(i), max_tokens=4 + i * 17 % 36, **params)
        for i in range(60)
    ]


@both_depths
def test_where_lengths_are_certain_nobody_is_preempted_and_the_cache_is_full(depth):
    engine = make_engine(num_blocks=40, max_num_seqs=60, depth=depth)
    seqs = crowd()
    run(engine, *seqs)
    assert_right(*seqs)
    assert engine.metrics.preemptions == 0
    assert engine.metrics.block_slots / (engine.metrics.steps * 40 * 4) > 0.7


@both_depths
def test_where_a_token_may_stop_them_fewer_are_preempted(depth):
    preemptions = {}
    for mean_output in 0, 16:
        engine = make_engine(num_blocks=40, max_num_seqs=60, mean_output=mean_output, depth=depth)
        seqs = crowd(ignore_eos=False)  # one token in 16 is EOS
        run(engine, *seqs)
        assert_right(*seqs)
        preemptions[mean_output] = engine.metrics.preemptions
    assert preemptions[16] < 0.7 * preemptions[0]


@both_depths
def test_the_mean_output_follows_those_that_ended(depth):
    engine = make_engine(num_blocks=400, max_num_seqs=60, depth=depth)
    seqs = [make_sequence([i % 16, i], str(i), max_tokens=5, ignore_eos=False) for i in range(300)]
    run(engine, *seqs)
    mean = sum(len(seq.output_token_ids) for seq in seqs) / len(seqs)
    assert mean < engine.scheduler.mean_output < mean + 6
    run(engine, *sequences([1], max_tokens=1))  # says nothing about sequences that may stop
    assert engine.scheduler.mean_output < mean + 6


def test_an_error_between_logprobs_and_tokens_repeats_neither(monkeypatch):
    engine = make_engine(depth=2)
    seqs = [make_sequence([1, 2, i], str(i), logprobs=i % 3, max_tokens=9) for i in range(4)]
    put, calls = engine.scheduler.logprobs.put, []

    def failing(*step):
        calls.append(put(*step))
        if len(calls) in (1, 4):
            raise MemoryError

    monkeypatch.setattr(engine.scheduler.logprobs, "put", failing)
    for seq in seqs:
        engine.add(seq)
    while engine.has_unfinished:
        with suppress(MemoryError):
            take_step(engine)
    assert_right(*seqs)


@both_depths
def test_logprobs_looked_at_while_they_come_are_the_first_of_all(monkeypatch, depth):
    """However few lines there is room for, and whoever else asks, is preempted or aborted."""
    monkeypatch.setattr("nanovllm.engine.recent_logprobs.NUM_LINES", 4)
    engine = make_engine(depth=depth, **PREEMPTING)
    recent, seen = engine.scheduler.logprobs, {}
    widths = (2, None, 20, 0, 5, 2, None, 1)
    seqs = [
        make_sequence([i] * (2 + i), str(i), logprobs=width, max_tokens=30, stop_token_ids=[NEVER])
        for i, width in enumerate(widths)
    ]
    for seq in seqs:
        engine.add(seq)
    while engine.has_unfinished:
        for seq in take_step(engine):
            if seq.logprobs is not None and seq is not seqs[0]:  # the first one is never read
                recent.take(seq)
                lines = list(seq.logprobs)
                assert len(lines) == len(seq.output_token_ids) and seen.get(seq, []) == lines[:-1]
                seen[seq] = lines
        if len(seqs[2].output_token_ids) == 9:
            engine.abort(seqs[2:3])
        check_invariants(engine)
    assert_right(*seqs)
    assert len(seqs[2].logprobs) == 9 and engine.metrics.preemptions > 0
    assert recent.lines.shape[1] == 1 + 2 * 21
    assert all(seen[seq] == list(seq.logprobs) for seq in seen)


# A request that fails every time


def poison(engine, token, at):
    """The worker fails at a stage of every step that computes this token of a prompt."""
    worker = engine.executor

    def fail_on(stage, number):
        if stage == at and any(token in chunk.token_ids for chunk in worker.steps[number].chunks):
            raise RuntimeError("poison")

    worker.fail_on = fail_on


def step_through(engine, limit=100):
    """Step to the end. Returns who ended, and how many steps failed."""
    ended, failures = [], 0
    for _ in range(limit):
        if not engine.has_unfinished:
            return ended, failures
        news = engine.step()
        ended += news.ended
        failures += news.error is not None
        check_invariants(engine)
    raise AssertionError("it goes on for ever")


@both_depths
@pytest.mark.parametrize("stage", ["submit", "stored", "result"])
def test_who_fails_every_step_ends_with_an_error_and_the_others_go_on(stage, depth):
    engine = make_engine(max_num_seqs=2, depth=depth)
    poison(engine, 15, stage)
    before = make_sequence([1] * 5, "before", max_tokens=4)
    assert step_through_all(engine, before) == 0
    bad = make_sequence([15] * 5, "bad", max_tokens=4)
    later = sequences([2] * 5, [3] * 6, [4] * 3, max_tokens=4)
    engine.add(bad)
    engine.add_batch(later)
    ended, failures = step_through(engine)
    assert failures == 2 and bad.finish_reason == "error"
    assert bad.metrics.finished_time is not None and set(ended) == {bad, *later}
    # Who ran beside it both times can't be told from it.
    assert [seq.finish_reason for seq in later] == ["error", "length", "length"]
    assert_right(*later[1:])
    run(engine, make_sequence([2] * 5, "again", max_tokens=4))
    assert engine.metrics.finish_reasons == {"error": 2, "length": 4}


def step_through_all(engine, *seqs):
    for seq in seqs:
        engine.add(seq)
    return step_through(engine)[1]


@both_depths
def test_steps_that_fail_now_and_then_end_nobody(depth):
    engine = make_engine(depth=depth)
    failing = range(2, 400, 5)

    def fail_on(stage, number):
        if stage == "stored" and number in failing:
            raise RuntimeError("now and then")

    engine.executor.fail_on = fail_on
    seqs = sequences([1] * 5, [2] * 6, [3], max_tokens=20)
    assert step_through_all(engine, *seqs) > 3
    assert_right(*seqs)


# The prefix cache


@both_depths
def test_the_prefix_cache_is_forgotten_when_no_block_is_in_use(depth):
    engine = make_engine(depth=depth)
    assert engine.reset_prefix_cache()
    first = make_sequence([1] * 9, "first", max_tokens=6)
    engine.add(first)
    assert engine.reset_prefix_cache(), "it waits"
    take_step(engine)
    assert not engine.reset_prefix_cache()
    run(engine)
    assert engine.reset_prefix_cache()
    second = make_sequence([1] * 9, "second", max_tokens=6)
    run(engine, second)
    assert_right(first, second)
    assert second.num_cached_tokens == 0


@both_depths
def test_running_requests_start_over_if_they_may(depth):
    engine = make_engine(depth=depth, max_num_seqs=2)
    seqs = sequences([1] * 9, [1] * 9, [2] * 5, max_tokens=8)
    for seq in seqs:
        engine.add(seq)
    for _ in range(4):
        take_step(engine)
    num_tokens = sum(seq.metrics.first_token_time is not None for seq in seqs)
    assert num_tokens == 2 and engine.reset_prefix_cache(reset_running_requests=True)
    check_invariants(engine)
    assert not engine.scheduler.block_manager.prefixes
    run(engine)
    assert_right(*seqs)


# What is counted of requests


def test_metrics_of_requests():
    engine = make_engine(max_num_seqs=1)

    def read():
        result = {}
        for metric in read_metrics(engine, {"model_name": "m"}):
            assert metric.labels["model_name"] == "m"
            result[metric.name, metric.labels.get("finished_reason")] = metric
        return result

    assert read()["vllm:generation_tokens", None].value == 0
    stop = expected_tokens(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))[0][3]
    seqs = sequences(PROMPT, [1] * 9, [2] * 9, [3] * 9, max_tokens=5)
    seqs[0] = make_sequence(PROMPT, "stops", max_tokens=9, stop_token_ids=[stop])
    for seq in seqs:
        engine.add(seq)
    step_until(engine, lambda: len(seqs[1].output_token_ids) == 2)
    engine.abort([seqs[3]])
    found = read()
    num_first = len(seqs[0].output_token_ids)
    assert found["vllm:generation_tokens", None].value == num_first + 2
    assert found["vllm:prompt_tokens", None].value == len(PROMPT) + 9
    assert found["vllm:num_requests_running", None].value == 1
    assert found["vllm:num_requests_waiting", None].value == 1
    assert found["vllm:kv_cache_usage_perc", None].value == 3 / 64
    run(engine)
    found = read()
    assert found["vllm:generation_tokens", None].value == num_first + 10
    assert found["vllm:prompt_tokens", None].value == len(PROMPT) + 18
    reasons = {r: found["vllm:request_success", r].value for r in ("stop", "length", "abort")}
    assert reasons == {"stop": 1, "length": 2, "abort": 1}
    for name in "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds":
        histogram = found[name, None]
        assert histogram.count == histogram.buckets["+Inf"] == 3
        assert sorted(histogram.buckets.values()) == list(histogram.buckets.values())


def test_observations_are_counted_up_to_each_limit():
    seen = Observations((0.5, 1.0))
    for value in (0.5, 0.6, 1.0, 7.0):
        seen.add(value)
    assert seen.buckets == {"0.5": 1, "1.0": 3, "+Inf": 4} and seen.sum == 9.1


# Known tokens that are scored


def num_scored(engine):
    """Of each step."""
    return [sum(len(s.token_ids) for s in step.scorings) for step in engine.executor.steps]


@both_depths
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_right_and_each_is_asked_for_once(options, depth):
    engine = make_engine(depth=depth, **options)
    for _ in "cold", "warm":
        seqs = unpredictable([1] * 11, [1] * 16, [2], max_tokens=20, prompt_logprobs=2)
        seqs.append(make_sequence([1] * 13, "from 9", score_from=9, targets=[1] * 4 + [5],
                                  max_tokens=1, prompt_logprobs=0))  # fmt: skip
        seqs += [make_sequence([1] * 12, "plain", max_tokens=9)]
        num_before = sum(num_scored(engine))
        run(engine, *seqs)
        assert_right(*seqs)
        assert sum(num_scored(engine)) - num_before == 10 + 15 + 5
        assert [seq.num_cached_tokens for seq in seqs[:3]] == [0, 0, 0]


def test_hits_reach_to_the_tokens_before_the_scored_ones():
    engine = make_engine(max_num_seqs=1)
    starts = range(1, 13)
    seqs = [
        make_sequence([1] * 12, str(start), score_from=start, targets=[1] * (12 - start) + [2],
                      max_tokens=1, prompt_logprobs=0)
        for start in starts
    ]  # fmt: skip
    run(engine, *seqs)
    assert_right(*seqs)
    assert [seq.num_cached_tokens for seq in seqs] == [(start - 1) // 4 * 4 for start in starts]


@both_depths
def test_a_preempted_prompt_goes_on_where_its_scores_end(depth):
    engine = make_engine(depth=depth, max_num_batched_tokens=8, **PREEMPTING)
    old = unpredictable([1] * 8, [2] * 8, max_tokens=30)
    young = make_sequence([3] * 24, "young", max_tokens=2, prompt_logprobs=0)
    for seq in (*old, young):
        engine.add(seq)
    step_until(engine, lambda: young.row >= 0)
    step_until(engine, lambda: young.row < 0)
    assert len(young.scores) == 18
    run(engine)
    assert_right(*old, young)
    assert sum(num_scored(engine)) == 23


def test_plain_sequences_are_not_scored():
    engine = make_engine()
    seqs = sequences([1] * 9, [2] * 9, max_tokens=3)
    run(engine, *seqs)
    assert all(seq.scores is None and not hasattr(seq, "targets") for seq in seqs)
    assert not any(step.scorings for step in engine.executor.steps)


@both_depths
@pytest.mark.parametrize("nth", [2, 4])
def test_an_error_amid_scores_repeats_and_loses_none(monkeypatch, nth, depth):
    engine = make_engine(depth=depth, max_num_batched_tokens=6)
    seqs = sequences([1] * 9, [2] * 14, max_tokens=3, prompt_logprobs=1)
    extend, calls = SampleLogprobs.extend, []

    def failing(scores, lines):
        calls.append(scores)
        if len(calls) == nth == 4:
            raise MemoryError
        extend(scores, lines)
        if len(calls) == nth == 2:
            raise MemoryError

    monkeypatch.setattr(SampleLogprobs, "extend", failing)
    for seq in seqs:
        engine.add(seq)
    while engine.has_unfinished:
        with suppress(MemoryError):
            take_step(engine)
    assert len(calls) > 4
    assert_right(*seqs)
