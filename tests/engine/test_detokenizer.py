"""Text in increments: the same as decoding everything at once, and never half a character."""

from itertools import pairwise
from pathlib import Path

import pytest
from fake_worker import make_sequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import REPLACEMENT, Detokenizer

TINY_QWEN3 = Path(__file__).parents[2] / "assets/tiny-qwen3"
fuzz = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class ByteTokenizer:
    """A token is a byte; from 256 on they are special."""

    all_special_ids = (256, 257)

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens, **_):
        assert skip_special_tokens
        return bytes(t for t in token_ids if t < 256).decode(errors="replace")


@pytest.fixture(scope="module", params=["bytes", "tiny-qwen3"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_QWEN3)


def increments(tokenizer, prompt, output, reads, finish_reason):
    """The text after the output tokens at which `reads` says to ask for it, the last at the end."""
    stop_token_ids = output[-1:] if finish_reason == "stop" else None
    detokenizer = Detokenizer(tokenizer)
    seq = make_sequence(prompt, stop_token_ids=stop_token_ids)
    texts = [detokenizer.text(seq)]
    for i, token in enumerate(output):
        seq.token_ids.append(token)
        if i == len(output) - 1:
            seq.finish_reason = finish_reason
        if seq.finished or reads[i % len(reads)]:
            texts.append(detokenizer.text(seq))
    assert texts[0] == "" and detokenizer.text(seq) == texts[-1]
    return texts


READS = st.lists(st.booleans(), min_size=1, max_size=7)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), min_size=1)


@fuzz
@given(prompt=TEXT, text=TEXT, reads=READS, special_at=st.lists(st.integers(0, 30), max_size=3))
def test_increments_add_up_to_the_text(tokenizer, prompt, text, reads, special_at):
    prompt = tokenizer.encode(prompt, add_special_tokens=False)
    output = tokenizer.encode(text, add_special_tokens=False)
    for index in special_at:
        output.insert(index, tokenizer.all_special_ids[0])
    texts = increments(tokenizer, prompt, output, reads, "length")
    assert texts[-1] == tokenizer.decode(output, skip_special_tokens=True) == text
    assert all(text.startswith(part) for part in texts)  # so no U+FFFD and no special token either


@fuzz
@given(prompt=TEXT, output=st.lists(st.integers(0, 255), min_size=1), reads=READS)
def test_bytes_that_are_no_text_decode_as_they_do_at_once(prompt, output, reads):
    tokenizer = ByteTokenizer()
    prompt = tokenizer.encode(prompt, add_special_tokens=False)
    texts = increments(tokenizer, prompt, output, reads, "length")
    assert texts[-1] == tokenizer.decode(output, skip_special_tokens=True)
    assert all(later.startswith(text) for text, later in pairwise(texts))


def test_half_a_character_is_held_back_until_the_text_ends(tokenizer):
    output = tokenizer.encode("a\N{PARTY POPPER}", add_special_tokens=False)
    assert len(output) > 2
    texts = increments(tokenizer, [65], output[:-1], [True], "length")
    assert set(texts[1:-1]) == {"a"} and texts[-1] == "a" + REPLACEMENT


@pytest.mark.parametrize("reads", [[True], [False]])
@pytest.mark.parametrize("reason, text", [("stop", "ab"), ("length", "abc"), ("abort", "abc")])
def test_only_the_token_that_stopped_stays_out(tokenizer, reads, reason, text):
    output = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "abc"]
    assert increments(tokenizer, [65], output, reads, reason)[-1] == text


def test_a_stop_inside_a_character_shows_what_was_held_back(tokenizer):
    half = tokenizer.encode("\N{PARTY POPPER}", add_special_tokens=False)[:-1]
    special = tokenizer.all_special_ids[0]
    assert increments(tokenizer, [65], [*half, special], [True], "stop")[-1] == REPLACEMENT


class WordTokenizer:
    """A token is a word with a space before it, dropped at the start (as SentencePiece does)."""

    def decode(self, token_ids, **_):
        return "".join(f" {chr(token)}" for token in token_ids).removeprefix(" ")


def test_spaces_between_tokens_are_kept():
    output = [ord(c) for c in "abcdefghijkl"]
    assert increments(WordTokenizer(), [65], output, [True, False], "length")[-1] == (
        " a b c d e f g h i j k l"
    )


class ByteFallbackTokenizer(ByteTokenizer):
    """Like Llama 2's: a run of bytes that is not valid UTF-8 is replaced byte by byte."""

    def decode(self, token_ids, **_):
        data = bytes(token_ids)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(data)


def test_a_context_that_begins_inside_a_character_is_widened():
    tokenizer = ByteFallbackTokenizer()
    seq = make_sequence(list("a😀😀".encode()))
    seq.token_ids.extend("😀😀b".encode())
    seq.finish_reason = "length"
    assert Detokenizer(tokenizer).text(seq) == "😀😀b"


# Stop strings; that they end a request is tests/engine/test_stop_strings.py's


@fuzz
@given(text=TEXT, data=st.data())
def test_a_stop_string_is_found_in_text_split_by_a_real_tokenizer(tokenizer, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    seq = make_sequence([65], stop=stop)
    shown = [""]
    for token in tokens:
        seq.token_ids.append(token)
        detokenizer.check_stop(seq)
        shown.append(detokenizer.text(seq))
        if seq.finished:
            break
    assert (seq.finish_reason, seq.stop_reason) == ("stop", stop)
    assert shown[-1] == text[: text.index(stop)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    before = tokenizer.decode(seq.output_token_ids[:-1], skip_special_tokens=True)
    assert stop not in before, "it stopped with the token that completed it"


def test_what_may_begin_a_stop_string_is_held_back():
    detokenizer = Detokenizer(ByteTokenizer())
    for include, held_back in ((False, 2), (True, 0)):
        seq = make_sequence([65], stop=["xyz", "q"], include_stop_str_in_output=include)
        seq.token_ids.extend(b"abxy")
        detokenizer.check_stop(seq)
        assert detokenizer.text(seq) == "abxy"[: 4 - held_back]
        seq.finish_reason = "length"
        assert detokenizer.text(seq) == "abxy"


@pytest.mark.parametrize("special", [True, False])
def test_include_stop_str_in_output_shows_the_stop_token_too(special):
    seq = make_sequence([65], stop_token_ids=[98], include_stop_str_in_output=special)
    seq.token_ids.extend(b"ab")
    seq.check_stop()
    assert Detokenizer(ByteTokenizer()).text(seq) == ("ab" if special else "a")


def test_the_text_may_be_left_out():
    seq = make_sequence([65], detokenize=False)
    seq.token_ids.extend(b"ab")
    assert Detokenizer(ByteTokenizer()).text(seq) == ""
