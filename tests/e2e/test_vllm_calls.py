"""Calls of vLLM's LLM beside generate and chat, on the model in the box: enqueue, truncation,
templates, overrides of the checkpoint's files, profiles."""

import _thread
import functools
import gzip
import json
import re
import threading
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from nanovllm import LLM, RequestOutput, RequestOutputKind, SamplingParams, TextPrompt, TokensPrompt

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "It is a truth universally acknowledged, that"
WHO = [{"role": "user", "content": "Who are you?"}]
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
            assert interrupted.wait(60)
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
    assert cut(truncate_prompt_tokens=-1) == [ids] * 4 + [ids[:2]]
    [long] = llm.generate(
        [ids * 999], greedy(1), use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1}
    )
    assert len(long.prompt_token_ids) == llm.max_model_len - 1


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
    with pytest.raises(ValueError, match="must be 'auto' or 'string', got 'openai'"):
        llm.chat(WHO, greedy(), chat_template_content_format="openai")


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
