"""Files of requests in OpenAI's batch format, as vLLM's run-batch: a request a line in, a result a
line out. cli.py calls it; a line's body is openai_format.py's business.

Results are appended as they come, so a run that was killed goes on where it stopped. They are not
in the order of the requests: custom_id says which is which.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from tqdm.auto import tqdm

from nanovllm.entrypoints.openai_format import Request, make_response, read_request
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import refuses_deep_nesting

PREFIX = b'{"id": "batch_req_'  # what all results begin with; the line's number follows


class BatchFileError(Exception):
    """The files won't do; the message says why."""


@dataclass
class Line:
    """A request that runs, and what its prompts have got."""

    number: int
    custom_id: str
    request: Request
    outputs: list[RequestOutput | None]


def run_batch(
    make_llm: Callable[[], LLM],
    source: Path,
    results: Path,
    model_names: Iterable[str] = (),
    use_tqdm: bool = True,
) -> str:
    """Answer all lines that have no result yet.

    Args:
        make_llm: called once the files are known to be good. It is closed at the end.
        source: a request a line.
        results: where results are appended; made if it is missing.
        model_names: what requests may call the model, besides its own name.

    Returns: how many were done, in words.

    Raises:
        BatchFileError: `results` has something else, or results of another file; or the model
            has no tokenizer.
        OSError: a file can't be read or written.
    """
    if results.exists() and source.exists() and source.samefile(results):
        raise BatchFileError(f"{source} is both input and output: name another file for results")
    with source.open("rb") as lines, results.open("ab") as sink:
        total = sum(1 for _ in lines)
        lines.seek(0)
        done, end = read_results(results)
        sink.truncate(end)
        bar = tqdm(total=total, desc="Processed lines", disable=not use_tqdm, dynamic_ncols=True)
        with bar, make_llm() as llm:
            if llm.config.skip_tokenizer_init:
                raise BatchFileError("answers are texts: leave skip_tokenizer_init out")
            batch = Batch(llm, done, sink, model_names, bar)
            batch.run(enumerate(lines, 1))
    return (
        f"{batch.num_good} answers, {batch.num_errors} errors in {results}"
        + f", besides {len(done)} results of before" * bool(done)
    )


def read_results(path: Path) -> tuple[dict[int, str | None], int]:
    """The custom_id of each line that has a result, by its number; and where the results end: a
    line that was being written when the process was killed does not count."""
    done: dict[int, str | None] = {}
    end = 0
    with path.open("rb") as file:
        for raw in file:
            if not (raw.startswith(PREFIX) or (PREFIX.startswith(raw) and raw)):
                raise BatchFileError(f"{path} holds something else than results of run-batch")
            if not raw.endswith(b"\n"):
                break
            try:
                record = json.loads(raw)
                done[int(record["id"].removeprefix("batch_req_"))] = record["custom_id"]
            except (ValueError, KeyError):
                raise BatchFileError(f"{path} has a broken line: {raw[:80]!r}") from None
            end += len(raw)
    return done, end


