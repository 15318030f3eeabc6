"""What the tests of the Triton kernels share: cases, tolerances, attention in float64."""

from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.ops.batch import Attention, BatchGroup, ForwardBatch, KVLayer, Queries
from nanovllm.ops.triton.attention import TritonAttention

# Query and context lengths by name.
LENS = {
    "decodes": lambda rng: ([1] * 40, rng.integers(1, 900, 40)),
    "crowd": lambda rng: ([1] * 300, rng.integers(1, 400, 300)),
    "one": lambda rng: ([1], [3000]),
    "skewed": lambda rng: ([1] * 30, [7000, *rng.integers(1, 200, 29)]),
    "chunks": lambda rng: ([700, 33, 128], [700, 500, 4000]),
    "mixed": lambda rng: ([1] * 10 + [5, 2, 300], [*rng.integers(1, 600, 10), 77, 900, 1500]),
}


def launch_attention(case: dict) -> None:
    """One launch, so that its kernels are compiled."""
    q, kv, step = paged_case(
        *LENS[case["lens"]](np.random.default_rng()), *case["heads"], case["head_dim"],
        case["block_size"], case["dtype"], torch.device("cuda"),
    )  # fmt: skip
    step.attend(q, kv, 1.0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN never passes a comparison with it."""
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def paged_case(
    query_lens, context_lens, heads, kv_heads, head_dim, block_size, dtype, device, num_sms=132,
    groups=(),
):  # fmt: skip
    """Queries, blocks and a Case that points at them: scattered blocks, NaN in every slot that no
    query may read, rows in any order.

    Args:
        groups: (sequences, blocks) that begin with the same blocks; they are read together if the
            sequences are decodes, which come first.
    """
    rng = np.random.default_rng()
    query_lens, context_lens = np.array(query_lens), np.array(context_lens)
    num_seqs, num_pages = len(query_lens), -(-context_lens // block_size)
    pages = rng.permutation(int(num_pages.sum()) + 2).astype(np.int32)
    rows = rng.permutation(num_seqs + 2)[:num_seqs]
    tables = np.full((num_seqs + 2, int(num_pages.max()) + 3), len(pages) - 1, np.int32)
    shape = (len(pages), block_size, kv_heads, head_dim)
    kv = KVLayer(*(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)))
    used = 0
    for row, count in zip(rows, num_pages, strict=True):
        tables[row, :count] = pages[used : used + count]
        used += count
    for seqs, count in groups:
        tables[rows[seqs], :count] = tables[rows[seqs[0]], :count]
    for row, context_len, count in zip(rows, context_lens, num_pages, strict=True):
        slots = tables[row, :count, None] * block_size + np.arange(block_size)
        slots = torch.from_numpy(slots.reshape(-1)[:context_len]).to(device)
        for cache in (kv.k, kv.v):
            values = torch.randn(context_len, kv_heads, head_dim, device=device).to(dtype)
            cache.view(-1, kv_heads, head_dim)[slots] = values
    num_decodes = int((query_lens == 1).cumprod().sum())
    attention = TritonAttention(
        heads, kv_heads, head_dim, block_size, dtype, device, num_sms, num_decodes
    )
    attention.min_gain_bytes = 0
    query_start = np.concatenate(([0], query_lens.cumsum()))
    arrays = attention.host_arrays(
        Queries(tables, rows, query_start, query_lens, context_lens, num_decodes, None)
    )
    positions = np.concatenate(
        [np.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)]
    )
    token_rows = np.repeat(rows, query_lens)
    slots = tables[token_rows, positions // block_size].astype(np.int64) * block_size
    case = Case(
        attention, tables, rows, query_start, query_lens, context_lens, num_decodes, positions,
        slots + positions % block_size, arrays, device,
    )  # fmt: skip
    q = torch.randn(len(positions), heads, head_dim, device=device).to(dtype)
    return q, kv, case


@dataclass
class Case:
    """A step of some sequences, for one group of layers. Fields as in Attention.host_arrays.

    Attributes:
        positions, slots: of the query tokens.
        arrays: attention's, of the host.
        list_age: in steps.
    """

    attention: Attention
    tables: np.ndarray
    rows: np.ndarray
    query_start: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    num_decodes: int
    positions: np.ndarray
    slots: np.ndarray
    arrays: dict
    device: torch.device
    list_age: int = 0

    @property
    def batch(self) -> ForwardBatch:
        def on_device(array):
            return torch.from_numpy(array).to(self.device)

        arrays = {name: on_device(array) for name, array in self.arrays.items()}
        arrays["list_age"] = torch.full((1,), self.list_age, dtype=torch.int32, device=self.device)
        group = BatchGroup(on_device(self.tables), on_device(self.slots), self.attention, arrays)
        return ForwardBatch(None, on_device(self.positions), (group,))

    def attend(self, q, kv, scale):
        return self.attention.attend(q, kv, self.batch, scale)


def attention_in_float64(q, kv, case, scale, window=None):
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    starts, block_size = case.query_start.tolist(), kv.k.shape[1]
    groups = q.shape[1] // kv.k.shape[2]
    positions = torch.from_numpy(case.positions).to(q.device)
    for i, context_len in enumerate(case.context_lens.tolist()):
        pages = case.tables[case.rows[i], : -(-context_len // block_size)]
        pages = torch.from_numpy(pages).long().to(q.device)
        k, v = (
            cache[pages].flatten(0, 1)[:context_len].double().repeat_interleave(groups, 1)
            for cache in (kv.k, kv.v)
        )
        tokens = slice(starts[i], starts[i + 1])
        scores = torch.einsum("thd,lhd->htl", q[tokens].double(), k) * scale
        key, query = torch.arange(context_len, device=q.device), positions[tokens, None]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        seen = v.masked_fill(hidden.all(0)[:, None, None], 0.0)  # may be NaN
        out[tokens] = torch.einsum("htl,lhd->thd", probs, seen)
    return out


def pairwise(**values):
    """Cases in which every two values of different parameters meet at least once (greedily, each
    case the one of some random ones that brings most new pairs)."""
    rng = np.random.default_rng(0)
    names = list(values)

    def pairs(case):
        return {(a, case[a], b, case[b]) for i, a in enumerate(names) for b in names[i + 1 :]}

    missing = {
        (a, x, b, y)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in values[a]
        for y in values[b]
    }
    cases = []
    while missing:
        must = dict(zip(names, [None] * len(names), strict=True))
        a, x, b, y = next(iter(sorted(missing, key=repr)))
        must.update({a: x, b: y})
        drawn = []
        for _ in range(50):
            case = {n: values[n][rng.integers(len(values[n]))] for n in names}
            drawn.append(case | {n: v for n, v in must.items() if v is not None})
        best = max(drawn, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases
