"""Calls of vLLM's LLM beside generate and chat, on the model in the box: enqueue, truncation,
templates, overrides of the checkpoint's files, profiles."""

import _thread
import functools
import gzip
import itertools
import json
import pickle
import re
import threading
import time
from types import SimpleNamespace

import pytest
from patience import PATIENCE
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import AutoTokenizer

from nanovllm import (
    LLM,
    FlatLogprobs,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from nanovllm.frontend import tokenization

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "It is a truth universally acknowledged, that"
WHO = [{"role": "user", "content": "Who are you?"}]
DELTA = RequestOutputKind.DELTA
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}


def greedy(max_tokens=12, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def texts(outputs):
    return [out.outputs[0].text for out in outputs]


# enqueue


def test_what_is_queued_is_generated_when_waited_for(llm):
    prompts = ["In the beginning", TEXT, "The king"]
    params = [greedy(n, output_kind=RequestOutputKind.DELTA) for n in (20, 4, 9)]
    steps = llm.llm_engine.metrics.steps
    ids = llm.enqueue(prompts, params) + llm.enqueue_chat(WHO, greedy())
    other = llm.add_request("a", greedy())
    assert llm.llm_engine.metrics.steps == steps
    assert llm.generate(TEXT, greedy(2), use_tqdm=False)[0].finished  # another call in between
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    assert [out.request_id for out in outputs] == [*ids, other]
    want = llm.generate(prompts, params, use_tqdm=False) + llm.chat(WHO, greedy(), use_tqdm=False)
    assert texts(outputs[:4]) == texts(want)
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_an_interrupted_wait_loses_nothing(llm, monkeypatch):
    ids = llm.enqueue(["a", "b", "c"], [greedy(n, ignore_eos=True) for n in (2, 8, 19)])
    executor = llm.llm_engine.executor
    submit, calls, interrupted = executor.submit, iter(range(100)), threading.Event()

    def interrupting(step):
        if next(calls) == 5:
            _thread.interrupt_main()
            assert interrupted.wait(PATIENCE)
        return submit(step)

    monkeypatch.setattr(executor, "submit", interrupting)
    with pytest.raises(KeyboardInterrupt):
        llm.wait_for_completion(use_tqdm=False)
    interrupted.set()
    assert len(llm.llm_engine.unfinished) == 2
    llm.abort(ids[2])
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [out.request_id for out in outputs] == ids[:2]


def test_refusals_queue_nothing(llm):
    for call in (llm.enqueue, llm.generate):
        for options in (
            {"priority": [1]},
            {"lora_request": "a"},
            {"mm_processor_kwargs": {"a": 1}},
        ):
            with pytest.raises(ValueError, match=f"{next(iter(options))} is not supported"):
                call(TEXT, greedy(), **options)
    with pytest.raises(ValueError, match="output_type must be RequestOutput"):
        llm.wait_for_completion(str)
    assert llm.is_finished()


def test_arguments_that_ask_for_nothing_run(llm):
    prompts = [TEXT, {"prompt": "The king"}]
    nothing = {"lora_request": [None, None], "priority": [0, 0], "mm_processor_kwargs": {}}
    nothing["tokenization_kwargs"] = {}
    want = texts(llm.generate(prompts, greedy(), use_tqdm=False))
    assert texts(llm.generate(prompts, greedy(), use_tqdm=False, **nothing)) == want
    llm.enqueue(prompts, greedy(), **nothing)
    assert texts(llm.wait_for_completion(use_tqdm=False)) == want


# Tokenization


@pytest.mark.parametrize("skip", [None, True])
def test_prompts_are_cut_to_a_length(llm, skip):
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    prompts = [
        TEXT,
        {"prompt": TEXT},
        ids,
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids[:2]},
    ]

    def cut(**kwargs):
        params = greedy(3, skip_reading_prefix_cache=skip)
        outputs = llm.generate(prompts, params, use_tqdm=False, tokenization_kwargs=kwargs)
        assert not skip or not any(out.num_cached_tokens for out in outputs)
        assert [out.prompt for out in outputs] == [TEXT, TEXT, None, None, None]
        return [out.prompt_token_ids for out in outputs]

    assert cut(truncate_prompt_tokens=4, truncation_side="left") == [ids[-4:]] * 4 + [ids[:2]]
    assert cut(truncate_prompt_tokens=4, truncation_side="right") == [ids[:4]] * 4 + [ids[:2]]
    assert cut(truncate_prompt_tokens=4) == [ids[-4:]] * 4 + [ids[:2]]  # a question's end counts
    assert cut(truncate_prompt_tokens=-1) == [ids] * 4 + [ids[:2]]
    [long] = llm.generate(
        [ids * 999], greedy(1), use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1}
    )
    assert len(long.prompt_token_ids) == llm.max_model_len - 1


