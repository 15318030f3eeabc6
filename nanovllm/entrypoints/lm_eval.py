r"""A model for EleutherAI's lm-eval, and lm-eval's command line with that model in it:

    python -m nanovllm.entrypoints.lm_eval --model nanovllm \
        --model_args pretrained=FOLDER,dtype=float32 --tasks hellaswag

lm-eval makes requests from tasks, and scores from results. Prompts are tokenized and cut as by its
`hf` model, so that the scores are the same.
"""

from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import TemplateError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'nanovllm[lm-eval]'") from None

from nanovllm.frontend import scoring
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams


@register_model("nanovllm")
class NanoVLLM(TemplateLM):
    """lm-eval's model class around an LLM, for simple_evaluate(model=NanoVLLM(...)).

    Args:
        pretrained: the model, a folder or a name on the hub.
        max_length: max_model_len, by the `hf` model's name.
        max_gen_toks: largest number of generated tokens, for tasks without a number of their own.
        add_bos_token: whether texts begin with BOS; None: the tokenizer decides.
        prefix_token_id: the token before a text without a context; None: BOS, or else EOS.
        chat_template_args: further variables of the chat template.
        enable_thinking: sets the variable of that name in chat_template_args.
        think_end_token: answers begin after this text, and stop strings count from there.
        batch_size, max_batch_size: ignored; the engine batches.
        device: LLM's; "cuda:0", which lm-eval passes by default, stands for "auto".
        options: further options of LLM.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str = "auto",
        **options: Any,
    ):
        super().__init__()
        if max_length not in (None, options.setdefault("max_model_len", max_length)):
            raise ValueError("max_length and max_model_len are two names of one: give one")
        self.llm = LLM(pretrained, device="auto" if device == "cuda:0" else device, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.max_length, self.max_gen_toks = self.llm.max_model_len, max_gen_toks
        self.add_bos_token, self.custom_prefix = add_bos_token, prefix_token_id
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.think_end_token = think_end_token

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self.custom_prefix is not None:
            return self.custom_prefix
        return scoring.first_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )

        try:
            return apply(chat_history)
        except TemplateError:  # some templates have no system message
            return apply([message for message in chat_history if message["role"] != "system"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False  # the chat template wrote the token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs, texts = [], []  # windows of all texts, and the text of each
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(*request.args), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                texts.append(i)
        totals = [0.0] * len(requests)
        for i, found in zip(texts, self.llm.loglikelihood(pairs, not disable_tqdm), strict=True):
            totals[i] += found.total
        return self._cached("loglikelihood_rolling", [r.args for r in requests], totals)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            pairs.append((context[-room:] if room > 0 else context, continuation))
        found = self.llm.loglikelihood(pairs, not disable_tqdm)
        results = [(one.total, one.is_greedy) for one in found]
        return self._cached("loglikelihood", [texts for texts, *_ in requests], results)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params, stops = [], [], []
        for text, gen_kwargs in (request.args for request in requests):
            options = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
            max_tokens, stop = options.pop("max_gen_toks"), options.pop("until")
            room = self.max_length - max_tokens
            if room <= 0:
                raise ValueError(
                    f"max_gen_toks={max_tokens} leaves no room for a prompt in "
                    f"max_model_len={self.max_length}: lower it or raise max_model_len"
                )
            options["temperature"] = (
                options.get("temperature", 1.0) if options.pop("do_sample") else 0.0
            )
            stops.append([string for string in stop if string])
            # Before the end of the thoughts nothing but EOS stops a request.
            early = [] if self.think_end_token else stops[-1]
            params.append(SamplingParams(max_tokens=max_tokens, stop=early, **options))
            prompts.append(self.tok_encode(text)[-room:] or [self.prefix_token_id])
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        if errors := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"{len(errors)} requests failed; the first: {errors[0]}")
        texts = [
            postprocess_generated_text(output.outputs[0].text, stop, self.think_end_token)
            for output, stop in zip(outputs, stops, strict=True)
        ]
        return self._cached("generate_until", [r.args for r in requests], texts)

    def _cached(self, name: str, keys: Iterable[Any], results: list[Any]) -> list[Any]:
        """The results, after lm-eval's cache has them for the next run."""
        for key, result in zip(keys, results, strict=True):
            self.cache_hook.add_partial(name, key, result)
        return results


if __name__ == "__main__":
    cli_evaluate()
