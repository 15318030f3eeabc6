"""LLM: what a user of the library relies on, on the model in the box."""

import gc
import json
import logging
import pickle
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from random import Random

import pytest
import torch
from patience import PATIENCE
from transformers import AutoTokenizer

import nanovllm
from nanovllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm.quantization.weight_format import packs_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 64}


def load(folder, **options):
    """A small engine for prompts of token ids."""
    return LLM(str(folder), **({"skip_tokenizer_init": True} | SMALL | options))


def greedy(max_tokens=8, **values):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def tokens(llm, prompts, params):
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


def drain(llm):
    """Step until all is done. Every output that came, by request."""
    seen = {}
    while not llm.is_finished():
        for out in llm.step():
            seen.setdefault(out.request_id, []).append(out)
    return seen


@pytest.fixture
def ids(llm):
    return llm.get_tokenizer()(TEXT)["input_ids"]


@pytest.fixture
def question(llm):
    """A chat prompt that the model in the box answers with a sentence and EOS."""
    return llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True
    )


@pytest.fixture(autouse=True)
def left_as_found(request):
    yield
    if "llm" in request.fixturenames:
        assert request.getfixturevalue("llm").is_finished()


# Prompts and outputs


def test_every_form_of_prompt_gives_the_same_tokens(llm, ids):
    [expected] = tokens(llm, TEXT, greedy())
    forms = [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}]
    for form in [*forms, [TEXT], [ids]]:
        assert tokens(llm, form, greedy()) == [expected]
    outputs = llm.generate(forms, greedy(), use_tqdm=False)
    assert [out["token_ids"] for out in outputs] == [expected] * 4
    assert [out.prompt for out in outputs] == [TEXT, None, TEXT, None]
    assert all(out.prompt_token_ids == ids for out in outputs)


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [[7 * i] * (1 + 11 * i % 23) for i in range(1, 9)]
    params = [greedy(3 + 5 * i % 7, ignore_eos=True) for i in range(1, 9)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [out.prompt_token_ids for out in outputs] == prompts
    assert [len(out["token_ids"]) for out in outputs] == [p.max_tokens for p in params]
    for prompt, p, out in zip(prompts, params, outputs, strict=True):
        assert tokens(llm, prompt, p) == [out["token_ids"]]


def test_an_output_has_vllms_fields_and_nano_vllms_keys(llm, ids):
    [out] = llm.generate(TEXT, greedy(), use_tqdm=False)
    assert isinstance(out, RequestOutput) and isinstance(out.request_id, str)
    assert pickle.loads(pickle.dumps(out)) == out  # before its prompt's tokens are read
    assert (out.prompt, out.prompt_token_ids, out.prompt_logprobs) == (TEXT, ids, None)
    assert asdict(out)["prompt_token_ids"] is not out.prompt_token_ids is out.prompt_token_ids
    assert out.finished and isinstance(out.num_cached_tokens, int)
    times = out.metrics
    assert times.arrival_time <= times.first_token_time <= times.finished_time
    [completion] = out.outputs
    assert isinstance(completion, CompletionOutput) and completion.finished()
    assert (completion.index, completion.cumulative_logprob, completion.logprobs) == (0, None, None)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert out["text"] is completion.text and out["token_ids"] is completion.token_ids
    with pytest.raises(KeyError, match="'logprobs': a RequestOutput answers 'text' and 'token_ids"):
        out["logprobs"]


def test_no_parameters_take_the_checkpoints(llm):
    default = llm.get_default_sampling_params()
    assert (default.temperature, default.top_k, default.top_p) == (0.6, 20, 0.95)
    assert default.max_tokens == 16
    seen = []
    rows = llm.llm_engine.executor.runner.rows
    start = rows.start
    with pytest.MonkeyPatch.context() as patch:

        def spy(starts, record):
            seen.extend(start.params for start in starts)
            start(starts, record)

        patch.setattr(rows, "start", spy)
        llm.generate([TEXT, TEXT], use_tqdm=False)
        llm.generate(TEXT, SamplingParams(), use_tqdm=False)
    assert seen == [default, default, SamplingParams()]


def test_changing_parameters_after_admission_has_no_effect(llm):
    params = greedy(8, stop_token_ids=[])
    expected = tokens(llm, TEXT, params)
    llm.add_request(TEXT, params, "a")
    params.max_tokens, params.temperature = 2, 5.0
    params.stop_token_ids += expected[0]
    assert [outs[-1]["token_ids"] for outs in drain(llm).values()] == expected


# Stopping


def test_eos_is_among_the_tokens_but_not_in_the_text(llm, question):
    [out] = llm.generate(question, greedy(200), use_tqdm=False)
    assert out["token_ids"][-1] == 2 and 2 not in out["token_ids"][:-1]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", None)
    assert out["text"] == llm.get_tokenizer().decode(out["token_ids"][:-1])
    assert "<|im_end|>" not in out["text"]


def test_ignore_eos_goes_on_and_special_tokens_stay_out_of_the_text(llm, question):
    [ended] = tokens(llm, question, greedy(200))
    [out] = llm.generate(question, greedy(100, ignore_eos=True), use_tqdm=False)
    assert len(out["token_ids"]) == 100 and out["token_ids"][: len(ended)] == ended
    assert out.outputs[0].finish_reason == "length"
    assert "<|" not in out["text"] and len(out["text"]) > 100


def test_min_tokens_delays_eos(llm, question):
    [ended] = tokens(llm, question, greedy(200))
    n = len(ended)
    assert tokens(llm, question, greedy(200, min_tokens=n - 1)) == [ended]
    [longer] = tokens(llm, question, greedy(n + 5, min_tokens=n + 5))
    assert len(longer) == n + 5 and longer[: n - 1] == ended[:-1] and 2 not in longer


def test_a_stop_token_ends_the_request_and_stays_out_of_the_text(llm):
    [base] = tokens(llm, TEXT, greedy(30))
    stop = base[5]
    end = base.index(stop) + 1
    [out] = llm.generate(TEXT, greedy(30, stop_token_ids=[999, stop]), use_tqdm=False)
    assert out["token_ids"] == base[:end]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", stop)
    assert out["text"] == llm.get_tokenizer().decode(base[: end - 1])
    [later] = tokens(llm, TEXT, greedy(30, stop_token_ids=[stop], min_tokens=end + 1))
    assert len(later) > end and stop not in later[: end + 1]


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_every_eos_id_stops(llm, ids, copy_tiny, where):
    [base] = tokens(llm, TEXT, greedy(30, ignore_eos=True))
    first, second = list(dict.fromkeys(base))[2:4]
    folder = copy_tiny(**{where: {"eos_token_id": [second, first]}})
    if where == "config":
        (folder / "generation_config.json").unlink()
    with load(folder) as other:
        for prompt, rest in [(ids, base), (ids + base[:3], base[3:])]:
            ends = min(rest.index(eos) for eos in (first, second) if eos in rest)
            [out] = other.generate(prompt, greedy(30), use_tqdm=False)
            assert out["token_ids"] == rest[: ends + 1] and ends < 29
            reason = None if rest[ends] == second else first  # only the first EOS goes unnamed
            assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", reason)
        assert base.index(first) < 3 <= base.index(second), "each id ended one of the two"


# Seeds


def random(max_tokens=8, **values):
    return SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True, **values)


