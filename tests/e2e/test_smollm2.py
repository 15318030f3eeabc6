"""A real checkpoint (tools/get_smollm2.py makes the folder): transformers' own tokens in float32,
sensible answers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "smollm2-135m-instruct"

if not FOLDER.is_dir():
    if os.environ.get("NANOVLLM_REQUIRE_SMOLLM2"):
        raise FileNotFoundError(f"{FOLDER}: run python tools/get_smollm2.py")
    pytest.skip("needs python tools/get_smollm2.py", allow_module_level=True)

NUM_TOKENS = 40
# Chats whose greedy tokens are well apart from the second best, so that rounding can't swap them.
CHATS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "Translate to French: good morning.",
    "Name five animals.",
    "What is the boiling point of water?",
    "Why is the sky blue?",
    "¿Cómo estás?",
    "Summarise: The cat sat on the mat.",
    "日本の首都はどこですか。",
    "Say hello in three languages.",
    "Count from 1 to 10.",
    "How many legs has a spider?",
    "Write one sentence about the sea.\n\nMake it sad.",
]


def test_tokens_and_text_equal_transformers():
    from transformers import AutoModelForCausalLM

    with LLM(str(FOLDER), dtype="float32", max_model_len=512) as llm:
        tokenizer = llm.get_tokenizer()
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True
            )
            for chat in CHATS
        ]
        outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    oracle = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for text, output in zip(texts, outputs, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        whole = oracle.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS)[0]
        expected = whole[ids.shape[1] :].tolist()
        assert output["token_ids"] == expected
        assert output["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert output.outputs[0].finish_reason == ("stop" if expected[-1] == 2 else "length")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_primary_colours(dtype):
    with LLM(str(FOLDER), dtype=dtype, max_model_len=512) as llm:
        text = llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": "List three primary colours."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        output = llm.generate(text, SamplingParams(temperature=0, max_tokens=128))[0]
    assert all(colour in output["text"].lower() for colour in ("red", "blue", "yellow"))
    assert output.outputs[0].finish_reason == "stop"


def test_chat_streams_and_stops():
    """Its answers in Japanese and emoji have characters of several tokens."""
    chats = ["Repeat: 日本の首都は東京です。", "Repeat: 🎉🎊🎈🎁", "List three primary colours."]
    messages = [[{"role": "user", "content": chat}] for chat in chats]
    with LLM(str(FOLDER), dtype="float32", max_model_len=512) as llm:
        params = SamplingParams(temperature=0, max_tokens=20)
        outputs = llm.chat(messages, params, use_tqdm=False)
        prompts = [out.prompt_token_ids for out in outputs]
        streamed = [[], [], []]
        for out in llm.stream(prompts, params):
            streamed[out.index].append(out["text"])
        stops = [out["text"][2:4] for out in outputs]
        stopping = [replace(params, stop=stop) for stop in stops]
        cut = llm.generate(prompts, stopping, use_tqdm=False)
    for out, texts, stop, short in zip(outputs, streamed, stops, cut, strict=True):
        assert "".join(texts) == out["text"]
        assert short["text"] == out["text"][: out["text"].index(stop)]
        assert short.outputs[0].stop_reason == stop
    for texts in streamed[:2]:
        assert "" in texts[:-1] and "\ufffd" not in "".join(texts)


def test_example_on_a_real_model():
    command = [sys.executable, "example.py", "--model", str(FOLDER)]
    command += ["--prompt", "List three primary colours."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(colour in done.stdout.lower() for colour in ("red", "blue", "yellow")), done.stdout