def test_a_cut_chat_keeps_its_question(llm):
    messages = [{"role": "user", "content": "filler " * 50 + "Who are you?"}]
    kwargs = {"truncate_prompt_tokens": 12}
    [out] = llm.chat(messages, greedy(1), use_tqdm=False, tokenization_kwargs=kwargs)
    text = llm.get_tokenizer().decode(out.prompt_token_ids)
    assert text.endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
    assert len(out.prompt_token_ids) == 12


def test_of_a_long_text_its_end_is_tokenized(llm, monkeypatch):
    tokenizer, text = llm.get_tokenizer(), " ".join(f"{TEXT} {i}" for i in range(9000))
    ids = tokenizer(text)["input_ids"]
    seen = []

    def watched(texts, **options):
        seen.extend(map(len, texts))
        return tokenizer(texts, **options)

    monkeypatch.setattr("nanovllm.frontend.prompts.TEXT_AT_ONCE", 500)
    for length, side in ((5, "left"), (2000, "left"), (5, "right"), (2000, "right")):
        kwargs = {"truncate_prompt_tokens": length, "truncation_side": side}
        [found] = tokenization.tokenize(text, watched, 4096, 2048, kwargs)
        assert found["prompt_token_ids"] == (ids[-length:] if side == "left" else ids[:length])
    assert max(seen) == 500 * 4**3 < len(text)


@pytest.mark.parametrize("around", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>", "$A"])
def test_the_special_tokens_of_a_text_stay(tiny, around):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    for length, side in itertools.product((3, 5, 8, 99), ("left", "right")):
        kwargs = {"truncate_prompt_tokens": length, "truncation_side": side}
        [found] = tokenization.tokenize(TEXT, tokenizer, 4096, 100, kwargs)
        tokenizer.truncation_side = side
        wanted = tokenizer(TEXT, truncation=True, max_length=length)["input_ids"]
        assert found["prompt_token_ids"] == wanted
        kwargs["add_special_tokens"] = False
        [found] = tokenization.tokenize(TEXT, tokenizer, 4096, 100, kwargs)
        plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert found["prompt_token_ids"] == (plain[-length:] if side == "left" else plain[:length])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"padding": True}, "tokenization_kwargs padding: not supported; supported: add_special_"),
        ({"truncate_prompt_tokens": 0}, "must be at least 1, or -1, got 0"),
        ({"truncate_prompt_tokens": "5"}, "must be at least 1, or -1, got '5'"),
        ({"truncate_prompt_tokens": 9999}, "leaves no room for a token in max_model_len=2048"),
        ({"add_special_tokens": 5}, "add_special_tokens must be True or False, got 5"),
        ([5], "tokenization_kwargs must be a dict, got [5]"),
        ({"truncation_side": "top"}, "truncation_side must be 'left' or 'right', got 'top'"),
    ],
)
def test_bad_tokenization_is_refused(llm, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        llm.generate(TEXT, greedy(), tokenization_kwargs=kwargs)


@pytest.mark.parametrize(
    "prompt",
    [5, None, {5}, [5.5], b"abc", [{"text": "a"}], {"prompt_token_ids": "ab"}, "\ud800", ""],
)
def test_bad_prompts_are_refused_as_ever(llm, prompt):
    with pytest.raises((TypeError, ValueError)) as plain:
        llm.generate(prompt, greedy())
    with pytest.raises(plain.type, match=re.escape(str(plain.value))):
        llm.generate(prompt, greedy(), tokenization_kwargs={"truncate_prompt_tokens": 3})


# Templates, overrides


def test_the_constructors_template_is_chats(tiny, tmp_path, llm):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for given in (template, file, str(file)):
        with LLM(str(tiny), chat_template=given, **SMALL) as other:
            [out] = other.chat(WHO, greedy(2), False)
            assert out.prompt == "<Who are you?>"
            [out] = other.chat(WHO, greedy(2), False, None, "{{ messages[0].role }}", "string")
            assert out.prompt == "user"
    with pytest.raises(ValueError, match="chat_template 'missing' is no file here"):
        LLM(str(tiny), chat_template="missing", **SMALL)
    with pytest.raises(ValueError, match="must be 'auto', 'string' or 'openai', got 'parts'"):
        llm.chat(WHO, greedy(), chat_template_content_format="parts")


def test_a_template_that_loops_over_parts_gets_the_message(llm):
    template = (
        "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ m.role }}: {{ p.text }}{% endfor %}{% endfor %} verdict:"
    )
    parts = [{"type": "text", "text": "how to pick a lock"}]
    for content in ("how to pick a lock", parts, ["how to pick a lock"]):
        messages = [{"role": "user", "content": content}]
        [prompt] = llm.render_chat(messages, chat_template=template)
        assert prompt["prompt"] == "user: how to pick a lock verdict:"


def test_the_checkpoints_files_are_overridden(tiny, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')
    with LLM(
        str(tiny),
        hf_overrides={"eos_token_id": 7, "max_position_embeddings": 99},
        generation_config=tmp_path,
        override_generation_config={"top_k": 3},
        dtype="float32",
        kv_cache_memory_bytes=4 << 20,
    ) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.top_p) == (0.25, 3, 1.0)
        assert llm.max_model_len == 99
        assert llm._checkpoint.eos_token_ids == (2, 7)
    with LLM.from_engine_args(
        SimpleNamespace(model=str(tiny), generation_config="vllm", _api_process_count=1, **SMALL)
    ) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        assert llm.get_world_size() == llm.get_world_size(include_dp=False) == 1
    for name in ("hf_overrides", "override_generation_config", "profiler_config"):
        with pytest.raises(TypeError, match=f"{name} must be a dict"):
            LLM(str(tiny), **{name: 5})
    with pytest.raises(TypeError, match="hf_token must be a string, True or False"):
        LLM(str(tiny), hf_token=5)


def test_the_hub_is_asked_as_told(monkeypatch, tiny):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"], options["token"], options["cache_dir"]))
        return tiny

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"hf_token": "secret", "download_dir": "cache", "revision": "a"}
    with LLM("no/model", tokenizer_revision="b", **options, **SMALL):
        pass
    assert asked == [
        ("no/model", revision, "secret", "cache") for revision in ("a", "b", "a")
    ]  # config.json, the tokenizer, the weights