def test_a_seed_draws_the_same_tokens_whatever_else_runs(llm):
    seeds = [1, 2, 3]
    alone = [tokens(llm, TEXT, random(seed=seed))[0] for seed in seeds]
    assert len({tuple(t) for t in alone}) == 3
    assert tokens(llm, [TEXT] * 3, [random(seed=seed) for seed in seeds]) == alone
    others = [[9] * 40, TEXT, [8], TEXT, TEXT]
    params = [random(20), random(seed=3), greedy(), random(seed=1), random(seed=2)]
    mixed = tokens(llm, others, params)
    assert [mixed[3], mixed[4], mixed[1]] == alone


def test_without_seeds_requests_differ_and_the_engines_seed_repeats_them(tiny):
    def run(**options):
        with load(tiny, **options) as llm:
            return tokens(llm, [[5, 6, 7]] * 2, random()) + tokens(llm, [5, 6, 7], random())

    first = run()
    assert len({tuple(t) for t in first}) == 3
    assert run(seed=0) == first
    assert not {tuple(t) for t in run(seed=1)} & {tuple(t) for t in first}


# Step by step


def test_driving_the_engine_by_hand_streams_what_generate_returns(llm, question):
    expected = llm.generate([TEXT, question], greedy(60), use_tqdm=False)
    assert llm.is_finished() and llm.step() == []
    names = [llm.add_request(TEXT, greedy(60)), llm.add_request(question, greedy(60), "mine")]
    assert names[1] == "mine" and not llm.is_finished()
    seen = drain(llm)
    for name, want in zip(names, expected, strict=True):
        texts = [out["text"] for out in seen[name]]
        assert all(b.startswith(a) for a, b in pairwise(texts))
        assert len(set(texts)) > 10
        assert [out.finished for out in seen[name]] == [False] * (len(texts) - 1) + [True]
        assert (texts[-1], seen[name][-1]["token_ids"]) == (want["text"], want["token_ids"])


