"""AsyncLLM: the tokens of LLM, whoever comes and goes meanwhile."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from patience import PATIENCE

from nanovllm import LLM, AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def greedy(max_tokens=20, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)


@pytest.fixture(scope="module")
def sync(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def shared(tiny, request):
    llm = AsyncLLM(str(tiny), async_scheduling=request.param, **SMALL)
    yield llm
    llm.shutdown()


@pytest.fixture
def llm(shared):
    """Nothing of a test stays behind."""
    yield shared
    deadline = time.monotonic() + PATIENCE
    while shared._client.consumers or not shared._llm.is_finished():
        assert time.monotonic() < deadline
        time.sleep(0.01)
        if not shared._client.consumers:
            shared._llm.step()  # one step of the aborted requests is in flight
    blocks = shared._llm.llm_engine.scheduler.block_manager
    assert blocks.num_free == blocks.num_blocks


async def collect(llm, prompt=TEXT, params=None, request_id=None):
    return [out async for out in llm.generate(prompt, params or greedy(), request_id)]


def expected(sync, prompts, params):
    return [out.outputs[0] for out in sync.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_what_comes_is_of_its_output_kind(llm, sync, kind):
    params = greedy(logprobs=2, output_kind=kind, stop=" the")
    [whole] = expected(sync, TEXT, params)
    outputs = asyncio.run(collect(llm, TEXT, params, "mine"))
    assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {out.request_id for out in outputs} == {"mine"} and outputs[0].prompt == TEXT
    parts = [out.outputs[0] for out in outputs]
    last = parts[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", " the")
    assert last.cumulative_logprob == whole.cumulative_logprob
    if kind is DELTA:
        assert "".join(part.text for part in parts) == whole.text
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
        assert [line for part in parts for line in part.logprobs] == list(whole.logprobs)
    else:
        assert (last.text, last.token_ids) == (whole.text, whole.token_ids)
        assert list(last.logprobs) == list(whole.logprobs)
    assert kind is not FINAL or len(parts) == 1


def test_hundreds_run_in_one_batch_and_each_gets_its_own(llm, sync):
    prompts = [[5 + i % 7] * (1 + i % 19) for i in range(200)]
    params = [
        SamplingParams(
            temperature=i % 2,
            seed=i,
            max_tokens=3 + i % 9,
            output_kind=list(RequestOutputKind)[i % 3],
            logprobs=1 if i % 5 == 0 else None,
        )
        for i in range(200)
    ]
    steps = llm._llm.llm_engine.metrics.steps

    async def run():
        tasks = [collect(llm, p, s) for p, s in zip(prompts, params, strict=True)]
        return await asyncio.gather(*tasks)

    all_outputs = asyncio.run(run())
    for outputs, s, whole in zip(all_outputs, params, expected(sync, prompts, params), strict=True):
        parts = [out.outputs[0] for out in (outputs if s.output_kind is DELTA else outputs[-1:])]
        assert "".join(part.text for part in parts) == whole.text
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert llm._llm.llm_engine.metrics.steps - steps < 100


def test_requests_arrive_while_others_run(llm, sync):
    long, short = expected(sync, [TEXT, "The king"], [greedy(60), greedy(5)])

    async def run():
        seen = []
        async for out in llm.generate(TEXT, greedy(60)):
            if len(out["token_ids"]) >= 10 and not seen:
                seen = await collect(llm, "The king", greedy(5))
        return seen[-1], out

    second, first = asyncio.run(run())
    assert (first["text"], second["text"]) == (long.text, short.text)
    assert second.metrics.finished_time < first.metrics.finished_time


@pytest.mark.parametrize("way", ["cancel", "break", "close", "error", "cancel at once"])
def test_who_leaves_ends_the_request(llm, sync, way):
    [whole] = expected(sync, "The king", greedy(40))

    async def leave():
        outputs = llm.generate(TEXT, greedy(200), "mine")
        if way == "error":
            with pytest.raises(ZeroDivisionError):
                async for _ in outputs:
                    raise ZeroDivisionError
            await outputs.aclose()
            return
        async for _ in outputs:
            if way == "break":
                break
            if way == "close":
                await outputs.aclose()

    async def run():
        other = asyncio.create_task(collect(llm, "The king", greedy(40)))
        if "cancel" in way:
            task = asyncio.create_task(collect(llm, TEXT, greedy(200), "mine"))
            await asyncio.sleep(0 if way == "cancel at once" else 0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await leave()
        gc.collect()
        while "mine" in llm._client.consumers:  # at the latest when this step has ended
            await asyncio.sleep(0.001)
        assert "mine" not in llm._llm.llm_engine.unfinished
        again = await collect(llm, "The king", greedy(40), "mine")  # the id is free
        return again[-1], (await other)[-1]

    again, other = asyncio.run(run())
    assert again["text"] == other["text"] == whole.text


def test_abort_ends_those_who_wait(llm, sync):
    [whole] = expected(sync, TEXT, greedy(200))

    async def run():
        async def one(name, kind):
            outputs = []
            async for out in llm.generate(TEXT, greedy(200, output_kind=kind), name):
                outputs.append(out)
                if len(outputs) == 3 and name == "b":
                    await llm.abort(["a", "b", "unknown"])
            return outputs

        async def final():
            await asyncio.sleep(0.02)
            await llm.abort("c")

        kinds = RequestOutputKind.CUMULATIVE, DELTA, FINAL
        tasks = [one(name, kind) for name, kind in zip("abc", kinds, strict=True)]
        return (await asyncio.gather(*tasks, final()))[:3]

    for outputs, joins in zip(asyncio.run(run()), (False, True, False), strict=True):
        parts = [out.outputs[0] for out in outputs]
        assert outputs[-1].finished and parts[-1].finish_reason == "abort"
        tokens = [t for part in (parts if joins else parts[-1:]) for t in part.token_ids]
        assert len(tokens) < 200 and tokens == whole.token_ids[: len(tokens)]


def test_a_slow_consumer_gets_more_at_a_time_and_holds_up_nobody(llm, sync):
    [whole] = expected(sync, TEXT, greedy(60))

    async def slow():
        outputs = []
        async for out in llm.generate(TEXT, greedy(60, output_kind=DELTA, logprobs=0)):
            outputs.append(out)
            if len(outputs) == 1:
                await fast  # all of it
        return outputs

    async def run():
        nonlocal fast
        fast = asyncio.create_task(collect(llm, TEXT, greedy(60)))
        return await slow()

    fast = None
    outputs = asyncio.run(run())
    assert len(outputs) < 30 and max(len(out["token_ids"]) for out in outputs) > 30
    assert "".join(out["text"] for out in outputs) == whole.text
    assert sum(len(out.outputs[0].logprobs) for out in outputs) == 60


def test_the_event_loop_never_waits(llm, monkeypatch):
    """Not for a tokenizer, not for a step."""
    submit = llm._llm.llm_engine.executor.submit
    monkeypatch.setattr(
        llm._llm.llm_engine.executor, "submit", lambda step: time.sleep(0.2) or submit(step)
    )
    make = llm._llm._make_one
    monkeypatch.setattr(llm._llm, "_make_one", lambda *args: time.sleep(0.3) or make(*args))

    async def run():
        task = asyncio.create_task(collect(llm, TEXT, greedy(3)))
        longest, last = 0.0, time.monotonic()
        while not task.done():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        return longest, await task

    longest, outputs = asyncio.run(run())
    assert longest < 0.15 and outputs[-1].finished


def test_bad_input_raises_where_it_is_awaited(llm):
    async def run():
        steps = llm._llm.llm_engine.metrics.steps
        for args, error, text in (
            (("",), ValueError, "request 'bad' is empty"),
            ((TEXT, greedy(stop_token_ids=[10**6])), ValueError, "stop_token_ids"),
            ((TEXT, "greedy"), TypeError, "sampling_params must be SamplingParams"),
            ((["a", "b"],), TypeError, "takes one prompt"),
            ((5,), TypeError, "takes one prompt"),
            (([1] * 999,), ValueError, "max_model_len=256 allows 255"),
            (("\ud800",), ValueError, "not valid Unicode"),
        ):
            args = (*args, greedy())[:2]
            with pytest.raises(error, match=text):
                await collect(llm, args[0], args[1], "bad")
        with pytest.raises(TypeError, match="request_id must be a string"):
            await collect(llm, TEXT, greedy(), 5)
        assert llm._llm.llm_engine.metrics.steps == steps
        outputs = llm.generate(TEXT, greedy(100), "twice")
        await anext(outputs)
        with pytest.raises(ValueError, match="'twice' is in use"):
            await collect(llm, TEXT, greedy(), "twice")
        assert not (await anext(outputs)).finished  # it is not disturbed
        await outputs.aclose()

    asyncio.run(run())


def test_chat_is_that_of_llm(llm, sync):
    messages = [{"role": "user", "content": "Who are you?"}]
    [want] = sync.chat(messages, greedy(), use_tqdm=False)

    async def run():
        with pytest.raises(ValueError, match="continue_final_message"):
            async for _ in llm.chat(messages, continue_final_message=True):
                raise AssertionError
        return [out async for out in llm.chat(messages, greedy())][-1]

    got = asyncio.run(run())
    assert (got.prompt, got["text"]) == (want.prompt, want["text"])


def test_chat_takes_the_constructors_template(tiny):
    template = "{% for message in messages %}{{ word }} {{ message.content }}{% endfor %}"
    llm = AsyncLLM(str(tiny), chat_template=template, **SMALL)

    async def run():
        options = {"chat_template_kwargs": {"word": "Behold,"}}
        messages = [{"role": "user", "content": "a king"}]
        return [out async for out in llm.chat(messages, greedy(1), **options)][-1]

    assert asyncio.run(run()).prompt == "Behold, a king"
    llm.shutdown()


def test_several_event_loops_share_it(llm, sync):
    [whole] = expected(sync, TEXT, greedy(30))
    texts = []

    async def several():
        for outputs in await asyncio.gather(*(collect(llm, TEXT, greedy(30)) for _ in range(5))):
            texts.append(outputs[-1]["text"])

    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert texts == [whole.text] * 20


def test_requests_of_a_closed_event_loop_are_dropped(llm):
    aborts = llm._llm.llm_engine.metrics.finish_reasons["abort"]
    loop = asyncio.new_event_loop()
    outputs = llm.generate(TEXT, greedy(200), "lost")
    loop.run_until_complete(anext(outputs))
    loop.close()
    deadline = time.monotonic() + PATIENCE
    while "lost" in llm._client.consumers and time.monotonic() < deadline:
        time.sleep(0.001)
    assert "lost" not in llm._client.consumers
    assert llm._llm.llm_engine.metrics.finish_reasons["abort"] == aborts + 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), torch.OutOfMemoryError("no memory")])
def test_a_failed_step_reaches_everybody_with_its_cause(llm, sync, monkeypatch, error):
    [whole] = expected(sync, TEXT, greedy())

    async def run():
        tasks = [asyncio.create_task(collect(llm, TEXT, greedy(200))) for _ in range(5)]
        await asyncio.sleep(0.1)
        with monkeypatch.context() as patch:

            def fail(step):
                raise error

            patch.setattr(llm._llm.llm_engine.executor, "submit", fail)
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(type(result) is RuntimeError for result in results)
        assert all(result.__cause__ is error for result in results)
        assert len({id(result) for result in results}) == 5
        return (await collect(llm))[-1]

    assert asyncio.run(run())["text"] == whole.text


def test_an_error_of_a_request_ends_it_alone(llm, sync):
    def fails(output, logits):
        return 1 / 0 if len(output) == 3 else logits

    params = SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True, logits_processors=[fails])
    wanted = expected(sync, [TEXT, "The king"], greedy(30))

    async def run():
        [*_, last] = await asyncio.wait_for(collect(llm, TEXT, params), PATIENCE)
        assert last.finished and {c.finish_reason for c in last.outputs} == {"error"}
        assert "ended by an error in its logits_processors" in last.error
        assert "ZeroDivisionError" in last.error

    async def run_all():
        others = (collect(llm, text, greedy(30)) for text in (TEXT, "The king"))
        _, *outputs = await asyncio.gather(run(), *others)
        for parts, want in zip(outputs, wanted, strict=True):
            assert parts[-1].outputs[0].token_ids == want.token_ids

    asyncio.run(run_all())


def test_abort_tells_of_samples_that_had_ended_only_once(llm, sync):
    calls = []

    def ends_one(output, logits):
        calls.append(output)
        logits[77] = float("inf") if len(calls) == 8 else float("-inf")
        return logits

    options = {"stop_token_ids": [77], "logits_processors": [ends_one], "ignore_eos": True}
    params = SamplingParams(n=3, max_tokens=200, output_kind=DELTA, **options)
    ended = []

    async def run():
        async for out in llm.generate(TEXT, params, "mine"):
            ended.extend((c.index, c.finish_reason) for c in out.outputs if c.finished())
            if ended and not out.finished:
                await llm.abort("mine")

    asyncio.run(run())
    assert sorted(index for index, _ in ended) == [0, 1, 2]
    assert {reason for _, reason in ended} == {"stop", "abort"}


def test_sleep_and_what_else_llm_has(llm, sync):
    [whole] = expected(sync, TEXT, greedy())

    async def run():
        outputs = llm.generate(TEXT, greedy(200))
        await anext(outputs)
        with pytest.raises(RuntimeError, match="1 requests are unfinished"):
            await llm.sleep()
        assert not await llm.reset_prefix_cache()
        await outputs.aclose()
        assert await llm.reset_prefix_cache()
        await llm.sleep(2)
        assert await llm.is_sleeping()
        with pytest.raises(RuntimeError, match="sleeps: call wake_up"):
            await collect(llm)
        await llm.wake_up()
        assert not await llm.is_sleeping()
        names = {metric.name for metric in await llm.get_metrics()}
        assert "vllm:num_requests_running" in names
        assert llm.get_tokenizer().decode(whole.token_ids) == whole.text
        return (await collect(llm))[-1]

    assert asyncio.run(run())["text"] == whole.text


# The end


def test_shutdown_ends_everything(tiny):
    llm = AsyncLLM(str(tiny), **SMALL)
    runner = weakref.ref(llm._llm.llm_engine.executor.runner)

    async def run():
        task = asyncio.create_task(collect(llm, TEXT, greedy(200)))
        await asyncio.sleep(0.1)
        llm.shutdown()
        llm.shutdown()
        with pytest.raises(RuntimeError, match="shut down"):
            await task
        for call in (collect(llm), llm.abort("a"), llm.sleep(), llm.get_metrics()):
            with pytest.raises(RuntimeError, match="this AsyncLLM is shut down"):
                await call

    asyncio.run(run())
    gc.collect()
    assert not llm._thread.thread.is_alive() and runner() is None


def test_who_drops_it_frees_its_memory(tiny):
    llm = AsyncLLM(str(tiny), **SMALL)
    assert asyncio.run(collect(llm))[-1].finished
    runner, thread = weakref.ref(llm._llm.llm_engine.executor.runner), llm._thread.thread
    del llm
    gc.collect()
    assert not thread.is_alive() and runner() is None


def test_a_script_ends_without_shutdown(tiny):
    code = f"""