# The rest


def test_progress_is_shown_by_a_bar_of_the_users(llm):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    llm.generate([TEXT] * 3, greedy(2), use_tqdm=functools.partial(Bar, leave=False))
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3)]


def test_a_profile_holds_the_operators(tiny, tmp_path, llm):
    with pytest.raises(ValueError, match="start_profile needs to know where to write"):
        llm.start_profile()
    with pytest.raises(RuntimeError, match="no profile is being taken"):
        llm.stop_profile()
    profiler = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "traces")}
    with LLM(str(tiny), profiler_config=profiler, **SMALL) as other:
        other.start_profile("mine")
        with pytest.raises(RuntimeError, match="being taken already"):
            other.start_profile()
        other.generate(TEXT, greedy(2), use_tqdm=False)
        other.stop_profile()
    trace = json.loads(
        gzip.decompress((tmp_path / "traces" / "mine.pt.trace.json.gz").read_bytes())
    )
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    with pytest.raises(ValueError, match="profiler_config must be"):
        LLM(str(tiny), profiler_config={"profiler": "cuda"})


def test_the_model_is_handed_out(llm):
    [num] = llm.apply_model(lambda model: sum(p.numel() for p in model.parameters()))
    assert num > 1_000_000


def test_what_is_not_supported_is_refused():
    for values in ({"thinking_token_budget": 0}, {"logprob_token_ids": [1]}, {"extra_args": {}}):
        [name] = values
        with pytest.raises(ValueError, match=f"{name} is not supported: leave it out"):
            SamplingParams(**values)
    assert SamplingParams(extra_args=None, routed_experts_prompt_start=0) == SamplingParams()
    with pytest.raises(TypeError, match="skip_reading_prefix_cache must be a bool, got 1"):
        SamplingParams(skip_reading_prefix_cache=1)


def test_prompts_have_vllms_types(llm):
    ids = llm.get_tokenizer().encode(TEXT)
    given: list[TextPrompt | TokensPrompt] = [
        TextPrompt(prompt=TEXT),
        TokensPrompt(prompt_token_ids=ids),
        TokensPrompt(prompt_token_ids=ids, prompt="its text"),
    ]
    outputs = llm.generate(given, greedy(), use_tqdm=False)
    assert [o.prompt for o in outputs] == [TEXT, None, "its text"]
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == ids


def test_lists_are_there_to_be_added_to():
    params = SamplingParams()
    assert (params.stop, params.stop_token_ids, params.bad_words) == ([], [], [])
    params.stop_token_ids.append(7)
    assert SamplingParams() == SamplingParams(stop_token_ids=None, bad_words=None) != params


