"""SamplingParams.n: samples of one prompt share its blocks, each draws as if it were alone."""

import time
from itertools import pairwise

import pytest

from nanovllm import LLM, RequestOutputKind, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.requests import _sequence_seed

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
LONG = [5 + 7 * i % 900 for i in range(202)]  # 12 blocks of 16, and 10 tokens
SMALL = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256}


def sampling(n=4, **values):
    return SamplingParams(
        n=n, **{"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, "seed": 3} | values
    )


def tokens(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in out.outputs] for out in outputs]


def alone(llm, prompt, params):
    """What each sample is, by a request of its own that has its seed."""
    result = []
    for index in range(params.n):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "nanovllm.frontend.requests._sequence_seed",
                lambda seed, engine_seed, number, _, index=index: _sequence_seed(
                    seed, engine_seed, number, index
                ),
            )
            params.n = 1
            [[drawn]] = tokens(llm, [prompt], params)
            result.append(drawn)
    params.n = len(result)
    return result


@pytest.fixture(scope="module")
def expected(llm):
    """Of some requests that a batch may mix: prompt, parameters, and their samples' tokens."""
    cases = [
        (LONG, sampling(8, max_tokens=20)),
        ([7, 8], sampling(3, repetition_penalty=1.3)),
        (LONG[:192], sampling(2, seed=4, top_p=0.9)),  # full blocks
        (LONG[:100], sampling(1)),
        ([9] * 30, SamplingParams(temperature=0, max_tokens=9)),
    ]
    return [(prompt, params, alone(llm, prompt, params)) for prompt, params in cases]


def test_samples_differ_and_the_first_is_that_of_n_1(expected, llm):
    for prompt, params, samples in expected:
        assert len({tuple(sample) for sample in samples}) == params.n
        out = llm.generate(prompt, params, use_tqdm=False)[0]
        assert [c.index for c in out.outputs] == list(range(params.n)) and out.finished
        assert [c.token_ids for c in out.outputs] == samples
        params.n, n = 1, params.n
        assert tokens(llm, prompt, params) == [samples[:1]]
        params.n = n


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 24, "max_num_seqs": 5},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 24, "block_size": 16, "preempts": True},
    ],
    ids=["mixed", "chunks", "no caching", "preemption"],
)
def test_a_batch_changes_nothing(tiny, expected, depth, options, request):
    options = dict(options)
    if preempts := options.pop("preempts", False):
        request.getfixturevalue("crowded")
    else:
        options["kv_cache_memory_bytes"] = 12 << 20
    prompts, params, samples = zip(*expected, strict=True)
    with LLM(str(tiny), async_scheduling=depth == 2, **SMALL, **options) as llm:
        for _ in range(2):
            assert tokens(llm, list(prompts), list(params)) == list(samples)
        assert (llm.llm_engine.metrics.preemptions > 0) == preempts


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [512, 64, 10])
def test_a_prompt_is_computed_once_and_its_tail_by_each(tiny, depth, budget):
    options = {"kv_cache_memory_bytes": 12 << 20, "max_num_seqs": 8, **SMALL}
    with LLM(
        str(tiny), async_scheduling=depth == 2, max_num_batched_tokens=budget, **options
    ) as llm:
        metrics = llm.llm_engine.metrics
        for prompt, tail in ((LONG, 10), ([3, *LONG[:191]], 1)):
            before = metrics.prefill_tokens, metrics.cached_tokens
            [out] = llm.generate([prompt], sampling(8), use_tqdm=False)
            assert metrics.prefill_tokens - before[0] == len(prompt) + 7 * tail
            assert metrics.cached_tokens - before[1] == 7 * (len(prompt) - tail)
            assert out.num_cached_tokens == 0
            [out] = llm.generate([prompt], sampling(8), use_tqdm=False)
            assert out.num_cached_tokens == len(prompt) - tail


def test_more_samples_than_rows_share_as_well(tiny):
    options = {"kv_cache_memory_bytes": 12 << 20, "max_num_seqs": 3, **SMALL}
    with LLM(str(tiny), **options) as llm:
        [out] = llm.generate([LONG], sampling(20, seed=None), use_tqdm=False)
        assert len({tuple(c.token_ids) for c in out.outputs}) == 20
        assert llm.llm_engine.metrics.prefill_tokens == len(LONG) + 19 * 10


def test_without_prefix_caching_each_computes_the_prompt(tiny):
    options = {"kv_cache_memory_bytes": 12 << 20, "enable_prefix_caching": False, **SMALL}
    with LLM(str(tiny), **options) as llm:
        llm.generate([LONG], sampling(4), use_tqdm=False)
        assert llm.llm_engine.metrics.prefill_tokens == 4 * len(LONG)


# How they come


def ending_apart(llm, **values):
    """A request of samples that end at different times, and their tokens in the end."""
    stops = [c.token_ids[i] for i, c in enumerate(
        llm.generate(TEXT, sampling(3, max_tokens=12), use_tqdm=False)[0].outputs)][:2]  # fmt: skip
    params = sampling(3, max_tokens=12, stop_token_ids=stops, **values)
    [out] = llm.generate(TEXT, params, use_tqdm=False)
    assert len({len(c.token_ids) for c in out.outputs}) > 1
    return params, out


