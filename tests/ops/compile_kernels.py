"""Compile all Triton kernels for a compute capability: python compile_kernels.py 90. Prints the
shared memory of each in bytes, as JSON."""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanovllm.ops.triton.layers import TRITON_HAS_PDL  # noqa: E402

# Heads for which decodes from the projection are compiled: all would take minutes.
PROJECTED = [(128, torch.bfloat16), (80, torch.float16), (64, torch.float32)]
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def record_launches() -> dict[str, tuple]:
    """Run every wrapper on small CPU tensors, with launches noted down instead of made."""
    from kernel_calls import paged_case

    from nanovllm.ops.batch import BatchGroup, ForwardBatch, KVLayer, Rotary
    from nanovllm.ops.triton import layers as triton_ops
    from nanovllm.ops.triton import limits as triton_limits
    from nanovllm.ops.triton import linear as triton_linear
    from nanovllm.ops.triton import rows as triton_rows
    from nanovllm.ops.triton import sampling as triton_sampling
    from nanovllm.worker.inputs import step_tensors
    from nanovllm.worker.record import make_records
    from nanovllm.worker.rows import Rows

    launches: dict[str, tuple] = {}
    label = ""

    def note(kernel, *args, grid, warmup, **kwargs):
        part = "" if kwargs.get("HAS_PREFIXES") is not True else " behind a prefix"
        launches[f"{kernel.__name__} {label}{part}"] = (kernel, args, kwargs)

    triton.JITFunction.run = note
    cpu = torch.device("cpu")
    for head_dim, dtype, block_size in [
        (64, torch.bfloat16, 16),
        (80, torch.float16, 16),
        (128, torch.bfloat16, 16),
        (128, torch.bfloat16, 256),
        (64, torch.float32, 16),
        (128, torch.float32, 16),
        (256, torch.bfloat16, 16),
        (256, torch.float32, 64),
        (128, torch.bfloat16, 5),
    ]:
        # One, some and long queries.
        for query_lens in ([1], [1] * 50, [200]) if block_size == 16 else ([1],):
            queries = f"{len(query_lens)} queries of {query_lens[0]}"
            label = f"head_dim {head_dim} {dtype} pages of {block_size}, {queries}"
            lens = [300] * len(query_lens)
            q, kv, step = paged_case(query_lens, lens, 4, 2, head_dim, block_size, dtype, cpu)
            step.attend(q, kv, 1.0)
            if query_lens[0] == 1 and (head_dim, dtype) in PROJECTED:
                label += ", projected"
                qkv = torch.zeros(len(query_lens), 8 * head_dim, dtype=dtype)
                norm = torch.zeros(head_dim, dtype=dtype)
                rotary = Rotary((norm, norm), 1e-6, torch.zeros(300, head_dim))
                step.attention.attend_projected(qkv, rotary, kv, step.batch, 1.0)
        if block_size != 16 or head_dim == 80:
            continue
        label = f"head_dim {head_dim} {dtype} pages of {block_size}, shared keys"
        lens, groups = [4 * block_size + 9] * 64, [(np.arange(64), 4)]
        q, kv, step = paged_case(
            [1] * 64, lens, 4, 2, head_dim, block_size, dtype, cpu, groups=groups
        )
        assert "shared_items" in step.arrays
        step.attend(q, kv, 1.0)
    label = "shared keys, each head with its own"
    sizes = 2, 2, 128, 16, torch.bfloat16, cpu
    q, kv, step = paged_case([1] * 64, [73] * 64, *sizes, groups=[(np.arange(64), 4)])
    assert "shared_items" in step.arrays
    step.attend(q, kv, 1.0)
    for head_dim in (64, 128):
        label = f"a crowd, head_dim {head_dim}"
        sizes = 4, 2, head_dim, 16, torch.bfloat16, cpu
        q, kv, step = paged_case([1] * 40, [50] * 40, *sizes, num_sms=1)
        assert "crowd_items" in step.arrays
        step.attend(q, kv, 1.0)
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype)
        x = torch.zeros(2, 4096, dtype=dtype)
        triton_ops.rms_norm(x, x[0], 1e-6)
        triton_ops.silu_and_mul(x)
        weight = torch.zeros(64, 4096, dtype=dtype)
        for rows in (1, 4):
            few = torch.zeros(rows, 4096, dtype=dtype)
            label = f"{dtype}, {rows} rows"
            triton_linear.linear(few, weight, norm=(x[0], 1e-6), gated=True)
            label += ", added"
            triton_linear.add_linear(few[:, :64].contiguous(), few, weight)
        label = str(dtype)
        kv = KVLayer(*torch.zeros(2, 4, 16, 8, 128, dtype=dtype))
        numbers = torch.zeros(2, dtype=torch.int64)
        batch = ForwardBatch(numbers, numbers, (BatchGroup(None, numbers, None, {}),))
        rotary = Rotary((x[0], x[0]), 1e-6, torch.zeros(9, 128))
        triton_ops.qk_norm_rope_store(x, rotary, batch, kv)
        triton_ops.store(*x.view(2, -1, 8, 128)[:, :2].unbind(1), kv, numbers)
        logits = torch.zeros(2, 151936, dtype=dtype)
        draws = torch.ones(2), torch.zeros(2, 2).long()
        triton_sampling.sample(logits, *draws)
        label += ", limited"
        triton_sampling.sample(logits, *draws, top_p=torch.ones(2))
        label = f"{dtype}, the most likely"
        triton_limits.top_logprobs(logits, torch.zeros(2).long(), 20)
    label = "of rows"
    state = Rows(8, 1, 4, 100, cpu)
    records, host_tokens = make_records(8, 1, 16, cpu)
    tensors = step_tensors(state, 1, 16)
    triton_rows.begin_step(records[0].columns, state.state, tensors, 16, 16)
    sampled = tensors.rows, tensors.rows, tensors.slot
    triton_rows.keep_sampled(state.state.last_tokens, host_tokens, *sampled)
    return launches


def compile_launch(kernel, args, kwargs, capability: int):
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name in kernel.arg_names
    }
    if "PDL" in values:
        values["PDL"] = capability >= 90 and TRITON_HAS_PDL
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[i].is_constexpr or value is None:
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    options["launch_pdl"] = values.get("PDL", False)
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


if __name__ == "__main__":
    shared = {
        name: compile_launch(*launch, int(sys.argv[1])).metadata.shared
        for name, launch in record_launches().items()
    }
    print(json.dumps(shared))
