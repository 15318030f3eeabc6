"""Steps as CUDA graphs run them, without a GPU: padded to a size, every token a query of its own,
by the interpreted attention kernel. They give the tokens of steps that are launched as they are."""

import pytest
import torch
from tiny_models import make_checkpoint

from nanovllm import LLM, SamplingParams, ops
from nanovllm.ops.batch import KVCache
from nanovllm.ops.triton import limits, rows, sampling
from nanovllm.ops.triton.attention import TritonAttention
from nanovllm.worker.graphs import StepGraphs, graph_sizes
from nanovllm.worker.runner import ModelRunner

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here"),
]
MAX_NUM_SEQS, MAX_TOKENS = 4, 16
KERNELS = [
    (rows, "begin_step"), (rows, "keep_sampled"), (sampling, "sample"), (limits, "top_logprobs"),
]  # fmt: skip


class Graphs(StepGraphs):
    """Launches what a graph would replay.

    Attributes:
        shapes: of all steps.
    """

    def __init__(self, sizes):
        self.sizes, self.shapes = sizes, []

    def run(self, shape, arrays, record, step):
        self.shapes.append(shape)
        return step(shape, record.upload(arrays))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", head_dim=16)


def load(folder, depth):
    return LLM(
        str(folder), dtype="float32", device="cpu", skip_tokenizer_init=True, max_model_len=64,
        kv_cache_memory_bytes=1 << 20, max_num_seqs=MAX_NUM_SEQS, block_size=4,
        max_num_batched_tokens=MAX_TOKENS, async_scheduling=depth == 2,
    )  # fmt: skip


def use_graphs(llm):
    """Have an idle engine run all steps padded."""
    executor, config = llm.llm_engine.executor, llm.model_config
    worker = executor.worker
    sizes = config.num_heads, config.num_kv_heads, config.head_dim
    attention = TritonAttention(
        *sizes, block_size=4, dtype=torch.float32, device=torch.device("cpu"), num_sms=1,
        max_decodes=MAX_NUM_SEQS,
    )  # fmt: skip
    assert attention.least_mixed == 3
    kv = KVCache([data.clone() for data in worker.kv.data], worker.kv.group_of)
    sizes = MAX_NUM_SEQS, MAX_TOKENS, worker.plan.max_blocks, config.vocab_size
    runner = worker.runner = ModelRunner(worker.model, kv, (attention,), *sizes)
    runner.logits = torch.empty(MAX_NUM_SEQS, config.vocab_size)
    worker.graph_sizes = graph_sizes(MAX_NUM_SEQS, attention.least_mixed, MAX_TOKENS)
    worker.mixed_tokens, worker.mixed_keys = MAX_TOKENS, attention.mixed_keys
    runner.graphs = Graphs(worker.graph_sizes)
    return runner.graphs


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("with_kernels", [False, True])
def test_padded_steps_give_the_same_tokens(folder, depth, with_kernels, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(128, (8,), generator=generator).tolist()
    prompts = [[*shared, i, *shared[:i]] for i in range(5)] + [shared]
    common = dict(max_tokens=6, ignore_eos=True)
    params = [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.9, seed=1, logprobs=2, **common),
        SamplingParams(temperature=1.2, seed=2, top_k=7, top_p=0.8, **common),
        SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.5, min_p=0.05, **common),
        SamplingParams(temperature=0, prompt_logprobs=1, **common),
        SamplingParams(temperature=0.8, seed=4, max_tokens=4, ignore_eos=True),
    ]
    with load(folder, depth) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
        llm.reset_prefix_cache()
        graphs = use_graphs(llm)
        if with_kernels:  # around the forward, and of the draws
            for module, name in KERNELS:
                monkeypatch.setattr(ops, name, getattr(module, name))
        found = llm.generate(prompts, params, use_tqdm=False)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["token_ids"] == theirs["token_ids"]
        for name in ("logprobs", "prompt_logprobs"):
            lists = [
                getattr(out if name[0] == "p" else out.outputs[0], name) for out in (mine, theirs)
            ]
            assert (lists[0] is None) == (lists[1] is None)
            for one, other in zip(*(lines or [] for lines in lists), strict=True):
                assert (one is None) == (other is None)
                for token, entry in (one or {}).items():
                    assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)
    shapes = graphs.shapes
    assert {shape.num_tokens for shape in shapes} >= {4, MAX_TOKENS}
    assert any(shape.limited for shape in shapes) and not all(shape.limited for shape in shapes)
    assert all(shape.gathers == (shape.num_tokens >= 3) for shape in shapes)
