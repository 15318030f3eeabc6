"""The engine's thread and its callers: interrupts, signals, forks, ends, many threads, and what of
the caller's thread counts in the steps."""

import _thread
import asyncio
import contextvars
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from patience import PATIENCE

from nanovllm import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.engine.policy import RoundRobin
from nanovllm.frontend import prompts
from nanovllm.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}


def greedy(max_tokens=12, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)


def tokens(llm, prompts=TEXT, params=None):
    outputs = llm.generate(prompts, params or greedy(), use_tqdm=False)
    return [out["token_ids"] for out in outputs]


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def shared(tiny, request):
    with LLM(str(tiny), async_scheduling=request.param, **SMALL) as llm:
        yield llm


@pytest.fixture
def llm(shared):
    yield shared
    while not shared.is_finished():  # a step in flight
        assert shared.step() == []
    assert not shared._thread.clients
    blocks = shared.llm_engine.scheduler.block_manager
    assert blocks.num_free == blocks.num_blocks


def before_step(llm, monkeypatch, nth, function):
    """Have the engine's thread call a function before its n-th step."""
    executor, steps = llm.llm_engine.executor, []
    submit = executor.submit

    def noting(step):
        steps.append(step)
        if len(steps) == nth:
            function()
        return submit(step)

    monkeypatch.setattr(executor, "submit", noting)
    return steps


def test_no_call_waits_while_another_prompt_is_tokenized(llm, monkeypatch):
    begun, may_end, tokenize = threading.Event(), threading.Event(), prompts.tokenize

    def slow(texts, *args, **options):
        if texts == ["long"]:
            begun.set()
            assert may_end.wait(60)
        return tokenize(texts, *args, **options)

    monkeypatch.setattr(prompts, "tokenize", slow)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(tokens, llm, "long")
        assert begun.wait(60)
        try:
            assert pool.submit(tokens, llm).result(60) and not long.done()
        finally:
            may_end.set()
        assert long.result(60)


# Interrupts hit the caller


@pytest.fixture
def sigint():
    """A background job of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGINT),
    "interrupt_main": _thread.interrupt_main,
}


@pytest.mark.parametrize("interrupt", INTERRUPTS.values(), ids=INTERRUPTS)
@pytest.mark.parametrize("call", ["generate", "stream", "wait_for_completion"])
def test_an_interrupt_hits_the_caller_and_the_engine_goes_on(
    llm, monkeypatch, sigint, interrupt, call
):
    want = tokens(llm, TEXT, greedy(30))
    llm.add_request(TEXT, greedy(30), "other")
    engine = llm.llm_engine
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_step(llm, patch, 5, lambda: interrupt() or time.sleep(1))
        if call == "generate":
            llm.generate([TEXT, [5]], greedy(200), use_tqdm=False)
        elif call == "stream":
            list(llm.stream([TEXT, [5]], greedy(200)))
        else:
            llm.enqueue([TEXT, [5]], greedy(200))
            llm.wait_for_completion(use_tqdm=False)
    if call == "wait_for_completion":
        assert len(llm.llm_engine.unfinished) == 3  # a later call would go on
        for name in list(engine.unfinished):
            if name != "other":
                llm.abort(name)
    assert set(llm.llm_engine.unfinished) == {"other"}
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert {out.request_id for out in outputs} == {"other"}
    assert [outputs[-1]["token_ids"]] == want and tokens(llm, TEXT, greedy(30)) == want
    assert not [seq for seq in engine.scheduler.running if seq.failed_at]
    llm.wait_for_completion(use_tqdm=False)


def test_an_interrupted_step_loses_no_increment(llm, monkeypatch, sigint):
    [want] = tokens(llm, TEXT, greedy(12))
    llm.add_request(TEXT, greedy(12, output_kind=RequestOutputKind.DELTA))
    got, interrupts = [], 0
    before_step(llm, monkeypatch, 4, lambda: _thread.interrupt_main() or time.sleep(1))
    while not llm.is_finished():
        try:
            got += [token for out in llm.step() for token in out["token_ids"]]
        except KeyboardInterrupt:
            interrupts += 1
    assert got == want and interrupts == 1


@pytest.mark.parametrize("call", ["poll", "step", "stream", "generate"])
def test_signals_at_any_time_lose_nothing(llm, call):
    want, random = tokens(llm, TEXT, greedy(6)), Random(call)
    calls = {
        "poll": llm.is_finished,
        "step": lambda: llm.add_request(TEXT, greedy(2)) and llm.step(),
        "stream": lambda: list(llm.stream(TEXT, greedy(6))),
        "generate": lambda: tokens(llm, TEXT, greedy(6)),
    }

    def interrupt(*_):
        raise InterruptedError

    before, interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        while interrupts < 40:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-3))
                while True:
                    calls[call]()
            except InterruptedError:
                interrupts += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    while not llm.is_finished():
        llm.step()
    assert tokens(llm, TEXT, greedy(6)) == want


@pytest.mark.parametrize("interrupt", INTERRUPTS.values(), ids=INTERRUPTS)
def test_an_interrupt_ends_the_loading(tiny, monkeypatch, sigint, interrupt):
    loading = []

    def load(*_):
        loading.append(threading.current_thread())
        interrupt()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("nanovllm.worker.worker.Worker._load", load)
    with pytest.raises(KeyboardInterrupt):
        LLM(str(tiny), **SMALL)
    assert loading[0].name == "nanovllm"
    assert not loading[0].is_alive()


# Posts from anywhere


def test_a_signals_handler_may_use_the_llm(llm, monkeypatch):
    [want], got = tokens(llm, TEXT, greedy(40)), []

    def handler(*_):
        got.extend(tokens(llm, TEXT, greedy(3)))
        llm.abort("unknown")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        before_step(llm, monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert tokens(llm, TEXT, greedy(40)) == [want]
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == [want[:3]] * 2


def test_dropped_streams_are_aborted_wherever_they_are_collected(llm, monkeypatch):
    def drop():
        cycle = [llm.stream([TEXT, [7]], greedy(200))]
        next(cycle[0])
        cycle.append(cycle)  # only a collection finds it

    want = tokens(llm)
    gc.collect()
    for collect_in in "engine", "caller", "thread":
        drop()
        with monkeypatch.context() as patch:
            if collect_in == "engine":
                before_step(llm, patch, 3, gc.collect)
                assert tokens(llm) == want
            elif collect_in == "caller":
                gc.collect()
            else:
                thread = threading.Thread(target=gc.collect)
                thread.start()
                thread.join()
        assert not llm.llm_engine.unfinished


# Forks


def in_child(function):
    """Run a function in a forked process. Returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        raise AssertionError("the child hangs")
    return process.exitcode


