"""What CUDA graphs rest on: their sizes, arrays whose shapes depend on the size alone, inputs that
a kernel makes."""

import numpy as np
import pytest
import torch
from nanovllm.worker.upload import ALIGNMENT, Uploader, layout, pack, views

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.ops.reference import TorchAttention
from nanovllm.ops.triton.attention import TritonAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.graphs import graph_sizes
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.sampler import noise_keys

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "max_num_seqs, max_tokens, larger",
    [
        *[(1, 16384, [128, 256, 512]), (4, 300, [128, 256, 300]), (255, 16384, [256, 512])],
        *[(256, 16384, [320, 384, 448, 512]), (1024, 1600, [1280, 1536, 1600])],
        *[(300, 16384, [376, 456, 528, 600]), (64, 66, []), (1024, 1024, []), (64, 70, [70])],
    ],
)
def test_there_are_some_sizes_for_prompts_beside_decodes(max_num_seqs, max_tokens, larger):
    without = graph_sizes(max_num_seqs)
    assert graph_sizes(max_num_seqs, 67, max_tokens) == [*without, *larger]
    assert graph_sizes(max_num_seqs, None, max_tokens) == without


def test_no_size_is_smaller_than_a_step_with_prompts_has():
    assert graph_sizes(4, 265, 16384) == [1, 2, 4, 512]
    assert graph_sizes(4, 529, 16384) == [1, 2, 4]


@pytest.mark.parametrize("max_num_seqs", [*range(1, 70), 100, 256, 500, 1024, 5000])
def test_sizes_go_up_to_max_num_seqs_with_little_padding(max_num_seqs):
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    assert len(sizes) <= 40
    for smaller, size in zip([0, *sizes], sizes, strict=False):
        assert size - smaller <= max(8, size / 4)


def make_inputs(num_rows, max_blocks, **heads):
    heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, **heads}
    attention = TritonAttention(
        **heads, block_size=16, dtype=torch.bfloat16, device=CPU, num_sms=132, max_decodes=num_rows
    )
    sizes = (num_rows, num_rows, max_blocks, 16)
    return InputBuilder(*sizes, attention, Uploader(CPU), no_state(num_rows))


def no_state(num_rows):
    return {
        "temperature": torch.zeros(num_rows + 1),
        "seed": torch.zeros(num_rows + 1, dtype=torch.int64),
    }


def decode_step(rows, positions, pages=None):
    pages = np.full(len(rows), -1, np.int32) if pages is None else pages
    return StepInput(decode_rows=rows, decode_positions=positions, decode_blocks=pages[None])


