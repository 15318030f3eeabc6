"""The worker's kernels around a forward in numpy and torch: what a CPU runs, and what the kernels
of triton/rows.py are tested against.
"""

import numpy as np
import torch

from nanovllm.ops.batch import RowState, StepColumns, StepTensors


def begin_step(
    columns: StepColumns, state: RowState, out: StepTensors, block_size: int, max_tokens: int
) -> None:
    """A step's tensors from its columns and the rows' state. Blocks that tokens open go to their
    rows' block tables; padding is of the last row.

    Args:
        out: written to, up to the counts with padding.
        block_size: tokens per block.
        max_tokens: tokens with padding, at most; a kernel is launched for this number.
    """
    counts, *tokens = columns
    num_tokens, size, num_sampled, num_draws, slot, list_age = counts.tolist()
    row, position, token, sampled, stored, block = (c.numpy()[..., :num_tokens] for c in tokens)
    tables, last_tokens, seed, *params = (tensor.numpy() for tensor in state)
    padding_row = len(last_tokens) - 1

    index, offset = np.divmod(position, block_size)
    for table, opened, slots in zip(tables, block, out.slot_mapping.numpy(), strict=True):
        opens = np.flatnonzero(opened >= 0)
        table[row[opens], index[opens]] = opened[opens]
        slots[:num_tokens] = table[row, index] * np.int64(block_size) + offset
        slots[:num_tokens][stored == 0] = -1
        slots[num_tokens:size] = -1
    token_ids, positions = out.token_ids.numpy(), out.positions.numpy()
    token_ids[:num_tokens] = np.where(token >= 0, token, last_tokens[row])
    positions[:num_tokens] = position
    token_ids[num_tokens:size], positions[num_tokens:size] = last_tokens[padding_row], 0

    sampled_tokens, rows = out.sampled_tokens.numpy(), out.rows.numpy()
    is_sampled = np.flatnonzero(sampled >= 0)
    sampled_tokens[sampled[is_sampled]] = is_sampled
    rows[sampled[is_sampled]] = row[is_sampled]
    sampled_tokens[num_sampled:num_draws], rows[num_sampled:num_draws] = 0, padding_row
    drawn = positions[sampled_tokens[:num_draws]] + 1  # the place of the token that will be
    out.draws.noise_keys.numpy()[:num_draws] = noise_keys(
        seed[rows[:num_draws]].view(np.uint64), drawn
    )
    top_k, temperature, top_p, min_p = params
    draws = zip(out.draws, (temperature, None, top_k, top_p, min_p), strict=True)
    for tensor, values in draws:
        if values is not None and tensor is not None:
            tensor.numpy()[:num_draws] = values[rows[:num_draws]]
    out.slot[0], out.list_age[0] = slot, list_age


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two 32-bit keys for each sampled token, from 64 bits of (seed, position) (splitmix64, Steele
    et al. 2014).

    Args:
        seeds: [n] uint64.
        positions: [n] int64, of the sampled tokens.

    Returns: [n, 2] int64.
    """
    x: np.ndarray = seeds + (positions.astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return np.stack((x >> 32, x & 0xFFFFFFFF), axis=1).astype(np.int64)


def keep_sampled(
    last_tokens: torch.Tensor,
    host_tokens: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """Sampled tokens go to their rows' state, and to the host.

    Args:
        last_tokens: [all rows] int64.
        host_tokens: [slots, n or more] int64, pinned.
        rows, token_ids: [n] int64.
        slot: [1] int32, the row of host_tokens.
    """
    last_tokens[rows] = token_ids
    host_tokens[slot, : len(rows)] = token_ids
