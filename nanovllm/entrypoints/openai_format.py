"""The bodies of OpenAI's API: a request's body becomes prompts and SamplingParams, and outputs
become a response's body. run_batch.py calls it; an unsupported field is an error that names it."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any
from uuid import uuid4

from nanovllm.frontend import prompts, tokenization
from nanovllm.frontend.tokens import token_bytes, token_text
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import (
    UNSUPPORTED,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# Fields that change nothing in the answer.
IGNORED = {
    *("metadata", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier"),
    *("service_tier", "store", "stream_options", "user"),
}
# Fields without an implementation here, and the one value of each that is accepted.
NEUTRAL = {
    "best_of": 1,
    "echo": False,
    "include_reasoning": True,
    "length_penalty": 1.0,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "priority": 0,
    "stream": False,
    "suffix": "",
    "tool_choice": "none",
    "use_beam_search": False,
    "verbosity": "medium",
}
TEMPLATE = {"add_generation_prompt", "chat_template", "continue_final_message", "tools"}
TEMPLATE_VALUES = {"documents", "reasoning_effort"}
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Fields of SamplingParams with the same name and meaning in a body; the others are read below.
SAME = {field.name for field in fields(SamplingParams) if field.init} - {
    *("detokenize", "flat_logprobs", "logits_processors", "logprobs", "max_tokens", "output_kind"),
    *("structured_outputs", *UNSUPPORTED),
}
LOWEST = -9999.0  # JSON has no -inf


@dataclass
class Request:
    """A checked body: what to generate, and the form of the answer.

    Attributes:
        echo: whether the answer begins with the prompt.
        only_echo: whether it ends there. The one token that the engine generates is left out.
    """

    url: str
    prompts: list[Any]
    params: SamplingParams
    echo: bool = False
    only_echo: bool = False


def read_request(
    llm: LLM, url: Any, body: Any, model_names: Iterable[str], trusts_templates: bool = False
) -> Request:
    """Check a body.

    Args:
        url: the endpoint, CHAT or COMPLETIONS.
        model_names: the values that the body's `model` may have.
        trusts_templates: whether the body may bring a chat template, a program that can run for
            ever.

    Raises:
        ValueError, TypeError: a field is missing or not supported, or its value is invalid.
    """
    if url not in (CHAT, COMPLETIONS):
        raise ValueError(f"url must be {CHAT} or {COMPLETIONS}, got {url!r:.80}")
    if not isinstance(body, dict):
        raise TypeError(f"body must be a JSON object, got {body!r:.80}")
    left = {name: value for name, value in body.items() if value is not None}
    left = {name: value for name, value in left.items() if name not in IGNORED}
    model = left.pop("model", None)
    if model is not None and model not in list(model_names):
        raise ValueError(
            f"the model {model!r:.80} is not the one that runs here; leave it out, or give its "
            f"name as --served-model-name"
        )
    values = {name: left.pop(name) for name in SAME & left.keys()}
    tokenize = {name: left.pop(name) for name in tokenization.KEYS & left.keys()}
    values["structured_outputs"] = _structured_outputs(left)
    echo = only_echo = False
    if url == CHAT:
        if tokenize.pop("add_special_tokens", False):
            raise ValueError("add_special_tokens: the chat template writes the special tokens")
        prompt_list = _chat_prompts(llm, left, tokenize, trusts_templates)
        values["max_tokens"] = left.pop("max_tokens", None)
        values["max_tokens"] = left.pop("max_completion_tokens", values["max_tokens"])
        wanted, num_top = left.pop("logprobs", False), left.pop("top_logprobs", None)
        if num_top and not wanted:
            raise ValueError("top_logprobs needs logprobs: true")
        values["logprobs"] = (num_top or 0) if wanted else None
    else:
        echo = bool(left.pop("echo", False))
        prompt_list = _plain_prompts(left)
        values["max_tokens"] = left.pop("max_tokens", 16)
        only_echo = echo and type(values["max_tokens"]) is int and values["max_tokens"] == 0
        if only_echo:
            values["max_tokens"] = 1
        values["logprobs"] = left.pop("logprobs", None)
        if echo and values["logprobs"] is not None:
            values.setdefault("prompt_logprobs", values["logprobs"])
    unknown = {name for name, value in left.items() if NEUTRAL.get(name) != value}
    if unknown:
        raise ValueError(f"not supported: {', '.join(sorted(unknown))}")
    if tokenize and url == COMPLETIONS:
        prompt_list = tokenization.tokenize(
            prompt_list,
            llm.get_tokenizer(),
            llm.model_config.vocab_size,
            llm.max_model_len,
            tokenize,
        )
    default = llm.get_default_sampling_params()
    values = {name: getattr(default, name) for name in RECOMMENDED} | values
    params = SamplingParams.from_optional(**values, output_kind=RequestOutputKind.FINAL_ONLY)
    return Request(url, prompt_list, params, echo, only_echo)


def _chat_prompts(
    llm: LLM, left: dict[str, Any], tokenize: dict[str, Any], trusts_templates: bool
) -> list[Any]:
    messages = left.pop("messages", None)
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        raise TypeError(f"messages must be a list of at least one message, got {messages!r:.80}")
    if left.get("tool_choice") == "auto":  # tools are in the prompt; the answer stays text
        del left["tool_choice"]
    options = {name: left.pop(name) for name in TEMPLATE & left.keys()}
    values = {name: left.pop(name) for name in TEMPLATE_VALUES & left.keys()}
    if not isinstance(kwargs := left.pop("chat_template_kwargs", {}), dict):
        raise TypeError(f"chat_template_kwargs must be a JSON object, got {kwargs!r:.80}")
    values |= kwargs
    if not trusts_templates and "chat_template" in options | values:
        raise ValueError(
            "chat_template: a request's own template is a program, which runs only with "
            "--trust-request-chat-template; --chat-template names one for all requests"
        )
    return llm.render_chat(
        messages, chat_template_kwargs=values, tokenization_kwargs=tokenize, **options
    )


def _plain_prompts(left: dict[str, Any]) -> list[Any]:
    prompt = left.pop("prompt", None)
    if not isinstance(prompt, (str, list)) or not prompt:
        raise TypeError(
            f"prompt must be a text, a list of token ids or a list of those, got {prompt!r:.80}"
        )
    if prompts.is_single(prompt):
        return [prompt]
    if not all(isinstance(p, (str, list)) for p in prompt):
        raise TypeError(f"prompt must be texts or lists of token ids, got {prompt!r:.80}")
    return list(prompt)


def _structured_outputs(left: dict[str, Any]) -> Any:
    """Parameters from response_format and vLLM's structured_outputs; None if neither limits the
    text."""
    form, values = left.pop("response_format", None), left.pop("structured_outputs", None)
    form = {"type": "text"} if form is None else form
    for name, value in (("response_format", form), ("structured_outputs", values)):
        if not isinstance(value, dict | None):
            raise TypeError(f"{name} must be a JSON object, got {value!r:.80}")
    kind = form.get("type")
    if kind == "json_object":
        values = {**(values or {}), "json_object": True}
    elif kind == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or "schema" not in schema:
            raise ValueError("response_format has no json_schema: {'schema': ...}")
        values = {**(values or {}), "json": schema["schema"]}
    elif kind == "structural_tag":
        values = {**(values or {}), "structural_tag": json.dumps(form)}
    elif kind != "text":
        raise ValueError(f"response_format {form!r:.80} is not supported")
    if values is None:
        return None
    return StructuredOutputsParams(**values)


def make_response(
    request: Request, outputs: Sequence[RequestOutput], model: str, tokenizer: Any
) -> dict[str, Any]:
    """The body of the answer.

    Args:
        outputs: one finished output for each prompt.
    """
    is_chat = request.url == CHAT
    if request.only_echo:
        for output in outputs:
            output.outputs = [_without_tokens(completion) for completion in output.outputs]
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for completion in output.outputs:
            make = _message if is_chat else _text
            choices.append(
                {
                    "index": len(choices),
                    **make(request, output, completion, tokenizer),
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
            )
            if output.prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = [
                    line and {str(token): _as_json(entry) for token, entry in line.items()}
                    for line in output.prompt_logprobs
                ]
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid4().hex,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
        },
    }


def _without_tokens(completion: CompletionOutput) -> CompletionOutput:
    logprobs: list[dict[int, Logprob]] | None = None if completion.logprobs is None else []
    return CompletionOutput(completion.index, "", [], logprobs=logprobs, finish_reason="length")


def _as_json(entry: Logprob) -> dict[str, Any]:
    return asdict(entry) | {"logprob": max(entry.logprob, LOWEST)}


def _message(
    request: Request, output: RequestOutput, completion: CompletionOutput, tokenizer: Any
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        num_top = request.params.logprobs or 0
        content = []
        for token, line in zip(completion.token_ids, completion.logprobs, strict=True):
            ranked = sorted(line, key=lambda other: line[other].rank or 0)
            top = [_token(other, line[other], tokenizer) for other in ranked[:num_top]]
            content.append({**_token(token, line[token], tokenizer), "top_logprobs": top})
        logprobs = {"content": content}
    return {"message": {"role": "assistant", "content": completion.text}, "logprobs": logprobs}


def _token(token: int, entry: Logprob, tokenizer: Any) -> dict[str, Any]:
    return {
        "token": entry.decoded_token or "",
        "logprob": max(entry.logprob, LOWEST),
        "bytes": list(token_bytes(tokenizer, token)),
    }


def _text(
    request: Request, output: RequestOutput, completion: CompletionOutput, tokenizer: Any
) -> dict[str, Any]:
    """A choice of the completions API, whose log-probabilities have another form than chat's."""
    text, logprobs = completion.text, None
    token_ids = list(completion.token_ids)
    lines: list[dict[int, Logprob] | None] = list(completion.logprobs or ())
    if request.echo:
        text = (output.prompt or tokenizer.decode(output.prompt_token_ids)) + text
        token_ids = output.prompt_token_ids + token_ids
        lines = [*(output.prompt_logprobs or ()), *lines]
    if completion.logprobs is not None:
        tokens = [
            (line[token].decoded_token or "") if line else token_text(tokenizer, [], token)
            for token, line in zip(token_ids, lines, strict=True)
        ]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [
                max(line[token].logprob, LOWEST) if line else None
                for token, line in zip(token_ids, lines, strict=True)
            ],
            "top_logprobs": [
                {e.decoded_token or "": max(e.logprob, LOWEST) for e in line.values()}
                if line
                else None
                for line in lines
            ],
            "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
        }
    return {"text": text, "logprobs": logprobs}
