"""python -m nanovllm at a terminal: generate and chat, and the engine's options."""

import io
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.entrypoints import cli

pytestmark = pytest.mark.usefixtures("one_thread")

WHO = "Who are you?"


@pytest.fixture
def run(tiny, capsys, monkeypatch):
    """Runs a command on the model in the box. Returns what it printed, and its exit status."""

    def run(*args, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        small = ["--dtype", "float32", "--kv-cache-memory-bytes", str(4 << 20)]
        status = cli.main([args[0], "--model", str(tiny), *small, *args[1:]])
        return capsys.readouterr().out, status

    return run


def greedy(max_tokens):
    return ("--temperature", "0", "--max-tokens", str(max_tokens))


def answer(llm, *said, max_tokens=24):
    """The model's answer to a conversation, messages of the user and of the model in turn."""
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return llm.chat(messages, params, use_tqdm=False)[0]["text"]


def test_a_text_goes_on(run, llm):
    params = SamplingParams(temperature=0, max_tokens=9)
    [want] = llm.generate("In the beginning", params, use_tqdm=False)
    assert run("generate", *greedy(9), "--prompt", "In the beginning") == (want["text"] + "\n", 0)
    assert run("generate", *greedy(9), stdin="In the beginning") == (want["text"] + "\n", 0)
    stop = want["text"].split()[-1]
    cut, _ = run("generate", *greedy(9), "--prompt", "In the beginning", "--stop", stop, "never")
    assert cut == want["text"][: want["text"].index(stop)] + "\n"


def test_a_conversation_has_a_history_until_it_is_cleared(run, llm):
    first = answer(llm, WHO)
    second = answer(llm, WHO, first, "And the sea?")
    assert second != answer(llm, "And the sea?")
    out, status = run("chat", *greedy(24), stdin=f"{WHO}\nAnd the sea?\n\n/clear\n{WHO}\n")
    assert (out, status) == (f"{first}\n{second}\n{first}\n", 0)
    assert run("chat", *greedy(24), "-q", WHO) == (first + "\n", 0)


def test_a_system_prompt_begins_the_conversation(run, llm):
    system = {"role": "system", "content": "Speak as a king."}
    params = SamplingParams(temperature=0, max_tokens=9)
    messages = [system, {"role": "user", "content": WHO}]
    want = llm.chat(messages, params, use_tqdm=False)[0]["text"]
    out, _ = run(
        "chat", *greedy(9), "--system-prompt", system["content"], stdin=f"{WHO}\n/clear\n{WHO}"
    )
    assert out == f"{want}\n" * 2


def test_ctrl_c_stops_the_answer_and_not_the_program(run, monkeypatch, llm):
    stream, left = LLM.stream, []

    def interrupted(self, *args):
        num_tokens = 0  # a consumer that lags gets several at a time
        for output in stream(self, *args):
            if not left and num_tokens >= 5:
                left.append(num_tokens)
                raise KeyboardInterrupt
            num_tokens += len(output["token_ids"])
            yield output

    monkeypatch.setattr(LLM, "stream", interrupted)
    out, status = run("chat", *greedy(24), stdin=f"{WHO}\nAnd the sea?\n")
    first, second = out.splitlines()
    assert status == 0 and first == answer(llm, WHO, max_tokens=left[0])
    assert second == answer(llm, WHO, first, "And the sea?"), "what was said stays said"


def test_ctrl_c_while_nothing_is_said_drops_the_line(monkeypatch):
    said = iter([KeyboardInterrupt, "hello", EOFError])

    def fake_input(prompt):
        if isinstance(line := next(said), str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", fake_input)
    assert list(cli._lines(False)) == ["hello"]


def test_an_error_does_not_end_the_conversation(run, llm, capsys):
    out, status = run("chat", *greedy(4), stdin="the " * 3000 + f"\n{WHO}\n")
    assert (out, status) == (answer(llm, WHO, max_tokens=4) + "\n", 0)
    assert run("chat", "-q", "the " * 3000) == ("", 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "--prompt", ""), "error: prompt 0 is empty"),
        (("generate", "--prompt", "a", "--top-p", "2"), "error: top_p must be in (0, 1]"),
        (("generate", "--prompt", "a", "--max-num-seqs", "0"), "error: max_num_seqs must be"),
        (("chat", "--chat-template", "missing"), "error: chat_template 'missing' is no file"),
        (("run-batch", "missing.jsonl", "-o", "o"), "error: [Errno 2] No such file"),
        (("run-batch", "-i", "missing.jsonl", "-o", "o"), "error: [Errno 2] No such file"),
    ],
)
def test_mistakes_are_one_line(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        run(*args)
    assert str(info.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_the_engine_is_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run-batch", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')} " in text or f"--{field.name}" in text
    assert "requests that run at a time." in text


def test_options_have_their_types(monkeypatch):
    given = {}
    monkeypatch.setattr("nanovllm.llm.LLM", lambda **options: given.update(options))
    line = "generate --model m --max-model-len 7 --no-enable-prefix-caching --hf-token"
    parse = cli._parser().parse_args
    cli.load(
        parse([*line.split(), "--gpu-memory-utilization", "0.5", "--hf-overrides", '{"a": 1}'])
    )
    assert given == {
        "model": "m",
        "max_model_len": 7,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "hf_overrides": {"a": 1},
        "hf_token": True,
    }
    with pytest.raises(SystemExit):
        parse([*line.split(), "--hf-overrides", "{"])


@pytest.mark.parametrize("files", [(), ("a", "-i", "b")], ids=str)
def test_run_batch_takes_one_input_file(files, capsys):
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["run-batch", *files, "-o", "o", "--model", "m"])
    assert "--input-file" in capsys.readouterr().err.splitlines()[-1]


def test_help_comes_without_torch():
    code = "import sys, nanovllm.entrypoints.cli; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout == "False\n"
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm", "--help"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and "run-batch" in done.stdout
