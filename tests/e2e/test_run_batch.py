"""run-batch: files of requests in OpenAI's format, and what a killed run leaves behind."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path

import pytest
from patience import PATIENCE

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.run_batch import BatchFileError, run_batch

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "It is a truth universally acknowledged, that"
WHO = [{"role": "user", "content": "Who are you?"}]


def line(custom_id, url=COMPLETIONS, **body):
    body = {"temperature": 0, **body}
    if url == COMPLETIONS:
        body = {"prompt": TEXT, "max_tokens": 8, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path, lines):
    """Lines as JSON; bytes stand as they are."""
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")


def read(path):
    """The results, in the order of the requests."""
    records = [json.loads(raw) for raw in path.read_bytes().splitlines()]
    return sorted(records, key=lambda record: int(record["id"].removeprefix("batch_req_")))


@pytest.fixture
def run(llm, files):
    """Runs lines on the one LLM, which is not closed."""

    def run(lines, names=(), **options):
        write(files[0], lines)
        run_batch(lambda: nullcontext(llm), *files, names, use_tqdm=False, **options)
        assert llm.is_finished()
        return read(files[1])

    return run


def body_of(record):
    assert record["error"] is None and record["response"]["status_code"] == 200
    return record["response"]["body"]


# Answers


def test_answers_are_what_llm_gives(run, llm):
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    plain, tokens, several, chat = (
        body_of(record)
        for record in run(
            [
                line("a"),
                line("b", prompt=ids, model=llm.config.model, user="me", stream=False, n=1),
                line("c", prompt=["The king", ids], echo=True, logit_bias={"5": -100}),
                line("d", CHAT, messages=WHO, max_completion_tokens=12, max_tokens=3, top_k=None),
            ]
        )
    )
    greedy = SamplingParams(temperature=0, max_tokens=8)
    [want] = llm.generate(TEXT, greedy, use_tqdm=False)
    for body in (plain, tokens):
        assert body["choices"][0] == {
            "index": 0,
            "text": want["text"],
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
        counts = {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8}
        assert body["usage"].items() >= counts.items()
        assert (body["object"], body["model"]) == ("text_completion", llm.config.model)
    king = llm.generate("The king", greedy, use_tqdm=False)[0]["text"]
    assert [c["index"] for c in several["choices"]] == [0, 1]
    assert [c["text"] for c in several["choices"]] == ["The king" + king, TEXT + want["text"]]
    [answer] = llm.chat(WHO, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": answer["text"]}


def test_parameters_are_mapped(run, llm):
    values = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "stop": [" x"], "min_tokens": 4,
              "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2,
              "bad_words": ["the"], "ignore_eos": True}  # fmt: skip
    got = body_of(run([line("a", **values)])[0])
    [want] = llm.generate(TEXT, SamplingParams(max_tokens=8, top_k=20, **values), use_tqdm=False)
    assert got["choices"][0]["text"] == want["text"], "top_k is generation_config's"


def test_logprobs_have_openais_forms(run, llm):
    records = run(
        [line("a", logprobs=2), line("b", CHAT, messages=WHO, max_tokens=5, logprobs=True,
                                     top_logprobs=2)]
    )  # fmt: skip
    old, new = (body_of(record)["choices"][0]["logprobs"] for record in records)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    want = llm.generate(TEXT, params, use_tqdm=False)[0].outputs[0]
    assert "".join(old["tokens"]) == want.text
    assert old["text_offset"][:2] == [0, len(old["tokens"][0])]
    for token, logprob, top, entry in zip(
        want.token_ids, old["token_logprobs"], old["top_logprobs"], want.logprobs, strict=True
    ):
        assert logprob == pytest.approx(entry[token].logprob, abs=1e-4)
        assert len(top) == 2 and list(top) == [e.decoded_token for e in entry.values()]
    assert len(new["content"]) == 5
    for entry in new["content"]:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 2


def test_characters_of_several_tokens_keep_their_bytes_and_places(run, llm):
    text = "a\N{PARTY POPPER}b"
    lines = [
        line("a", prompt=text, echo=True, logprobs=0, max_tokens=1, n=2, temperature=1, seed=1),
        line("b", CHAT, messages=WHO, max_tokens=20, structured_outputs={"choice": [text]},
             top_logprobs=3, logprobs=True),
    ]  # fmt: skip
    echo, chat = map(body_of, sorted(run(lines), key=itemgetter("custom_id")))
    for choice in echo["choices"]:
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert tokens[:6] == ["a", "", "", "", "\N{PARTY POPPER}", "b"]
        assert offsets[:7] == [0, 1, 1, 1, 1, 2, 3]
        assert "".join(tokens) == choice["text"]
    content = chat["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).startswith(text.encode())
    assert "".join(entry["token"] for entry in content).startswith(text)


def test_an_echo_has_the_prompts_logprobs(run, llm):
    [record] = run([line("a", echo=True, logprobs=1)])
    [choice] = body_of(record)["choices"]
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and choice["text"].startswith(TEXT)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert len(logprobs["token_logprobs"]) == len(ids) + 8
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    assert choice["prompt_logprobs"][1][str(ids[1])].keys() == {"logprob", "rank", "decoded_token"}


def test_an_echo_without_a_token_scores_the_prompt(run, llm):
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    only = dict(echo=True, max_tokens=0)
    text, tokens, several, plain, one = map(
        body_of,
        run(
            [
                line("a", **only, logprobs=2),
                line("b", **only, logprobs=0, prompt=ids),
                line("c", **only, logprobs=1, prompt=[TEXT, "The king"], n=2, temperature=1),
                line("d", **only, ignore_eos=True, stop="a"),
                line("e", **only, logprobs=1, prompt=ids[:1]),
            ]
        ),
    )
    [want] = llm.loglikelihood([(ids[:1], ids[1:])], use_tqdm=False)
    for body in (text, tokens):
        [choice] = body["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"]) == TEXT
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(want.logprobs, abs=1e-4)
        assert len(logprobs["text_offset"]) == len(logprobs["top_logprobs"]) == len(ids)
        usage = (body["usage"]["completion_tokens"], body["usage"]["total_tokens"])
        assert usage == (0, len(ids))
    assert {len(top) for top in text["choices"][0]["logprobs"]["top_logprobs"][1:]} <= {2, 3}
    assert [c["text"] for c in several["choices"]] == [TEXT, TEXT, "The king", "The king"]
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == (TEXT, None)
    assert one["choices"][0]["logprobs"]["token_logprobs"] == [None]


def test_several_samples_are_several_choices(run):
    [record] = run([line("a", n=2, prompt=[TEXT, "The king"], temperature=1, seed=1)])
    body = body_of(record)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) == 4
    assert body["usage"]["completion_tokens"] <= 4 * 8


def test_a_response_format_is_kept(run):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    records = run(
        [
            line("a", CHAT, messages=WHO, response_format=form, max_tokens=60,
                 structured_outputs={"disable_any_whitespace": True}),
            line("b", structured_outputs={"choice": ["yes", "no"]}),
            line("c", response_format={"type": "text"}),
            line("d", structured_outputs={"choice": ["yes"], "regex": "a"}),
        ]
    )  # fmt: skip
    assert json.loads(body_of(records[0])["choices"][0]["message"]["content"])["a"] in (1, 2)
    assert body_of(records[1])["choices"][0]["text"] in ("yes", "no")
    assert body_of(records[2])
    assert "exactly one of" in records[3]["error"]["message"]


def test_a_request_that_fails_while_it_runs_is_an_error_record(run):
    pytest.importorskip("llguidance")
    endless = {"grammar": 'start: "a" start'}  # found out when the text begins
    bad, good = run([line("a", structured_outputs=endless, prompt=["x", "y"]), line("b")])
    assert bad["response"]["status_code"] == 500 and bad["error"]["type"] == "server_error"
    assert "structured_outputs" in bad["error"]["message"] and body_of(good)


def test_who_fails_every_step_is_an_error_record(run, llm, monkeypatch):
    executor = llm.llm_engine.executor
    submit = executor.submit

    def broken(step):
        if any(start.params.seed == 13 for start in step.starts):
            raise RuntimeError("no memory left")
        return submit(step)

    monkeypatch.setattr(executor, "submit", broken)
    [bad] = run([line("a", seed=13)])
    assert bad["response"]["status_code"] == 500 and bad["error"]["message"] == "no memory left"
    again, good = run([line("a", seed=13), line("b")])
    assert again == bad and body_of(good)


def test_prompts_are_cut(run):
    ids = [300, 400, 500]
    lines = [
        line("a", truncate_prompt_tokens=2),
        line("b", truncate_prompt_tokens=2, prompt=ids),
        line("c", prompt=ids[1:]),
    ]
    text, cut, end = map(body_of, sorted(run(lines), key=itemgetter("custom_id")))
    assert text["usage"]["prompt_tokens"] == 2
    assert cut["choices"][0]["text"] == end["choices"][0]["text"]


# Bad lines


def test_a_line_of_tens_of_megabytes_takes_no_more_than_its_text(run):
    text = "word " * 4_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = [{"role": "user", "content": text}]
    records = run(
        [
            line("a", prompt=text),
            line("b", CHAT, messages=messages),
            line("c", prompt=[text[: 2**20]] * 10),
            line("d", prompt=text, truncate_prompt_tokens=5),
            line("e", CHAT, messages=messages, truncate_prompt_tokens=5, max_tokens=8),
        ]
    )
    *refused, cut, cut_chat = sorted(records, key=itemgetter("custom_id"))
    for record in refused:
        assert record["response"]["status_code"] == 400
        assert "characters, too many for the 2047 tokens" in record["error"]["message"]
    for record in (cut, cut_chat):
        assert body_of(record)["usage"]["prompt_tokens"] == 5
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 500 * 1024  # kilobytes; it was 3 GiB


def test_a_bad_line_is_an_error_record_and_the_rest_goes_on(run):
    bad = [
        (b"{", "not a line of JSON"),
        (b"\xff", "not a line of JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not a line of JSON"),
        ([1], "a line must be a JSON object"),
        ({"url": COMPLETIONS}, "the line has no custom_id"),
        ({**line(""), "custom_id": 5}, "the line has no custom_id"),
        (line("good 0"), "line 1 has the same custom_id"),
        ({**line("method"), "method": "GET"}, "method must be POST, got 'GET'"),
        (line("url", "/v1/embeddings"), "url must be /v1/chat/completions or /v1/completions"),
        ({**line("url 2"), "url": ["a"]}, "url must be"),
        ({**line("body"), "body": [1]}, "body must be a JSON object"),
        (line("range", temperature=3), "temperature must be in [0, 2]"),
        (line("nothing", max_tokens=0), "max_tokens must be"),
        (line("nothing 2", CHAT, messages=WHO, max_tokens=0), "max_tokens must be"),
        (line("nothing 3", max_tokens=False, echo=True), "max_tokens must be"),
        (line("type", max_tokens="9"), "max_tokens must be a whole number"),
        (line("bias", logit_bias={"a": 1}), "logit_bias must be token id -> bias"),
        (line("vocabulary", logit_bias={"999999": 1}), "logit_bias has the token id 999999"),
        (line("long", prompt="the " * 5000), "max_model_len=2048 allows 2047"),
        (line("second", prompt=[TEXT, [10**9]]), "has the token id 1000000000"),
        (line("empty", prompt=""), "prompt must be a text"),
        (line("none", prompt=None), "prompt must be a text"),
        (line("dict", prompt={"prompt": "a"}), "prompt must be a text"),
        (line("nested", prompt=[{"prompt": "a"}]), "prompt must be texts or lists"),
        (line("model", model="gpt"), "the model 'gpt' is not the one that runs here"),
        (line("field", colour="red", suffix="b"), "not supported: colour, suffix"),
        (line("stream", stream=True), "not supported: stream"),
        (line("audio", CHAT, messages=WHO, modalities=["audio"]), "not supported: modalities"),
        (line("tool", CHAT, messages=WHO, tool_choice="required"), "not supported: tool_choice"),
        (line("talk", CHAT), "messages must be a list of at least one message, got None"),
        (line("two", CHAT, messages=[WHO]), "messages must be a list of at least one message"),
        (line("picture", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
         "content must be a text, or a list of texts"),
        (line("top", CHAT, messages=WHO, top_logprobs=2), "top_logprobs needs logprobs: true"),
        (line("form", response_format="json"), "response_format must be a JSON object"),
        (line("form 2", response_format={"type": "xml"}), "response_format {'type': 'xml'} is not"),
        (line("form 3", response_format={"type": "json_schema"}), "response_format has no json_s"),
        (line("grammar", structured_outputs=5), "structured_outputs must be a JSON object, got 5"),
        (line("template", CHAT, messages=WHO, chat_template_kwargs=[5]),
         "chat_template_kwargs must be a JSON object, got [5]"),
        (line("loop", CHAT, messages=WHO, chat_template="{% for i in range(10**9) %}a{% endfor %}"),
         "chat_template: a request's own template is a program"),
        (line("loop 2", CHAT, messages=WHO, chat_template_kwargs={"chat_template": "{{ 'a' }}"}),
         "chat_template: a request's own template is a program"),
        (line("thought", thinking_token_budget=5), "not supported: thinking_token_budget"),
    ]  # fmt: skip
    records = run([line("good 0"), *(entry for entry, _ in bad), line("good 1")])
    assert len(records) == len(bad) + 2
    assert body_of(records[0])["choices"] == body_of(records[-1])["choices"]
    for record, (entry, message) in zip(records[1:-1], bad, strict=True):
        assert message in record["error"]["message"]
        assert record["response"]["status_code"] == 400 and record["response"]["body"] is None
        custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
        assert record["custom_id"] == (custom_id if isinstance(custom_id, str) else None)


def test_a_requests_own_template_runs_if_it_is_trusted(run, llm):
    echo = {"chat_template": "{{ messages[0].content }}", "max_tokens": 8}
    lines = [line("a", CHAT, messages=WHO, **echo), line("b", prompt=WHO[0]["content"])]
    own, plain = map(body_of, run(lines, trusts_templates=True))
    assert own["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def test_odd_files(run, files, llm):
    assert run([b""]) == []
    records = run([b"\xef\xbb\xbf" + json.dumps(line("\ud800 \N{SNOWMAN}")).encode(), b"  "])
    assert records[0]["custom_id"] == "\ud800 \N{SNOWMAN}"
    assert run([line("\ud800 \N{SNOWMAN}"), b""]) == records, "nothing was left to do"


def test_another_name_for_the_model(run):
    assert body_of(run([line("a", model="gpt")], ["gpt"])[0])


# Files


def test_answers_need_a_tokenizer(files, tiny):
    write(files[0], [line("a")])
    with pytest.raises(BatchFileError, match="leave skip_tokenizer_init out"):
        run_batch(lambda: LLM(str(tiny), skip_tokenizer_init=True), *files, use_tqdm=False)


def no_llm():
    raise AssertionError("the files are looked at first")


def test_files_that_will_not_do(files, llm, run):
    source, results = files
    with pytest.raises(FileNotFoundError):
        run_batch(no_llm, *files)
    write(source, [line("a"), line("b")])
    with pytest.raises(BatchFileError, match="is both input and output"):
        run_batch(no_llm, source, source)
    for other in (b"my diary\n", b"my diary", b'{"id": "batch_req_1"\n', b"\n", b"\0\0mp4\n",
                  b'{"id": "batch_req_1", "custom_id": "a"}\n',
                  b'{"id": "batch_req_1", "id": 1}\n',
                  b'{"id": "batch_req_1", "custom_id": ' + b"[" * 100_000 + b"\n"):  # fmt: skip
        results.write_bytes(other)
        with pytest.raises(BatchFileError, match=r"something else than results|a broken line"):
            run_batch(no_llm, *files)
        assert results.read_bytes() == other


def test_files_that_are_no_regular_files(files, tmp_path):
    source, results = files
    write(source, [line("a")])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path, Path("/dev/null")):
        for pair in ((source, odd), (odd, results)):
            with pytest.raises(BatchFileError, match=f"{odd} is no regular file"):
                run_batch(no_llm, *pair)
    assert not results.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [line("c"), *lines[1:]], "line 1 of .* is not the one that has a result"),
        (lambda lines: [*lines[:2], line("c", top_k=3)], "line 3 of .* is not the one"),
        (lambda lines: [*lines[:1], b"", *lines[1:]], "line 2 of .* is not the one"),
        (lambda lines: [*lines[:1], b"[", *lines[2:]], "line 2 of .* is not the one"),
        (lambda lines: lines[:2], "has a result of line 3, and .* has 2 lines"),
        (lambda lines: lines[1:], "line 1 of .* is not the one"),
    ],
)
def test_results_of_another_input_are_refused(files, run, change, message):
    lines = [line("a", prompt="a"), b"{", line("c")]
    before = run(lines)
    write(files[0], change(lines))
    with pytest.raises(BatchFileError, match=message):
        run_batch(no_llm, *files)
    assert read(files[1]) == before
    more = run([*lines, line("d")])
    assert more[:3] == before and body_of(more[3]), "lines may be added"


def test_results_of_another_model_are_refused(files, run, tiny):
    before = run([line("a"), b"{"])
    write(files[0], [line("a"), b"{", line("b")])
    other = str(tiny.parent / "." / ".." / tiny.parent.name / tiny.name)
    with pytest.raises(BatchFileError, match=r"results of the model .*, and .* runs now: give"):
        run_batch(lambda: LLM(other, max_model_len=64), *files, use_tqdm=False)
    assert read(files[1]) == before
    write(files[1], [{**before[0], "model": "x"}, {**before[1], "model": None}])
    with pytest.raises(BatchFileError, match="results of the model 'None'"):
        run_batch(lambda: LLM(str(tiny), max_model_len=64), *files, use_tqdm=False)


def test_one_process_writes_results(files, run, monkeypatch):
    write(files[0], [line("a")])
    with files[1].open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BatchFileError, match="another process writes its results into"):
            run_batch(no_llm, *files)
    assert body_of(run([line("a")])[0])


def test_a_disk_without_locks(files, run, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert body_of(run([line("a")])[0])
    assert "start no second run" in caplog.text


HALF = b'{"id": "batch_req_1", "custom_id": "a", "r'


@pytest.mark.parametrize(
    "rest", [b"", b'{"id": "ba', HALF, b"\0" * 5000, HALF + b"\0" * 50, b"\0\0 lost\n" + HALF]
)
def test_a_half_written_line_is_done_again(run, files, rest):
    first = run([line("a", prompt="a"), b"{", line("b"), line("c")])
    kept = [json.dumps(record).encode() + b"\n" for record in first[1:3]]
    files[1].write_bytes(b"".join(kept) + rest)
    again = run([line("a", prompt="a"), b"{", line("b"), line("c")])
    assert len(files[1].read_bytes().splitlines()) == 4
    assert again[1:3] == first[1:3]
    for old, new in zip(first, again, strict=True):
        choices = [(record["response"]["body"] or {}).get("choices") for record in (old, new)]
        assert choices[0] == choices[1] and old["error"] == new["error"]


def test_a_file_of_nuls_has_no_results(run, files):
    files[1].write_bytes(b"\0" * 4096)
    assert body_of(run([line("a")])[0])


def test_a_window_of_requests_is_in_memory(run, llm, monkeypatch):
    seen = []
    step = llm.step

    def counted():
        seen.append(len(llm.llm_engine.unfinished))
        return step()

    monkeypatch.setattr(llm, "step", counted)
    monkeypatch.setattr(llm.llm_engine.scheduler, "max_num_seqs", 3)
    records = run([line(str(i), max_tokens=1 + i % 5) for i in range(40)])
    assert len(records) == 40 and all(body_of(record) for record in records)
    assert max(seen) == 6 and seen.count(6) >= 20


def test_a_killed_run_goes_on_where_it_stopped(files, tiny, tmp_path):
    lines = [line(f"id {i}", prompt=f"{i} and", max_tokens=40, ignore_eos=True) for i in range(60)]
    lines[7] = b"{"
    write(files[0], lines)
    command = [sys.executable, "-m", "nanovllm", "run-batch", "--model", str(tiny),
               "-i", str(files[0]), "-o", str(files[1]), "--dtype", "float32",
               "--max-num-seqs", "4", "--max-model-len", "128"]  # fmt: skip
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if files[1].exists() and files[1].read_bytes().count(b"\n") > 8:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = files[1].read_bytes().count(b"\n")
    assert 8 < before < 60
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    records = read(files[1])
    assert [record["id"] for record in records] == [f"batch_req_{i + 1}" for i in range(60)]
    assert [r["custom_id"] for r in records] == [f"id {i}" if i != 7 else None for i in range(60)]
    assert f"besides {before} results of before" in done.stderr
    assert f"{59 - before + 1} answers, 0 errors" in done.stderr
