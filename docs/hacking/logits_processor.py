"""A logits processor: no n-gram is generated twice (transformers' no_repeat_ngram_size).

python docs/hacking/logits_processor.py
"""

import torch

from nanovllm import LLM, SamplingParams


class NoRepeatedNgrams:
    """Forbids tokens that would complete an n-gram of the output for the second time.

    Any Python callable with these arguments will do; with three arguments the first one is the
    prompt's token ids. The engine calls it once for each token of its request.
    """

    def __init__(self, n: int):
        self.n = n

    def __call__(self, output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            output_token_ids: the tokens generated so far.
            logits: [vocab] float32, of the next token; may be changed in place.
        """
        num_tokens = len(output_token_ids)
        last = output_token_ids[num_tokens - self.n + 1 :]
        for start in range(num_tokens - self.n + 1):
            *ngram, following = output_token_ids[start : start + self.n]
            if ngram == last:
                logits[following] = -torch.inf
        return logits


def num_repeated(token_ids: list[int], n: int) -> int:
    ngrams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return len(ngrams) - len(set(ngrams))


def main() -> list[int]:
    """The numbers of repeated 3-grams without and with the processor."""
    llm = LLM("assets/tiny-qwen3", max_model_len=512)
    plain = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    careful = SamplingParams(
        temperature=0, max_tokens=120, ignore_eos=True, logits_processors=[NoRepeatedNgrams(3)]
    )
    counts = []
    for output in llm.generate(["In the beginning"] * 2, [plain, careful], use_tqdm=False):
        counts.append(num_repeated(output["token_ids"], 3))
        print(f"{counts[-1]} repeated 3-grams: {output['text']!r:.90}")
    return counts


if __name__ == "__main__":
    main()
