"""chat.py: what is a conversation, and what the template gets to see of it."""

import re

import pytest
from transformers import AutoTokenizer

from nanovllm.frontend import chat

OPTIONS = {"chat_template": None, "add_generation_prompt": True, "continue_final_message": False}


class Tokenizer:
    """Its template shows what it is given."""

    chat_template = "yes"

    def get_chat_template(self, chat_template, tools):
        return chat_template or self.chat_template

    def apply_chat_template(self, conversation, tokenize, **options):
        assert not tokenize
        self.seen = conversation, options
        if conversation[0]["role"] == "stranger":
            raise KeyError("no such role")
        return "".join(message["content"] for message in conversation)

    def __call__(self, texts, add_special_tokens, **_):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def message(content="a", role="user", **more):
    return {"role": role, "content": content, **more}


def texts(messages, **options):
    return [p["prompt"] for p in chat.render(messages, Tokenizer(), OPTIONS | options)]


def test_one_conversation_or_a_list_of_them():
    assert texts([message("a"), message("b")]) == ["ab"]
    assert texts([[message("a"), message("b")], [message("c")]]) == ["ab", "c"]
    assert texts(([message("a")], (message("b"),))) == ["a", "b"]
    assert texts([]) == []


def test_a_prompt_has_its_text_and_tokens():
    [prompt] = chat.render([message("ab")], Tokenizer(), OPTIONS)
    assert prompt == {"prompt": "ab", "prompt_token_ids": [97, 98]}


def test_the_template_gets_the_options_and_all_of_a_message():
    tokenizer = Tokenizer()
    chat.render([message(name="me")], tokenizer, OPTIONS | {"tools": [{}], "thinking": False})
    [seen], options = tokenizer.seen
    assert seen == message(name="me") and options == OPTIONS | {"tools": [{}], "thinking": False}


@pytest.mark.parametrize(
    "content", [["a", "b"], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]]
)
def test_parts_of_a_content_are_lines(content):
    assert texts([message(content)]) == ["a\nb"]


PARTS = [
    "a",
    {"type": "text", "text": "b", "cache_control": "x"},
    {"type": "input_text", "text": "c"},
    {"type": "output_text", "text": "d"},
    {"type": "refusal", "refusal": "e"},
    {"type": "thinking", "thinking": "f"},
    {"type": "text", "text": None},
    {"type": "refusal", "refusal": None},
]


def test_every_kind_of_text_is_a_part():
    assert texts([message(PARTS)]) == ["a\nb\nc\nd\ne\nf"]
    [seen] = seen_by(LOOP, [message(PARTS)])
    assert [part["text"] for part in seen["content"]] == list("abcdef")
    assert {part["type"] for part in seen["content"]} == {"text"}
    assert seen["content"][1]["cache_control"] == "x"


def test_no_content_is_an_empty_one():
    for nothing in ({"role": "assistant"}, message(None), message([])):
        assert texts([nothing]) == [""]
        assert seen_by(LOOP, [nothing])[0]["content"] == []


def test_templates_see_no_empty_list_of_tool_calls():
    for calls in ([], None):
        [seen] = seen_by("{{ messages }}", [message("a", "assistant", tool_calls=calls)])
        assert seen == message("a", "assistant")


LOOP = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


def seen_by(template, conversation, content_format="auto"):
    """The conversation as a template gets it."""
    tokenizer = Tokenizer()
    tokenizer.apply_chat_template = lambda seen, **_: tokenizer.seen.append(seen) or "text"
    tokenizer.seen = []
    chat.render(conversation, tokenizer, OPTIONS | {"chat_template": template}, content_format)
    return tokenizer.seen[0]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (LOOP, "openai"),
        (LOOP.replace("m.content", "m['content'] | selectattr('type', 'equalto', 'text')"),
         "openai"),
        (LOOP.replace("m.content", "m.content[1:]"), "openai"),
        (LOOP.replace("in messages", "in messages[1:]"), "openai"),
        ("{% set c = messages | list %}" + LOOP.replace("in messages", "in c"), "openai"),
        ("{% set a = messages %}{% set b = a[1:] %}" + LOOP.replace("in messages", "in b"),
         "openai"),
        ("{% macro show(content) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}",
         "openai"),
        ("{% for m in messages %}{% generation %}{% for p in m.content %}{% break %}{% endfor %}"
         "{% endgeneration %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set x, y = messages, 1 %}{% for p in m.parts %}{% endfor %}"
         "{% endfor %}", "string"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}",
         "string"),
        ("{% for m in others %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}", "string"),
        ("{% for", "string"),
    ],
)  # fmt: skip
def test_a_template_gets_the_form_of_content_that_it_reads(template, wanted):
    given = [message("hi"), message("", "tool")]
    parts = [message([{"type": "text", "text": "hi"}]), message("", "tool")]
    assert seen_by(template, given) == (parts if wanted == "openai" else given)
    assert seen_by(template, given, "string") == given
    assert seen_by(template, given, "openai") == parts


