"""Chat with a model: the one in the box, or any folder or hub name of a supported family.

python example.py
python example.py --model FOLDER --prompt "List three primary colours."
"""

import argparse
import logging
from pathlib import Path

from nanovllm import LLM, SamplingParams

TINY = Path(__file__).parent / "assets" / "tiny-qwen3"
PROMPTS = ["Who are you?", "Who is Emma?", "Tell me about the sea.", "Continue: It is a truth"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY), help="a folder or a hub name")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, help="default: what the checkpoint recommends, else 0 (greedy)"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    llm = LLM(args.model)
    params = llm.get_default_sampling_params()
    if args.temperature is not None:
        params.temperature = args.temperature
    elif params == SamplingParams():
        params.temperature = 0.0  # the checkpoint recommends nothing
    params.max_tokens = args.max_tokens

    prompts = args.prompt or PROMPTS
    tokenizer = llm.get_tokenizer()
    inputs = prompts
    if tokenizer.chat_template:
        inputs = [  # token ids: the template's text holds the special tokens already
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
    for prompt, output in zip(prompts, llm.generate(inputs, params), strict=True):
        completion = output.outputs[0]
        print(
            f"\nPrompt: {prompt}\nAnswer: {completion.text.strip()}  [{completion.finish_reason}]"
        )


if __name__ == "__main__":
    main()
