"""The options that change logits: each equals transformers' processor (or its definition), at every
position of a sequence, in batches whose other requests have other options."""

import numpy as np
import pytest
import torch
from logits_oracle import asked_logits
from row_sampling import RowSampling

from nanovllm.core.step import RowStart
from nanovllm.sampling_params import SamplingParams

VOCAB = 70  # not a multiple of 32
PROMPT = [3, 9, 3, 4]
OUTPUT = [5, 6, 5, 5, 7, 3, 6, 5, 6, 7]


def bad_words(*words, **values):
    params = SamplingParams(**values)
    params.bad_words_token_ids = [list(word) for word in words]
    return params


ASKING = [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-0.5, frequency_penalty=0.3, repetition_penalty=1.1),
    SamplingParams(frequency_penalty=-2),
    SamplingParams(logit_bias={0: 5.0, 69: -3.5, 7: -float("inf")}),
    SamplingParams(allowed_token_ids=[0, 31, 32, 69]),
    bad_words([5], [6, 7]),
    bad_words([5, 6, 5], [3, 4, 5], [5, 5], [69], [6, 5, 6, 7, 8]),
    bad_words([5, 5, 7], logit_bias={7: 2.0, 5: 1.0}, allowed_token_ids=list(range(3, 9)),
              presence_penalty=0.7, frequency_penalty=0.2, repetition_penalty=1.7),
    SamplingParams(min_tokens=4),
    SamplingParams(),
]  # fmt: skip
STOPS = (6, 60)


def start(row, params, known=PROMPT):
    token_ids = known if params.needs_history else ()
    min_len = len(PROMPT) + params.min_tokens
    return RowStart(row, 0, params, row, STOPS, min_len, num_prompt_tokens=len(PROMPT),
                    token_ids=token_ids)  # fmt: skip


def processed(sampling, logits, rows, positions):
    processors = sampling.sampler.processors
    columns = sampling.record.upload(processors.columns(rows, positions))
    return processors.apply(logits.clone(), rows, positions, columns)


@pytest.mark.parametrize("resumes_at", [None, 3])
def test_the_steps_equal_transformers(resumes_at):
    torch.manual_seed(0)
    sampling = RowSampling([], VOCAB, num_rows=len(ASKING) + 3)
    rows = np.arange(len(ASKING))[::-1].copy() + 3
    sampling.start([start(row, params) for row, params in zip(rows.tolist(), ASKING, strict=True)])
    for n in range(len(OUTPUT)):
        if n == resumes_at:  # in other rows, which others have had
            rows = np.roll(rows, 1)
            sampling.start(
                [
                    start(row, params, PROMPT + OUTPUT[:n])
                    for row, params in zip(rows.tolist(), ASKING, strict=True)
                ]
            )
        logits = torch.randn(len(ASKING), VOCAB) * 4
        positions = np.full(len(ASKING), len(PROMPT) + n)
        found = processed(sampling, logits, rows, positions)
        for i, params in enumerate(ASKING):
            expected = asked_logits(params, logits[i], PROMPT, OUTPUT[:n], STOPS)
            torch.testing.assert_close(
                found[i], expected, msg=lambda m, p=params, n=n: f"{p} {n}: {m}"
            )
            # The same alone.
            assert torch.equal(
                processed(sampling, logits[i : i + 1], rows[i : i + 1], positions[i : i + 1])[0],
                found[i],
            )
        token_ids = torch.full((len(ASKING),), OUTPUT[n])
        sampling.sampler.processors.keep(rows, positions, token_ids, sampling.record)