def drain(llm):
    outputs = []
    while not llm.is_finished():
        step = llm.step()
        assert len({out.request_id for out in step}) == len(step)
        outputs += step
    return outputs


def test_cumulative_outputs_have_all_samples(llm):
    params, whole = ending_apart(llm)
    llm.add_request(TEXT, params, "a")
    outputs = drain(llm)
    assert all([c.index for c in out.outputs] == [0, 1, 2] for out in outputs)
    for earlier, later in pairwise(outputs):
        for a, b in zip(earlier.outputs, later.outputs, strict=True):
            assert b.token_ids[: len(a.token_ids)] == a.token_ids and b.text.startswith(a.text)
    assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all(out.metrics.finished_time is None for out in outputs[:-1])
    assert outputs[-1].outputs == whole.outputs
    assert len(outputs) == max(len(c.token_ids) for c in whole.outputs)


def added_up(outputs, n):
    texts, token_ids, reasons = [""] * n, [[] for _ in range(n)], [None] * n
    for out in outputs:
        assert out.outputs
        for completion in out.outputs:
            assert reasons[completion.index] is None, "nothing comes after the end"
            texts[completion.index] += completion.text
            token_ids[completion.index] += completion.token_ids
            reasons[completion.index] = completion.finish_reason
    return list(zip(texts, token_ids, reasons, strict=True))


def test_deltas_are_of_those_with_news(llm):
    params, whole = ending_apart(llm, output_kind=RequestOutputKind.DELTA)
    expected = [(c.text, c.token_ids, c.finish_reason) for c in whole.outputs]
    llm.add_request(TEXT, params)
    outputs = drain(llm)
    assert added_up(outputs, 3) == expected
    assert {len(out.outputs) for out in outputs} > {3}
    for outs in (outputs, list(llm.stream([[5], TEXT], params))):
        mine = [out for out in outs if out.prompt == TEXT]
        assert added_up(mine, 3) == expected
        assert [out.finished for out in mine] == [False] * (len(mine) - 1) + [True]
    assert {out.index for out in outs if out.prompt == TEXT} == {1}


def test_final_only_comes_once(llm):
    params, whole = ending_apart(llm, output_kind=RequestOutputKind.FINAL_ONLY)
    llm.add_request(TEXT, params)
    llm.add_request(TEXT, params, "b")
    outputs = drain(llm)
    assert [out.outputs for out in outputs] == [whole.outputs] * 2
    times = outputs[0].metrics
    assert times.arrival_time <= times.first_token_time < times.finished_time


def test_logprobs_are_each_samples_own(llm):
    [out] = llm.generate(TEXT, sampling(3, logprobs=2), use_tqdm=False)
    for completion in out.outputs:
        lines = zip(completion.token_ids, completion.logprobs, strict=True)
        total = sum(line[token].logprob for token, line in lines)
        assert completion.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_prompt_logprobs_are_the_first_samples_alone(llm, kind):
    text = TEXT * 9
    [alone] = llm.generate(text, sampling(1, prompt_logprobs=1), use_tqdm=False)
    before = llm.llm_engine.metrics.prefill_tokens
    params = sampling(3, prompt_logprobs=1, output_kind=kind)
    [out] = llm.generate(text, params, use_tqdm=False)
    assert list(out.prompt_logprobs) == list(alone.prompt_logprobs)
    tail = (len(out.prompt_token_ids) - 1) % 16 + 1
    computed = len(out.prompt_token_ids) + 2 * tail
    assert llm.llm_engine.metrics.prefill_tokens - before == computed
    llm.add_request(text, params)
    first, *others = drain(llm)
    assert list(first.prompt_logprobs) == list(alone.prompt_logprobs)
    if kind is RequestOutputKind.DELTA:
        assert others and all(out.prompt_logprobs == [] for out in others)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", RequestOutputKind)
