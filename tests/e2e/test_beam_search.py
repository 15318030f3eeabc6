"""LLM.beam_search against transformers' where both mean the same, and against a search written down
from vLLM's definition, over transformers' logits.

They differ where texts end. transformers divides by the generated tokens alone, ends a beam only if
its EOS is among the best `num_beams` candidates, and may stop early; vLLM counts the prompt too,
keeps every EOS among a beam's candidates, and goes on. Where no EOS ends a beam and no length is
divided by (vLLM doesn't count a last EOS even where it is ignored), the two are the same.
"""

import re

import pytest
import torch
from conftest import TINY
from fake_worker import logprob_lines
from tiny_models import load_oracle, make_checkpoint, oracle_logits

from nanovllm import LLM, BeamSearchParams, Logprob, SamplingParams, StructuredOutputsParams
from nanovllm.frontend.beam_search import Search
from nanovllm.outputs import SampleLogprobs

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "In the beginning"
PROMPTS = [[5, 6, 7], [8] * 20, [5 + 7 * i % 90 for i in range(33)]]
SMALL = {"dtype": "float32", "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def oracle():
    return load_oracle(TINY)


@pytest.fixture(scope="module")
def question(llm):
    """A chat prompt whose answers end with EOS."""
    return llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True
    )["input_ids"]


def reference(oracle, prompt, params, eos):
    """[(tokens, sum of log-probabilities)], the best first."""
    beams, ended = [(prompt, 0.0)], []

    def score(beam):
        tokens, total = beam
        return total / (len(tokens) - (tokens[-1] in eos)) ** params.length_penalty

    for _ in range(params.max_tokens):
        found = []
        for tokens, total in beams:
            values, ids = oracle_logits(oracle, tokens)[-1].log_softmax(-1).topk(
                min(2 * params.beam_width, oracle.config.vocab_size)
            )  # fmt: skip
            for value, token in zip(values.tolist(), ids.tolist(), strict=True):
                is_end = token in eos and not params.ignore_eos
                (ended if is_end else found).append(([*tokens, token], total + value))
        beams = sorted(found, key=score, reverse=True)[: params.beam_width]
    return sorted(ended + beams, key=score, reverse=True)[: params.beam_width]


def assert_same(outputs, want):
    """Sums may differ in their last bits, by what else was computed with them."""
    for output, other in zip(outputs, want, strict=True):
        for sequence, expected in zip(output.sequences, other.sequences, strict=True):
            same_sum = pytest.approx(expected.cum_logprob, abs=1e-4)
            assert (sequence.tokens, sequence.cum_logprob) == (expected.tokens, same_sum)
            assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == (
                expected.text, expected.finish_reason, expected.stop_reason,
            )  # fmt: skip
            for line, wanted in zip(sequence.logprobs, expected.logprobs, strict=True):
                assert {t: (c.rank, c.decoded_token) for t, c in line.items()} == {
                    t: (c.rank, c.decoded_token) for t, c in wanted.items()
                }
                assert [c.logprob for c in line.values()] == pytest.approx(
                    [c.logprob for c in wanted.values()], abs=1e-4
                )


def check(outputs, expected):
    for out, beams in zip(outputs, expected, strict=True):
        assert [seq.tokens for seq in out.sequences] == [tokens for tokens, _ in beams]
        for seq, (_, total) in zip(out.sequences, beams, strict=True):
            assert seq.cum_logprob == pytest.approx(total, abs=1e-3)


def test_without_ends_it_is_transformers(llm, oracle):
    params = BeamSearchParams(4, 12, ignore_eos=True, length_penalty=0.0)
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        found = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        totals = found.sequences_scores.tolist()
        check([out], [list(zip(found.sequences.tolist(), totals, strict=True))])


