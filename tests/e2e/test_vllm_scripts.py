"""What vLLM's example scripts do, written anew in a few lines each, with names from nanovllm."""

import asyncio
import json
import re
import time
from pathlib import Path

import pytest

from nanovllm import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    Counter,
    EngineArgs,
    FlexibleArgumentParser,
    Gauge,
    Histogram,
    LLMEngine,
    Metric,
    ProfilerConfig,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    Vector,
    cleanup_dist_env_and_memory,
    init_logger,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = Path(__file__).parents[2] / "docs" / "vllm.md"
TEXT = "It is a truth universally acknowledged, that"
PROMPTS = [TEXT, "In the beginning", "The king"]
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
WORDS = ["--dtype", "float32", "--kv-cache-memory-bytes", "4M", "--max-model-len", "256"]


def greedy(max_tokens=8, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


@pytest.fixture
def engine(tiny):
    parser = FlexibleArgumentParser(description="a demo of an engine")
    args = EngineArgs.add_cli_args(parser).parse_args(["--model", str(tiny), *WORDS])
    with LLMEngine.from_engine_args(EngineArgs.from_cli_args(args)) as engine:
        yield engine


def test_a_parsers_options_make_an_llm(tiny, llm):
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=str(tiny))
    parser.add_argument("--max-tokens", type=int)
    args = vars(parser.parse_args([*WORDS, "--max_tokens", "5"]))
    max_tokens = args.pop("max_tokens")
    with LLM(**args) as other:
        params = other.get_default_sampling_params()
        params.max_tokens, params.temperature = max_tokens, 0
        [out] = other.chat([{"role": "user", "content": "Who?"}], params, use_tqdm=False)
    [want] = llm.chat([{"role": "user", "content": "Who?"}], greedy(5), use_tqdm=False)
    assert out.outputs[0].token_ids == want.outputs[0].token_ids


def test_an_engine_is_stepped_by_hand(engine, llm):
    todo = [
        (PROMPTS[0], greedy(4, logprobs=1, prompt_logprobs=1)),
        (PROMPTS[1], SamplingParams(temperature=0.8, top_k=5, seed=1, presence_penalty=0.2)),
        (PROMPTS[2], SamplingParams(n=2, temperature=0.8, top_p=0.95, seed=2)),
    ]
    want = llm.generate([p for p, _ in todo], [params for _, params in todo], use_tqdm=False)
    finished, number = {}, 0
    while todo or engine.has_unfinished_requests():
        if todo:
            assert engine.add_request(str(number), *todo.pop(0)) == str(number)
            number += 1
            assert engine.get_num_unfinished_requests() >= 1
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert engine.get_num_unfinished_requests() == 0
    assert list(map(str, range(3))) == sorted(finished)
    for i, output in enumerate(want):
        assert [c.text for c in finished[str(i)].outputs] == [c.text for c in output.outputs]


def test_an_engine_takes_vllms_arguments(engine):
    ids = engine.get_tokenizer().encode(TEXT)
    engine.add_request(
        "a",
        ids,
        greedy(3),
        12.5,
        None,
        {"truncate_prompt_tokens": 4, "truncation_side": "left"},
        {},
        0,
        prompt_text="a text",
    )
    engine.add_request("b", TEXT, greedy(99, ignore_eos=True))
    engine.add_request("c", prompt=TEXT, params=greedy(2), arrival_time=1.0, trace_headers=None)
    assert engine.get_num_unfinished_requests() == 3
    engine.step()
    engine.abort_request(["b", "unknown"])
    engine.abort_request("ac")  # one id: neither "a" nor "c"
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    assert sorted(outputs) == ["a", "c"] and all(out.finished for out in outputs.values())
    assert (outputs["a"].prompt, outputs["a"].prompt_token_ids) == ("a text", ids[-4:])
    for change, error in [
        ({"request_id": 5}, TypeError),
        ({"lora_request": "adapter"}, ValueError),
        ({"priority": 3}, ValueError),
        ({"params": "greedy"}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(change)).replace("params", "sampling_params")):
            engine.add_request(**{"request_id": "d", "prompt": "a", "params": greedy(), **change})
    with pytest.raises(ValueError, match="stat_loggers are not supported"):
        LLMEngine.from_engine_args(EngineArgs(), stat_loggers=[object])