def test_an_error_of_one_sample_ends_its_request(tiny, kind, depth):
    calls = []

    def fails(output, logits):
        calls.append(output)
        return 1 / 0 if len(calls) == 8 else logits

    options = {"kv_cache_memory_bytes": 4 << 20, "async_scheduling": depth == 2, **SMALL}
    with LLM(str(tiny), **options) as llm:
        want = tokens(llm, [[5, 6]], sampling(2))
        params = sampling(3, max_tokens=20, logits_processors=[fails])
        bad, good = llm.generate([[7], [5, 6]], [params, sampling(2)], use_tqdm=False)
        assert {c.finish_reason for c in bad.outputs} == {"error"} and good.error is None
        assert "ended by an error in its logits_processors" in bad.error
        assert not llm.llm_engine.unfinished
        calls.clear()
        params.output_kind = kind
        llm.add_request([7], params, "a")
        llm.add_request([5, 6], sampling(2), "b")
        seen = []
        while not llm.is_finished():
            seen += llm.step()
        [last] = [out for out in seen if out.request_id == "a" and out.finished]
        assert {c.finish_reason for c in last.outputs} == {"error"}
        assert "ZeroDivisionError" in last.error
        last = [out for out in seen if out.request_id == "b"][-1]
        assert last.finished and [c.token_ids for c in last.outputs] == want[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_error_past_the_end_of_a_sample_counts_for_nothing(tiny, depth):
    num_ended = 0

    def ends_one(output, logits):
        nonlocal num_ended
        if 77 in output:
            raise AssertionError("called for a token after the last")
        logits[77] = float("-inf")
        if len(output) == 3:
            num_ended += 1
            logits[77] = float("inf") if num_ended == 2 else float("-inf")
        return logits

    options = {"kv_cache_memory_bytes": 4 << 20, "async_scheduling": depth == 2, **SMALL}
    with LLM(str(tiny), **options) as llm:
        params = sampling(3, stop_token_ids=[77], logits_processors=[ends_one])
        [out] = llm.generate([[5, 6]], params, use_tqdm=False)
        assert [len(c.token_ids) for c in out.outputs] == [8, 4, 8]
        assert [c.finish_reason for c in out.outputs] == ["length", "stop", "length"]


def test_the_progress_bar_counts_requests(llm, capsys):
    llm.generate([TEXT, [5]], sampling(3))
    assert "2/2" in capsys.readouterr().err


def test_joined_increments_stay_in_order_of_index(llm):
    params = sampling(3, output_kind=RequestOutputKind.DELTA)
    [whole] = llm.generate([TEXT], params, use_tqdm=False)
    outputs = list(llm.stream([TEXT], params))
    del outputs[0].outputs[0]  # as if the first sample's news came later
    joined = outputs[0]
    for later in outputs[1:]:
        joined.add(later, aggregate=True)
    assert [c.index for c in joined.outputs] == [0, 1, 2] and joined.finished
    assert [c.token_ids for c in joined.outputs[1:]] == [c.token_ids for c in whole.outputs[1:]]


# Ids and aborts


def test_an_id_ends_all_samples_and_is_free_when_all_have_ended(llm):
    params, _ = ending_apart(llm)
    llm.add_request(TEXT, params, "a")
    while not any(c.finished() for out in llm.step() for c in out.outputs):
        pass
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        llm.add_request(TEXT, params, "a")
    llm.abort("a")
    assert llm.is_finished() and llm.step() == []
    manager = llm.llm_engine.scheduler.block_manager
    assert manager.num_free == manager.num_blocks
    llm.add_request(TEXT, params, "a")
    assert drain(llm)[-1].finished


def test_an_aborted_stream_says_so(llm, monkeypatch):
    params, _ = ending_apart(llm)
    params.stop_token_ids = params.stop_token_ids[:1]
    outputs, executor = [], llm.llm_engine.executor
    submit = executor.submit  # slower than the abort is
    monkeypatch.setattr(executor, "submit", lambda step: time.sleep(0.05) or submit(step))
    for out in llm.stream([TEXT], params):
        outputs.append(out)
        if any(c.finished() for c in out.outputs):
            llm.abort(out.request_id)
    *_, (_, first, _), last = added_up(outputs, 3)
    reasons = [reason for _, _, reason in added_up(outputs, 3)]
    assert set(reasons) == {"stop", "abort"} and outputs[-1].finished and not outputs[-2].finished
    assert first and last[1] and llm.is_finished()


@pytest.mark.parametrize("nth", [1, 2, 6])
def test_a_failed_step_loses_no_sample_and_repeats_none(llm, monkeypatch, nth):
    params, whole = ending_apart(llm, output_kind=RequestOutputKind.DELTA)
    executor, calls = llm.llm_engine.executor, []
    submit = executor.submit

    def failing(step):
        calls.append(step)
        if len(calls) == nth:
            raise RuntimeError("worker")
        return submit(step)

    monkeypatch.setattr(executor, "submit", failing)
    llm.add_request(TEXT, params)
    outputs = []
    while not llm.is_finished():
        try:
            outputs += llm.step()
        except RuntimeError:
            assert len(calls) == nth
    assert [ids for _, ids, _ in added_up(outputs, 3)] == [c.token_ids for c in whole.outputs]


def test_an_interrupted_add_adds_no_sample(llm, monkeypatch):
    add = llm.llm_engine.add

    def interrupted(seq: Sequence):
        add(seq)
        if seq.index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.llm_engine, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.add_request(TEXT, sampling(3), "a")
    assert llm.is_finished()


# What is refused


@pytest.mark.parametrize(
    "values, error, text",
    [
        (dict(n=0), ValueError, r"n must be in \[1, 16384\], got 0"),
        (dict(n=16385), ValueError, r"n must be in \[1, 16384\], got 16385"),
        (dict(n=2, temperature=0), ValueError, "n must be 1 when sampling is greedy"),
        (dict(n=1.5), TypeError, "n must be a whole number"),
        (dict(n=True), TypeError, "n must be a whole number"),
        (dict(n=None), TypeError, "n must be a whole number"),
    ],
)
def test_bad_values(values, error, text):
    with pytest.raises(error, match=text):
        SamplingParams(**values)