@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_graphs_arrays_have_the_shapes_of_its_size_and_their_names(size):
    inputs = make_inputs(40, 300)
    rng = np.random.default_rng(0)
    shapes = {}
    for num_decodes in {1, (size + 1) // 2, size}:
        for longest in (2, 400, 4000, 4700):
            # Tables of zeros: all rows share all of their blocks, if that counts.
            for inputs.attention.min_gain_bytes in (0, 1 << 60):
                rows = rng.permutation(40)[:num_decodes]
                inputs.steps_listed = 0
                step = decode_step(rows, rng.integers(1, longest, num_decodes))
                arrays = inputs.begin(step, size)
                kinds = tuple((a.shape, a.dtype) for a in arrays.values())
                shapes.setdefault(tuple(arrays), set()).add(kinds)
    assert all(len(kinds) == 1 for kinds in shapes.values())
    assert any("shared_items" in names for names in shapes) == (size > 2)
    layouts = [names for names in shapes if "shared_items" not in names]
    assert len(layouts) == 1 or size == 8  # few decodes with few keys, and with many


@pytest.mark.parametrize(
    "num_decodes, num_keys, layout",
    [
        *[(1, 1, "few"), (1, 4224, "few"), (1, 4225, "short"), (8, 500, "few"), (8, 600, "short")],
        *[(9, 10, "short"), (247, 900, "short"), (248, 10, "crowd"), (1024, 900, "crowd")],
        *[(33, 3072, "short"), (33, 3073, "deep"), (66, 1537, "deep"), (67, 3100, "short")],
        *[(1, 200_000, "deep"), (67, [4000] * 66 + [9000], "deep")],
    ],
)
def test_the_layout_of_attention_follows_from_decodes_and_keys(num_decodes, num_keys, layout):
    inputs = make_inputs(1024, 12_500, num_heads=16, num_kv_heads=8, head_dim=128)
    inputs.attention.min_gain_bytes = 1 << 60
    step = decode_step(np.arange(num_decodes), np.full(num_decodes, num_keys) - 1)
    arrays = inputs.begin(step, num_decodes)
    assert [name for name in arrays if name.endswith("_items")] == [f"{layout}_items"]


def test_a_list_of_work_serves_while_the_decodes_are_the_same():
    inputs = make_inputs(8, 300)
    rows, positions = np.array([3, 1, 6]), np.array([30, 700, 2])

    def begin(rows, positions, size=8):
        return inputs.begin(decode_step(rows, positions), size)

    first = begin(rows, positions)
    served = inputs.attention.steps_per_list
    for i in range(1, served):
        assert begin(rows, positions + i) is first
    positions += served
    later = begin(rows, positions)
    assert later is not first and begin(rows, positions + 1) is later
    assert begin(rows[:2], positions[:2] + 2) is not later
    fewer = begin(rows[:2], positions[:2] + 3)
    assert begin(rows[:2], positions[:2] + 4) is fewer
    other_size = begin(rows[:2], positions[:2] + 5, size=4)
    assert other_size is not fewer
    # Row 3 ends, another sequence takes it.
    inputs.build(
        StepInput(
            starts=[RowStart(3, 0, SamplingParams(), 0, (), 0, (np.array([5], np.int32),))],
            chunks=[Chunk(3, 0, [1, 2], samples=True)],
        )
    )
    assert begin(rows[:2], np.array([2, positions[1] + 6]), size=4) is not other_size


@pytest.mark.gpu
def test_a_steps_inputs_on_a_gpu():
    check_step_inputs(torch.device("cuda"))


def test_a_steps_inputs_interpreted():
    check_step_inputs(CPU)


def check_step_inputs(device):
    """begin_step's kernel beside what numpy makes of the same step."""
    rng = np.random.default_rng()
    num_rows, num_tokens = 300, 420
    seeds = rng.integers(0, 2**64, 301, np.uint64)
    seeds[0] = 2**64 - 1
    state = {
        "temperature": torch.from_numpy(rng.random(301).astype(np.float32)).to(device),
        "seed": torch.from_numpy(seeds.view(np.int64)).to(device),
    }
    inputs = InputBuilder(num_rows, num_tokens, 20, 16, TorchAttention(), Uploader(device), state)
    inputs.host_tables[:] = rng.permutation(301 * 20).reshape(301, 20)
    inputs.block_tables.copy_(torch.from_numpy(inputs.host_tables))
    inputs.last_tokens.copy_(torch.from_numpy(rng.integers(0, 150_000, 301)))
    for num_decodes, num_chunks in ((1, 0), (270, 0), (280, 0), (0, 1), (100, 20), (290, 10)):
        all_rows = rng.permutation(num_rows)
        rows, chunk_rows = all_rows[:num_decodes], all_rows[num_decodes:][:num_chunks]
        positions = rng.integers(2, 320, num_decodes)  # behind what is cached
        opens = positions % 16 == 0
        pages = np.where(opens, rng.integers(9000, 9999, num_decodes), -1).astype(np.int32)
        step = decode_step(rows, positions, pages)
        for row in chunk_rows.tolist():
            table = rng.permutation(6000)[:20].astype(np.int32)
            cached, samples = int(rng.integers(0, 3)), bool(rng.integers(0, 2))
            step.starts.append(RowStart(row, cached, SamplingParams(), 0, (), 0, (table,)))
            tokens = rng.integers(0, 150_000, rng.integers(1, 9)).tolist()
            step.chunks.append(Chunk(row, max(0, cached - 1), tokens, samples))
        n = int(step.query_lens.sum())
        size = int(rng.integers(n, num_tokens + 1))
        listed = inputs.begin(step, size)
        written = {n: t[:size].cpu().numpy() for n, t in inputs.step_inputs.items()}
        arrays = inputs._arrays(step)
        assert (inputs.host_tables[rows, positions // 16][opens] == pages[opens]).all()
        assert np.array_equal(inputs.block_tables.cpu().numpy(), inputs.host_tables)
        for name in ("positions", "slot_mapping"):
            assert np.array_equal(written[name][:n], arrays[name]), name
        assert (written["context_lens"] == written["positions"] + 1).all()
        last_tokens = inputs.last_tokens.cpu().numpy()
        token_ids = np.concatenate((last_tokens[rows], step.known_tokens))
        assert np.array_equal(written["token_ids"][:n], token_ids)
        drawn = np.full(n, inputs.padding_row)
        drawn[step.sampled_tokens] = step.rows[step.samples]
        assert np.array_equal(written["rows"][:n], drawn)
        assert (written["rows"][n:] == inputs.padding_row).all()
        assert (written["slot_mapping"][n:] == -1).all()
        assert (written["positions"][n:] == 0).all()
        assert (written["token_ids"][n:] == last_tokens[inputs.padding_row]).all()
        sampled = drawn != inputs.padding_row
        assert ("sampled_tokens" in listed) == (size > num_rows)
        if size > num_rows:
            places = listed["sampled_tokens"]
            assert len(places) == num_rows
            assert np.array_equal(places[: sampled.sum()], step.sampled_tokens)
            assert (written["rows"][places[sampled.sum() :]] == inputs.padding_row).all()
        temperature = state["temperature"].cpu().numpy()
        assert np.array_equal(written["temperature"][:n][sampled], temperature[drawn[sampled]])
        keys = noise_keys(seeds[drawn], written["positions"][:n] + 1)
        assert np.array_equal(written["noise_keys"][:n][sampled], keys[sampled])

        # And back: what is sampled for them.
        token_ids = torch.from_numpy(rng.integers(0, 150_000, size)).to(device)
        batch, tensors = inputs.batch_of(size, {})
        assert batch.query_start.tolist() == list(range(size + 1)) and batch.is_decode
        inputs.keep_sampled(tensors["rows"], token_ids, tensors["turn"])
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert inputs.sampled()[:n].tolist() == token_ids[:n].tolist()
        places = step.sampled_tokens
        assert inputs.last_tokens[drawn[places]].tolist() == token_ids[places].tolist()


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