@pytest.mark.parametrize(
    "values",
    [
        dict(beam_width=1),
        dict(beam_width=4),
        dict(beam_width=10, max_tokens=6),
        dict(length_penalty=0.0),
        dict(length_penalty=-2.0),
        dict(length_penalty=3.0),
        dict(ignore_eos=True, max_tokens=20),
    ],
    ids=str,
)
def test_it_is_vllms_definition(llm, oracle, question, values):
    params = BeamSearchParams(**{"beam_width": 3, "max_tokens": 16} | values)
    prompts = [question, question + llm.get_tokenizer()("I am")["input_ids"], PROMPTS[1]]
    eos = set(llm._checkpoint.eos_token_ids)
    expected = [reference(oracle, prompt, params, eos) for prompt in prompts]
    outputs = llm.beam_search(prompts, params)
    check(outputs, expected)
    ends = [seq.tokens[-1] in eos for out in outputs for seq in out.sequences]
    reasons = [seq.finish_reason for out in outputs for seq in out.sequences]
    assert reasons == ["stop" if end and not params.ignore_eos else "length" for end in ends]


def test_wide_enough_it_finds_the_best_of_all(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", vocab_size=4)
    oracle = load_oracle(folder)
    every = []
    for first in range(4):
        for second in range(4):
            lines = oracle_logits(oracle, [1, 2, 3, first])[-2:].log_softmax(-1)
            every.append(([1, 2, 3, first, second], float(lines[0, first] + lines[1, second])))
    every.sort(key=lambda beam: beam[1], reverse=True)
    with LLM(str(folder), max_model_len=32, kv_cache_memory_bytes=4 << 20, **SMALL) as llm:
        check(llm.beam_search([[1, 2, 3]], BeamSearchParams(10, 2)), [every[:10]])


OPTIONS = [
    dict(max_num_batched_tokens=9, max_num_seqs=3),
    dict(enable_prefix_caching=False),
    dict(block_size=4),
    dict(num_gpu_blocks_override=7, block_size=16, max_model_len=64, max_num_seqs=20),
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_how_the_engine_runs_changes_nothing(tiny, llm, options, depth):
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    expected = llm.beam_search(PROMPTS, params)
    options = {"max_model_len": 128, "async_scheduling": depth == 2, **SMALL} | options
    if "num_gpu_blocks_override" not in options:
        options["kv_cache_memory_bytes"] = 4 << 20
    with LLM(str(tiny), **options) as other:
        for limit in (None, 2):
            outputs = other.beam_search(PROMPTS, params, concurrency_limit=limit)
            for mine, want in zip(outputs, expected, strict=True):
                assert [s.tokens for s in mine.sequences] == [s.tokens for s in want.sequences]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_round_computes_the_tails_of_the_pages_alone(tiny, depth):
    options = {"async_scheduling": depth == 2, "kv_cache_memory_bytes": 8 << 20, **SMALL}
    prompt, width, length = [5 + 7 * i % 900 for i in range(200)], 4, 40
    with LLM(str(tiny), max_model_len=256, **options) as llm:
        llm.beam_search([prompt], BeamSearchParams(width, length, ignore_eos=True))
        tails = [(len(prompt) + i - 1) % 16 + 1 for i in range(1, length)]
        metrics = llm.llm_engine.metrics
        assert metrics.prefill_tokens == len(prompt) + width * sum(tails)
        assert metrics.decode_tokens == 0 and metrics.preemptions == 0


# What comes back


def test_texts_and_logprobs(llm, question):
    decode = llm.get_tokenizer().decode
    for include in (False, True):
        params = BeamSearchParams(3, 30, include_stop_str_in_output=include)
        [out] = llm.beam_search(question, params)
        assert {seq.finish_reason for seq in out.sequences} >= {"stop"}
        for seq in out.sequences:
            ended = seq.finish_reason == "stop"
            assert seq.text == decode(seq.tokens[:-1] if ended and not include else seq.tokens)
            assert seq.tokens[: len(question)] == question and seq.stop_reason is None
            generated = seq.tokens[len(question) :]
            total = sum(
                line[token].logprob for token, line in zip(generated, seq.logprobs, strict=True)
            )
            assert total == pytest.approx(seq.cum_logprob)
            assert all(len(line) == 6 for line in seq.logprobs)
            entry = seq.logprobs[0][generated[0]]
            assert isinstance(entry, Logprob) and entry.decoded_token == decode([generated[0]])


def test_every_form_of_prompt_and_none(llm):
    params = BeamSearchParams(2, 3)
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    [expected] = llm.beam_search(TEXT, params)
    forms = [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}]
    assert llm.beam_search(forms, params) == [expected] * 4
    assert llm.beam_search([], params) == []


def test_a_beam_ends_at_max_model_len(tiny):
    with LLM(str(tiny), max_model_len=16, kv_cache_memory_bytes=4 << 20, **SMALL) as llm:
        short, long = llm.beam_search([[5], [6] * 12], BeamSearchParams(2, 9, ignore_eos=True))
        assert {len(seq.tokens) for seq in short.sequences} == {10}
        assert {len(seq.tokens) for seq in long.sequences} == {16}
        assert {seq.finish_reason for seq in long.sequences} == {"length"}
        assert long.sequences[0].text is None


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_a_search_stops_when_nothing_can_change(llm, oracle, question, penalty):
    params = BeamSearchParams(2, 70, length_penalty=penalty)
    steps = llm.llm_engine.metrics.steps
    outputs = llm.beam_search(question, params)
    assert llm.llm_engine.metrics.steps - steps < 70
    check(outputs, [reference(oracle, question, params, llm._checkpoint.eos_token_ids)])


def line(*candidates):
    """A round's candidates of a beam: (token, log-probability), the drawn one first."""
    found = SampleLogprobs(len(candidates) - 1)
    found.extend(logprob_lines([(1, *zip(*candidates, strict=True))]))
    return found


def test_a_drawn_token_is_a_candidate_too():
    search = Search([1], BeamSearchParams(2, 5, temperature=1.0), (0,), 64)
    search.extend([line((9, -0.5), (7, -0.25), (8, -4.0))])
    assert [beam.tokens for beam in search.beams] == [[1, 7], [1, 9]]
    search.extend([line((7, -1.0), (7, -1.0), (0, -2.0)), line((5, -9.0), (0, -0.25), (5, -9.0))])
    assert [beam.tokens for beam in search.beams] == [[1, 7, 7], [1, 9, 5]]
    assert [beam.tokens for beam in search.ended] == [[1, 9, 0], [1, 7, 0]]


def test_draws_add_candidates_by_the_engines_seed(tiny):
    def run(temperature):
        with LLM(str(tiny), max_model_len=64, kv_cache_memory_bytes=4 << 20, **SMALL) as llm:
            return llm.beam_search(PROMPTS, BeamSearchParams(1, 8, temperature=temperature))

    assert run(2.0) == run(2.0)
    assert run(0.0) == run(0.0)


# Beside others, and interrupted


def test_others_requests_go_on_meanwhile(llm):
    greedy = SamplingParams(temperature=0, max_tokens=20)
    [expected] = llm.generate(TEXT, greedy, use_tqdm=False)
    want = llm.beam_search(PROMPTS, BeamSearchParams(3, 6))
    llm.add_request(TEXT, greedy, "mine")
    llm.step()
    assert_same(llm.beam_search(PROMPTS, BeamSearchParams(3, 6)), want)
    [*_, last] = iter(lambda: llm.step()[0] if not llm.is_finished() else None, None)
    assert last["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_in_leaves_nothing(llm, monkeypatch, error):
    submit, calls = llm.llm_engine.executor.submit, []

    def failing(step):
        calls.append(step)
        if len(calls) == 4:
            raise error("worker")
        return submit(step)

    want = llm.beam_search(PROMPTS, BeamSearchParams(3, 6))
    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine.executor, "submit", failing)
        with pytest.raises(error, match="worker"):
            llm.beam_search(PROMPTS, BeamSearchParams(3, 6))
    assert llm.is_finished()
    assert_same(llm.beam_search(PROMPTS, BeamSearchParams(3, 6)), want)


def test_the_bar_counts_tokens(llm, capsys):
    llm.beam_search(TEXT, BeamSearchParams(2, 5, ignore_eos=True), use_tqdm=True)
    assert "5/5" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    "values, error, text",
    [
        (dict(beam_width=0), ValueError, r"beam_width must be in \[1, 10\], got 0"),
        (dict(beam_width=11), ValueError, r"beam_width must be in \[1, 10\], got 11"),
        (dict(beam_width="2"), TypeError, "beam_width must be a whole number"),
        (dict(max_tokens=0), ValueError, "max_tokens must be at least 1"),
        (dict(max_tokens=None), TypeError, "max_tokens must be a whole number"),
        (dict(temperature=-1), ValueError, "temperature must be in"),
        (dict(length_penalty=17), ValueError, r"length_penalty must be in \[-16, 16\], got 17"),
        (dict(length_penalty=float("nan")), ValueError, "length_penalty must be in"),
        (dict(ignore_eos=1), TypeError, "ignore_eos must be a bool"),
        (dict(include_stop_str_in_output=None), TypeError, "include_stop_str_in_output must be"),
    ],
)
def test_bad_parameters(llm, values, error, text):
    with pytest.raises(error, match=text):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | values)
    params = BeamSearchParams(2, 4)
    [(name, value)] = values.items()
    setattr(params, name, value)
    with pytest.raises(error, match=text):
        llm.beam_search(TEXT, params)


