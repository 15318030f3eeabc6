"""What CUDA graphs rest on: their sizes, arrays whose shapes depend on the size alone, inputs that
a kernel makes."""

import types

import numpy as np
import pytest
import torch

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.ops.batch import RowState
from nanovllm.ops.reference_attention import TorchAttention
from nanovllm.ops.reference_rows import noise_keys
from nanovllm.ops.triton import rows as triton_rows
from nanovllm.ops.triton.attention import TritonAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.executor import InProcessExecutor
from nanovllm.worker.graphs import graph_sizes
from nanovllm.worker.inputs import InputBuilder, step_tensors
from nanovllm.worker.record import ALIGNMENT, layout, make_records, pack, views
from nanovllm.worker.rows import Rows

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


LONG = [(20_000, 20_000)]


@pytest.mark.parametrize(
    "num_decodes, waiting, expected",
    [
        *[(0, [(9, 9)], 1000), (10, [], 0), (10, [(30, 30)], 30), (10, [(60, 60), (90, 90)], 118)],
        # More than four steps of a graph: one step of its own.
        *[(10, [(200, 200)] * 3, 990), (10, LONG, 990), (128, [(1, 1)], 872), (500, [(9, 9)], 500)],
        # Keys that a graph's attention may read: 50,000.
        *[(10, [(40, 2000)], 25), (10, [(10, 2000), (70, 1000)], 40), (10, [(5, 50_001)], 990)],
    ],
)
def test_prompts_fill_a_graph_or_have_a_step_of_their_own(num_decodes, waiting, expected):
    executor = object.__new__(InProcessExecutor)
    executor.worker = types.SimpleNamespace(
        graph_sizes=[1, 64, 128], mixed_tokens=128, mixed_keys=50_000, max_num_batched_tokens=1000
    )
    assert executor.prompt_budget(num_decodes, iter(waiting)) == expected
    executor.worker.graph_sizes = []
    assert executor.prompt_budget(num_decodes, iter(waiting)) == 1000 - num_decodes


def make_inputs(num_rows, max_blocks, **heads):
    """A builder of a GPU's inputs, whose kernels do not run."""
    heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, **heads}
    attention = TritonAttention(
        **heads, block_size=16, dtype=torch.bfloat16, device=CPU, num_sms=132, max_decodes=num_rows
    )
    rows = Rows(num_rows, 1, max_blocks, 100, CPU)
    return InputBuilder(rows, (attention,), 16, num_rows), make_records(num_rows, 1, num_rows, CPU)


def decode_step(rows, positions):
    blocks = np.full((1, len(rows)), -1, np.int32)
    return StepInput(decode_rows=rows, decode_positions=positions, decode_blocks=blocks)


