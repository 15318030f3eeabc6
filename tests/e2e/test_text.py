"""The text side of vLLM's offline API, as its scripts use it, on the model in the box."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, RequestOutputKind, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20}


def greedy(max_tokens=40, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def generate(llm, prompts, params):
    return [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def llm(tiny, request):
    with LLM(str(tiny), async_scheduling=request.param, **SMALL) as llm:
        yield llm
        assert not llm.llm_engine.unfinished


@pytest.fixture
def question(llm):
    return llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True
    )


# Stop strings


def test_stop_strings_cut_the_text(llm):
    [whole] = generate(llm, TEXT, greedy())
    middle = whole.text[len(whole.text) // 2 :][:7]
    end = whole.text.index(middle)
    for params in (greedy(stop=middle), greedy(stop=["never there", middle])):
        [cut] = generate(llm, TEXT, params)
        assert cut.text == whole.text[:end]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", middle)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        decode = llm.get_tokenizer().decode
        assert middle in decode(cut.token_ids) and middle not in decode(cut.token_ids[:-1])
    [kept] = generate(llm, TEXT, greedy(stop=middle, include_stop_str_in_output=True))
    assert kept.text == whole.text[: end + len(middle)] and kept.token_ids == cut.token_ids


def test_each_request_has_its_own_stop_strings(llm):
    [whole] = generate(llm, TEXT, greedy())
    params = [greedy(), greedy(stop=" "), greedy(stop=whole.text[9:12]), greedy(stop="\0")]
    texts = [out.text for out in generate(llm, [TEXT] * 4, params)]
    stops = [whole.text.index(p.stop[0]) for p in params[1:3]]
    assert texts == [whole.text, *(whole.text[:end] for end in stops), whole.text]


def test_min_tokens_holds_stop_strings_back(llm):
    [whole] = generate(llm, TEXT, greedy())
    [cut] = generate(llm, TEXT, greedy(stop=" ", min_tokens=12))
    assert len(cut.token_ids) > 12 and cut.text == whole.text[: len(cut.text)]
    assert whole.text[len(cut.text)] == " " and " " in cut.text


def test_a_stop_string_in_the_last_token_counts_before_the_length(llm):
    [whole] = generate(llm, TEXT, greedy())
    num = 1 + next(i for i in range(40) if " " in llm.get_tokenizer().decode(whole.token_ids[i]))
    [cut] = generate(llm, TEXT, greedy(num, stop=" "))
    assert (len(cut.token_ids), cut.finish_reason, cut.stop_reason) == (num, "stop", " ")


@pytest.mark.parametrize("length", [1, 3, 9])
def test_stops_where_transformers_stops(llm, tiny, length):
    tokenizer = llm.get_tokenizer()
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompts = [TEXT, "The king said unto", "It is a truth universally acknowledged, that"]
    for prompt, whole in zip(prompts, generate(llm, prompts, greedy()), strict=True):
        stop = whole.text[20 : 20 + length]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"do_sample": False, "max_new_tokens": 40, "tokenizer": tokenizer}
        expected = oracle.generate(ids, stop_strings=[stop], **options)[0, ids.shape[1] :].tolist()
        [cut] = generate(llm, prompt, greedy(stop=[stop]))
        assert cut.token_ids == expected and cut.stop_reason == stop


def test_stop_strings_need_a_tokenizer(tiny):
    with (
        LLM(str(tiny), skip_tokenizer_init=True, **SMALL) as llm,
        pytest.raises(ValueError, match="stop needs a tokenizer: after skip_tokenizer_init=True"),
    ):
        llm.generate([[5], [6]], [greedy(), greedy(stop="a")])


# How text is made


def test_detokenize_false_leaves_the_text_empty(llm):
    [whole, bare] = generate(llm, [TEXT] * 2, [greedy(), greedy(detokenize=False)])
    assert (bare.text, bare.token_ids) == ("", whole.token_ids) and whole.text


def test_special_tokens_are_shown_if_asked_for(llm, question):
    params = greedy(200, skip_special_tokens=False, spaces_between_special_tokens=False)
    [plain] = generate(llm, question, greedy(200))
    assert plain.finish_reason == "stop"
    [shown] = generate(llm, question, params)
    assert shown.text == plain.text, "EOS stopped it, so it stays out"
    params.include_stop_str_in_output = True
    [shown] = generate(llm, question, params)
    assert shown.text == plain.text + "<|im_end|>" and shown.stop_reason is None
    params.ignore_eos, params.max_tokens = True, len(plain.token_ids) + 5
    [longer] = generate(llm, question, params)
    assert longer.text == llm.get_tokenizer().decode(longer.token_ids)
    params.stop = ["<|im_end|>"]
    [cut] = generate(llm, question, params)
    assert cut.text == shown.text and cut.stop_reason == "<|im_end|>"


# output_kind


def step_all(llm, *requests):
    """Step until all is done. The completions that came, by request."""
    names = [llm.add_request(prompt, params) for prompt, params in requests]
    seen = {name: [] for name in names}
    while not llm.is_finished():
        for out in llm.step():
            assert out.finished == out.outputs[0].finished()
            seen[out.request_id].append(out.outputs[0])
    return [seen[name] for name in names]


def test_output_kinds_are_vllms(llm, question):
    [whole] = generate(llm, question, greedy(200))
    kinds = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
    requests = [(question, greedy(200, output_kind=kind)) for kind in kinds]
    so_far, deltas, final = step_all(llm, *requests)
    assert final == [whole] and so_far[-1] == whole and deltas[-1].finish_reason == "stop"
    assert len(so_far) == len(deltas) == len(whole.token_ids)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert all(len(delta.token_ids) == 1 for delta in deltas)
    for i, out in enumerate(so_far):
        assert out.token_ids == whole.token_ids[: i + 1]
        assert out.text == "".join(delta.text for delta in deltas[: i + 1])


def test_deltas_hold_back_what_may_begin_a_stop_string(llm):
    [whole] = generate(llm, TEXT, greedy())
    stop = whole.text[30:50]
    params = greedy(stop=["never there", stop], output_kind=RequestOutputKind.DELTA)
    [deltas] = step_all(llm, (TEXT, params))
    assert "".join(delta.text for delta in deltas) == whole.text[:30]
    shown = decoded = ""
    for delta in deltas[:-1]:
        shown, decoded = shown + delta.text, decoded + llm.get_tokenizer().decode(delta.token_ids)
        assert len(shown) == max(0, len(decoded) - len(stop) + 1)


def test_a_delta_is_all_that_came_since_the_last_one(llm):
    [whole] = generate(llm, TEXT, greedy(20))
    name = llm.add_request(TEXT, greedy(20, output_kind=RequestOutputKind.DELTA))
    deltas = llm.step()
    generate(llm, "The king", greedy(10))
    while not llm.is_finished():
        deltas += llm.step()
    assert {out.request_id for out in deltas} == {name}
    assert max(len(out["token_ids"]) for out in deltas) >= 9
    assert "".join(out["text"] for out in deltas) == whole.text


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_generate_waits_for_the_end_whatever_the_output_kind(llm, kind):
    [whole] = generate(llm, TEXT, greedy())
    assert generate(llm, TEXT, greedy(output_kind=kind)) == [whole]


# chat

WHO = [{"role": "user", "content": "Who are you?"}]
KING = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a king."}]


def chat(llm, messages, params=None, **options):
    return llm.chat(messages, params or greedy(), use_tqdm=False, **options)


def test_chat_is_generate_on_the_templates_tokens(llm):
    apply = llm.get_tokenizer().apply_chat_template
    ids = [apply(m, add_generation_prompt=True, return_dict=False) for m in (WHO, KING)]
    expected = generate(llm, ids, [greedy(200), greedy(20)])
    outputs = chat(llm, [WHO, KING], [greedy(200), greedy(20)])
    assert [out.outputs[0] for out in outputs] == expected
    assert [out.prompt_token_ids for out in outputs] == ids
    [alone] = chat(llm, WHO, greedy(200))
    assert alone.outputs == [expected[0]] and "I am" in alone["text"]
    assert alone.prompt == apply(WHO, add_generation_prompt=True, tokenize=False)


def test_chat_goes_on_with_the_last_message(llm):
    begun = [*WHO, {"role": "assistant", "content": "I am a"}]
    options = dict(add_generation_prompt=False, continue_final_message=True)
    [out] = chat(llm, begun, greedy(200), **options)
    [whole] = chat(llm, WHO, greedy(200))
    assert out.prompt.endswith("assistant\nI am a")
    assert whole["text"] == "I am a" + out["text"]


def test_chat_takes_another_template_and_what_it_reads(llm):
    template = "{{ messages[0].content }}{{ word }}{{ tools | length }}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    options = dict(chat_template=template, chat_template_kwargs={"word": " In"}, tools=tools)
    [out] = chat(llm, WHO, **options)
    assert out.prompt == "Who are you? In1"


def test_chat_errors_come_before_anything_runs(llm):
    steps = llm.llm_engine.metrics.steps
    for messages, params, options, error, text in (
        (WHO, [], {}, ValueError, "1 prompts but 0 sampling_params"),
        ([WHO, "b"], None, {}, TypeError, "conversation 1 must be a list of messages"),
        (WHO, None, {"continue_final_message": True}, ValueError, "add_generation_prompt=False"),
        (WHO, None, {"chat_template": "{{"}, ValueError, "the chat template refuses"),
        (WHO, None, {"lora_request": 1}, ValueError, "lora_request is not supported"),
    ):
        with pytest.raises(error, match=text):
            llm.chat(messages, params, **options)
    assert llm.llm_engine.metrics.steps == steps


def test_chat_needs_a_tokenizer(tiny):
    with (
        LLM(str(tiny), skip_tokenizer_init=True, **SMALL) as llm,
        pytest.raises(ValueError, match="there is no tokenizer: skip_tokenizer_init=True"),
    ):
        llm.chat(WHO)


# stream

PROMPTS = [TEXT, "The king said unto", [5, 6, 7]]


def texts(outputs, num_prompts):
    """What has been streamed of each prompt."""
    result = [""] * num_prompts
    for out in outputs:
        result[out.index] += out["text"]
    return result


@pytest.fixture
def idle(llm):
    """The engine, in which nothing may be left; it then works as before."""
    [expected] = generate(llm, TEXT, greedy())
    yield llm
    blocks = llm.llm_engine.scheduler.block_manager
    assert not llm.llm_engine.unfinished and not llm._thread.clients
    assert blocks.num_free == blocks.num_blocks
    assert generate(llm, TEXT, greedy()) == [expected]


def test_a_streams_increments_add_up_to_generates_outputs(idle):
    params = [greedy(), greedy(stop=" the"), greedy(7, ignore_eos=True)]
    whole = generate(idle, PROMPTS, params)
    outputs = list(idle.stream(PROMPTS, params))
    assert texts(outputs, 3) == [out.text for out in whole]
    for i, want in enumerate(whole):
        mine = [out for out in outputs if out.index == i]
        assert [token for out in mine for token in out["token_ids"]] == want.token_ids
        assert [out.finished for out in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].outputs[0].stop_reason == want.stop_reason
        assert len({out.request_id for out in mine}) == 1
    assert outputs[0].prompt == TEXT and outputs[-1].metrics.finished_time is not None


def test_a_stream_never_splits_a_character(idle):
    tokenizer = idle.get_tokenizer()
    bias = tokenizer("\N{PARTY POPPER} \N{PARTY POPPER}")["input_ids"]
    seq = idle._requests.make([[5]], greedy())[0]
    shown = []
    for token in bias:
        seq.token_ids.append(token)
        shown.append(idle._requests.output([seq], delta=True)["text"])
    assert len(bias) > 3 and "".join(shown) == "\N{PARTY POPPER} \N{PARTY POPPER}"
    assert all("\ufffd" not in text for text in shown)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
@pytest.mark.parametrize("way", ["break", "close", "error", "drop", "close at once"])
def test_leaving_a_stream_aborts_what_is_left(idle, num_taken, way):
    stream = idle.stream(PROMPTS, greedy(ignore_eos=True))
    assert len(idle.llm_engine.unfinished) == 3
    if way == "close at once":
        stream.close()
        return
    for _ in range(num_taken):
        next(stream)
    if way == "close":
        stream.close()
    elif way == "drop":
        del stream
    elif way == "break":
        for _ in stream:
            del stream
            break
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in idle.stream(PROMPTS, greedy()):
                raise ZeroDivisionError
        stream.close()


def test_a_streams_input_is_checked_before_anything_runs(idle):
    steps = idle.llm_engine.metrics.steps
    for prompts, params, error in (
        (["a", ""], greedy(), ValueError),
        ("a", [], ValueError),
        (5, greedy(), TypeError),
    ):
        with pytest.raises(error):
            idle.stream(prompts, params)
    assert list(idle.stream([], greedy())) == []
    assert idle.llm_engine.metrics.steps == steps


def test_others_go_on_beside_a_stream(idle):
    whole = generate(idle, PROMPTS, greedy(ignore_eos=True))
    idle.add_request(PROMPTS[1], greedy(ignore_eos=True), "mine")
    outputs, seen = [], []
    for out in idle.stream([PROMPTS[0], PROMPTS[2]], greedy(ignore_eos=True)):
        outputs.append(out)
        if len(outputs) == 4:
            inner = generate(idle, PROMPTS[1], greedy(5))[0].text
            assert texts(idle.stream(PROMPTS[1], greedy(5)), 1) == [inner]
            assert inner and whole[1].text.startswith(inner)
        if len(outputs) == 10:
            while not idle.is_finished():
                seen += idle.step()
    assert texts(outputs, 2) == [whole[0].text, whole[2].text]
    assert {out.request_id for out in seen} == {"mine"} and seen[-1]["text"] == whole[1].text


def test_a_streamed_request_may_be_aborted(idle, monkeypatch):
    whole = generate(idle, PROMPTS[:2], greedy(ignore_eos=True))
    outputs, executor = [], idle.llm_engine.executor
    submit = executor.submit  # slower than the abort is
    monkeypatch.setattr(executor, "submit", lambda step: time.sleep(0.02) or submit(step))
    for out in idle.stream(PROMPTS[:2], greedy(ignore_eos=True)):
        outputs.append(out)
        if out.index == 0 and len(outputs) > 6:
            idle.abort(out.request_id)
    first, second = texts(outputs, 2)
    assert whole[0].text.startswith(first) and first != whole[0].text and second == whole[1].text


def test_a_failed_step_ends_its_stream(idle, monkeypatch):
    stream = idle.stream(TEXT, greedy())
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(idle.llm_engine.executor, "submit", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)


def test_a_stream_of_a_closed_llm_says_so(tiny):
    with LLM(str(tiny), **SMALL) as llm:
        streams = [llm.stream(TEXT, greedy()) for _ in range(2)]
        next(streams[0])
    streams[0].close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        list(streams[1])
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.stream(TEXT)
