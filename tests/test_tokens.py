"""tokens.py: the bytes of tokens, and which texts have too many tokens by their length alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm.frontend.tokens import has_more_tokens, token_bytes, token_text

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(*, fallback=True, **parts):
    """As Llama 2's: a space is a sign, and characters that it lacks are bytes."""
    vocab = ["<unk>", "<s>", *BYTE_TOKENS[: 256 if fallback else 255], "▁", "a", "b", "▁a", "ab"]
    model = models.BPE({token: i for i, token in enumerate(vocab)}, [("▁", "a"), ("a", "b")],
                       byte_fallback=True, unk_token="<unk>", fuse_unk=True)  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.fixture(scope="module")
def byte_level(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_the_bytes_of_tokens_are_those_of_the_text(byte_level, text):
    for tokenizer in (byte_level, sentencepiece()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        shown = b"".join(token_bytes(tokenizer, token) for token in ids).decode()
        normalizer = tokenizer.backend_tokenizer.normalizer
        assert shown.replace(" ", "▁") == normalizer.normalize_str(text).replace(" ", "▁")
        assert not has_more_tokens(text, tokenizer, len(ids))


def texts_of(tokenizer, ids):
    return [token_text(tokenizer, ids[max(0, i - 4) : i], token) for i, token in enumerate(ids)]


def test_the_last_token_of_a_character_has_the_whole(byte_level):
    ids = byte_level.encode("a\N{PARTY POPPER}\N{PARTY POPPER}b")
    party = ["", "", "", "\N{PARTY POPPER}"]
    assert texts_of(byte_level, ids) == ["a", *party, *party, "b"]
    assert texts_of(byte_level, ids[1:4]) == ["", "", ""]  # as in vLLM
    tokenizer = sentencepiece()
    ids = tokenizer.encode("a\N{PARTY POPPER}a b", add_special_tokens=False)
    assert texts_of(tokenizer, ids) == [" a", *party, "a", " ", "b"]


def test_tokens_may_end_and_begin_inside_characters():
    class Pieces:
        """Token i is pieces[i]."""

        pieces = (b"\xe2\x82", b"\xac\xe2", b"\x82\xac", b"\xaca", b"b")

        def decode(self, ids):
            return b"".join(self.pieces[token] for token in ids).decode(errors="replace")

        def convert_ids_to_tokens(self, token):
            return None

    assert texts_of(Pieces(), [4, 0, 1, 2, 4]) == ["b", "", "", "€€", "b"]
    assert texts_of(Pieces(), [4, 0, 3, 0, 3]) == ["b", "", "€a", "", "€a"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aé€\N{PARTY POPPER} \u0301"), max_size=20))
def test_the_texts_of_tokens_are_the_text(byte_level, text):
    ids = byte_level.encode(text)
    assert "".join(texts_of(byte_level, ids)) == byte_level.decode(ids)


def test_a_special_token_is_its_text(byte_level):
    assert token_bytes(byte_level, 1) == b"<|im_start|>"
    assert token_bytes(sentencepiece(), 1) == b"<s>"


def test_long_texts_have_too_many_tokens(byte_level):
    longest = 14  # bytes of " understanding", and of no longer token
    for text in ("word " * 1000, "é" * 2500, "\u0001" * 5000):
        num_tokens = len(text.encode()) // longest
        assert has_more_tokens(text, byte_level, num_tokens - 1)
        assert not has_more_tokens(text, byte_level, num_tokens + 1)
    decomposed = "e\u0301" * 1000  # one character of two bytes after the normalizer
    assert not has_more_tokens(decomposed, byte_level, 2000 // longest + 1)
    assert has_more_tokens("a" * 1000, sentencepiece(), 1000 // 6 - 1)  # "<0x00>"


def test_pieces_of_a_text_are_no_longer_than_the_whole(byte_level, monkeypatch):
    monkeypatch.setattr("nanovllm.frontend.tokens.PIECE", 101)
    text = "a\u0323\u0302e\u0301" * 50
    length = len(byte_level.backend_tokenizer.normalizer.normalize_str(text).encode())
    assert not has_more_tokens(text, byte_level, length // 14)
    assert has_more_tokens("word " * 400, byte_level, 1)


def test_bytes_that_the_vocabulary_lacks_are_dropped(byte_level):
    vocab = {"a": 0, "b": 1, "ab": 2}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.encode("c" * 1000) == [] and not has_more_tokens("c" * 1000, tokenizer, 0)
    assert has_more_tokens("c" * 1000 + "ab" * 3, tokenizer, 2)
    assert not has_more_tokens("c" * 1000 + "ab" * 3, tokenizer, 3)


@pytest.mark.parametrize(
    "parts",
    [
        dict(fallback=False),
        dict(normalizer=normalizers.Strip()),
        dict(normalizer=normalizers.Replace(Regex(" +"), " ")),
        dict(normalizer=normalizers.Replace("  ", " ")),
        dict(pre_tokenizer=pre_tokenizers.Whitespace()),
        dict(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed")])),
        dict(model=models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    ],
)
def test_no_length_is_too_long_where_a_token_may_stand_for_any(parts):
    assert not has_more_tokens("a  b" * 1000, sentencepiece(**parts), 1)


def test_a_token_that_takes_the_space_around_it_has_no_length():
    tokenizer = sentencepiece()
    assert has_more_tokens(" " * 1000, tokenizer, 1)
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert not has_more_tokens(" " * 1000, tokenizer, 1)


def test_other_tokenizers_know_no_bound():
    assert not has_more_tokens("a" * 10**6, object(), 1)