@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_graphs_arrays_have_the_shapes_of_its_size_and_their_names(size):
    inputs, ([record, *_], _) = make_inputs(40, 300)
    [attention] = inputs.attentions
    rng = np.random.default_rng(0)
    shapes = {}
    for num_decodes in {1, (size + 1) // 2, size}:
        for longest in (2, 400, 4000, 4700):
            # Tables of zeros: all rows share all of their blocks, if that counts.
            for attention.min_gain_bytes in (0, 1 << 60):
                rows = rng.permutation(40)[:num_decodes]
                inputs.list_age = 0
                step = decode_step(rows, rng.integers(1, longest, num_decodes))
                arrays = inputs.begin(step, record, size)
                kinds = tuple((a.shape, a.dtype) for a in arrays.values())
                shapes.setdefault(tuple(arrays), set()).add(kinds)
    assert all(len(kinds) == 1 for kinds in shapes.values())
    assert any("0.shared_items" in names for names in shapes) == (size > 2)
    layouts = [names for names in shapes if "0.shared_items" not in names]
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
    inputs, ([record, *_], _) = make_inputs(
        1024, 12_500, num_heads=16, num_kv_heads=8, head_dim=128
    )
    inputs.attentions[0].min_gain_bytes = 1 << 60
    step = decode_step(np.arange(num_decodes), np.full(num_decodes, num_keys) - 1)
    arrays = inputs.begin(step, record, num_decodes)
    assert [name for name in arrays if name.endswith("_items")] == [f"0.{layout}_items"]


def test_a_list_of_work_serves_while_the_decodes_are_the_same():
    inputs, ([record, *_], _) = make_inputs(8, 300)
    rows, positions = np.array([3, 1, 6]), np.array([30, 700, 2])

    def begin(rows, positions, size=8):
        return inputs.begin(decode_step(rows, positions), record, size)

    first = begin(rows, positions)
    served = inputs.attentions[0].steps_per_list
    for i in range(1, served):
        assert begin(rows, positions + i) is first
        assert inputs.tensors.list_age.item() == i
    positions += served
    later = begin(rows, positions)
    assert later is not first and begin(rows, positions + 1) is later
    assert begin(rows[:2], positions[:2] + 2) is not later
    fewer = begin(rows[:2], positions[:2] + 3)
    assert begin(rows[:2], positions[:2] + 4) is fewer
    other_size = begin(rows[:2], positions[:2] + 5, size=4)
    assert other_size is not fewer
    # Row 3 ends, another sequence takes it.
    starts = [RowStart(3, 0, SamplingParams(), 0, (), 0, (np.array([5], np.int32),))]
    inputs.rows.start(starts, record)
    inputs.begin(StepInput(starts, chunks=[Chunk(3, 0, [1, 2], samples=True)]), record)
    assert begin(rows[:2], np.array([2, positions[1] + 6]), size=4) is not other_size


@pytest.mark.gpu
def test_a_steps_tensors_on_a_gpu():
    checkstep_tensors(torch.device("cuda"))


def test_a_steps_tensors_interpreted():
    checkstep_tensors(CPU)


def random_state(rng, num_groups, num_rows, max_blocks, device):
    """Of num_rows sequences and padding."""
    n = num_rows + 1
    seeds = rng.integers(0, 2**64, n, np.uint64)
    seeds[0] = 2**64 - 1
    tables = rng.permutation(num_groups * n * max_blocks).astype(np.int32)
    arrays = (
        tables.reshape(num_groups, n, max_blocks), rng.integers(0, 150_000, n),
        np.stack((seeds.view(np.int64), rng.integers(1, 150_000, n))),
        rng.random((3, n)).astype(np.float32),
    )  # fmt: skip
    tables, last_tokens, ints, floats = (torch.from_numpy(a).to(device) for a in arrays)
    return RowState(tables, last_tokens, *ints, *floats)


def random_step(rng, num_decodes, num_chunks, num_groups, num_rows):
    """Decodes that open blocks or not, chunks of rows of which others computed some tokens."""
    rows = rng.permutation(num_rows)
    positions = rng.integers(2, 320, num_decodes)
    opens = positions % 16 == 0
    blocks = np.where(opens, rng.integers(9000, 9999, (num_groups, num_decodes)), -1)
    step = StepInput([], rows[:num_decodes], positions, blocks.astype(np.int32))
    for row in rows[num_decodes:][:num_chunks].tolist():
        tables = tuple(rng.permutation(6000)[:20].astype(np.int32) for _ in range(num_groups))
        cached, samples = int(rng.integers(0, 3)), bool(rng.integers(0, 2))
        step.starts.append(RowStart(row, cached, SamplingParams(), 0, (), 0, tables))
        tokens = rng.integers(0, 150_000, rng.integers(1, 9)).tolist()
        step.chunks.append(Chunk(row, max(0, cached - 1), tokens, samples))
    return step


def checkstep_tensors(device):
    """begin_step's kernel beside its reference, on random steps, and what numpy makes of them."""
    rng = np.random.default_rng()
    num_rows, num_tokens, num_groups = 300, 420, 2
    state = random_state(rng, num_groups, num_rows, 20, device)
    attentions = (TorchAttention(), TorchAttention())
    for num_decodes, num_chunks in ((1, 0), (270, 0), (280, 0), (0, 1), (100, 20), (290, 10)):
        rows = Rows(num_rows, num_groups, 20, 150_000, CPU)
        rows.state = RowState(*(tensor.cpu().clone() for tensor in state))
        builder = InputBuilder(rows, attentions, 16, num_tokens)
        [record, *_], _ = make_records(num_rows, num_groups, num_tokens, device)
        step = random_step(rng, num_decodes, num_chunks, num_groups, num_rows)
        for start in step.starts:
            rows.num_cached_tokens[start.row] = start.num_cached_tokens
            for tables in (rows.state.block_tables, state.block_tables):
                for table, blocks in zip(tables, start.block_tables, strict=True):
                    table[start.row] = torch.from_numpy(blocks)
        lens = [len(chunk.token_ids) for chunk in step.chunks]
        n = num_decodes + sum(lens)
        size = int(rng.integers(n, num_tokens + 1))
        builder.begin(step, record, size)
        expected = builder.tensors

        out = step_tensors(Rows(num_rows, num_groups, 20, 150_000, device), 2, num_tokens)
        triton_rows.begin_step(record.columns, state, out, 16, size)
        num_draws, num_sampled = min(size, num_rows), record.num_sampled
        for name, mine, theirs in zip(out._fields, out, expected, strict=True):
            if name == "draws":
                continue
            end = num_draws if name in ("rows", "sampled_tokens") else size
            assert torch.equal(mine.cpu()[..., :end], theirs[..., :end]), name
        for name, mine, theirs in zip(out.draws._fields, out.draws, expected.draws, strict=True):
            assert torch.equal(mine.cpu()[:num_draws], theirs[:num_draws]), name
        assert torch.equal(state.block_tables.cpu(), rows.state.block_tables)

        # What they mean.
        token_rows = np.concatenate((step.decode_rows, np.repeat(step.rows[num_decodes:], lens)))
        known = [token for chunk in step.chunks for token in chunk.token_ids]
        last_tokens = state.last_tokens.cpu().numpy()
        token_ids = np.concatenate((last_tokens[step.decode_rows], np.array(known, np.int64)))
        assert np.array_equal(expected.token_ids[:n], token_ids)
        positions = expected.positions[:n].numpy()
        ends = [chunk.position + len(chunk.token_ids) - 1 for chunk in step.chunks]
        last = num_decodes + np.cumsum(lens, dtype=int) - 1
        assert positions[last].tolist() == ends
        for group in range(num_groups):
            blocks = state.block_tables[group].cpu().numpy()[token_rows, positions // 16]
            slots = blocks.astype(np.int64) * 16 + positions % 16
            slots[num_decodes:][positions[num_decodes:] < rows.num_cached_tokens[
                token_rows[num_decodes:]]] = -1  # fmt: skip
            assert np.array_equal(expected.slot_mapping[group, :n], slots)
        assert (expected.slot_mapping[:, n:size] == -1).all()
        samples = np.append(np.arange(num_decodes), last)[step.samples]
        assert expected.sampled_tokens[:num_sampled].tolist() == samples.tolist()
        assert expected.rows[:num_sampled].tolist() == step.rows[step.samples].tolist()
        assert (expected.rows[num_sampled:num_draws] == num_rows).all()
        seeds = state.seed.cpu().numpy().view(np.uint64)[expected.rows[:num_sampled]]
        keys = noise_keys(seeds, positions[samples] + 1)
        assert np.array_equal(expected.draws.noise_keys[:num_sampled], keys)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            of_rows = getattr(state, name).cpu()[expected.rows[:num_draws]]
            assert torch.equal(getattr(expected.draws, name)[:num_draws], of_rows)

        # And back: what is sampled for them.
        pin = device.type == "cuda"
        host_tokens = torch.zeros(4, num_rows, dtype=torch.int64, pin_memory=pin)
        token_ids = torch.from_numpy(rng.integers(0, 150_000, num_draws)).to(device)
        out.slot.fill_(2)
        sampled = out.rows[:num_draws], token_ids, out.slot
        triton_rows.keep_sampled(state.last_tokens, host_tokens, *sampled)
        if pin:
            torch.cuda.synchronize()
        assert torch.equal(host_tokens[2, :num_draws], token_ids.cpu())
        rows_of = out.rows[:num_sampled]
        assert torch.equal(state.last_tokens[rows_of], token_ids[:num_sampled])


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
