r"""A model for EleutherAI's lm-eval, and lm-eval's command line with that model in it:

    python -m nanovllm.entrypoints.lm_eval --model nanovllm \
        --model_args pretrained=FOLDER,dtype=float32 --tasks hellaswag

lm-eval makes requests from tasks, and scores from results. Prompts are tokenized and cut, and texts
stopped and decoded, as by its `hf` model, so that the scores are the same.
"""

from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import TemplateError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'nanovllm[lm-eval]'") from None

from nanovllm.frontend import chat, scoring
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

# Options of transformers' generate without an implementation here, and the value of each that
# changes nothing.
NEUTRAL = {
    "early_stopping": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "use_cache": True,
}
RECOMMENDED = ("top_p", "top_k", "min_p", "repetition_penalty")  # by generation_config


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
        think_end_token: answers begin after this text or token id, and stop strings count from
            there.
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
        think_end_token: str | int | None = None,
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
        if self.llm.config.chat_template is not None:  # lm-eval records it from there
            self.tokenizer.chat_template = chat.load_template(self.llm.config.chat_template)
        if add_bos_token is not None:
            self.tokenizer.add_bos_token = add_bos_token
        self.max_length, self.max_gen_toks = self.llm.max_model_len, max_gen_toks
        self.add_bos_token, self.custom_prefix = add_bos_token, prefix_token_id
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        is_id = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token or 0) if is_id else think_end_token
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_texts = [token.content for token in added if token.special]

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
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        default = self.llm.get_default_sampling_params()
        for text, gen_kwargs in (request.args for request in requests):
            options: dict[str, Any] = {name: getattr(default, name) for name in RECOMMENDED}
            options |= normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
            options = {k: v for k, v in options.items() if k not in NEUTRAL or v != NEUTRAL[k]}
            max_tokens, until = options.pop("max_gen_toks"), options.pop("until")
            room = self.max_length - max_tokens
            if room <= 0:
                raise ValueError(
                    f"max_gen_toks={max_tokens} leaves no room for a prompt in "
                    f"max_model_len={self.max_length}: lower it or raise max_model_len"
                )
            options["temperature"] = (
                options.get("temperature", 1.0) if options.pop("do_sample") else 0.0
            )
            stops.append([stop for stop in handle_stop_sequences(until, eos) if stop])
            prompts.append(self._encode_prompt(text)[-room:] or [self.prefix_token_id])
            if "max_length" in options:  # with the prompt
                max_tokens = options.pop("max_length") - len(prompts[-1])
            # Special tokens are stops too, so the text that is searched has them.
            options |= {"stop": self._early(stops[-1]), "skip_special_tokens": False}
            params.append(SamplingParams(max_tokens=max_tokens, **options))
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        if errors := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"{len(errors)} requests failed; the first: {errors[0]}")
        texts = [
            self._answer(list(output.outputs[0].token_ids), stop)
            for output, stop in zip(outputs, stops, strict=True)
        ]
        return self._cached("generate_until", [r.args for r in requests], texts)

    def _encode_prompt(self, text: str) -> list[int]:
        """Of a text to go on with: without BOS if it begins with that, whatever prefix_token_id
        is."""
        bos = self.tokenizer.bos_token
        return self.tok_encode(text, False if bos and text.startswith(bos) else self.add_bos_token)

    def _early(self, stops: list[str]) -> list[str]:
        """The stop strings that end a request. Before the end of the thoughts that is the business
        of special tokens only."""
        if self.think_end_token is None:
            return stops
        return [stop for stop in stops if any(text in stop for text in self.special_texts)]

    def _answer(self, token_ids: list[int], stops: list[str]) -> str:
        """The text of generated tokens alone (after a prompt, the first piece of a sentencepiece
        tokenizer would begin with a space)."""
        end = self.think_end_token
        if isinstance(end, int) and end in token_ids:
            token_ids = token_ids[len(token_ids) - token_ids[::-1].index(end) :]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if isinstance(end, int):
            return postprocess_generated_text(text.lstrip(), stops, None)
        return postprocess_generated_text(text, stops, end)

    def _cached(self, name: str, keys: Iterable[Any], results: list[Any]) -> list[Any]:
        """The results, after lm-eval's cache has them for the next run."""
        for key, result in zip(keys, results, strict=True):
            self.cache_hook.add_partial(name, key, result)
        return results


if __name__ == "__main__":
    cli_evaluate()
