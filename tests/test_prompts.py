"""prompts.py and SamplingParams: every accepted form of a prompt, and one checked copy of the
parameters for each."""

import re
from array import array

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nanovllm import SamplingParams
from nanovllm.frontend import prompts as prompts_module
from nanovllm.frontend.prompts import TokenizedPrompt, match_params


def tokenizer(texts, **_):
    assert isinstance(texts, list)
    return {"input_ids": [[ord(c) for c in text] for text in texts]}


def normalize(prompts, tokenizer, vocab_size=128, max_model_len=64):
    return prompts_module.normalize(prompts, tokenizer, vocab_size, max_model_len)


A = TokenizedPrompt(array("I", [97]), "a")
IDS = TokenizedPrompt(array("I", [1, 2]))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", [A]),
        (["a"], [A]),
        (("a", "a"), [A, A]),
        ([1, 2], [IDS]),
        ((1, 2), [IDS]),
        ([[1, 2]], [IDS]),
        ([(1, 2), "a"], [IDS, A]),
        ({"prompt": "a"}, [A]),
        ({"prompt_token_ids": [1, 2]}, [IDS]),
        ({"prompt": "a", "multi_modal_data": None, "mm_processor_kwargs": {}}, [A]),
        *[(make([1, 2]), [IDS]) for make in (np.array, torch.tensor)],
        *[(make([[1, 2], [1, 2]]), [IDS, IDS]) for make in (np.array, torch.tensor)],
        ([np.array([1, 2]), {"prompt_token_ids": torch.tensor([1, 2])}], [IDS, IDS]),
        ([{"prompt": "a"}, {"prompt_token_ids": [1, 2]}, "a", [1, 2]], [A, IDS, A, IDS]),
        ([], []),
    ],
)
def test_every_form_becomes_one_list(prompts, expected):
    found = normalize(prompts, tokenizer)
    assert found == expected
    assert all(type(token) is int for prompt in found for token in prompt.token_ids)


def test_all_texts_are_tokenized_in_one_call():
    calls = []
    normalize(["a", [1], "b"], lambda texts, **_: calls.append(texts) or tokenizer(texts))
    assert calls == [["a", "b"]]


def test_many_long_texts_are_tokenized_some_at_a_time(monkeypatch):
    monkeypatch.setattr(prompts_module, "TEXT_AT_ONCE", 10)
    calls = []
    texts = ["a" * n for n in (4, 4, 4, 1, 25, 2, 3)]
    found = normalize(texts, lambda texts, **_: calls.append(texts) or tokenizer(texts))
    assert [prompt.text for prompt in found] == [text for call in calls for text in call] == texts
    assert [[len(text) for text in call] for call in calls] == [[4, 4], [4, 1], [25], [2, 3]]


def test_a_text_too_long_by_its_characters_is_not_tokenized(tiny):
    known = AutoTokenizer.from_pretrained(tiny)

    class Counting:
        backend_tokenizer = known.backend_tokenizer
        added_tokens_decoder = known.added_tokens_decoder
        get_vocab = known.get_vocab
        texts = ()

        def __call__(self, texts, **options):
            self.texts += tuple(texts)
            return known(texts, **options)

    counting = Counting()
    with pytest.raises(ValueError, match=r"prompt 1 has 50000 characters, too many for the 63 tok"):
        normalize(["good", "word " * 10_000], counting, 4096)
    assert counting.texts == ()
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens; max_model_len=64 allows 63"):
        normalize(["word " * 100], counting, 4096)
    assert len(counting.texts) == 1


def test_text_needs_a_tokenizer_and_token_ids_do_not():
    assert normalize([1, 2], None) == [IDS]
    with pytest.raises(ValueError, match=r"text prompt needs a tokenizer.*token ids"):
        normalize([[1, 2], "a"], None)


def test_a_prompt_may_fill_all_but_one_place():
    normalize([[0, 9, 0]], None, max_model_len=4)
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens; max_model_len=3 allows 2"):
        normalize([[0, 9, 0]], None, max_model_len=3)


@pytest.mark.parametrize("wrong", [-(2**70), -1, 10, 2**31, 2**32 - 1, 2**32, 2**64])
@pytest.mark.parametrize("make", [list, tuple])
def test_a_token_id_outside_the_vocabulary_is_named(wrong, make):
    message = rf"^prompt 1 has the token id {wrong}, outside \[0, 10\)$"
    with pytest.raises(ValueError, match=message):
        normalize([[9], make([3, wrong, 4])], None, vocab_size=10)