def test_params_from_json():
    params = SamplingParams.from_optional(temperature=None, max_tokens=None, top_k=None,
                                          logit_bias={"5": 200, "6": -1000})  # fmt: skip
    assert params == SamplingParams(max_tokens=None, logit_bias={5: 100.0, 6: -100.0})
    assert params.clone() == params and params.clone().logit_bias is not params.logit_bias
    for bias in ({"a": 1}, {"1": None}):
        with pytest.raises(ValueError, match="logit_bias must be token id -> bias"):
            SamplingParams.from_optional(logit_bias=bias)


# What outputs and the model say


def test_logprobs_are_lists(llm):
    params = greedy(6, logprobs=2, prompt_logprobs=1)
    first, again = (llm.generate(TEXT, params, use_tqdm=False)[0] for _ in range(2))
    got, same = first.outputs[0].logprobs, again.outputs[0].logprobs
    assert [set(line) for line in got] == [set(line) for line in list(same)]
    assert got == list(got) and list(got) == got and got == got[:] and got != got[1:]
    assert got != [] and got != "text" and got != 5
    for joined in (got + got, got + list(got), list(got) + got):
        assert type(joined) is list and joined == list(got) * 2
    prompt = first.prompt_logprobs
    assert prompt == list(prompt) and prompt + prompt == list(prompt) * 2
    with pytest.raises(TypeError):
        got + 5
    assert pickle.loads(pickle.dumps(got)) == got


@pytest.mark.parametrize("num", [0, 1, 3])
def test_flat_logprobs_are_the_same_numbers(llm, num):
    params = dict(logprobs=num, prompt_logprobs=num)
    [want], [out] = (
        llm.generate(TEXT, greedy(6, **params, flat_logprobs=flat), use_tqdm=False)
        for flat in (False, True)
    )
    for flat, lines in [
        (out.outputs[0].logprobs, want.outputs[0].logprobs),
        (out.prompt_logprobs, want.prompt_logprobs),
    ]:
        assert isinstance(flat, FlatLogprobs) and len(flat) == len(lines)
        assert [line or {} for line in lines] == list(flat) == flat
        width = num + 1
        num_entries = width * sum(line is not None for line in lines)
        for entries in (flat.token_ids, flat.logprobs, flat.ranks, flat.decoded_tokens):
            assert len(entries) == num_entries
        assert flat[2:] == flat[2:4] + flat[4:] == list(flat)[2:]
        assert type(flat[1:]) is type(flat + flat) is FlatLogprobs and flat[:0] == []
        assert pickle.loads(pickle.dumps(flat)) == flat
        for i, start in enumerate(flat.start_indices):
            if lines[i] is not None:
                assert flat.token_ids[start] == next(iter(lines[i]))
    assert out.prompt_logprobs[0] == {} and out.prompt_logprobs.end_indices[0] == 0
    assert out.outputs[0].logprobs.token_ids[::width] == out.outputs[0].token_ids


def test_flat_logprobs_come_in_parts(llm):
    params = greedy(6, logprobs=2, flat_logprobs=True)
    [want] = llm.generate(TEXT, params, use_tqdm=False)
    parts = [out.outputs[0].logprobs for out in llm.stream(TEXT, params)]
    assert all(isinstance(part, FlatLogprobs) for part in parts)
    token_ids = [token for part in parts for token in part.token_ids]
    assert token_ids == want.outputs[0].logprobs.token_ids
    llm.add_request(TEXT, greedy(6, logprobs=2, flat_logprobs=True, output_kind=DELTA))
    whole = None
    while not llm.is_finished():
        for out in llm.step():
            if whole is None:
                whole = out
            else:
                whole.add(out, aggregate=True)
    assert whole.outputs[0].logprobs.token_ids == want.outputs[0].logprobs.token_ids


def test_small_temperatures_are_raised_as_in_vllm(llm, caplog):
    for temperature in (1e-6, 0.0099):
        params = SamplingParams(temperature=temperature)
        assert params.temperature == 0.01 and not params.is_greedy
    assert "temperature=1e-06 is raised to 0.01" in caplog.text
    caplog.clear()
    assert SamplingParams(temperature=0).is_greedy and SamplingParams(temperature=0.01)
    assert SamplingParams(n=2, temperature=1e-6).n == 2 and len(caplog.records) == 1
    [out] = llm.generate(TEXT, SamplingParams(temperature=1e-9, max_tokens=4), use_tqdm=False)
    assert out.finished