def test_requests_added_by_hand_go_on_while_generate_runs(llm):
    expected = tokens(llm, [TEXT, [5, 6]], [greedy(20), greedy(3, ignore_eos=True)])
    llm.add_request(TEXT, greedy(20), "long")
    llm.add_request([5, 6], greedy(3, ignore_eos=True), "short")
    llm.step()
    [out] = llm.generate([9], greedy(6, ignore_eos=True), use_tqdm=False)
    assert out.prompt_token_ids == [9] and not llm.is_finished()
    progress = llm.step()
    assert sorted(o.request_id for o in progress) == ["long", "short"]  # "short" ended meanwhile
    seen = drain(llm)
    assert "short" not in seen and progress[-1].finished
    assert [seen["long"][-1]["token_ids"], progress[-1]["token_ids"]] == expected


def test_a_batch_that_runs_longest_first_comes_back_in_order(tiny):
    prompts = [[5 + i] * (1 + i % 3) for i in range(7)]
    params = [greedy(n, ignore_eos=True) for n in (3, 9, 1, 12, 5, 9, 20)]
    with load(tiny, max_num_seqs=2, num_gpu_blocks_override=64, kv_cache_memory_bytes=None) as llm:
        expected = [tokens(llm, [p], q)[0] for p, q in zip(prompts, params, strict=True)]
        steps = llm.llm_engine.metrics.steps
        assert tokens(llm, prompts, params) == expected
        assert llm.llm_engine.metrics.steps - steps <= 31  # 59 tokens, 2 at a time, and the seam


def test_generate_makes_outputs_while_others_run(llm, monkeypatch):
    left, make_output, engine = [], llm._requests.output, llm.llm_engine

    def output(*args):
        left.append(len(engine.unfinished))
        return make_output(*args)

    monkeypatch.setattr(llm._requests, "output", output)
    params = [greedy(n, ignore_eos=True) for n in (9, 2, 5)]
    outs = llm.generate([TEXT] * 3, params, use_tqdm=False)
    assert [len(out["token_ids"]) for out in outs] == [9, 2, 5]
    assert left == [2, 1, 0]


def test_abort_ends_one_request_and_spares_the_others(llm):
    expected = tokens(llm, TEXT, greedy(20))
    for name in ("gone", "waiting", "kept"):
        llm.add_request(TEXT, greedy(20), name)
    llm.abort("waiting")
    for _ in range(5):
        assert {out.request_id for out in llm.step()} == {"gone", "kept"}
    for name in ("gone", "gone", "unknown"):
        llm.abort(name)
    seen = drain(llm)
    assert list(seen) == ["kept"] and [seen["kept"][-1]["token_ids"]] == expected
    llm.abort("kept")  # it has ended


def test_aborting_all_finishes_the_engine(llm):
    llm.add_request(TEXT, greedy(20), "a")
    llm.step()
    llm.abort("a")
    assert llm.is_finished() and llm.step() == []
    block_manager = llm.llm_engine.scheduler.block_manager
    assert block_manager.num_free == block_manager.num_blocks
    llm.add_request(TEXT, greedy(2), "b")
    tokens(llm, TEXT, greedy(6))
    llm.abort("b")  # it ended during generate: its output is still to come
    with pytest.raises(ValueError, match="request_id 'b' is in use"):
        llm.add_request(TEXT, greedy(2), "b")
    [out] = llm.step()
    assert out.finished and llm.is_finished() and llm.step() == []