class Batch:
    """One run over a file.

    Args:
        done: the custom_id of each line that has a result.
        sink: takes the results.
        model_names: what requests may call the model, besides its own name.
        bar: counts lines.
    """

    def __init__(
        self,
        llm: LLM,
        done: dict[int, str | None],
        sink: IO[bytes],
        model_names: Iterable[str],
        bar: Any,
    ):
        self.llm, self.done, self.sink, self.bar = llm, done, sink, bar
        self.tokenizer = llm.get_tokenizer()
        self.model = llm.config.model
        self.model_names = {self.model, *model_names}
        self.seen: dict[str, int] = {}  # the line of each custom_id
        self.running: dict[str, tuple[Line, int]] = {}  # request id -> its line, which prompt
        self.num_good = self.num_errors = 0
        # Large enough for the engine's batch to stay full while lines are read.
        self.window = 2 * llm.llm_engine.scheduler.max_num_seqs

    def run(self, lines: Iterable[tuple[int, bytes]]) -> None:
        """Answer these lines; only the window's are in memory."""
        for number, raw in lines:
            self._admit(number, raw)
            while len(self.running) >= self.window:
                self._step()
        while self.running:
            self._step()

    def _step(self) -> None:
        try:
            outputs = self.llm.step()
        except RuntimeError:  # a request that was in two failed steps ends by it
            self.llm.is_finished()  # raises if the LLM can't go on
            return
        for output in outputs:
            if output.request_id not in self.running:
                continue  # its line has failed
            if output.error is not None:
                self._fail(output.request_id, RuntimeError(output.error))
                continue
            line, index = self.running.pop(output.request_id)
            line.outputs[index] = output
            outputs = [output for output in line.outputs if output is not None]
            if len(outputs) == len(line.outputs):
                body = make_response(line.request, outputs, self.model, self.tokenizer)
                self._write(line.number, line.custom_id, body, None)

    def _fail(self, request_id: str, error: Exception) -> None:
        """A line's request was ended by an error, so all of the line's are."""
        failed, _ = self.running[request_id]
        for other in [id for id, (line, _) in self.running.items() if line is failed]:
            self.llm.abort(other)
            del self.running[other]
        self._write(failed.number, failed.custom_id, None, error)

    def _admit(self, number: int, raw: bytes) -> None:
        """Start a line's requests, unless it has a result."""
        line: Any = None
        broken: Exception | None = None
        try:
            line = json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode())
        except (ValueError, RecursionError) as error:
            broken = error
        custom_id = line.get("custom_id") if isinstance(line, dict) else None
        custom_id = custom_id if isinstance(custom_id, str) else None
        if number in self.done or not raw.strip():
            if self.done.get(number) != custom_id:
                raise BatchFileError(
                    f"the results are of another file: line {number} is {custom_id!r:.80} now, and "
                    f"was {self.done[number]!r:.80}"
                )
            self.seen.setdefault(custom_id or "", number)
            self.bar.update()
            return
        try:
            if broken:
                raise ValueError(f"not a line of JSON: {broken}")
            self._start(number, custom_id, line)
        except (ValueError, TypeError) as error:
            self._write(number, custom_id, None, error)

    @refuses_deep_nesting("the line")
    def _start(self, number: int, custom_id: str | None, line: Any) -> None:
        if not isinstance(line, dict):
            raise TypeError(f"a line must be a JSON object, got {line!r:.80}")
        if not custom_id:
            raise ValueError("the line has no custom_id: give a string that no other line has")
        if self.seen.setdefault(custom_id, number) != number:
            raise ValueError(f"line {self.seen[custom_id]} has the same custom_id")
        if line.get("method", "POST") != "POST":
            raise ValueError(f"method must be POST, got {line['method']!r:.80}")
        request = read_request(self.llm, line.get("url"), line.get("body"), self.model_names)
        started = Line(number, custom_id, request, [None] * len(request.prompts))
        request_ids: list[str] = []
        try:
            for prompt in request.prompts:
                request_ids.append(self.llm.add_request(prompt, request.params))
        except (ValueError, TypeError):
            for request_id in request_ids:
                self.llm.abort(request_id)
            raise
        self.running |= {id: (started, i) for i, id in enumerate(request_ids)}

    def _write(
        self, number: int, custom_id: str | None, body: Any, error: Exception | None
    ) -> None:
        status, about = 200, None
        if error:
            is_users = isinstance(error, (ValueError, TypeError))
            status = 400 if is_users else 500
            kind = "invalid_request_error" if is_users else "server_error"
            about = {"message": str(error), "type": kind, "code": status}
        record = {
            "id": f"batch_req_{number}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": uuid4().hex, "body": body},
            "error": about,
        }
        self.sink.write(json.dumps(record).encode() + b"\n")
        self.sink.flush()
        self.num_good += not error
        self.num_errors += bool(error)
        self.bar.update()
