"""LLM between its first request and its end: sleep, the prefix cache, metrics, threads, errors."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.core.metrics import Counter, Gauge, Histogram

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
PROMPTS = [[5, 6, 7], [8] * 40, [9], [8] * 33]
ASLEEP = "this LLM sleeps: call wake_up"


def greedy(max_tokens=12, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)


PARAMS = [greedy(), greedy(repetition_penalty=1.3), SamplingParams(seed=1), greedy(logprobs=2)]


def generate(llm, prompts=PROMPTS, params=PARAMS):
    """Tokens and, where they were asked for, the sum of their log-probabilities."""
    completions = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    return [(c.token_ids, pytest.approx(c.cumulative_logprob)) for c in completions]


def tokens(llm, prompts, params):
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def shared(tiny, request):
    with LLM(str(tiny), async_scheduling=request.param, **SMALL) as llm:
        yield llm


@pytest.fixture
def llm(shared):
    yield shared
    assert shared.is_finished() and not shared.is_sleeping() and not shared._thread.clients
    blocks = shared.llm_engine.scheduler.block_manager
    assert blocks.num_free == blocks.num_blocks


# Sleep


@pytest.mark.parametrize("level", [1, 2])
def test_after_sleep_the_tokens_are_the_same(llm, level):
    expected = generate(llm)
    worker = llm.llm_engine.executor.worker
    cache = weakref.ref(worker.runner.kv.data[0])
    weight = weakref.ref(next(worker.model.parameters()))
    llm.sleep(level)
    assert llm.is_sleeping()
    assert cache() is None and (weight() is None) == (level == 2)
    llm.wake_up()
    assert not llm.is_sleeping() and generate(llm) == expected
    [out] = llm.generate([PROMPTS[1]], greedy(2), use_tqdm=False)
    assert out.num_cached_tokens == 32  # of what ran since


def test_the_model_may_be_looked_at_while_it_has_weights(llm):
    llm.sleep(level=1)
    assert llm.apply_model(lambda model: model) == [llm.llm_engine.executor.worker.model]
    llm.sleep(level=2)
    with pytest.raises(RuntimeError, match=r"the weights sleep: call wake_up\(\)"):
        llm.apply_model(lambda model: model)
    llm.wake_up()


def test_to_wake_up_what_is_awake_does_nothing(llm):
    runner = llm.llm_engine.executor.runner
    llm.wake_up()
    assert llm.llm_engine.executor.runner is runner


def test_the_prefix_cache_does_not_outlive_a_sleep(llm):
    generate(llm)
    llm.sleep()
    llm.wake_up()
    outputs = llm.generate([PROMPTS[1], PROMPTS[0]], greedy(2), use_tqdm=False)
    assert [out.num_cached_tokens for out in outputs] == [0, 0]


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_parts_wake_one_after_the_other(llm, order):
    expected = generate(llm)
    llm.sleep(1)
    llm.sleep(2)  # deeper
    llm.sleep(1)  # it stays so
    llm.wake_up([])
    for tag in order:
        assert llm.is_sleeping()
        with pytest.raises(RuntimeError, match=ASLEEP):
            llm.generate(TEXT)
        llm.wake_up([tag])
    assert not llm.is_sleeping() and generate(llm) == expected
    llm.wake_up()  # it is awake
    assert generate(llm) == expected


def test_calls_while_asleep_say_so(llm):
    llm.sleep()
    for call in (
        lambda: llm.generate(TEXT),
        lambda: llm.add_request(TEXT),
        lambda: llm.stream(TEXT),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(RuntimeError, match=ASLEEP):
            call()
    assert llm.step() == [] and llm.is_finished() and llm.reset_prefix_cache()
    llm.abort("a")
    llm.wake_up()


def test_unfinished_requests_keep_it_awake(llm):
    llm.add_request(TEXT, greedy(), "a")
    llm.step()
    with pytest.raises(RuntimeError, match="1 requests are unfinished: let them end, or abort"):
        llm.sleep()
    assert not llm.is_sleeping()
    llm.abort("a")
    llm.sleep()  # though a step of it may be in flight
    llm.wake_up()
    while not llm.is_finished():
        llm.step()


@pytest.mark.parametrize("level", [0, 3, "1", None])
def test_levels_that_there_are_not(llm, level):
    with pytest.raises(ValueError, match="level must be 1 or 2"):
        llm.sleep(level)


@pytest.mark.parametrize("tags", ["weights", ["weight"], ["scheduling"], ("weights",)])
def test_tags_that_there_are_not(llm, tags):
    llm.sleep()
    with pytest.raises(ValueError, match="tags must be a list of 'weights' and 'kv_cache'"):
        llm.wake_up(tags)
    assert llm.is_sleeping()
    llm.wake_up()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["_load", "_allocate"])
def test_a_wake_up_that_fails_may_be_tried_again(llm, level, error, method, monkeypatch):
    expected = generate(llm)
    llm.sleep(level)
    with monkeypatch.context() as patch:

        def fail(*args):
            raise error("too small")

        patch.setattr(llm.llm_engine.executor.worker, method, fail)
        if (level, method) == (1, "_load"):
            llm.wake_up()  # it needs no file
        else:
            raised = RuntimeError if error is torch.OutOfMemoryError else error
            with pytest.raises(raised, match="too small"):
                llm.wake_up()
            assert llm.is_sleeping()
    llm.wake_up()
    assert generate(llm) == expected


def test_dummy_weights_come_back(tiny):
    with LLM(str(tiny), load_format="dummy", seed=3, enable_sleep_mode=True, **SMALL) as llm:
        expected = generate(llm)
        llm.sleep(2)
        llm.wake_up()
        assert generate(llm) == expected


def test_a_sleeper_can_be_closed(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        llm.sleep(2)
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.wake_up()


# The prefix cache, metrics


def test_reset_prefix_cache(llm):
    expected = generate(llm)
    assert llm.reset_prefix_cache()
    assert [out.num_cached_tokens for out in llm.generate(PROMPTS[:2], use_tqdm=False)] == [0, 0]
    name = llm.add_request(PROMPTS[1], greedy(30))
    llm.step()
    assert not llm.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    while not llm.is_finished():
        outputs = llm.step()
    assert outputs[-1].request_id == name
    assert [outputs[-1]["token_ids"]] == tokens(llm, [PROMPTS[1]], greedy(30))
    assert generate(llm) == expected


def test_metrics_are_vllms(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        llm.generate([[5] * 40] * 3, greedy(7), use_tqdm=False)
        metrics = llm.get_metrics()
    kinds = {metric.name: type(metric) for metric in metrics}
    assert kinds["vllm:num_requests_running"] is Gauge
    assert kinds["vllm:generation_tokens"] is Counter
    assert kinds["vllm:time_to_first_token_seconds"] is Histogram
    values = {metric.name: metric.value for metric in metrics if isinstance(metric, Counter)}
    assert values["vllm:generation_tokens"] == 21 and values["vllm:prompt_tokens"] == 120
    assert values["vllm:prefix_cache_hits"] == 64 and values["nanovllm:steps"] == 7
    # Each token of a prompt was looked for once, each but the last generated one was computed.
    assert values["vllm:prefix_cache_queries"] == 120
    assert all(metric.labels["model_name"] == str(tiny) for metric in metrics)


# Threads


def test_threads_share_the_batches(llm):
    prompts = [[[5 + i, 6, 7], [8 + i] * 20] for i in range(6)]
    expected = [tokens(llm, pair, greedy(40)) for pair in prompts]
    steps = llm.llm_engine.metrics.steps
    start = threading.Barrier(6)

    def call(pair):
        start.wait()
        return tokens(llm, pair, greedy(40))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, prompts)) == expected
    assert llm.llm_engine.metrics.steps - steps < 3 * 40  # one after the other it would be 6 * 40


BEAMS = BeamSearchParams(beam_width=2, max_tokens=100, ignore_eos=True)


@pytest.mark.parametrize(
    "long_call",
    [
        lambda llm: tokens(llm, [[5] * 9] * 4, greedy(200)),
        lambda llm: llm.beam_search([[5] * 9] * 4, BEAMS),
    ],
    ids=["generate", "beam_search"],
)
def test_a_short_call_does_not_wait_for_a_long_one(llm, long_call):
    [want] = tokens(llm, TEXT, greedy(3))
    ended = []

    def long():
        long_call(llm)
        ended.append("long")

    metrics = llm.llm_engine.metrics
    before = metrics.steps
    thread = threading.Thread(target=long)
    thread.start()
    while metrics.steps == before:
        time.sleep(0.001)
    for _ in range(3):
        assert tokens(llm, TEXT, greedy(3)) == [want]
        ended.append("short")
    assert [out["token_ids"] for out in llm.stream(TEXT, greedy(1))] == [want[:1]]
    thread.join()
    assert ended == ["short"] * 3 + ["long"]


def test_step_leaves_other_threads_requests_alone(llm):
    [want] = tokens(llm, TEXT, greedy(60))
    thread_got = []
    thread = threading.Thread(target=lambda: thread_got.extend(tokens(llm, TEXT, greedy(100))))
    thread.start()
    llm.add_request(TEXT, greedy(60), "mine")
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    thread.join()
    assert {out.request_id for out in outputs} == {"mine"} and outputs[-1]["token_ids"] == want
    assert [len(ids) for ids in thread_got] == [100] and thread_got[0][:60] == want


# Failures


def fail_steps(monkeypatch, llm, num, error=RuntimeError):
    executor = llm.llm_engine.executor
    submit, left = executor.submit, [None] * num

    def failing(step):
        if left:
            left.pop()
            raise error("worker")
        return submit(step)

    monkeypatch.setattr(executor, "submit", failing)


def test_requests_of_add_request_survive_one_failure_but_not_two(llm, monkeypatch):
    [want] = tokens(llm, TEXT, greedy())
    for failures, reason in ((1, "length"), (2, "error")):
        with monkeypatch.context() as patch:
            llm.add_request(TEXT, greedy(), "a")
            fail_steps(patch, llm, failures)
            for _ in range(failures):
                with pytest.raises(RuntimeError, match="worker"):
                    llm.step()
            while not llm.is_finished():
                outputs = llm.step()
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == reason
        assert outputs[-1]["token_ids"] == (want if reason == "length" else [])
    assert tokens(llm, TEXT, greedy()) == [want]


def test_a_failed_step_ends_the_calls_whose_requests_ran_in_it(llm, monkeypatch):
    [want] = tokens(llm, TEXT, greedy(60))
    with monkeypatch.context() as patch, ThreadPoolExecutor(5) as pool:
        engine = llm.llm_engine
        patch.setattr(engine.scheduler, "max_num_seqs", 4)  # the fifth waits
        calls = [pool.submit(tokens, llm, TEXT, greedy(60)) for _ in range(5)]
        while len(engine.unfinished) < 5:
            pass
        fail_steps(patch, llm, 1)
        errors = [call.exception() for call in calls]
        assert sorted(str(error) for error in errors) == ["None"] + ["worker"] * 4
        assert [call.result() for call in calls if not call.exception()] == [[want]]


def test_an_llm_whose_gpu_is_lost_closes_and_says_why(tiny, monkeypatch):
    with LLM(str(tiny), **SMALL) as llm:
        executor = llm.llm_engine.executor
        fail_steps(monkeypatch, llm, 1)
        monkeypatch.setattr(executor, "is_usable", lambda: False)
        with pytest.raises(RuntimeError, match="worker"):
            llm.generate(TEXT, use_tqdm=False)
        with pytest.raises(RuntimeError, match=r"its GPU failed.*\(worker\); start another one"):
            llm.generate(TEXT)
        assert not hasattr(executor, "runner")


# Calls from inside a step


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stream_that_is_collected_amid_a_step_is_aborted_after_it(tiny, depth):
    def drop():
        cycle = [llm.stream(["In the", "The queen"], greedy(200))]
        next(cycle[0])
        cycle.append(cycle)

    def collects(output, logits):
        if len(output) == 2:
            gc.collect()
            left.append(len(engine.unfinished))
        return logits

    left = []
    with LLM(str(tiny), async_scheduling=depth == 2, **SMALL) as llm:
        params = [greedy(9), greedy(9, logits_processors=[collects])]
        want = llm.generate(TEXT, params[0], use_tqdm=False)[0]["token_ids"]
        drop()
        engine = llm.llm_engine
        steps = engine.metrics.steps
        outputs = llm.generate([TEXT, TEXT], params, use_tqdm=False)
        assert [out["token_ids"] for out in outputs] == [want, want]
        assert left == [4]  # the stream's were still there
        assert not engine.unfinished and engine.metrics.steps - steps < 100
        while not llm.is_finished():
            llm.step()
        pages = llm.llm_engine.scheduler.block_manager
        assert pages.num_free == pages.num_blocks


def test_a_step_cannot_use_its_own_llm(llm):
    def generates(_, logits):
        llm.generate("Behold", greedy(1), use_tqdm=False)
        return logits

    [out] = llm.generate(TEXT, greedy(3, logits_processors=[generates]), use_tqdm=False)
    assert out.outputs[0].finish_reason == "error"
    assert "can't be used by what its own step calls" in out.error
    assert not llm.llm_engine.unfinished
    while not llm.is_finished():
        llm.step()