def test_an_unknown_form_of_content_is_refused():
    with pytest.raises(ValueError, match="must be 'auto', 'string' or 'openai', got 'parts'"):
        seen_by(LOOP, [message()], "parts")


def test_arguments_of_tool_calls_are_dicts():
    tokenizer = Tokenizer()
    given = [{"type": "function", "function": {"name": "f", "arguments": a}}
             for a in ('{"x": 1}', {"x": 1}, "", None)]  # fmt: skip
    call = message(None, "assistant", tool_calls=given)
    chat.render([message(), call], tokenizer, OPTIONS)
    seen = [call["function"] for call in tokenizer.seen[0][1]["tool_calls"]]
    assert seen == [{"name": "f", "arguments": a} for a in ({"x": 1}, {"x": 1}, {}, {})]
    assert given[0]["function"]["arguments"] == '{"x": 1}', "the caller's own is left alone"


FORM = "must be a dict {'role': ..., 'content': ...}, got"
CONTENT = "message 0 of conversation 0: content must be a text, or a list of texts and"


@pytest.mark.parametrize(
    ("messages", "error", "text"),
    [
        *[(m, TypeError, "messages must be a list of messages or of those, got")
          for m in ("hello", None, message(), b"")],
        ([[]], ValueError, "conversation 0 is empty: it must have at least one message"),
        ([[message()], []], ValueError, "conversation 1 is empty"),
        ([[message()], message()], TypeError, "conversation 1 must be a list of messages, got {"),
        ([message(), "b"], TypeError, f"message 1 of conversation 0 {FORM} 'b'"),
        ([[message()], [5]], TypeError, f"message 0 of conversation 1 {FORM} 5"),
        ([{"content": "a"}], TypeError, f"message 0 of conversation 0 {FORM} {{'content'"),
        ([message(role=1)], TypeError, FORM),
        ([message(5)], TypeError, CONTENT),
        ([message([{"type": "image_url", "image_url": "x"}])], TypeError, CONTENT),
        ([message([{"type": ["text"], "text": "x"}])], TypeError, CONTENT),
        ([message([{"type": "text"}])], TypeError, CONTENT),
        ([message([{"type": "refusal", "refusal": 5}])], TypeError, CONTENT),
        ([message([None])], TypeError, CONTENT),
        ([message(None, tool_calls=[{"function": {"arguments": "{"}}])], ValueError,
         "message 0 of conversation 0 has a broken tool call {"),
        ([message(None, tool_calls=["f"])], ValueError, "has a broken tool call 'f'"),
        ([message("a", tool_calls=3)], TypeError, "tool_calls must be a list, got 3"),
        ([[message()], [message(role="stranger")]], ValueError,
         "the chat template refuses conversation 1: 'no such role'"),
        ([[message()], [message("\ud800")]], ValueError, "conversation 1 is not valid Unicode"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(messages, error, text):
    with pytest.raises(error, match=re.escape(text)):
        texts(messages)


def test_a_new_message_and_the_last_one_going_on_exclude_each_other():
    with pytest.raises(ValueError, match="set add_generation_prompt=False"):
        texts([message()], continue_final_message=True)
    assert texts([message()], continue_final_message=True, add_generation_prompt=False) == ["a"]


def test_a_conversation_too_long_by_its_characters_is_not_tokenized(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    long = [[message()], [message("word " * 10_000)]]
    with pytest.raises(ValueError, match=r"conversation 1 has 500\d\d characters, too many for"):
        chat.render(long, tokenizer, OPTIONS, max_model_len=64)
    assert len(chat.render(long, tokenizer, OPTIONS)[1]["prompt_token_ids"]) > 64


def test_a_template_is_needed():
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give one as chat_template="):
        chat.render([message()], tokenizer, OPTIONS)
    assert chat.render([message()], tokenizer, OPTIONS | {"chat_template": "{{ x }}"})


def test_a_template_that_would_ignore_the_messages_is_refused():
    tokenizer = Tokenizer()
    with pytest.raises(ValueError, match=r"chat_template 'chatml.jinja' is no Jinja template"):
        chat.render([message()], tokenizer, OPTIONS | {"chat_template": "chatml.jinja"})
    tokenizer.chat_template = {"default": "{{ a }}", "tool_use": "{{ b }}"}  # transformers takes it
    assert chat.render([message()], tokenizer, OPTIONS | {"chat_template": "tool_use"})
