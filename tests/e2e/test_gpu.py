"""The engine on a GPU: the same greedy tokens in float32 as transformers and the CPU give, with and
without CUDA graphs, and its memory given back."""

import asyncio
import gc
import logging
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from patience import PATIENCE
from tiny_models import (
    LLAMA3_ROPE,
    engine_logits,
    load_oracle,
    make_checkpoint,
    oracle_greedy,
    oracle_logits,
)

from nanovllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from nanovllm.worker.graphs import graph_sizes

pytestmark = pytest.mark.gpu
FAMILIES = {
    "qwen3": dict(family="qwen3", head_dim=32),
    "qwen2": dict(family="qwen2", num_attention_heads=6, hidden_size=48),
    "llama": dict(
        family="llama",
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=20,
        hidden_size=54,
        rope_parameters=LLAMA3_ROPE,
    ),
}


def greedy(num_tokens=20):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def make_prompts(seed=1):
    rng = random.Random(seed)
    shared = [rng.randrange(128) for _ in range(48)]
    prompts = [shared + [rng.randrange(128) for _ in range(n)] for n in (1, 5, 0, 30)]
    prompts += [shared[:32], shared[:33], list(shared)]
    return prompts + [[rng.randrange(128) for _ in range(n)] for n in (1, 16, 17, 70)]