import asyncio
from nanovllm import AsyncLLM, SamplingParams
llm = AsyncLLM({str(tiny)!r}, kv_cache_memory_bytes=4 << 20)
async def main():
    async for output in llm.generate("In the", SamplingParams(max_tokens=200, ignore_eos=True)):
        print(len(output["token_ids"]))
        break
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert "Error" not in done.stderr


# vLLM's names


def test_an_engine_is_made_of_engine_args(tiny, sync):
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(tiny), **SMALL, enforce_eager=True))
    try:
        assert llm.tokenizer is llm.get_tokenizer()
        assert llm.model_config.max_model_len == 256 and llm.is_running and not llm.errored
        ids = llm.tokenizer.encode(TEXT)

        async def run():
            await llm.check_health()
            options = {"lora_request": None, "trace_headers": {}, "priority": 0}
            options["tokenization_kwargs"] = {
                "truncate_prompt_tokens": 2,
                "truncation_side": "left",
            }
            generator = llm.generate(
                request_id="1", prompt=ids, sampling_params=greedy(3), prompt_text="a", **options
            )
            return [out async for out in generator][-1]

        out = asyncio.run(run())
        assert (out.request_id, out.prompt, out.prompt_token_ids) == ("1", "a", ids[-2:])
        [want] = sync.generate([ids[-2:]], greedy(3), use_tqdm=False)
        assert out.outputs[0].text == want.outputs[0].text
        with pytest.raises(ValueError, match="lora_request is not supported"):
            asyncio.run(anext(llm.generate(TEXT, greedy(), lora_request="adapter")))
        with pytest.raises(ValueError, match="priority is not supported by the policy 'fcfs'"):
            asyncio.run(anext(llm.generate(TEXT, greedy(), priority=1)))
    finally:
        llm.shutdown()
    assert llm.errored and llm.is_stopped and not llm.is_running
    with pytest.raises(RuntimeError, match="is shut down"):
        asyncio.run(llm.check_health())
    with pytest.raises(ValueError, match="stat_loggers are not supported"):
        AsyncLLM.from_engine_args(AsyncEngineArgs(str(tiny)), stat_loggers=[object])


