"""Conversations -> prompts, by the checkpoint's chat template. LLM.chat calls it before anything
runs; rendering is transformers' business."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from nanovllm.frontend.prompts import check_characters, check_unicode, tokenize
from nanovllm.sampling_params import refuses_deep_nesting

CONTENT_FORMATS = ("auto", "string", "openai")
# The types of a content's parts that are text, and where it stands.
TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


@refuses_deep_nesting("messages")
def render(
    messages: Any,
    tokenizer: Any,
    options: Mapping[str, Any],
    content_format: str = "auto",
    max_model_len: int = sys.maxsize,
    encode: Any = None,
) -> list[dict[str, Any]]:
    """A prompt for each conversation: its text, and that text's tokens.

    Args:
        messages: a conversation, which is a list of {"role": ..., "content": ...}, or a list of
            conversations.
        options: apply_chat_template's, and what else the template reads.
        content_format: what the template sees of a content: "string", one text; "openai", a list of
            parts; "auto": parts if it loops over them.
        max_model_len: a text that is too long for it by its characters is not tokenized.
        encode: makes tokens of texts in the tokenizer's place, called as that.

    Raises:
        TypeError: not messages.
        ValueError: there is no template, or it refuses a conversation; a conversation is too long;
            or an unknown format.
    """
    if content_format not in CONTENT_FORMATS:
        raise ValueError(
            f"chat_template_content_format must be 'auto', 'string' or 'openai', "
            f"got {content_format!r:.80}"
        )
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise ValueError(
            "continue_final_message=True goes on with the last message, add_generation_prompt=True "
            "(the default) begins a new one: set add_generation_prompt=False"
        )
    given, own = options["chat_template"], tokenizer.chat_template
    if not given and not own:
        raise ValueError("the tokenizer has no chat template: give one as chat_template=")
    # Rendered, a text without any would be the prompt, whatever the messages are.
    if given and "{" not in str(given) and not (isinstance(own, dict) and given in own):
        raise ValueError(
            f"chat_template {given!r:.80} is no Jinja template, nor the name of one of the "
            f"tokenizer's: that has {{{{ or {{% in it; a file's name is the constructor's to read"
        )
    if not _is_list(messages):
        raise TypeError(f"messages must be a list of messages or of those, got {messages!r:.80}")
    if messages and not _is_list(messages[0]):
        messages = [messages]
    conversations = [_checked(c, f"conversation {i}") for i, c in enumerate(messages)]
    if content_format == "auto":
        template = tokenizer.get_chat_template(given, tools=options.get("tools"))
        content_format = "openai" if loops_over_parts(template) else "string"
    if content_format == "string":
        conversations = [[_with_text(message) for message in c] for c in conversations]
    encode = encode or tokenizer
    texts = []
    for i, conversation in enumerate(conversations):
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        # A template is a program of the checkpoint's: what it raises depends on what it does.
        except Exception as error:
            raise ValueError(f"the chat template refuses conversation {i}: {error}") from error
        check_unicode(text, f"conversation {i}")
        if len(text) >= max_model_len:
            check_characters(text, f"conversation {i}", encode, max_model_len)
        texts.append(text)
    # The template has written the special tokens.
    tokenized = tokenize(texts, encode, add_special_tokens=False)
    return [
        {"prompt": text, "prompt_token_ids": token_ids}
        for text, token_ids in zip(texts, tokenized, strict=True)
    ]


def load_template(template: str | None) -> str | None:
    """A template, from the file of that name if it is one, as in vLLM.

    Raises:
        ValueError: it is neither a file nor a template.
    """
    if template is None or any(char in template for char in "{}\n"):
        return template
    if not os.path.isfile(template):
        raise ValueError(
            f"chat_template {template!r} is no file here, and no Jinja template: that has {{{{ or "
            f"{{% in it"
        )
    with open(template, encoding="utf-8") as file:
        return file.read()


class _GenerationTag(Extension):
    """transformers' {% generation %}, around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def loops_over_parts(template: str) -> bool:
    """Whether a template has a loop over the parts of a message's content, by its syntax tree. What
    counts as a message and as its content is vLLM's rule."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag]).parse(template)
    except TemplateSyntaxError:  # rendering will say so
        return False
    conversations = {"messages"}
    assigned = [(_target(a), _source(a.node)) for a in tree.find_all(nodes.Assign)]
    while more := {new for new, old in assigned if new and old in conversations} - conversations:
        conversations |= more
    loops = [(_target(loop), _source(loop.iter)) for loop in tree.find_all(nodes.For)]
    contents = {f"{message}.content" for message, over in loops if over in conversations}
    return any(over in contents | {"content"} for _, over in loops)


def _target(node: nodes.Assign | nodes.For) -> str | None:
    return node.target.name if isinstance(node.target, nodes.Name) else None


def _source(node: nodes.Node | None) -> str | None:
    """The variable, or "variable.key", whose elements an expression gives: filters, tests and
    slices around it leave that as it is."""
    match node:
        case nodes.Filter() | nodes.Test() | nodes.Getitem(arg=nodes.Slice()):
            return _source(node.node)
        case nodes.Name():
            return node.name
        case nodes.Getattr(node=nodes.Name(name=name), attr=key):
            return f"{name}.{key}"
        case nodes.Getitem(node=nodes.Name(name=name), arg=nodes.Const(value=key)):
            return f"{name}.{key}"
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _checked(conversation: Any, name: str) -> list[dict[str, Any]]:
    """The conversation as templates expect it."""
    if not _is_list(conversation):
        raise TypeError(f"{name} must be a list of messages, got {conversation!r:.80}")
    if not conversation:
        raise ValueError(f"{name} is empty: it must have at least one message")
    return [_message(m, f"message {i} of {name}") for i, m in enumerate(conversation)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(
            f"{name} must be a dict {{'role': ..., 'content': ...}}, got {message!r:.80}"
        )
    result = {**message, "content": list(_parts(message.get("content"), name))}
    if calls := result.pop("tool_calls", None):
        if not _is_list(calls):
            raise TypeError(f"{name}: tool_calls must be a list, got {calls!r:.80}")
        result["tool_calls"] = [_tool_call(call, name) for call in calls]
    return _with_text(result) if message["role"] == "tool" else result


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """The parts of the content as one text; as in vLLM they are lines."""
    parts = message["content"]
    text = parts if isinstance(parts, str) else "\n".join(part["text"] for part in parts)
    return {**message, "content": text}


def _parts(content: Any, name: str) -> Iterator[dict[str, Any]]:
    """The parts of a content, each as one of the type "text"; a part that is None says nothing."""
    if content is None:
        return
    for part in content if _is_list(content) else [content]:
        given = {"text": part} if isinstance(part, str) else part
        is_part = isinstance(given, Mapping)
        key = TEXT_KEYS.get(str(given.get("type", "text"))) if is_part else None
        if key is None or key not in given or not isinstance(text := given[key], str | None):
            raise TypeError(
                f"{name}: content must be a text, or a list of texts and {{'type': 'text', 'text': "
                f"...}}, got {content!r:.80}"
            )
        if text is not None:
            others = {k: v for k, v in given.items() if k != key}
            yield {**others, "type": "text", "text": text}


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """OpenAI's format has a call's arguments as JSON, templates want them as a dict."""
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        function["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {**call, "function": function}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} has a broken tool call {call!r:.80}: {error}") from None
