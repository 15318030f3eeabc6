"""What CUDA graphs rest on, without a GPU: the sizes, and arrays whose shapes depend on the size
alone."""

import numpy as np
import pytest
import torch

from nanovllm.ops.triton_attention import TritonAttention
from nanovllm.step import StepInput
from nanovllm.worker.cuda_graph import graph_sizes
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.upload import ALIGNMENT, Uploader, layout, pack, views

CPU = torch.device("cpu")


@pytest.mark.parametrize("max_num_seqs", [*range(1, 70), 100, 256, 500, 1024, 5000])
def test_sizes_go_up_to_max_num_seqs_with_little_padding(max_num_seqs):
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    assert len(sizes) <= 40
    for smaller, size in zip([0, *sizes], sizes, strict=False):
        assert size - smaller <= max(8, size / 4)


@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_graphs_arrays_have_the_shapes_of_its_size(size):
    attention = TritonAttention(8, 2, 64, 16, torch.bfloat16, CPU, num_sms=132, max_decodes=40)
    inputs = InputBuilder(40, 300, 16, attention, Uploader(CPU))
    rng = np.random.default_rng(0)
    shapes = {False: set(), True: set()}
    for num_decodes in {1, (size + 1) // 2, size}:
        for longest in (2, 400, 4000):
            # Tables of zeros: all rows share all of their pages, if that counts.
            for attention.min_gain_bytes in (0, 1 << 60):
                step = StepInput(
                    decode_rows=rng.permutation(40)[:num_decodes],
                    decode_positions=rng.integers(1, longest, num_decodes),
                )
                arrays = inputs.decode_arrays(step, size)
                shares = "shared_items" in arrays
                shapes[shares].add(tuple((name, a.shape, a.dtype) for name, a in arrays.items()))
                assert (arrays["rows"][num_decodes:] == inputs.padding_row).all()
                assert (arrays["slot_mapping"][num_decodes:] == -1).all()
                for name in ("short", "shared") if shares else ("short",):
                    assert arrays[f"num_{name}_items"][0] <= len(arrays[f"{name}_items"])
    assert len(shapes[False]) == 1
    assert len(shapes[True]) == (size > 2)


def test_packed_arrays_come_back_as_they_were():
    arrays = {
        "a": np.arange(7, dtype=np.int32),
        "b": np.zeros((0, 9), np.int32),
        "c": np.random.default_rng(0).random((3, 5)).astype(np.float32),
        "d": np.arange(4).reshape(2, 2).T,
    }
    offsets, size = layout(arrays)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    buffer = torch.zeros(size, dtype=torch.uint8)
    pack(arrays, offsets, buffer.numpy())
    for name, view in views(buffer, arrays, offsets).items():
        assert (
            np.array_equal(view.numpy(), arrays[name]) and view.numpy().dtype == arrays[name].dtype
        )