def test_the_lowest_priority_runs_first(tiny):
    llm = AsyncLLM(str(tiny), **SMALL, scheduling_policy="priority", max_num_seqs=1)
    ended = []

    async def request(priority):
        async for _ in llm.generate(TEXT, greedy(8), str(priority), priority=priority):
            pass
        ended.append(priority)

    async def run():
        await llm.pause_generation(mode="keep")
        tasks = [asyncio.create_task(request(priority)) for priority in (3, 1, 2)]
        while len(llm._client.held) < 3:
            await asyncio.sleep(0.01)
        await llm.resume_generation()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    llm.shutdown()
    assert ended == [1, 2, 3]


@pytest.mark.parametrize("clear_cache", [True, False])
def test_a_pause_keeps_requests(llm, sync, clear_cache):
    [want] = expected(sync, TEXT, greedy(40))

    async def run():
        seen, begun = [], asyncio.Event()

        async def request():
            async for out in llm.generate(TEXT, greedy(40)):
                seen.append(out)
                if len(seen) > 3:
                    begun.set()

        task = asyncio.create_task(request())
        await begun.wait()
        await llm.pause_generation(mode="keep", clear_cache=clear_cache)
        assert await llm.is_paused()
        await asyncio.sleep(0.05)
        num = len(seen)
        steps = llm._llm.llm_engine.metrics.steps
        late = asyncio.create_task(collect(llm, TEXT, greedy(40)))
        cancelled = asyncio.create_task(collect(llm, TEXT, greedy(40), "cancelled"))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        assert len(seen) == num < 40 and not late.done()
        assert llm._llm.llm_engine.metrics.steps == steps
        await llm.resume_generation()
        assert not await llm.is_paused()
        await task
        assert (await llm_ends(cancelled)) and seen[-1].outputs[0].token_ids == want.token_ids
        assert (await late)[-1].outputs[0].token_ids == want.token_ids

    async def llm_ends(task):
        with pytest.raises(asyncio.CancelledError):
            await task
        return True

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pause_ends_requests(llm, sync, mode):
    [want] = expected(sync, TEXT, greedy(60))

    async def run():
        tasks = [asyncio.create_task(collect(llm, TEXT, greedy(60))) for _ in range(3)]
        while len(llm._client.consumers) < 3:
            await asyncio.sleep(0.001)
        await llm.pause_generation(mode=mode)
        assert not llm._client.seqs
        for task in tasks:
            last = (await task)[-1].outputs[0]
            assert last.finish_reason == {"abort": "abort", "wait": "length"}[mode]
            assert last.token_ids == want.token_ids[: len(last.token_ids)]
        late = asyncio.create_task(collect(llm, TEXT, greedy(60)))
        await asyncio.sleep(0.05)
        assert not late.done()
        await llm.pause_generation(mode=mode)  # once more is no harm
        await llm.resume_generation()
        assert (await late)[-1].outputs[0].token_ids == want.token_ids
        await llm.resume_generation()
        with pytest.raises(ValueError, match="mode must be 'abort', 'wait' or 'keep', got 'stop'"):
            await llm.pause_generation(mode="stop")

    asyncio.run(run())


