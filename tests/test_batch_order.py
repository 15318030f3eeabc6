"""The order of a whole batch: longest first where that is sooner done."""

import pytest
from fake_worker import assert_right, make_engine, make_sequence, run

from nanovllm.frontend.requests import batch_order


def crowd():
    return [make_sequence([i, *range(7)], str(i), max_tokens=4 + i * 17 % 36) for i in range(60)]


def test_a_batch_with_too_few_rows_runs_longest_first():
    num_steps = {}
    for is_ordered in False, True:
        engine = make_engine(num_blocks=400, max_num_seqs=8)
        seqs = crowd()
        if is_ordered:
            seqs = batch_order(seqs, engine.scheduler)
            lengths = [seq.max_len for seq in seqs]
            assert lengths == sorted(lengths, reverse=True)
        run(engine, *seqs)
        assert_right(*seqs)
        num_steps[is_ordered] = engine.metrics.steps
    assert num_steps[True] < 0.92 * num_steps[False]


@pytest.mark.parametrize("options", [dict(max_num_seqs=60), dict(max_num_seqs=8, num_blocks=40)])
def test_a_batch_that_fits_or_has_too_few_blocks_keeps_its_order(options):
    seqs = crowd()
    assert batch_order(seqs, make_engine(**options).scheduler) == seqs
