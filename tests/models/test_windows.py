"""A family some of whose layers see a window: two groups of layers, each with its block tables,
against transformers, however the engine gets there."""

import pytest
import torch
from tiny_models import (
    edit_config,
    engine_logits,
    load_oracle,
    make_checkpoint,
    oracle_greedy,
    oracle_logits,
)

from nanovllm import LLM, SamplingParams
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models import register
from nanovllm.models.frame import CausalLM, DecoderLayer
from nanovllm.ops import make_attention
from nanovllm.ops.batch import AttentionSpec
from nanovllm.worker import worker
from nanovllm.worker.cache_plan import LayerGroup, layer_groups, plan_cache

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 9
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


class WindowedForCausalLM(CausalLM):
    """Qwen3 with windows in some layers."""

    def make_layer(self, config, i):
        window = WINDOW if KINDS[i] == "sliding_attention" else None
        attention = Attention(config, self.rope, qk_norm=True, window=window)
        return DecoderLayer(config, attention, GatedMLP(config))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint, transformers' model of it, prompts that share beginnings."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("windowed"), "qwen3", num_hidden_layers=3, layer_types=KINDS,
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0, head_dim=16,
    )  # fmt: skip
    oracle = load_oracle(folder)
    assert oracle.config.layer_types == KINDS and oracle.config.sliding_window == WINDOW
    edit_config(
        folder, architectures=["WindowedForCausalLM"], use_sliding_window=None,
        sliding_window=None, layer_types=None, max_window_layers=None,
    )  # fmt: skip
    register("WindowedForCausalLM", WindowedForCausalLM)
    generator = torch.Generator().manual_seed(3)

    def some(n):
        return torch.randint(128, (n,), generator=generator).tolist()

    shared = some(40)
    prompts = [shared[:n] + some(m) for n, m in ((40, 3), (40, 0), (20, 30), (33, 1), (0, 5))]
    return folder, oracle, prompts


def load(folder, **options):
    sizes = dict(dtype="float32", device="cpu", skip_tokenizer_init=True, max_model_len=96)
    return LLM(str(folder), **sizes | options)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_logits_equal_transformers(setting, chunk):
    folder, oracle, prompts = setting
    with load(folder, kv_cache_memory_bytes=4 << 20) as llm:
        assert [group.window for group in llm.llm_engine.executor.groups] == [WINDOW, None]
        logits = engine_logits(llm, prompts[0], chunk)
    torch.testing.assert_close(logits, oracle_logits(oracle, prompts[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [
    dict(block_size=4),
    dict(block_size=4, max_num_batched_tokens=7, max_num_seqs=3),
    dict(block_size=1, enable_prefix_caching=False),
    dict(),
], ids=str)  # fmt: skip
def test_tokens_equal_transformers(setting, options, depth):
    folder, oracle, prompts = setting
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = [oracle_greedy(oracle, prompt, 30) for prompt in prompts]
    options = {"kv_cache_memory_bytes": 2 << 20} | options
    with load(folder, async_scheduling=depth == 2, **options) as llm:
        for _ in range(2):  # cold, then warm
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [out["token_ids"] for out in outputs] == expected


def spec(window=None, num_kv_heads=2):
    return AttentionSpec(4, num_kv_heads, 16, 0.25, window)


def test_layers_of_one_shape_and_window_are_a_group():
    groups = layer_groups([spec(8), spec(), spec(8), spec(num_kv_heads=1), spec()])
    assert groups == [
        LayerGroup(spec(8), (0, 2)),
        LayerGroup(spec(), (1, 4)),
        LayerGroup(spec(num_kv_heads=1), (3,)),
    ]


def test_each_group_holds_the_same_number_of_sequences():
    layers = layer_groups([spec(100), spec(), spec(100)])
    of_block = 16 * 2 * 2 * 16 * 4  # tokens, keys and values, heads, dims, bytes
    # A sequence of 3,200 tokens: 200 blocks; in a window of 100 with steps of 60 tokens 11.
    of_seq = of_block * (200 + 2 * 11)
    plan = plan_cache(5 * of_seq, layers, 4, 16, 64, 60, 3200, 4000)
    assert [group.num_blocks for group in plan.groups] == [55, 1000]
    assert [group.window for group in plan.groups] == [100, None]
    few = plan_cache(5 * of_seq, layers, 4, 16, 3, 60, 3200, 4000)
    assert [group.num_blocks for group in few.groups] == [33, 600]
    with pytest.raises(ValueError, match="max_model_len=3201 does not fit"):
        plan_cache(of_seq, layers, 4, 16, 3, 60, 3201, 4000)
    lowered = plan_cache(of_seq, layers, 4, 16, 3, 60, None, 4000)
    assert lowered.max_model_len == 3200


def test_the_memory_of_all_groups_is_checked(setting, monkeypatch):
    """A cache that fits by its groups' own sizes, of which two are smaller, is not refused."""
    folder, *_ = setting
    seen = []
    check = worker.check_memory
    monkeypatch.setattr(
        worker, "check_memory", lambda *args, **kw: seen.append((args, kw)) or check(*args, **kw)
    )
    with load(folder, kv_cache_memory_bytes=2 << 20, block_size=4) as llm:
        cache = sum(data.nbytes for data in llm.llm_engine.executor.worker.kv.data)
    assert seen[-1][0][2] == cache <= 2 << 20


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_backends_without_windows_say_so(backend):
    sizes = 16, torch.bfloat16, torch.device("cuda"), 8
    with pytest.raises(ValueError, match="window of 8; device='cpu' runs it"):
        make_attention(backend, spec(8), *sizes)