VALUES = {
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2,
    "temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.2, "seed": 5, "stop": ["zzzz"],
    "stop_token_ids": [1], "ignore_eos": True, "include_stop_str_in_output": True,
    "max_tokens": 3, "min_tokens": 2, "detokenize": False, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "output_kind": RequestOutputKind.FINAL_ONLY,
    "logit_bias": {67: 5.0}, "allowed_token_ids": [67, 68],
    "flat_logprobs": True, "skip_reading_prefix_cache": True, "n": 2,
}  # fmt: skip


def test_every_parameter_that_vllm_shares_runs(llm):
    """docs/vllm.md calls these parameters supported; what each does has tests of its own."""
    rows = re.search(r"^## SamplingParams$(.*?)^## ", TABLE.read_text(), re.M | re.S)[1]
    rows = re.findall(r"^\| (`.*?) \| supported \|", rows, re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"clone"}
    assert names == set(VALUES)
    params = [SamplingParams(**{"max_tokens": 4, "seed": 1, name: VALUES[name]}) for name in VALUES]
    outputs = llm.generate([TEXT] * len(params), params, use_tqdm=False)
    assert all(out.finished for out in outputs)
    by_name = {name: out.outputs for name, out in zip(VALUES, outputs, strict=True)}
    assert set(by_name["allowed_token_ids"][0].token_ids) <= {67, 68}
    assert len(by_name["max_tokens"][0].token_ids) <= 3 and len(by_name["n"]) == 2
    assert by_name["detokenize"][0].text == "" != by_name["top_p"][0].text


def test_running_requests_survive_a_forgotten_cache(engine, llm):
    engine.add_request("0", TEXT, greedy(12))
    for _ in range(4):
        engine.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    [want] = llm.generate(TEXT, greedy(12), use_tqdm=False)
    assert outputs[0].outputs[0].text == want.outputs[0].text


def test_a_prefix_is_cached_after_a_clean_up(tiny):
    """Of two engines, one after the other, the second shares the prompts' beginning."""
    prompts = [TEXT * 4 + text for text in PROMPTS]
    first = LLM(str(tiny), **SMALL, enable_prefix_caching=False)
    plain = first.generate(prompts, greedy(), use_tqdm=False)
    del first
    cleanup_dist_env_and_memory()
    with LLM(str(tiny), **SMALL, enable_prefix_caching=True) as second:
        second.generate(prompts[0], greedy(), use_tqdm=False)
        cached = second.generate(prompts, greedy(), use_tqdm=False)
        cleanup_dist_env_and_memory(shutdown_ray=True)  # what is in use goes on
        assert second.generate(TEXT, greedy(2), use_tqdm=False)[0].finished
    assert [o.outputs[0].text for o in plain] == [o.outputs[0].text for o in cached]
    assert all(out.num_cached_tokens for out in cached)


def test_metrics_are_of_four_kinds(tiny):
    with LLM(str(tiny), **SMALL, disable_log_stats=False) as llm:
        llm.generate(PROMPTS, greedy(), use_tqdm=False)
        kinds = {Counter: "value", Gauge: "value", Vector: "values", Histogram: "buckets"}
        seen = set()
        for metric in llm.get_metrics():
            [kind] = [kind for kind in kinds if isinstance(metric, kind)]
            assert isinstance(metric, Metric) and hasattr(metric, kinds[kind])
            seen.add(kind)
        assert seen == {Counter, Gauge, Histogram}
    assert Vector("vllm:some", {}, [1, 2]).values == [1, 2]


def test_a_profile_is_taken(tiny, tmp_path):
    config = ProfilerConfig(profiler="torch", torch_profiler_dir=str(tmp_path / "profile"))
    with LLM(str(tiny), **SMALL, tensor_parallel_size=1, profiler_config=config) as llm:
        llm.start_profile()
        llm.generate(PROMPTS, greedy(2), use_tqdm=False)
        llm.stop_profile()
    assert len(list((tmp_path / "profile").iterdir())) == 1


