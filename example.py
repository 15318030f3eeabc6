"""Chat with a model: the one in the box, or any folder or hub name of a supported family.

python example.py
python example.py --model FOLDER --prompt "List three primary colours."
python example.py --watch                      # see each step, and a map of the KV cache
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.watch import watch

TINY = Path(__file__).parent / "assets" / "tiny-qwen3"
PROMPTS = ["Who are you?", "Who is Emma?", "Tell me about the sea.", "Continue: It is a truth"]

# For --watch: questions with a common beginning, limits that they reach, a cache that they fill.
WATCHED = ["a king", "the sea", "a dog", "Emma", "the moon", "a ship", "a queen", "the war"]
WATCHED_PROMPTS = [f"Tell me in a few plain words all that you know about {it}." for it in WATCHED]
WATCHED_LIMITS = dict(
    num_gpu_blocks_override=64, block_size=4, max_num_seqs=6, max_num_batched_tokens=48
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY), help="a folder or a hub name")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, help="default: 128, or 32 to watch")
    parser.add_argument(
        "--temperature", type=float, help="default: what the checkpoint recommends, else 0 (greedy)"
    )
    parser.add_argument("--watch", action="store_true", help="a small cache, and a map of it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    llm = LLM(args.model, **(WATCHED_LIMITS if args.watch else {}))
    params = llm.get_default_sampling_params()
    if args.temperature is not None:
        params.temperature = args.temperature
    elif params == SamplingParams():
        params.temperature = 0.0  # the checkpoint recommends nothing
    params.max_tokens = 32 if args.watch else 128
    if args.max_tokens is not None:
        params.max_tokens = args.max_tokens

    prompts = args.prompt or (WATCHED_PROMPTS if args.watch else PROMPTS)
    tokenizer = llm.get_tokenizer()
    inputs = prompts
    if tokenizer.chat_template:
        inputs = [  # token ids: the template's text holds the special tokens already
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
    if args.watch:
        color = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
        outputs = watch(llm, inputs, params, color)
    else:
        outputs = llm.generate(inputs, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        print(
            f"\nPrompt: {prompt}\nAnswer: {completion.text.strip()}  [{completion.finish_reason}]"
        )


if __name__ == "__main__":
    main()