def load(folder, **options):
    defaults = dict(
        device="cuda", dtype="float32", skip_tokenizer_init=True, max_model_len=256,
        max_num_seqs=16, kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    return LLM(str(folder), **{**defaults, **options})


def generate(llm, prompts, params):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory):
    """A checkpoint and the oracle's tokens for the prompts."""
    sizes = dict(FAMILIES[request.param])
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), sizes.pop("family"), **sizes)
    oracle = load_oracle(folder)
    prompts = make_prompts()
    return folder, prompts, [oracle_greedy(oracle, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("options", [
    dict(),
    dict(enforce_eager=True),
    dict(async_scheduling=False),
    dict(block_size=64),
    dict(block_size=48, max_num_seqs=5),
    dict(max_num_seqs=10, max_num_batched_tokens=24),  # chunks
    dict(enable_prefix_caching=False),
    dict(num_gpu_blocks_override=16, kv_cache_memory_bytes=None),  # preemptions
    dict(num_gpu_blocks_override=16, kv_cache_memory_bytes=None, async_scheduling=False),
], ids=str)  # fmt: skip
def test_greedy_tokens_equal_transformers(setting, options, request):
    folder, prompts, expected = setting
    if "num_gpu_blocks_override" in options:
        request.getfixturevalue("crowded")
    with load(folder, **options) as llm:
        assert generate(llm, prompts, greedy()) == expected
        assert generate(llm, prompts, greedy()) == expected  # every prefix in the cache
        metrics = llm.llm_engine.metrics
        if options.get("enable_prefix_caching", True):
            assert metrics.cached_tokens > 0
        assert (metrics.preemptions > 0) == ("num_gpu_blocks_override" in options)


@pytest.mark.alone
def test_the_memory_that_is_measured_serves_full_batches(setting):
    folder, prompts, expected = setting
    with load(folder, kv_cache_memory_bytes=None, gpu_memory_utilization=0.1) as llm:
        assert generate(llm, prompts, greedy()) == expected


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_bfloat16_logits_are_close_to_transformers(setting, chunk):
    folder, prompts, _ = setting
    token_ids = prompts[3] + prompts[10]
    exact = oracle_logits(load_oracle(folder), token_ids)
    rounded = oracle_logits(load_oracle(folder, torch.bfloat16), token_ids)
    with load(folder, dtype="bfloat16") as llm:
        logits = engine_logits(llm, token_ids, chunk).cpu().float()
    error, allowed = (x.float().sub(exact).norm() / exact.norm() for x in (logits, rounded))
    assert error < 1.5 * allowed + 1e-3  # no further off than transformers in the same dtype


def test_graphs_equal_eager_at_every_batch_size(setting):
    folder, *_ = setting
    rng = random.Random(2)
    prompts = [[rng.randrange(128) for _ in range(rng.randrange(1, 40))] for _ in range(100)]
    sizes = set(range(1, 41))
    for size in graph_sizes(100):
        sizes |= {size - 1, size, size + 1} & set(range(1, 101))
    with (
        load(folder, max_num_seqs=100) as graphed,
        load(folder, max_num_seqs=100, enforce_eager=True) as eager,
    ):
        expected = generate(eager, prompts, greedy(6))
        for size in sorted(sizes):
            assert generate(graphed, prompts[:size], greedy(6)) == expected[:size], size


@pytest.mark.parametrize("eager", [False, True])
def test_tokens_are_the_same_when_requests_wait_for_rows(setting, eager):
    folder, *_ = setting
    rng = random.Random(3)
    prompts = [[rng.randrange(128) for _ in range(rng.randrange(1, 40))] for _ in range(90)]
    params = [greedy(rng.randrange(1, 30)) for _ in prompts]
    with load(folder, max_num_seqs=100) as llm:
        expected = generate(llm, prompts, params)
    with load(folder, max_num_seqs=24, enforce_eager=eager) as llm:
        budget = llm.llm_engine.executor.prompt_budget(1, [(511, 511)])
        assert budget == (llm.llm_engine.scheduler.max_num_batched_tokens if eager else 512) - 1
        by_graph = count_calls(
            llm.llm_engine.executor.runner, "graph_size", lambda size: size is not None
        )
        assert generate(llm, prompts, params) == expected
        assert all(by_graph) if not eager else not any(by_graph)


@pytest.mark.parametrize("mixed_tokens", [0, 30, 70])
@pytest.mark.parametrize("chunk", [30, 512])
def test_tokens_are_the_same_however_steps_mix(setting, mixed_tokens, chunk):
    """Chunks of prompts beside decodes, also with log-probabilities and changed logits."""
    folder, *_ = setting
    rng = random.Random(5)
    prompts = [[rng.randrange(128) for _ in range(rng.randrange(1, 90))] for _ in range(60)]
    prompts += prompts[:10]  # in the prefix cache
    asking = dict(logprobs=2, prompt_logprobs=1)
    params = [
        SamplingParams(
            temperature=rng.choice((0.0, 0.8)),
            top_p=rng.choice((1.0, 0.7)),
            min_tokens=rng.choice((0, 1)),
            seed=i,
            max_tokens=rng.randrange(1, 30),
            ignore_eos=True,
            **rng.choice(({}, {}, asking)),
        )
        for i in range(len(prompts))
    ]
    with load(folder, max_num_seqs=100, enforce_eager=True) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with load(folder, max_num_seqs=24, max_num_batched_tokens=chunk) as llm:
        llm.llm_engine.executor.prompt_budget = lambda num_decodes, waiting: min(
            chunk - num_decodes, max(1, mixed_tokens - num_decodes) if num_decodes else chunk
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, other in zip(outputs, expected, strict=True):
        assert output["token_ids"] == other["token_ids"]
        for name in ("prompt_logprobs", "logprobs"):
            mine, theirs = (
                getattr(o if name[0] == "p" else o.outputs[0], name) for o in (output, other)
            )
            assert (mine is None) == (theirs is None)
            for one, two in zip(mine or [], theirs or [], strict=True):
                assert (one is None) == (two is None)
                if one:
                    assert one.keys() == two.keys()
                    for token, logprob in one.items():
                        assert abs(logprob.logprob - two[token].logprob) < 1e-3


@pytest.mark.parametrize("options", [
    dict(),
    dict(async_scheduling=False),
    dict(enforce_eager=True),
    dict(max_num_batched_tokens=40),  # chunks beside decodes that share
    dict(block_size=64),
], ids=str)  # fmt: skip
def test_tokens_are_the_same_when_a_shared_prefix_is_read_once(setting, options):
    folder, *_ = setting
    rng = random.Random(4)
    documents = [[rng.randrange(128) for _ in range(n)] for n in (130, 70, 16)]
    prompts = [
        rng.choice(documents) + [rng.randrange(128) for _ in range(rng.randrange(1, 40))]
        for _ in range(60)
    ]
    params = [greedy(rng.randrange(1, 30)) for _ in prompts]
    with load(folder, max_num_seqs=40, **options) as llm:
        [attention] = llm.llm_engine.executor.worker.attentions
        attention.min_gain_bytes = 1 << 60
        expected = generate(llm, prompts, params)
        attention.min_gain_bytes = 0
        shared_items = count_calls(attention, "_shared", lambda result: bool(result[0]))
        for _ in range(2):  # the second time by graphs
            assert generate(llm, prompts, params) == expected
        assert sum(shared_items) > 10


def count_calls(owner, name, what):
    """What a method's results are to `what`, from now on."""
    method, seen = getattr(owner, name), []

    def call(*args, **kwargs):
        result = method(*args, **kwargs)
        seen.append(what(result))
        return result

    setattr(owner, name, call)
    return seen


@pytest.mark.parametrize("max_num_seqs", [1, 3, 10])
def test_any_max_num_seqs_and_sequences_of_full_length(setting, max_num_seqs):
    folder, prompts, expected = setting
    with load(folder, max_num_seqs=max_num_seqs, max_model_len=100) as llm:
        assert generate(llm, prompts[:6], greedy()) == expected[:6]
        [output] = llm.generate([prompts[0]], greedy(None), use_tqdm=False)
        assert len(output["token_ids"]) == 100 - len(prompts[0])


def test_draws_depend_on_the_seed_alone(setting):
    folder, prompts, _ = setting
    params = [
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=4, top_p=0.8, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.5, seed=5, top_k=5, min_p=0.01, max_tokens=12, min_tokens=4),
    ]
    with load(folder) as llm:
        together = generate(llm, prompts[:3], params)
        alone = [generate(llm, [p], q)[0] for p, q in zip(prompts[:3], params, strict=True)]
        crowd = generate(llm, prompts[:3] + prompts, [*params, *[greedy(9)] * len(prompts)])[:3]
        assert together == alone == crowd
    with load(folder, enforce_eager=True, async_scheduling=False) as llm:
        assert generate(llm, prompts[:3], params) == together


@pytest.mark.parametrize(
    "options", [dict(), dict(async_scheduling=False), dict(enforce_eager=True)]
)
def test_changed_logits_and_logprobs_are_those_of_a_cpu(tiny, options):
    asked = [
        dict(repetition_penalty=1.4, logprobs=3),
        dict(presence_penalty=1.5, frequency_penalty=0.4),
        dict(logit_bias={40: 6.0, 50: -float("inf")}, logprobs=20),
        dict(allowed_token_ids=list(range(10, 200, 7)), frequency_penalty=0.8),
        dict(bad_words=["of the", "and", "he"], min_tokens=5),
        dict(),
    ]
    params = [SamplingParams(temperature=0, max_tokens=14, **values) for values in asked]
    prompts = ["In the beginning", "And the earth was", "In the", "And", "The king", "The king of"]
    outputs = []
    for device in ("cpu", "cuda"):
        with LLM(str(tiny), device=device, dtype="float32", kv_cache_memory_bytes=16 << 20,
                 **(options if device == "cuda" else {})) as llm:  # fmt: skip
            outputs.append([out.outputs[0] for out in llm.generate(prompts, params)])
    for cpu, gpu in zip(*outputs, strict=True):
        assert gpu.token_ids == cpu.token_ids
        assert (gpu.logprobs is None) == (cpu.logprobs is None)
        for expected, found in zip(cpu.logprobs or (), gpu.logprobs or (), strict=True):
            assert next(iter(found)) == next(iter(expected))
            for token in set(found) & set(expected):  # the last of the most likely may tie
                assert found[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)


@pytest.mark.parametrize(
    "options", [dict(), dict(enforce_eager=True), dict(async_scheduling=False)], ids=str
)
def test_samples_share_their_prompt_and_beams_are_those_of_a_cpu(setting, options):
    folder, prompts, _ = setting
    sampled = SamplingParams(n=6, max_tokens=20, ignore_eos=True, seed=5)
    beams = BeamSearchParams(beam_width=3, max_tokens=12)
    with load(folder, device="cpu") as llm:
        expected = llm.beam_search(prompts, beams)
    with load(folder, block_size=16, **options) as llm:
        metrics = llm.llm_engine.metrics
        [mixed] = [[c.token_ids for c in out.outputs] for out in llm.generate(
            [prompts[3]], sampled, use_tqdm=False)]  # fmt: skip
        tail = (len(prompts[3]) - 1) % 16 + 1
        assert metrics.prefill_tokens == len(prompts[3]) + 5 * tail
        sampled.n = 1
        assert generate(llm, [prompts[3]], sampled) == mixed[:1]
        assert len({tuple(tokens) for tokens in mixed}) == 6
        outputs = llm.beam_search(prompts, beams)
    for out, want in zip(outputs, expected, strict=True):
        assert [seq.tokens for seq in out.sequences] == [seq.tokens for seq in want.sequences]


def test_an_interrupted_generate_leaves_the_engine_usable(setting, monkeypatch):
    folder, prompts, expected = setting
    with load(folder) as llm:
        runner = llm.llm_engine.executor.runner
        begin, calls = runner.inputs.begin, []  # of every step, with graphs and without

        def fail(*args):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return begin(*args)

        monkeypatch.setattr(runner.inputs, "begin", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, prompts, greedy())
        assert generate(llm, prompts, greedy()) == expected


@pytest.mark.parametrize("options", [dict(), dict(max_num_seqs=4, dtype="bfloat16")], ids=str)
def test_full_batches_compile_nothing(tiny, monkeypatch, options):
    from triton import knobs

    compiled = []

    def note(**launch):
        if not launch["is_manual_warmup"]:
            compiled.append(launch["repr"])

    with load(tiny, **options) as llm:
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
        for num_tokens in (10, 40, 100):
            generate(llm, [[5] * num_tokens], greedy())
        generate(llm, [[6] * 20] * 8, greedy())
        assert compiled == []


# Memory


def held():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.alone
@pytest.mark.parametrize("options", [dict(), dict(enforce_eager=True)], ids=str)
def test_close_gives_all_memory_back(tiny, options):
    with load(tiny):  # libraries keep something at their first use
        pass
    before = held()
    llm = load(tiny, kv_cache_memory_bytes=None, gpu_memory_utilization=0.1, **options)
    generate(llm, [[5] * 40] * 9, greedy())
    assert held()[0] > before[0]
    llm.close()
    assert held() == before


def test_del_frees_the_tensors(tiny):
    with load(tiny):
        pass
    before = torch.cuda.memory_allocated()
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        llm = load(tiny)
        generate(llm, [[5, 6]], greedy())
        del llm
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps them; close() clears them as well
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.alone
def test_the_engine_stays_within_its_share(tiny):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = 0.2
    with load(
        tiny, kv_cache_memory_bytes=None, gpu_memory_utilization=share, max_model_len=None,
        max_num_seqs=512, dtype="bfloat16",
    ) as llm:  # fmt: skip
        generate(llm, [[7] * 100] * 600, greedy(60))
        assert free - torch.cuda.mem_get_info()[0] <= share * total


@pytest.mark.alone
def test_too_little_memory_names_the_options(tiny):
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        load(tiny, kv_cache_memory_bytes=None, gpu_memory_utilization=1e-4)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        load(
            tiny, kv_cache_memory_bytes=1 << 50, max_model_len=None, max_num_seqs=10**5,
            max_num_batched_tokens=10**5,
        )  # fmt: skip


@pytest.mark.alone
def test_what_others_hold_is_left_to_them(tiny, caplog):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = torch.empty(free - total // 8, dtype=torch.uint8, device="cuda")
    with caplog.at_level(logging.WARNING), load(
        tiny, kv_cache_memory_bytes=None, max_num_seqs=10**4, max_num_batched_tokens=10**4,
        max_model_len=None, enforce_eager=True,
    ) as llm:  # fmt: skip
        assert "other processes leave only" in caplog.text
        generate(llm, [[7] * 100] * 600, greedy(9))
    del others


@pytest.mark.alone
def test_two_engines_share_a_gpu(tiny):
    with load(tiny) as one, load(tiny, kv_cache_memory_bytes=None, max_num_seqs=4) as other:
        prompts = make_prompts()
        assert generate(one, prompts, greedy()) == generate(other, prompts, greedy())


def test_closing_one_engine_leaves_the_other_whole(tiny):
    prompts = make_prompts()
    with load(tiny) as one:
        expected = generate(one, prompts, greedy())
        load(tiny).close()
        noise = torch.full((1 << 28,), torch.nan, device="cuda")  # takes what was given back
        assert generate(one, prompts, greedy()) == expected
        del noise


@pytest.mark.alone
def test_a_failed_construction_gives_its_memory_back(tiny):
    with load(tiny):
        pass
    before = held()
    with pytest.raises(ValueError, match="max_model_len") as caught:
        load(tiny, max_model_len=2000, kv_cache_memory_bytes=1 << 20)
    assert held() == before
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        load(tiny, kv_cache_memory_bytes=None, gpu_memory_utilization=1e-3)
    assert held() == before
    assert caught.value


# Options


def test_flash_attn_gives_the_same_tokens_where_it_is_installed(tiny):
    flash_attn = pytest.importorskip("flash_attn")
    assert flash_attn
    prompts = make_prompts()
    with load(tiny, dtype="bfloat16") as llm:
        ours = generate(llm, prompts, greedy(4))
    for eager in (False, True):
        with load(
            tiny, dtype="bfloat16", attention_backend="FLASH_ATTN", enforce_eager=eager
        ) as llm:
            assert llm.llm_engine.executor.groups[0].block_size == 256
            theirs = generate(llm, prompts, greedy(4))
        # bfloat16 rounds; the first tokens are hardly ever near a tie.
        assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(prompts) - 2


@pytest.mark.parametrize("options, message", [
    (dict(attention_backend="FLASH_ATTN", block_size=16), "multiple of 256"),
    (dict(attention_backend="FLASH_ATTN"), "float16 and bfloat16"),
    (dict(attention_backend="TORCH_SDPA"), "TRITON_ATTN"),
    (dict(device="cuda:99"), "there are"),
], ids=str)  # fmt: skip
def test_options_that_a_gpu_cannot_have(tiny, options, message):
    if options.get("attention_backend") == "FLASH_ATTN":
        pytest.importorskip("flash_attn")
    with pytest.raises(ValueError, match=message):
        load(tiny, **options)


def test_a_missing_flash_attn_says_how_to_install_it(tiny, monkeypatch):
    from nanovllm.ops import flash_attention

    monkeypatch.setattr(flash_attention, "flash_attn", None)
    with pytest.raises(ValueError, match="pip install"):
        load(tiny, attention_backend="FLASH_ATTN")


@pytest.mark.alone
def test_a_start_beside_used_memory(tiny, tmp_path, monkeypatch):
    """What torch has cached on the GPU is not zeros, and kernels are not compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = [torch.full((1 << 20,), -1, dtype=torch.int64, device="cuda") for _ in range(64)]
    used += [torch.full((1 << 10,), -1, dtype=torch.int64, device="cuda") for _ in range(999)]
    del used[1::2]
    with LLM(str(tiny), device="cuda", gpu_memory_utilization=0.1) as llm:
        [output] = llm.generate(["In the beginning"], greedy(), use_tqdm=False)
        assert len(output["token_ids"]) == 20


# Sleep


def reserved():
    """What this process's tensors and graphs keep; other tests may run at the same time."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


# A cache of 1 GiB, which 512 requests of full length would fill.
LARGE = dict(kv_cache_memory_bytes=1 << 30, max_model_len=512, max_num_seqs=512)


@pytest.mark.alone
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "options", [dict(), dict(enforce_eager=True), dict(async_scheduling=False)], ids=str
)
def test_sleep_gives_the_memory_back_and_the_tokens_stay_the_same(tiny, level, options):
    prompts = make_prompts()
    before = reserved()
    with load(tiny, **LARGE, **options) as llm:
        expected = generate(llm, prompts, greedy())
        worker = llm.llm_engine.executor.worker
        for _ in range(2):
            assert reserved() - before > 1 << 30
            llm.sleep(level)
            # Left are the sampler's state and what attention works in.
            assert reserved() - before < 1 << 28
            assert (worker.model is not None) == (level == 1)
            llm.wake_up()
            assert generate(llm, prompts, greedy()) == expected
            assert (worker.runner.graphs is None) == options.get("enforce_eager", False)


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_graphs_are_captured_when_all_parts_are_awake(tiny, order):
    prompts = make_prompts()
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    with load(tiny) as llm:
        expected = generate(llm, prompts, params)
        llm.sleep()
        noise = torch.full((1 << 26,), torch.nan, device="cuda")  # takes what was given back
        for tag in order:
            assert llm.is_sleeping() and llm.llm_engine.executor.worker.runner is None
            llm.wake_up([tag])
        assert llm.llm_engine.executor.runner.graphs is not None
        assert generate(llm, prompts, params) == expected
        del noise


@pytest.mark.alone
def test_too_little_memory_to_wake_up_leaves_it_asleep(tiny):
    prompts = make_prompts()
    with load(tiny, **LARGE) as llm:
        expected = generate(llm, prompts, greedy())
        llm.sleep()
        room = (reserved() + (1 << 27)) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(room)
        try:
            with pytest.raises(RuntimeError, match="GPU memory is too small to wake up"):
                llm.wake_up()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert llm.is_sleeping()
        llm.wake_up()
        assert generate(llm, prompts, greedy()) == expected


def test_asyncio_and_threads_give_the_same_tokens(setting):
    """Others than the thread that made the engine step it, with graphs and without."""
    folder, prompts, expected = setting
    options = dict(device="cuda", dtype="float32", skip_tokenizer_init=True, max_model_len=256,
                   max_num_seqs=16, kv_cache_memory_bytes=64 << 20)  # fmt: skip
    llm = AsyncLLM(str(folder), **options)

    async def one(prompt):
        return [out["token_ids"] async for out in llm.generate(prompt, greedy())][-1]

    async def every():
        return await asyncio.gather(*map(one, prompts))

    async def slept():
        await llm.sleep()
        await llm.wake_up()

    assert asyncio.run(every()) == expected
    asyncio.run(slept())
    assert asyncio.run(every()) == expected
    llm.shutdown()
    with load(folder) as llm, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(generate, llm, prompts, greedy()) for _ in range(4)]
        assert [call.result() for call in calls] == [expected] * 4


LOST = """
import sys, torch
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cuda", kv_cache_memory_bytes=64 << 20)
submit = llm.llm_engine.executor.submit
def broken(step):
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # a device-side assert
    return submit(step)
llm.llm_engine.executor.submit = broken
for text in ("CUDA", "its GPU failed"):
    try:
        llm.generate("In the beginning", SamplingParams(max_tokens=9), use_tqdm=False)
    except RuntimeError as error:
        assert text in str(error), error
        print("said so", flush=True)
"""


def test_a_device_side_assert_closes_the_llm_and_says_so(tiny):
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tiny)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.split("\n")[:2] == ["said so"] * 2, done.stderr