@pytest.mark.parametrize(
    "constraint",
    [{"choice": ["Positive", "Negative"]}, {"regex": r"\w+@\w+\.com"},
     {"json": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"],
               "additionalProperties": False}}],
    ids=["choice", "regex", "json"],
)  # fmt: skip
def test_outputs_are_structured(llm, constraint):
    params = greedy(64, structured_outputs=StructuredOutputsParams(**constraint))
    [out] = llm.generate(TEXT, params, use_tqdm=False)
    text = out.outputs[0].text
    if "choice" in constraint:
        assert text in constraint["choice"]
    elif out.outputs[0].finish_reason == "stop":
        assert text.endswith(".com") if "regex" in constraint else "age" in json.loads(text)


def test_weights_may_be_skipped_at_first(tiny):
    with LLM(str(tiny), **SMALL, load_format="dummy", enforce_eager=True) as llm:
        [out] = llm.generate(TEXT, greedy(), use_tqdm=False)
        assert len(out.outputs[0].token_ids) <= 8
        with pytest.raises(AttributeError, match="collective_rpc is not supported"):
            llm.collective_rpc("reload_weights")


def test_the_same_seed_gives_the_same_texts(tiny):
    texts = []
    for _ in range(2):
        with LLM(str(tiny), **SMALL, seed=42) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8), use_tqdm=False)
            texts.append([out.outputs[0].text for out in outputs])
    assert texts[0] == texts[1]


def test_a_request_brings_its_own_logits_processor(llm):
    """vLLM's example has a class for the engine, that reads a token of extra_args."""

    def force(token_id):
        def process(output_token_ids, logits):
            value = logits[token_id].clone()
            logits.fill_(float("-inf"))[token_id] = value
            return logits

        return process

    params = [greedy(4, logits_processors=[force(token)]) for token in (128, 67)] + [greedy(4)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outputs[:2]] == [[128] * 4, [67] * 4]
    assert set(outputs[2].outputs[0].token_ids) != {67}
    with pytest.raises(ValueError, match="extra_args is not supported: leave it out; a function"):
        SamplingParams(extra_args={"target_token": 128})
    assert SamplingParams(logits_processors=[]) and SamplingParams(extra_args=None)


def test_a_logger_is_pythons(caplog):
    logger = init_logger("a.script")
    logger.warning("one of %d", 2)
    assert caplog.records[-1].name == "a.script" and "one of 2" in caplog.text


def test_tokens_are_streamed(tiny, llm):
    async def run():
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(tiny), enforce_eager=True, **SMALL)
        )
        params, text = greedy(8, seed=42, output_kind=RequestOutputKind.DELTA), ""
        async for output in engine.generate(request_id="a", prompt=TEXT, sampling_params=params):
            for completion in output.outputs:
                text += completion.text
            if output.finished:
                break
        engine.shutdown()
        return text

    [want] = llm.generate(TEXT, greedy(8), use_tqdm=False)
    assert asyncio.run(run()) == want.outputs[0].text


def test_generation_is_paused_and_resumed(tiny):
    async def run():
        args = AsyncEngineArgs(str(tiny), disable_log_stats=False, **SMALL)
        engine = AsyncLLM.from_engine_args(args)
        times, begun = [], asyncio.Event()

        async def generate():
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            async for output in engine.generate("Count to 100", params, request_id="test"):
                times.append((len(output.outputs[0].token_ids), time.monotonic()))
                if len(times) > 5:
                    begun.set()
            return output

        async def control():
            await begun.wait()
            await engine.pause_generation(mode="keep")
            paused = time.monotonic()
            await asyncio.sleep(0.5)
            await engine.resume_generation()
            return paused

        output, paused = await asyncio.gather(generate(), control())
        engine.shutdown()
        return output, paused

    output, paused = asyncio.run(run())
    assert output.finished and len(output.outputs[0].token_ids) == 30
    metrics = output.metrics
    assert metrics.last_token_ts > paused + 0.5 and metrics.first_token_latency < 60


def test_every_name_is_there():
    import nanovllm

    for name in nanovllm.__all__:
        assert getattr(nanovllm, name) is not None
    assert nanovllm.AsyncLLMEngine is nanovllm.AsyncLLM
