"""The command line: generate, chat, and run-batch for files of requests. `python -m nanovllm` calls
it; it uses LLM as any script does."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import __version__
from nanovllm.arguments import FlexibleArgumentParser, add_options, given_options
from nanovllm.config import VLLM_DEFAULTS
from nanovllm.engine_args import EngineArgs
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:  # importing torch takes seconds, and --help has no use for it
    from nanovllm.llm import LLM

SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
# run-batch has vLLM's served_model_name for itself.
OPTIONS = {option.name for option in fields(EngineArgs)} - {"served_model_name"}
CHAT_HELP = "/clear forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends"


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the process's exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        sys.stdout = None
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = FlexibleArgumentParser(prog="python -m nanovllm", description="Offline LLM inference")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("--prompt", help="the text; by default standard input")
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk with a model", description=CHAT_HELP)
    chat.add_argument("--system-prompt", help="what the conversation begins with")
    chat.add_argument("-q", "--quick", metavar="MESSAGE", help="answer this and end")
    chat.set_defaults(run=run_chat)
    for command in (generate, chat):
        add_options(
            command, "sampling (by default as the checkpoint says)", SamplingParams, SAMPLING
        )

    batch = commands.add_parser("run-batch", help="answer a file of requests in OpenAI's format")
    source = batch.add_mutually_exclusive_group(required=True)
    source.add_argument("file", type=Path, nargs="?", metavar="INPUT", help="a request a line")
    source.add_argument("-i", "--input-file", type=Path, help="the same, by vLLM's name")
    batch.add_argument(
        "-o",
        "--output-file",
        type=Path,
        required=True,
        help="a result a line; lines that have a result are not done again",
    )
    batch.add_argument(
        "--served-model-name", nargs="+", default=[], help="names of the model in requests"
    )
    batch.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="run chat templates that requests bring, without a limit on time and memory",
    )
    batch.set_defaults(run=run_batch_file)
    for command in (generate, chat, batch):
        add_options(command, "engine", EngineArgs, OPTIONS, VLLM_DEFAULTS, ["model"])
    return parser


def load(args: argparse.Namespace) -> "LLM":
    from nanovllm.llm import LLM

    try:
        return LLM(**given_options(args, EngineArgs))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"error: {error}") from None


def params_of(args: argparse.Namespace, llm: "LLM") -> SamplingParams:
    """The checkpoint's recommended parameters without a limit on the length, then the options
    given."""
    values: dict[str, Any] = {"max_tokens": None, **given_options(args, SamplingParams)}
    values.pop("seed", None)  # the engine's
    try:
        return replace(llm.get_default_sampling_params(), **values)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"error: {error}") from None


def run_generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    with load(args) as llm:
        params = params_of(args, llm)
        try:
            for _ in _show(llm, prompt, params):
                pass
        except (ValueError, TypeError) as error:
            raise SystemExit(f"error: {error}") from None
    return 0


def run_chat(args: argparse.Namespace) -> int:
    with load(args) as llm:
        params = params_of(args, llm)
        system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        if args.quick is not None:
            return 0 if _answer(llm, [*system, _said(args.quick)], params) is not None else 1
        messages = list(system)
        for text in _lines(sys.stdin.isatty()):
            if text.strip() == "/clear":
                messages = list(system)
            elif text.strip():
                answer = _answer(llm, [*messages, _said(text)], params)
                if answer is not None:
                    messages += [_said(text), {"role": "assistant", "content": answer}]
    return 0


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _lines(is_terminal: bool) -> Iterator[str]:
    """The lines that the user types, until the end of the input; Ctrl-C drops a line."""
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (input has a history then)
        print(CHAT_HELP)
    while True:
        try:
            yield input("> " if is_terminal else "")
        except KeyboardInterrupt:
            print()
        except EOFError:
            if is_terminal:
                print()
            return


def _answer(llm: "LLM", messages: list[dict[str, str]], params: SamplingParams) -> str | None:
    """Print the answer as it comes, and return its text, up to Ctrl-C; None after an error."""
    parts: list[str] = []
    try:
        [prompt] = llm.render_chat(messages)
        for text in _show(llm, prompt, params):
            parts.append(text)
    except KeyboardInterrupt:
        print()
    except (ValueError, TypeError) as error:
        print(f"error: {error} (/clear forgets the conversation)", file=sys.stderr)
        return None
    return "".join(parts)


def _show(llm: "LLM", prompt: Any, params: SamplingParams) -> Iterator[str]:
    """Print a text as it comes, and yield its parts."""
    for output in llm.stream(prompt, params):
        if output.error:
            raise ValueError(output.error)
        print(output["text"], end="", flush=True)
        yield output["text"]
    print()


def run_batch_file(args: argparse.Namespace) -> int:
    from nanovllm.entrypoints.run_batch import BatchFileError, run_batch

    try:
        source, names = args.file or args.input_file, args.served_model_name
        trusts = args.trust_request_chat_template
        done = run_batch(
            lambda: load(args), source, args.output_file, names, trusts_templates=trusts
        )
    except (BatchFileError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(done, file=sys.stderr)
    return 0