@pytest.mark.parametrize("when", ["idle", "in a step", "before use"])
def test_a_forked_process_goes_on_with_a_thread_of_its_own(tiny, monkeypatch, when):
    with LLM(str(tiny), **SMALL) as llm:
        want = [] if when == "before use" else tokens(llm, TEXT, greedy(30))
        llm.add_request(TEXT, greedy(30), "by hand")
        if when != "before use":
            llm.step()

        lock = threading.Thread(target=lambda: llm._requests.lock.acquire() or done.wait(PATIENCE))
        done = threading.Event()  # until then another thread tokenizes

        def child():
            outputs = []
            while not llm.is_finished():
                outputs += llm.step()
            assert {out.request_id for out in outputs} == {"by hand"}
            got = tokens(llm, TEXT, greedy(30))
            assert [outputs[-1]["token_ids"]] == got and want in ([], got)
            llm.close()

        if when == "in a step":
            in_step, forked = threading.Event(), threading.Event()
            before_step(llm, monkeypatch, 4, lambda: in_step.set() or forked.wait(PATIENCE))
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(tokens, llm, [[9] * 5], greedy(30))
                assert in_step.wait(PATIENCE)
                forked.is_set()
                process = multiprocessing.get_context("fork").Process(target=child)
                process.start()
                forked.set()
                process.join(PATIENCE)
                assert process.exitcode == 0 and len(call.result()[0]) == 30
        else:
            lock.start()
            assert in_child(child) == 0
            done.set()
            lock.join()
            llm._requests.lock = threading.RLock()
        assert set(llm.llm_engine.unfinished) <= {"by hand"}
        assert tokens(llm, TEXT, greedy(30)) == want or not want


def test_a_forked_process_has_threads_for_grammars_too(tiny):
    pytest.importorskip("llguidance")
    params = greedy(12, structured_outputs=StructuredOutputsParams(regex="[a-z ]+"))
    with LLM(str(tiny), **SMALL) as llm:
        want = tokens(llm, [TEXT] * 3, params)

        def child():
            assert tokens(llm, [TEXT] * 3, params) == want

        assert in_child(child) == 0