@pytest.mark.parametrize("wrong", ["a", None, 1.5])
@pytest.mark.parametrize("outside", [-1, 2**64])
def test_what_is_no_token_id_is_named_beside_one_outside(wrong, outside):
    for prompt in ([outside, wrong], [wrong, outside]):
        with pytest.raises(TypeError, match="prompt 0 must be a string or a list of token"):
            normalize([prompt], None, vocab_size=10)


def test_the_tokenizers_token_ids_are_checked_too():
    with pytest.raises(ValueError, match=r"^prompt 1 has the token id 98, outside \[0, 98\)$"):
        normalize(["a", "ab"], tokenizer, vocab_size=98)


def test_a_request_is_named_by_its_id():
    with pytest.raises(ValueError, match=r"^request 'x' is empty"):
        prompts_module.normalize([[]], None, 10, 64, request_id="x")


@pytest.mark.parametrize("value", [[True, 2], [1.0], [1, 2.0], ["1"], [1, None], [[1]], 5, {1}])
def test_what_is_no_list_of_integers_is_refused(value):
    with pytest.raises(TypeError, match=r"^prompt 0 must be a string or a list of token ids, got "):
        normalize([{"prompt_token_ids": value}], None)


GREEDY, RANDOM = SamplingParams(temperature=0), SamplingParams(seed=3)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (GREEDY, [GREEDY, GREEDY]),
        ([GREEDY, RANDOM], [GREEDY, RANDOM]),
        ((RANDOM, GREEDY), [RANDOM, GREEDY]),
    ],
)
def test_each_prompt_gets_its_parameters(params, expected):
    assert match_params(params, num_prompts=2) == expected


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: [p]])
def test_parameters_are_copied_and_checked_again(wrap):
    params = SamplingParams()
    [mine] = match_params(wrap(params), 1)
    params.temperature = -1.0
    assert mine.temperature == 1.0
    with pytest.raises(ValueError, match="temperature must be"):
        match_params(wrap(params), 1)


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    ("temperature", [-0.1, 2.1, NAN, INF, -INF], "be in [0, 2] (0 is greedy)"),
    ("top_p", [0.0, -0.5, 1.1, NAN], "be in (0, 1] (1 keeps every token)"),
    ("top_k", [-2], "be at least 1, or 0 or -1 to keep every token"),
    ("min_p", [-0.1, 1.1, NAN], "be in [0, 1] (0 keeps every token)"),
    ("max_tokens", [0, -1], "be at least 1, or None for no limit of its own"),
    ("min_tokens", [-1], "be at least 0"),
    ("min_tokens", [17], "be at most max_tokens=16"),
    ("seed", [2**63, -(2**63) - 1], "fit in 64 bits"),
]
WRONG_TYPE = [
    (["temperature", "top_p", "min_p"], [None, "1", True, [0]], "a number"),
    (["top_k", "min_tokens"], [1.5, None, "1", True], "a whole number"),
    (["max_tokens", "seed"], [1.0, "1", False], "a whole number"),
    (
        [
            "ignore_eos",
            "include_stop_str_in_output",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ],
        [1, None],
        "a bool",
    ),
    (["output_kind"], [0, "DELTA", None], "a RequestOutputKind"),
    (["stop"], [1, [1], {"a": 1}, ["a", None], b"a"], "a string or a list of strings"),
    (["stop_token_ids"], [2, "2", {2: 2}, [2.0], [True], [[2]]], "a list of token ids"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), [(n, v, m) for n, values, m in OUT_OF_RANGE for v in values]
)
def test_a_value_out_of_range_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"^{name} must {re.escape(message)}, got {value}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"), [(n, v, k) for ns, vs, k in WRONG_TYPE for n in ns for v in vs]
)
def test_a_wrong_type_is_refused(name, value, kind):
    with pytest.raises(TypeError, match=f"^{name} must be {kind}, got {re.escape(repr(value))}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", [None, [], "a", ("a", "bc"), ["a", "bc"]])
def test_stop_strings_become_a_list(stop):
    assert SamplingParams(stop=stop).stop == ([stop] if stop == "a" else list(stop or ()))


def test_stop_strings_that_can_never_be_found_are_refused():
    for stop in ("", ["a", ""]):
        with pytest.raises(ValueError, match="stop cannot contain an empty string"):
            SamplingParams(stop=stop)
    with pytest.raises(ValueError, match="it needs detokenize=True"):
        SamplingParams(stop="a", detokenize=False)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_p": 1e-9, "top_k": -1, "min_p": 1, "seed": -(2**63)},
        {"temperature": 2, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 99, "stop_token_ids": []},
        {"max_tokens": 5, "min_tokens": 5, "stop_token_ids": [1, 2]},
    ],
)
def test_the_ends_of_the_ranges_are_accepted(values):
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values