def test_an_id_is_free_again_once_its_request_ended(llm):
    for _ in range(2):
        llm.add_request(TEXT, greedy(2), "again")
        with pytest.raises(ValueError, match="'again' is in use by an unfinished request"):
            llm.add_request(TEXT, greedy(2), "again")
        assert len(drain(llm)["again"]) == 2


def test_chosen_ids_that_look_like_ours_do_not_clash(llm):
    following = llm._requests.num_made + 1
    llm.add_request(TEXT, greedy(4), str(following))
    assert len(tokens(llm, [TEXT] * 3, greedy(2))) == 3
    assert list(drain(llm)) == [str(following)]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collections_wait_for_the_first_step_only(llm, monkeypatch, enabled):
    seen = []
    submit = llm.llm_engine.executor.submit

    def noting(step):
        seen.append(gc.isenabled())
        return submit(step)

    monkeypatch.setattr(llm.llm_engine.executor, "submit", noting)
    (gc.enable if enabled else gc.disable)()
    try:
        tokens(llm, TEXT, greedy(3))
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="is empty"):
            llm.generate("")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [False, enabled, enabled]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_what_breaks_into_generate_ends_its_requests_only(llm, monkeypatch, error, nth):
    expected = tokens(llm, TEXT, greedy(20))
    llm.add_request(TEXT, greedy(20), "other")
    llm.step()
    executor, calls = llm.llm_engine.executor, []
    submit = executor.submit

    def failing(step):
        calls.append(step)
        if len(calls) == nth:
            raise error("worker")
        return submit(step)

    monkeypatch.setattr(executor, "submit", failing)
    with pytest.raises(error, match="worker"):
        llm.generate([TEXT, [9] * 30], greedy(10, ignore_eos=True), use_tqdm=False)
    assert set(llm.llm_engine.unfinished) == {"other"}
    assert tokens(llm, TEXT, greedy(20)) == expected
    seen = drain(llm)
    assert list(seen) == ["other"] and [seen["other"][-1]["token_ids"]] == expected


INTERRUPTED = """
import os, signal, sys, threading, time, torch
from nanovllm import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
torch.set_num_threads(1)
llm = LLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes=12 << 20)
greedy = SamplingParams(temperature=0, max_tokens=20)
expected = llm.generate("In the beginning", greedy, use_tqdm=False)[0]["token_ids"]
llm.add_request("In the beginning", SamplingParams(temperature=0, max_tokens=20), "other")
metrics = llm.llm_engine.metrics

def interrupt():
    while metrics.steps < 60:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    llm.generate([[5]] * 4, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
except KeyboardInterrupt:
    print("interrupted")
assert not llm.llm_engine.unfinished, llm.llm_engine.unfinished
[other] = llm.step()
assert other.finished and other["token_ids"] == expected
assert llm.generate("In the beginning", greedy, use_tqdm=False)[0]["token_ids"] == expected
print("usable")
"""