def test_a_pause_that_ends_while_it_waits(llm, sync):
    [want] = expected(sync, TEXT, greedy(60))

    async def run():
        task = asyncio.create_task(collect(llm, TEXT, greedy(60)))
        while not llm._client.consumers:
            await asyncio.sleep(0.001)
        pause = asyncio.create_task(llm.pause_generation(mode="wait"))
        while not await llm.is_paused():
            await asyncio.sleep(0.001)
        await llm.resume_generation()
        await asyncio.gather(task, pause)
        assert not await llm.is_paused()
        late = await asyncio.wait_for(collect(llm, TEXT, greedy(60)), 60)
        assert late[-1].outputs[0].token_ids == want.token_ids

    asyncio.run(run())


def test_a_paused_engine_can_be_shut_down(tiny):
    llm = AsyncLLM(str(tiny), **SMALL)

    async def run():
        await llm.pause_generation(wait_for_inflight_requests=True)
        task = asyncio.create_task(collect(llm))
        while not llm._client.held:
            await asyncio.sleep(0.01)
        llm.shutdown()
        with pytest.raises(RuntimeError, match="is shut down"):
            await task

    asyncio.run(run())


def test_what_runs_is_logged_and_profiled(tiny, tmp_path, caplog):
    profiler = {"profiler": "torch", "torch_profiler_dir": str(tmp_path)}
    llm = AsyncLLM(str(tiny), **SMALL, profiler_config=profiler)

    async def run():
        await llm.start_profile("mine")
        await collect(llm, TEXT, greedy(5))
        await llm.stop_profile()
        with caplog.at_level("INFO"):
            await llm.do_log_stats()

    asyncio.run(run())
    llm.shutdown()
    assert (tmp_path / "mine.pt.trace.json.gz").is_file()
    assert "running: 0 requests" in caplog.text and "generated so far: 5 tokens" in caplog.text
