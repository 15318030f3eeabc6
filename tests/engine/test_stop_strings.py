"""Stop strings: found however the text is split into tokens, at both depths; nothing is shown that
is taken back."""

from itertools import pairwise

import pytest
from fake_worker import (
    EOS,
    VOCAB,
    assert_idle,
    check_invariants,
    expected_tokens,
    make_engine,
    make_sequence,
    run,
    take_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams


class Pieces:
    """Token i is pieces[i]."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, token_ids, **_):
        return "".join(self.pieces[token] for token in token_ids)


def expected(pieces, prompt, seed, params):
    """Tokens, finish reason, stop reason and text, from the definition: of the strings that end
    among a token's characters the first of the list counts."""
    plain = {"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"}
    plain = SamplingParams(**{name: getattr(params, name) for name in plain})
    tokens, reason = expected_tokens(prompt, plain, seed=seed)
    stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else EOS)}
    text = ""
    for i, token in enumerate(tokens):
        if token in stops and not params.include_stop_str_in_output:
            break
        ends = range(len(text) + 1, len(text) + len(pieces[token]) + 1)
        text += pieces[token]
        found = [(stop, e) for stop in params.stop for e in ends if text[:e].endswith(stop)]
        if i >= params.min_tokens and found:
            stop, end = found[0]
            kept = text[:end] if params.include_stop_str_in_output else text[: end - len(stop)]
            return tokens[: i + 1], "stop", stop, kept
    by_choice = tokens[-1] in stops and (params.ignore_eos or tokens[-1] not in EOS)
    return tokens, reason, tokens[-1] if by_choice else None, text


REQUESTS = st.tuples(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9),
    st.integers(0, 9),  # seed
    st.builds(
        dict,
        stop=st.lists(st.text("ab\N{PARTY POPPER}", min_size=1, max_size=4), max_size=3),
        include_stop_str_in_output=st.booleans(),
        max_tokens=st.sampled_from([1, 5, 20]),
        min_tokens=st.sampled_from([0, 0, 1, 5]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([None, [3, 4]]),
    ),
)


@settings(max_examples=1000, derandomize=True, database=None, deadline=None)
@given(
    pieces=st.lists(st.text("ab\N{PARTY POPPER}", max_size=4), min_size=VOCAB, max_size=VOCAB),
    requests=st.lists(REQUESTS, min_size=1, max_size=5),
    depth=st.integers(1, 2),
    num_blocks=st.sampled_from([12, 64]),
    looks=st.booleans(),
)
def test_a_stop_string_ends_the_request_wherever_it_lies(
    pieces, requests, depth, num_blocks, looks
):
    detokenizer = Detokenizer(Pieces(pieces))
    engine = make_engine(depth=depth, num_blocks=num_blocks, mean_output=0, detokenizer=detokenizer)
    seqs, seen = [], {}
    for i, (prompt, seed, params) in enumerate(requests):
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        seqs.append(make_sequence(prompt, str(i), seed=seed, **params))
        engine.add(seqs[-1])
    while engine.has_unfinished:
        for seq in take_step(engine):
            if looks or seq.finished:
                seen.setdefault(seq, []).append(detokenizer.text(seq))
        check_invariants(engine)
    assert_idle(engine)
    for seq, (prompt, seed, _) in zip(seqs, requests, strict=True):
        tokens, reason, stop, text = expected(pieces, prompt, seed, seq.params)
        assert (seq.output_token_ids, seq.finish_reason, seq.stop_reason) == (tokens, reason, stop)
        assert seen[seq][-1] == text == detokenizer.text(seq)
        assert all(later.startswith(shown) for shown, later in pairwise(seen[seq]))


@pytest.mark.parametrize(("stop", "text"), [(["b", "a"], "xa"), (["a", "b"], "x")])
def test_of_two_strings_that_one_token_completes_the_first_of_the_list_counts(stop, text):
    detokenizer = Detokenizer(Pieces(["xab"] * VOCAB))
    engine = make_engine(detokenizer=detokenizer)
    seq = make_sequence([5], max_tokens=6, stop=stop)
    run(engine, seq)
    assert (seq.stop_reason, detokenizer.text(seq)) == (stop[0], text)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_error_of_the_tokenizer_ends_its_request_alone(depth):
    class Breaks(Pieces):
        def decode(self, token_ids, **options):
            calls.append(token_ids)
            return 1 / 0 if len(calls) == 4 else super().decode(token_ids, **options)

    calls = []
    engine = make_engine(depth=depth, detokenizer=Detokenizer(Breaks(["a"] * VOCAB)))
    bad, good = make_sequence([5], "bad", max_tokens=6, stop="b"), make_sequence([5], max_tokens=6)
    run(engine, bad, good)
    assert good.finish_reason == "length" and len(good.output_token_ids) == 6
    assert bad.finish_reason == "error"
    assert "'bad' ended by an error in its stop strings after 2 tokens: Zero" in bad.error


def test_sequences_without_stop_strings_are_not_decoded():
    class Never:
        def decode(self, token_ids, **_):
            raise AssertionError("no text was needed")

    engine = make_engine(detokenizer=Detokenizer(Never()))
    run(engine, make_sequence([5], max_tokens=9))