def test_metrics_have_vllms_names(llm):
    outputs = llm.generate([TEXT, "a"], [greedy(6, ignore_eos=True), greedy(1)], use_tqdm=False)
    for out, num in zip(outputs, (6, 1), strict=True):
        times = out.metrics
        assert times.num_generation_tokens == num == len(out.outputs[0].token_ids)
        assert times.queued_ts == times.arrival_time <= times.scheduled_ts < times.first_token_ts
        assert times.first_token_ts <= times.last_token_ts <= times.finished_time
        assert times.first_token_latency == times.first_token_ts - times.arrival_time > 0
        assert (times.first_token_ts == times.last_token_ts) == (num == 1)
    params = SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True)
    assert llm.generate(TEXT, params, use_tqdm=False)[0].metrics.num_generation_tokens == 15
    llm.add_request(TEXT, greedy(3, ignore_eos=True))
    numbers = [out.metrics.num_generation_tokens for _ in range(3) for out in llm.step()]
    assert numbers == [1, 2, 3] and llm.is_finished()


def test_histograms_count_each_request(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        nums = [1, 4, 9]
        params = [greedy(n, ignore_eos=True) for n in nums]
        outputs = llm.generate([TEXT] * 3, params, use_tqdm=False)
        seen = {metric.name: metric for metric in llm.get_metrics()}

    def total(name):
        metric = seen[f"vllm:{name}"]
        assert metric.buckets["+Inf"] == metric.count
        return metric.count, metric.sum

    assert total("request_generation_tokens") == (3, sum(nums))
    assert seen["vllm:request_generation_tokens"].buckets["5.0"] == 2
    times = [out.metrics for out in outputs]
    for name, seconds in [
        ("request_queue_time_seconds", [t.scheduled_ts - t.queued_ts for t in times]),
        ("request_prefill_time_seconds", [t.first_token_ts - t.scheduled_ts for t in times]),
        ("request_decode_time_seconds", [t.last_token_ts - t.first_token_ts for t in times]),
        ("request_inference_time_seconds", [t.last_token_ts - t.scheduled_ts for t in times]),
        ("time_to_first_token_seconds", [t.first_token_latency for t in times]),
        ("e2e_request_latency_seconds", [t.finished_time - t.arrival_time for t in times]),
        # A time between tokens for each token but the first: together the time of decoding.
        ("inter_token_latency_seconds", [t.last_token_ts - t.first_token_ts for t in times]),
    ]:
        num = sum(nums) - 3 if name == "inter_token_latency_seconds" else 3
        assert total(name) == (num, pytest.approx(sum(seconds)))


def test_time_between_tokens_counts_a_new_start(tiny):
    """Sequences that compute their tokens again go on: the pause is a time between two tokens."""
    with LLM(str(tiny), **SMALL) as llm:
        for prompt, num in ((TEXT, 9), ("a", 5), ("b", 12)):
            llm.add_request(prompt, greedy(num, ignore_eos=True))
        outputs = []
        for i in range(40):
            if i == 3:
                time.sleep(0.2)
                assert llm.reset_prefix_cache(reset_running_requests=True)
            outputs += [out for out in llm.step() if out.finished]
        seen = {metric.name: metric for metric in llm.get_metrics()}
    between, times = seen["vllm:inter_token_latency_seconds"], [out.metrics for out in outputs]
    assert len(outputs) == 3 and between.count == 9 + 5 + 12 - 3
    assert between.sum == pytest.approx(sum(t.last_token_ts - t.first_token_ts for t in times))
    assert between.buckets["0.15"] <= between.count - 3


def test_the_models_config_has_vllms_names(llm, tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert llm.model_config.max_model_len == llm.max_model_len == 2048
    assert llm.model_config.get_vocab_size() == config["vocab_size"]
    assert llm.model_config.hf_config.num_hidden_layers == config["num_hidden_layers"]
    with LLM(str(tiny), **SMALL) as other:
        assert other.model_config.max_model_len == 256


def test_in_float32_a_batch_changes_nothing_but_the_last_digits(llm):
    """Greedy tokens, the tokens of a seed, and log-probabilities to float32's rounding."""
    params = [
        greedy(12, logprobs=3, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=12, logprobs=3, ignore_eos=True),
    ]
    others = ["The king", "In the beginning was the", TEXT * 3, "a"] * 3
    for own in params:
        [alone] = llm.generate(TEXT, own, use_tqdm=False)
        among = llm.generate([TEXT, *others], [own] + [greedy(20)] * 12, use_tqdm=False)[0]
        assert among.outputs[0].token_ids == alone.outputs[0].token_ids
        for one, other in zip(alone.outputs[0].logprobs, among.outputs[0].logprobs, strict=True):
            assert one.keys() == other.keys()
            for token in one:
                assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)
