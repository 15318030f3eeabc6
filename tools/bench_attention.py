"""Time the attention kernel alone, beside flash-attn's if that is installed:

    python tools/bench_attention.py

Decodes are given in TB/s of keys and values read, causal prefill in TFLOP/s; decodes that share a
prefix in microseconds, beside the time in which each decode reads the prefix by itself. Our blocks
have 16 tokens, flash-attn's 256, its smallest size. Keys are read from memory, not from the L2
cache: small cases alternate between several caches. "Projected" decodes start from the QKV
projection, with norms and RoPE.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.ops import flash_attention
from nanovllm.ops.batch import Attention, BatchGroup, ForwardBatch, KVLayer, Queries, Rotary
from nanovllm.ops.triton.attention import TritonAttention

CUDA = torch.device("cuda")
L2_BYTES = 2**28  # well above any GPU's L2 cache
REPEATS = 9


@dataclass
class Case:
    name: str
    query_lens: list[int]
    context_lens: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    num_shared_keys: int = 0

    @property
    def is_decode(self) -> bool:
        return max(self.query_lens) == 1

    @property
    def kv_bytes(self) -> int:
        num_keys = sum(self.context_lens) - (len(self.context_lens) - 1) * self.num_shared_keys
        return num_keys * self.kv_heads * self.head_dim * 2 * 2

    def rate(self, seconds: float) -> str:
        if self.num_shared_keys or (self.is_decode and len(self.query_lens) < 16):
            return f"{seconds * 1e6:.1f} us"
        if self.is_decode:
            return f"{self.kv_bytes / seconds / 1e12:.2f} TB/s"
        operations = sum(2 * n * n for n in self.query_lens) * self.heads * self.head_dim
        return f"{operations / seconds / 1e12:.0f} TFLOP/s"


def cases() -> list[Case]:
    rng = np.random.default_rng(0)

    def decodes(name: str, lens: list[int], heads: int, kv_heads: int, head_dim: int) -> Case:
        return Case(f"{name}, {heads}/{kv_heads} heads of {head_dim}", [1] * len(lens), lens,
                    heads, kv_heads, head_dim)  # fmt: skip

    def prefill(name: str, lens: list[int], heads: int, kv_heads: int, head_dim: int) -> Case:
        return Case(f"prefill {name}, {heads}/{kv_heads} heads of {head_dim}", lens, lens,
                    heads, kv_heads, head_dim)  # fmt: skip

    def shared(num_seqs: int, num_keys: int) -> Case:
        own = np.random.default_rng(1).integers(100, 201, num_seqs)
        return Case(f"{num_seqs} share {num_keys}, 16/8 heads of 128", [1] * num_seqs,
                    (num_keys + own).tolist(), 16, 8, 128, num_keys)  # fmt: skip

    mixed, skewed = rng.integers(200, 1501, 256).tolist(), rng.integers(100, 8001, 64).tolist()
    return [
        *(shared(*sizes) for sizes in ((512, 2048), (64, 8192), (32, 1024), (8, 4096), (512, 64))),
        decodes("256 x 840", [840] * 256, 16, 8, 128),
        decodes("64 x 4096", [4096] * 64, 32, 8, 128),
        decodes("256 of 200 to 1500", mixed, 16, 8, 128),
        decodes("64 of 100 to 8000", skewed, 16, 8, 128),
        decodes("1 x 2048", [2048], 16, 8, 128),
        decodes("8 x 600", [600] * 8, 32, 8, 128),
        *(decodes("256 x 840", [840] * 256, 32, 8, head_dim) for head_dim in (64, 80, 96)),
        decodes("256 x 840", [840] * 256, 16, 8, 256),
        prefill("1 x 16384", [16384], 16, 8, 128),
        prefill("16 x 1024", [1024] * 16, 16, 8, 128),
        *(prefill("1 x 16384", [16384], 16, 8, head_dim) for head_dim in (64, 80, 96, 256)),
    ]


def seconds_of(case: Case, block_size: int, attention: Attention, projected: bool = False) -> float:
    """The median time of one layer's attention in a CUDA graph."""
    query_lens, context_lens = np.array(case.query_lens), np.array(case.context_lens)
    num_pages = -(-context_lens // block_size)
    tables = np.zeros((len(num_pages), int(num_pages.max())), np.int32)
    pages = np.random.default_rng(0).permutation(int(num_pages.sum())).astype(np.int32)
    for row, end in enumerate(num_pages.cumsum()):
        tables[row, : num_pages[row]] = pages[end - num_pages[row] : end]
    num_shared_pages = case.num_shared_keys // block_size
    tables[:, :num_shared_pages] = tables[0, :num_shared_pages]
    shape = (2, len(pages), block_size, case.kv_heads, case.head_dim)
    num_caches = 1 + L2_BYTES // case.kv_bytes if case.is_decode else 1
    caches = [
        KVLayer(*torch.randn(shape, device=CUDA, dtype=torch.bfloat16)) for _ in range(num_caches)
    ]
    query_start = np.concatenate(([0], query_lens.cumsum()))
    rows = np.arange(len(query_lens))
    positions = np.concatenate(
        [np.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)]
    )
    num_decodes = len(rows) if case.is_decode else 0
    arrays = attention.host_arrays(
        Queries(tables, rows, query_start, query_lens, context_lens, num_decodes, None)
    )
    tensors = {name: torch.from_numpy(array).to(CUDA) for name, array in arrays.items()}
    tensors["list_age"] = torch.zeros(1, dtype=torch.int32, device=CUDA)
    slots = torch.full((len(positions),), -1, device=CUDA)
    group = BatchGroup(torch.from_numpy(tables).to(CUDA), slots, attention, tensors)
    batch = ForwardBatch(
        token_ids=torch.empty(0),
        positions=torch.from_numpy(positions).to(CUDA),
        groups=(group,),
        max_query_len=int(query_lens.max()),
        is_decode=case.is_decode,
    )
    scale = case.head_dim**-0.5
    if projected:
        num_heads = case.heads + 2 * case.kv_heads
        qkv = torch.randn(len(positions), num_heads * case.head_dim, device=CUDA).bfloat16()
        weight = torch.ones(case.head_dim, device=CUDA, dtype=torch.bfloat16)
        table = torch.randn(int(context_lens.max()), case.head_dim, device=CUDA)
        rotary = Rotary((weight, weight), 1e-6, table)

        def attend(kv: KVLayer) -> None:
            assert attention.attend_projected
            attention.attend_projected(qkv, rotary, kv, batch, scale)
    else:
        q = torch.randn(len(positions), case.heads, case.head_dim, device=CUDA).bfloat16()

        def attend(kv: KVLayer) -> None:
            attention.attend(q, kv, batch, scale)

    attend(caches[0])
    graph = torch.cuda.CUDAGraph()
    num_calls = max(4, num_caches) if case.is_decode else 1
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            attend(caches[i % num_caches])
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_calls)
    return sorted(times)[REPEATS // 2]


def main() -> None:
    num_sms = torch.cuda.get_device_properties(CUDA).multi_processor_count
    print(torch.cuda.get_device_name(), "bfloat16")
    print(f"{'':45}{'ours':>14}{'flash-attn':>14}{'ours, projected':>18}")
    for case in cases():
        ours = TritonAttention(
            case.heads, case.kv_heads, case.head_dim, 16, torch.bfloat16, CUDA, num_sms, 512
        )
        flash_rate = ""
        if flash_attention.flash_attn is not None:
            flash = flash_attention.FlashAttention(case.head_dim, torch.bfloat16, 256)
            flash_rate = case.rate(seconds_of(case, 256, flash))
        if case.num_shared_keys:
            ours.min_gain_bytes = 1 << 60
            alone = case.rate(seconds_of(case, 16, ours))
            print(f"{case.name + ', each alone':45}{alone:>14}{flash_rate:>14}", flush=True)
            ours.min_gain_bytes = 0
        projected = ""
        if case.is_decode and not case.num_shared_keys:
            projected = case.rate(seconds_of(case, 16, ours, projected=True))
        rate = case.rate(seconds_of(case, 16, ours))
        print(f"{case.name:45}{rate:>14}{flash_rate:>14}{projected:>18}", flush=True)


if __name__ == "__main__":
    main()
