"""Conversations -> prompts, by the checkpoint's chat template. LLM.chat calls it before anything
runs; rendering is transformers' business."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.frontend.prompts import check_unicode
from nanovllm.sampling_params import refuses_deep_nesting


@refuses_deep_nesting("messages")
def render(messages: Any, tokenizer: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A prompt for each conversation: its text, and that text's tokens.

    Args:
        messages: a conversation, which is a list of {"role": ..., "content": ...}, or a list of
            conversations.
        options: apply_chat_template's, and what else the template reads.

    Raises:
        TypeError: not messages.
        ValueError: there is no template, or it refuses a conversation.
    """
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
    texts = []
    for i, conversation in enumerate(conversations):
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        # A template is a program of the checkpoint's: what it raises depends on what it does.
        except Exception as error:
            raise ValueError(f"the chat template refuses conversation {i}: {error}") from error
        check_unicode(text, f"conversation {i}")
        texts.append(text)
    # The template has written the special tokens.
    tokenized = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {}
    return [
        {"prompt": text, "prompt_token_ids": token_ids}
        for text, token_ids in zip(texts, tokenized.get("input_ids", ()), strict=True)
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
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise TypeError(f"{name} has no content: {message!r:.80}")
    result = {**message, "content": _text(content, name)}
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_tool_call(call, name) for call in calls]
    return result


def _text(content: Any, name: str) -> str:
    """A content of several parts as one text, of which most templates make something; as in vLLM
    they are lines."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if _is_list(content) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{name}: content must be a text, or a list of texts and {{'type': 'text', 'text': "
            f"...}}, got {content!r:.80}"
        )
    return "\n".join(texts)


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """OpenAI's format has a call's arguments as JSON, templates want them as a dict."""
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        function["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {**call, "function": function}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} has a broken tool call {call!r:.80}: {error}") from None