def test_bad_calls_run_nothing(llm):
    params, steps = BeamSearchParams(2, 4), llm.llm_engine.metrics.steps
    for prompts, given, options, error, text in (
        (TEXT, SamplingParams(), {}, TypeError, "params must be BeamSearchParams"),
        (["a", ""], params, {}, ValueError, "prompt 1 is empty"),
        (5, params, {}, TypeError, "prompts must be"),
        (TEXT, params, {"concurrency_limit": 0}, ValueError, "concurrency_limit must be at least"),
        (TEXT, params, {"concurrency_limit": "1"}, ValueError, "concurrency_limit must be at"),
        (TEXT, params, {"lora_request": "mine"}, ValueError, "lora_request is not supported"),
    ):
        with pytest.raises(error, match=text):
            llm.beam_search(prompts, given, **options)
    assert llm.llm_engine.metrics.steps == steps


CHOICES = ["the king", "the kingdom", "a man", "cafe\u0301"]


def structured(llm, prompts, width=4, max_tokens=16, ignore_eos=False, **values):
    params = BeamSearchParams(
        beam_width=width, max_tokens=max_tokens, ignore_eos=ignore_eos,
        structured_outputs=StructuredOutputsParams(**values),
    )  # fmt: skip
    outputs = llm.beam_search(prompts, params)
    decode = llm.get_tokenizer().decode
    lengths = [len(llm.get_tokenizer().encode(prompt)) for prompt in prompts]
    return [
        [
            (decode(beam.tokens[n:], skip_special_tokens=True), beam.finish_reason)
            for beam in output.sequences
        ]
        for output, n in zip(outputs, lengths, strict=True)
    ]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_beams_of_a_grammar(llm, ignore_eos):
    pytest.importorskip("llguidance")
    prompts = [TEXT, "And it came to pass that"]
    for beams in structured(llm, prompts, ignore_eos=ignore_eos, choice=CHOICES):
        assert 1 <= len(beams) <= 4
        assert all(text in CHOICES and reason == "stop" for text, reason in beams)
    pattern = "[a-z]{2,5}( [a-z]{1,4})?"
    found = structured(llm, prompts, ignore_eos=ignore_eos, regex=pattern)
    assert max(map(len, found)) == 4
    for beams in found:
        assert len({text for text, _ in beams}) == len(beams)
        assert all(re.fullmatch(pattern, text) and reason == "stop" for text, reason in beams)
    for beams in structured(llm, prompts, max_tokens=3, regex="[a-z]{2} [a-z]{30}"):
        assert beams and all(
            re.fullmatch("[a-z]{2} [a-z]*", text) and reason == "length" for text, reason in beams
        )


def test_one_beam_of_a_grammar_is_greedy(llm):
    """Its only candidate beside the most likely tokens is the most likely one that may come."""
    pytest.importorskip("llguidance")
    grammar = StructuredOutputsParams(regex="[A-Z]{3}[0-9]{4}")
    greedy = SamplingParams(temperature=0, max_tokens=16, structured_outputs=grammar)
    [output] = llm.generate(TEXT, greedy, use_tqdm=False)
    [[(text, _)]] = structured(llm, [TEXT], width=1, regex="[A-Z]{3}[0-9]{4}")
    assert text == output.outputs[0].text


def test_bad_grammars_of_beams(llm):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=r"regex won't do: .*invalid regex"):
        structured(llm, [TEXT], regex="a(")
    with pytest.raises(TypeError, match="structured_outputs must be StructuredOutputsParams"):
        BeamSearchParams(2, 2, structured_outputs={"regex": "a"})