@pytest.mark.parametrize("parts", [1, 2, 100])
def test_draws_from_changed_logits_do_not_touch_the_others(parts, monkeypatch):
    monkeypatch.setattr("nanovllm.worker.sampler.PROCESSED_LOGITS", VOCAB * len(ASKING) // parts)
    torch.manual_seed(0)
    logits = torch.randn(len(ASKING), VOCAB)
    rows, positions = np.arange(len(ASKING)), np.full(len(ASKING), len(PROMPT))

    def draw(params):
        sampling = RowSampling([], VOCAB, num_rows=len(params))
        sampling.start([start(row, p) for row, p in enumerate(params)])
        return sampling.sample(logits, rows, positions)

    before = logits.clone()
    mixed = draw(ASKING)
    assert torch.equal(logits, before)
    plain = draw([SamplingParams()] * len(ASKING))
    for i, params in enumerate(ASKING):
        alone = [SamplingParams()] * len(ASKING)
        alone[i] = params
        drawn = draw(alone)
        assert drawn[i] == mixed[i]
        drawn[i] = plain[i]
        assert torch.equal(drawn, plain)
    assert mixed[6] in (0, 31, 32, 69)


def test_a_reused_row_forgets_what_was_asked_before():
    sampling = RowSampling([], VOCAB, num_rows=1)
    rows, positions = np.array([0]), np.array([len(PROMPT)])
    logits = torch.randn(1, VOCAB)
    for params in [*ASKING, *reversed(ASKING)]:
        sampling.start([start(0, params)])
        expected = asked_logits(params, logits[0], PROMPT, [], STOPS)
        torch.testing.assert_close(processed(sampling, logits, rows, positions)[0], expected)
    sampling.start([RowStart(0, 0, SamplingParams(), 0, STOPS, 0)])
    assert not (sampling.rows.changes(rows, positions).any() or sampling.rows.any_changed)


def test_no_minimum_changes_nothing():
    sampling = RowSampling([], VOCAB, num_rows=1)
    sampling.start([start(0, SamplingParams())])
    assert not (sampling.rows.any_changed or sampling.rows.stop_token_ids.used.any())


def test_single_bad_words_need_no_history():
    sampling = RowSampling([], VOCAB, num_rows=2)
    params = bad_words([5], [69])
    sampling.start([start(0, params), start(1, SamplingParams(logit_bias={0: 1.0}))])
    logits = torch.randn(2, VOCAB)
    found = processed(sampling, logits, np.arange(2), np.array([6, 6]))
    torch.testing.assert_close(found[0], asked_logits(params, logits[0], PROMPT, OUTPUT[:2]))
    assert not sampling.rows.history.used.any()


def test_a_long_word_beside_many_takes_the_room_of_its_tokens():
    sampling = RowSampling([], VOCAB, num_rows=2)
    long, words = [5, 6] * 1000, [[i % VOCAB, (i + 1) % VOCAB] for i in range(2000)]
    sampling.start([start(0, bad_words(*words, long)), start(1, SamplingParams())])
    assert sampling.rows.bad_words.data.shape == (3, 8192)  # 2000 * 3 + 2001, doubled
    output = torch.tensor([[5, 6] * 999 + [5], [5] * 1999])
    logits = torch.randn(2, VOCAB)
    for n in range(output.shape[1] + 1):
        if n in (0, 3, 1999):
            found = processed(sampling, logits, np.arange(2), np.full(2, len(PROMPT) + n))
            banned = {0: [], 3: [6], 1999: [6]}[n]
            expected = logits[0].index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf)
            assert torch.equal(found[0], expected) and torch.equal(found[1], logits[1])
        if n < output.shape[1]:
            places = np.full(2, len(PROMPT) + n)
            sampling.sampler.processors.keep(np.arange(2), places, output[:, n], sampling.record)


def test_rows_say_whether_their_logits_are_changed():
    for params in ASKING[:-2]:
        sampling = RowSampling([], VOCAB, num_rows=2)
        sampling.start([start(0, params), RowStart(1, 0, SamplingParams(), 0, STOPS, 0)])
        positions = np.full(2, len(PROMPT))
        assert sampling.rows.changes(np.arange(2), positions).tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits_for_the_gpu(dtype):
    on_cpu, on_gpu = (
        RowSampling([], VOCAB, num_rows=len(ASKING), device=device) for device in ("cpu", "cuda")
    )
    starts = [start(row, params) for row, params in enumerate(ASKING)]
    rows = np.arange(len(ASKING))
    for token in (None, *OUTPUT):  # None: memory is made, kernels are compiled
        if token in (None, OUTPUT[0]):
            for sampling in (on_cpu, on_gpu):
                sampling.start(starts)
                sampling.rows.wants_logprobs[:] = True
            positions = np.full(len(ASKING), len(PROMPT))
        logits = torch.randn(len(ASKING), VOCAB).to(dtype)
        on_device = logits.cuda()
        expected = on_cpu.sample(logits, rows, positions)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if token is None else "error")
        try:
            found = on_gpu.sample(on_device, rows, positions)
            read = on_gpu.read_logprobs(on_device, found, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.tolist() == expected.tolist()
        own = on_cpu.read_logprobs(logits, expected, rows)
        torch.cuda.synchronize()
        np.testing.assert_allclose(read.logprobs, own.logprobs, atol=1e-4)
        positions = positions + 1