@pytest.mark.parametrize("end", ["return", "sys.exit", "os._exit"])
def test_a_forked_process_that_never_uses_the_llm_ends(tiny, end):
    llm = LLM(str(tiny), **SMALL)
    stream = llm.stream(TEXT, greedy(200))
    next(stream)

    def child():
        if end != "return":
            (os._exit if end == "os._exit" else sys.exit)(0)

    assert in_child(child) == 0
    stream.close()
    assert len(tokens(llm)[0]) == 12
    llm.close()


def test_a_stream_of_the_process_that_forked_says_so(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        stream = llm.stream(TEXT, greedy(200))
        next(stream)

        def child():
            with pytest.raises(RuntimeError, match="runs in the process that was forked"):
                list(stream)

        assert in_child(child) == 0
        assert len(list(stream)) > 0


def test_where_memory_does_not_survive_a_fork_the_first_use_says_so(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        llm._thread.survives_fork = False  # as on a GPU

        def child():
            for call in (llm.is_finished, lambda: llm.generate(TEXT), lambda: llm.stream(TEXT)):
                with pytest.raises(RuntimeError, match="made before the process forked, and a GPU"):
                    call()
            llm.close()

        assert in_child(child) == 0
        assert len(tokens(llm)[0]) == 12


# Ends


ENDS = {
    "running": """
def run():
    try:
        llm.generate("a", params)
    except RuntimeError as error:
        assert "this LLM is closed" in str(error)
threading.Thread(target=run, daemon=True).start()
while not llm.llm_engine.unfinished: pass
""",
    "stream": "stream = llm.stream('a', params); next(stream)",
    "by hand": "llm.add_request('a', params); llm.step()",
    "never used": "",
    "exception": "llm.add_request('a', params); llm.step(); raise SystemExit(0)",
    "sys.exit in a stream": "for _ in llm.stream('a', params): sys.exit(0)",
}


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_a_script_ends_whatever_runs(tiny, code):
    script = f"""
import sys, threading
from nanovllm import LLM, SamplingParams
llm = LLM({str(tiny)!r}, kv_cache_memory_bytes=4 << 20)
params = SamplingParams(max_tokens=None, ignore_eos=True)
{code}
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr


@pytest.mark.parametrize("place", ["tqdm", "other thread", "signal"])
def test_close_from_anywhere_frees_the_memory(tiny, place):
    llm = LLM(str(tiny), **SMALL)
    runner = weakref.ref(llm.llm_engine.executor.runner)
    closing = []

    def close(*args, **kwargs):
        if not closing:
            closing.append(threading.Thread(target=llm.close) if place == "other thread" else None)
            closing[0].start() if closing[0] else llm.close()

    def processor(output, logits):
        if len(output) == 3 and place != "tqdm":
            if place == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)
            else:
                close()
        return logits

    def make_bar(*args, **kwargs):
        from tqdm import tqdm

        close()
        return tqdm(*args, disable=True)

    before = signal.signal(signal.SIGUSR1, close)
    try:
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            llm.generate(
                TEXT,
                greedy(200, logits_processors=[processor]),
                use_tqdm=make_bar if place == "tqdm" else False,
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    llm.close()  # waits for the thread
    gc.collect()
    assert runner() is None
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate(TEXT)


def test_a_step_cannot_close_its_llm(llm):
    def processor(output, logits):
        llm.close()

    params = [greedy(4), greedy(4, logits_processors=[processor]), greedy(4)]
    outputs = llm.generate([TEXT] * 3, params, use_tqdm=False)
    assert [out.outputs[0].finish_reason for out in outputs] == ["length", "error", "length"]
    assert "can't be used by what its own step calls" in outputs[1].error


def test_a_collected_llm_leaves_no_thread(tiny):
    llm = LLM(str(tiny), **SMALL)
    tokens(llm)
    thread, cycle = llm._thread.thread, [llm]
    cycle.append(cycle)
    assert thread.is_alive()
    del llm, cycle
    gc.collect()
    assert not thread.is_alive()


# Many callers


def test_sixteen_threads_at_once(llm):
    prompts = [[5 + i] * (1 + i % 5) for i in range(16)]
    want = [tokens(llm, [prompt], greedy(20)) for prompt in prompts]
    barrier = threading.Barrier(16)

    def call(i):
        barrier.wait()
        if i % 4 == 0:
            return [[t for out in llm.stream([prompts[i]], greedy(20)) for t in out["token_ids"]]]
        if i % 4 == 1:
            llm.add_request(prompts[i], greedy(20), f"mine {i}")
        return tokens(llm, [prompts[i]], greedy(20))

    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(call, range(16))) == want
            while not llm.is_finished():
                llm.step()


def test_the_same_call_makes_the_same_batches(tiny):
    prompts = [[5 + i] * (1 + 7 * i % 40) for i in range(24)]
    params = [greedy(1 + i % 9) for i in range(24)]
    seen = []
    for _ in range(3):
        with LLM(str(tiny), max_num_batched_tokens=64, max_num_seqs=8, **SMALL) as llm:
            with pytest.MonkeyPatch.context() as patch:
                steps = before_step(llm, patch, 0, None)
                tokens(llm, prompts, params)
            chunks = [[list(chunk.token_ids) for chunk in step.chunks] for step in steps]
            seen.append([(s.num_decodes, own) for s, own in zip(steps, chunks, strict=True)])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 5


def test_steps_by_hand_are_the_same_every_time(llm):
    def drive():
        for i in range(6):
            llm.add_request([5 + i] * (1 + 5 * i), greedy(2 + i % 3), f"{i}")
        rounds = []
        while not llm.is_finished():
            rounds.append([(out.request_id, out["token_ids"]) for out in llm.step()])
        return rounds

    first = drive()
    llm.reset_prefix_cache()
    assert drive() == first
    time.sleep(0.05)
    steps = llm.llm_engine.metrics.steps
    llm.add_request(TEXT, greedy())
    time.sleep(0.05)
    assert llm.llm_engine.metrics.steps == steps, "the thread steps only for those who wait"
    while not llm.is_finished():
        llm.step()


# A request that fails


def test_a_failing_processor_ends_its_request_and_spares_three(llm, caplog):
    def fails(output, logits):
        return 1 / 0 if len(output) == 3 else logits

    prompts = [TEXT, [5, 6], [7], [8] * 9]
    want = tokens(llm, prompts)
    params = [greedy(), greedy(logits_processors=[fails]), greedy(), greedy()]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    bad = outputs.pop(1)
    assert [out["token_ids"] for out in outputs] == [want[0], *want[2:]]
    assert not any(out.error for out in outputs)
    assert bad.finished and bad.outputs[0].finish_reason == "error"
    assert bad["token_ids"] == want[1][:3]
    assert "error in its logits_processors" in bad.error and "ZeroDivisionError" in bad.error
    [record] = [record for record in caplog.records if record.name == "nanovllm.llm"]
    assert record.message.startswith("1 of 4 requests ended with the finish_reason 'error'")
    *_, last = llm.stream([5, 6], params[1])
    assert last.outputs[0].error == last.error and "ZeroDivisionError" in last.error
    llm.enqueue([TEXT, [5, 6]], params[:2])
    good, bad = llm.wait_for_completion(use_tqdm=False)
    assert good["token_ids"] == want[0] and "ZeroDivisionError" in bad.error


# What of the caller's thread counts

NAME = contextvars.ContextVar("NAME", default="unset")


def test_processors_see_the_context_variables_of_their_caller(llm):
    seen = {}

    def notes(prompt, output, logits):
        seen.setdefault(prompt[0], set()).add(NAME.get())
        return logits

    def call(i):
        NAME.set(f"caller {i}")
        tokens(llm, [[i]], greedy(9, logits_processors=[notes]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(5, 9)))
    assert seen == {i: {f"caller {i}"} for i in range(5, 9)}
    NAME.set("mine")
    assert llm.apply_model(lambda _: NAME.get()) == ["mine"]


def test_torchs_number_of_threads_is_the_callers(llm):
    seen = []

    def notes(output, logits):
        seen.append(torch.get_num_threads())
        return logits

    before = torch.get_num_threads()
    try:
        for number in 2, 1, 3:
            torch.set_num_threads(number)
            tokens(llm, TEXT, greedy(2, logits_processors=[notes]))
            assert set(seen) == {number}
            seen.clear()
    finally:
        torch.set_num_threads(before)


# Other processes


def bias(output, logits):
    return logits


def test_what_crosses_can_be_pickled(llm):
    params = greedy(4, logprobs=2, prompt_logprobs=1, logits_processors=[bias])
    with pytest.MonkeyPatch.context() as patch:
        steps = before_step(llm, patch, 0, None)
        [out] = llm.generate(TEXT, params, use_tqdm=False)
    copied = pickle.loads(pickle.dumps(out))
    assert copied.prompt_token_ids == out.prompt_token_ids and copied.metrics == out.metrics
    assert copied.outputs[0].logprobs == list(out.outputs[0].logprobs)
    assert copied.prompt_logprobs == list(out.prompt_logprobs)
    assert (copied["text"], copied["token_ids"]) == (out["text"], out["token_ids"])
    for step in steps:
        again = pickle.loads(pickle.dumps(step))
        assert again.rows.tolist() == step.rows.tolist()
        assert again.positions.tolist() == step.positions.tolist()
        for start, other in zip(step.starts, again.starts, strict=True):
            assert other.params.logits_processors == [bias]
            assert (other.row, other.seed) == (start.row, start.seed)


def test_a_grammar_crosses_as_its_source(llm):
    pytest.importorskip("llguidance")
    params = SamplingParams(
        temperature=0, structured_outputs=StructuredOutputsParams(regex="[a-f]{6}")
    )
    with pytest.MonkeyPatch.context() as patch:
        steps = before_step(llm, patch, 0, None)
        [out] = llm.generate(TEXT, params, use_tqdm=False)
    crossed = pickle.loads(pickle.dumps(steps[0].starts[0].params.grammar))
    vocabulary = llm._requests.grammars.vocabulary
    matcher = crossed.bind(vocabulary).matcher.deep_copy()
    assert matcher.validate_tokens(out["token_ids"]) == len(out["token_ids"]) > 3


# What a review found


def test_two_threads_may_wait_for_completion(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        llm.enqueue([TEXT, TEXT], greedy(40), use_tqdm=False)
        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(llm.wait_for_completion, use_tqdm=False) for _ in range(2)]
            outputs = [out for wait in waits for out in wait.result(timeout=PATIENCE)]
        assert len(outputs) == 2 and llm.is_finished()


def test_a_policy_that_raises_ends_the_call(tiny):
    class Broken:
        def next(self, waiting):
            raise KeyError("no next")

        def victim(self, running):
            raise AssertionError

    with LLM(str(tiny), scheduler=Broken(), **SMALL) as llm:
        for _ in range(2):
            with pytest.raises(KeyError, match="no next"):
                llm.generate(TEXT, greedy(4), use_tqdm=False)
        assert llm.is_finished()


def test_an_id_with_an_output_that_was_not_taken_is_in_use(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        llm.add_request(TEXT, greedy(1), "x")
        llm.generate([9] * 4, greedy(4), use_tqdm=False)  # "x" runs beside it
        with pytest.raises(ValueError, match="'x' is in use"):
            llm.add_request([5] * 4, greedy(4), "x")
        outputs = llm.step()
        assert [(out.request_id, out.finished) for out in outputs] == [("x", True)]
        llm.add_request([5] * 4, greedy(1), "x")
        while not llm.is_finished():
            outputs = llm.step()
        assert outputs[-1].prompt_token_ids == [5] * 4


def test_a_processor_may_raise_anything(tiny):
    def leave(output, logits):
        raise SystemExit(3)

    with LLM(str(tiny), **SMALL) as llm:
        good, bad = llm.generate(
            [TEXT] * 2, [greedy(5), greedy(5, logits_processors=[leave])], use_tqdm=False
        )
        assert (good.outputs[0].finish_reason, bad.outputs[0].finish_reason) == ("length", "error")
        assert "SystemExit(3)" in bad.error and bad.metrics.finished_time is not None


def test_an_id_may_be_used_again_though_its_consumer_left(tiny):
    async def main(llm):
        async for _ in llm.generate(TEXT, greedy(3), "x"):
            await asyncio.sleep(0.5)
            break
        params = greedy(30, output_kind=RequestOutputKind.DELTA)
        return [out async for out in llm.generate(TEXT, params, "x")]

    llm = AsyncLLM(str(tiny), **SMALL)
    try:
        outputs = asyncio.run(main(llm))
    finally:
        llm.shutdown()
    assert len(outputs) > 1 and sum(len(out["token_ids"]) for out in outputs) == 30


def test_callers_take_turns_by_client(tiny):
    with LLM(str(tiny), scheduler=RoundRobin(), **SMALL) as llm:
        for _ in range(3):
            llm.add_request(TEXT, greedy(2))
        callers = {seq.caller for seqs in llm.llm_engine.unfinished.values() for seq in seqs}
        assert len(callers) == 1
        assert len(tokens(llm, [TEXT] * 2, greedy(2))) == 2
        while not llm.is_finished():
            llm.step()