def python(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ctrl_c_ends_generate_and_leaves_the_engine_usable(tiny):
    assert python(INTERRUPTED, tiny).split() == ["interrupted", "usable"]


# The end


@pytest.mark.parametrize("end", ["close", "with", "del", "del after an error"])
@pytest.mark.parametrize("unfinished", [False, True])
def test_the_memory_is_freed_at_once(tiny, end, unfinished):
    gc.collect()
    gc.disable()
    try:
        llm = load(tiny)
        llm.generate([[5, 6], [7]], random(4), use_tqdm=False)
        if unfinished:
            llm.add_request([5], greedy())
            llm.step()
        runner = llm.llm_engine.executor.runner
        parts = [runner.model, runner.kv.data[0], next(runner.model.parameters()), llm.llm_engine]
        refs = [weakref.ref(part) for part in parts if type(part).__weakrefoffset__]
        assert len(refs) == 4
        del runner, parts
        if end == "close":
            llm.close()
        elif end == "with":
            with llm:
                pass
        else:
            with suppress(ValueError):
                llm.generate([[]] if end == "del after an error" else [])
            del llm
        assert [ref() for ref in refs] == [None] * 4
    finally:
        gc.enable()


def test_a_failed_construction_frees_its_memory(copy_tiny, monkeypatch):
    from nanovllm.worker import worker

    refs, build = [], worker.build_model

    def spy(*args):
        model = build(*args)
        refs.append(weakref.ref(model))
        return model

    monkeypatch.setattr(worker, "build_model", spy)
    folder = copy_tiny()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated") as caught:
        load(folder)
    gc.collect()
    assert refs and all(ref() is None for ref in refs)
    assert caught.value  # even while the caller holds the error


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_calls_after_close_say_so(tiny, error):
    with suppress(ZeroDivisionError), load(tiny) as llm:
        llm.add_request([5], greedy())
        if error:
            raise error
    llm.close()  # once more does no harm
    for call, *args in (
        (llm.generate, [5]), (llm.add_request, [5]), (llm.abort, "0"), (llm.step,),
        (llm.is_finished,),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call(*args)


# Engines and options


def test_two_engines_at_once_do_not_disturb_each_other(llm, tiny):
    prompts = [[5, 6, 7], [8] * 20]
    with load(tiny, load_format="dummy", seed=7) as other:
        engines = [llm, other]
        alone = [tokens(engine, prompts, greedy(12, ignore_eos=True)) for engine in engines]
        assert alone[0] != alone[1]
        for i, prompt in enumerate(prompts):
            for engine in engines:
                engine.add_request(prompt, greedy(12, ignore_eos=True), str(i))
        last = [{}, {}]
        while not all(engine.is_finished() for engine in engines):
            for engine, outs in zip(engines, last, strict=True):
                outs.update({out.request_id: out["token_ids"] for out in engine.step()})
    assert [[outs["0"], outs["1"]] for outs in last] == alone


@pytest.mark.parametrize(
    "options",
    [{"async_scheduling": True}, {"async_scheduling": False}, {"enforce_eager": True},
     {"enable_prefix_caching": False}, {"attention_backend": "TORCH_SDPA"}, {"block_size": 8},
     {"max_num_seqs": 2}, {"max_num_batched_tokens": 4}, {"gpu_memory_utilization": 0.5}],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_change_the_tokens(llm, tiny, options):
    prompts = [[5, 6, 7], [8] * 20, [8] * 18, [9]]
    params = [greedy(12, ignore_eos=True)] * 3 + [random(12, seed=1)]
    with load(tiny, **options) as other:
        assert tokens(other, prompts, params) == tokens(llm, prompts, params)


def test_the_prefix_cache_says_how_many_prompt_tokens_it_had(tiny):
    def cached(llm, prompts):
        return [out.num_cached_tokens for out in llm.generate(prompts, greedy(2), use_tqdm=False)]

    prompt = list(range(5, 45))  # two full blocks of 16 and a half
    with load(tiny) as llm:
        assert cached(llm, [prompt]) == [0]
        assert cached(llm, [prompt, prompt[:20], [9, *prompt]]) == [32, 16, 0]
        assert cached(llm, [[3] * 33] * 2) == [0, 32]  # within one batch
        assert cached(llm, [prompt[:32]]) == [31]  # the last token runs again, for its logits
    with load(tiny, enable_prefix_caching=False) as llm:
        assert cached(llm, [prompt]) == cached(llm, [prompt]) == [0]


def test_dummy_weights_need_config_json_alone(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text()) | {"eos_token_id": 11}
    (tmp_path / "config.json").write_text(json.dumps(config))
    runs = []
    for seed in (0, 0, 1):
        with load(tmp_path, load_format="dummy", seed=seed) as llm:
            runs += tokens(llm, [[5, 6, 7]], greedy(ignore_eos=True))
            assert llm._checkpoint.eos_token_ids == (11,)
            default = llm.get_default_sampling_params()
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 8
    assert default == SamplingParams()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_runs(tiny, dtype, caplog):
    with caplog.at_level(logging.INFO, "nanovllm"), load(tiny, dtype=dtype) as llm:
        [out] = tokens(llm, [[5, 6, 7]], greedy(ignore_eos=True))
    assert len(out) == 8 and f"in {str(dtype).removeprefix('torch.')}," in caplog.text


def test_a_tokenizer_may_come_from_elsewhere(copy_tiny, tiny):
    folder = copy_tiny()
    (folder / "tokenizer.json").unlink()
    with LLM(str(folder), tokenizer=str(tiny), **SMALL) as llm:
        assert llm.generate(TEXT, greedy(), use_tqdm=False)[0]["text"]


# What is printed


def test_only_the_progress_bar_prints(llm, capsys):
    llm.generate([TEXT, TEXT], greedy(), use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    llm.generate([TEXT, TEXT], greedy())
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err
    assert re.search(r"prefill [1-9]\d* tok/s, decode [1-9]\d* tok/s", err.split("\r")[-1])


def test_one_line_at_the_start_says_what_runs_where(tiny, caplog):
    with caplog.at_level(logging.INFO, "nanovllm"), load(tiny):
        pass
    [record] = [r for r in caplog.records if r.levelno == logging.INFO]
    assert record.name.startswith("nanovllm")
    line = record.getMessage()
    for part in ("Qwen3ForCausalLM on cpu in float32, ", "TORCH_SDPA"):
        assert part in line
    packed = packs_weights(torch.device("cpu"), torch.float32)  # then the tied head is there twice
    assert f"weights {0.02 if packed else 0.01} GiB" in line
    # 4 MiB / (2 * 5 layers * 2 heads * 64 * 4 bytes) = 819 tokens, 51 blocks of 16
    assert "cache of 816 tokens in blocks of 16, 12.8 requests of 64 tokens" in line


def test_importing_nanovllm_imports_no_torch():
    code = "import sys, nanovllm, nanovllm.engine.engine; print('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_dir_lists_the_public_names():
    assert set(dir(nanovllm)) == {*nanovllm.__all__, "__version__"}
    assert {"LLM", "SamplingParams", "RequestOutput"} <= set(nanovllm.__all__)
    assert all(hasattr(nanovllm, name) for name in nanovllm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'llms'"):
        nanovllm.llms  # noqa: B018


# Scripts written for nano-vllm run unchanged


def test_nano_vllms_example(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    llm = LLM(str(tiny), enforce_eager=True, tensor_parallel_size=1)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in ["introduce yourself", "list all prime numbers within 100"]
    ]
    outputs = llm.generate(prompts, sampling_params)
    assert len(outputs) == len(prompts)
    assert all(output["text"] and 1 <= len(output["token_ids"]) <= 256 for output in outputs)


def test_nano_vllms_bench(tiny):
    randint = Random(0).randint
    llm = LLM(str(tiny), enforce_eager=False, max_model_len=128)
    prompt_token_ids = [[randint(0, 2559) for _ in range(randint(10, 64))] for _ in range(12)]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(10, 40))
        for _ in range(12)
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    outputs = llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    total = sum(sp.max_tokens for sp in sampling_params)
    assert sum(len(out["token_ids"]) for out in outputs) == total


def test_threads_take_turns(llm):
    prompts = [[5, 6, 7], [8, 9]]
    expected = tokens(llm, prompts, greedy())
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(tokens, llm, prompts, greedy()) for _ in range(8)]
        assert [call.result() for call in calls] == [expected] * 8
    assert llm.is_finished()


def test_eos_ids_outside_the_vocabulary_are_left_out(copy_tiny):
    folder = copy_tiny(generation_config={"eos_token_id": [2, 99999, -1]})
    with load(folder) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=2)
        assert len(tokens(llm, [[5, 6, 7]], params)[0]) >= 2


def test_eos_ids_that_are_no_ids_are_refused(copy_tiny):
    with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them"):
        load(copy_tiny(generation_config={"eos_token_id": ["2"]}))


def test_min_tokens_holds_back_eos_even_where_it_would_be_ignored(llm):
    params = SamplingParams(temperature=2, max_tokens=40, min_tokens=40, ignore_eos=True)
    for ids in tokens(llm, [[5, 6, 7]] * 50, params):
        assert not {0, 2} & set(ids)
