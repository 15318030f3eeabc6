"""Files of requests in OpenAI's batch format, as vLLM's run-batch: a request a line in, a result a
line out. cli.py calls it; a line's body is openai_format.py's business.

Results are appended as they come, so a run that was killed goes on where it stopped. They are not
in the order of the requests: custom_id says which is which. A result has its line's hash and the
model's name, so that the results of one file are answers of one model to one input.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import xxhash
from tqdm.auto import tqdm

from nanovllm.entrypoints.openai_format import Request, make_response, read_request
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import refuses_deep_nesting

try:
    import fcntl
except ImportError:  # no lock on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PREFIX = b'{"id": "batch_req_'  # what all results begin with; the line's number follows
BOM = b"\xef\xbb\xbf"
OTHER_FILE = "name another file for the results"


class BatchFileError(Exception):
    """The files won't do; the message says why."""


@dataclass
class Line:
    """A line of the input: its number and hash; then its request, and what its prompts have got."""

    number: int
    hash: str
    custom_id: str | None = None
    request: Request | None = None
    outputs: list[RequestOutput | None] = field(default_factory=list)


def run_batch(
    make_llm: Callable[[], LLM],
    source: Path,
    results: Path,
    model_names: Iterable[str] = (),
    use_tqdm: bool = True,
    trusts_templates: bool = False,
) -> str:
    """Answer all lines that have no result yet.

    Args:
        make_llm: called once the files are known to be good. It is closed at the end.
        source: a request a line.
        results: where results are appended; made if it is missing.
        model_names: what requests may call the model, besides its own name.
        trusts_templates: whether requests may bring chat templates; see read_request.

    Returns: how many were done, in words.

    Raises:
        BatchFileError: a file is no regular file; `results` has something else, or results of
            another input or model, or another process writes there; or the model has no tokenizer.
        OSError: a file can't be read or written.
    """
    for path in (source, results):
        if path.exists() and not path.is_file():
            raise BatchFileError(
                f"{path} is no regular file, and a run that goes on reads both again: "
                f"name a file on a disk"
            )
    if results.exists() and source.exists() and source.samefile(results):
        raise BatchFileError(f"{source} is both input and output: {OTHER_FILE}")
    with source.open("rb") as lines, results.open("ab") as sink:
        lock(sink, results)
        old = read_results(results)
        total = check_lines(lines, source, old, results)
        lines.seek(0)
        sink.truncate(old.end)
        bar = tqdm(total=total, desc="Processed lines", disable=not use_tqdm, dynamic_ncols=True)
        with bar, make_llm() as llm:
            if llm.config.skip_tokenizer_init:
                raise BatchFileError("answers are texts: leave skip_tokenizer_init out")
            if others := old.models - {llm.config.model}:
                raise BatchFileError(
                    f"{results} has results of the model {min(others)!r}, and {llm.config.model!r} "
                    f"runs now: give the model as before, or {OTHER_FILE}"
                )
            batch = Batch(llm, old.hashes.keys(), sink, model_names, bar, trusts_templates)
            batch.run(enumerate(lines, 1))
    return (
        f"{batch.num_good} answers, {batch.num_errors} errors in {results}"
        + f", besides {len(old.hashes)} results of before" * bool(old.hashes)
    )


def lock(sink: IO[bytes], path: Path) -> None:
    """Keep other processes from writing results there, until the file is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchFileError(
            f"another process writes its results into {path}: wait for its end, or {OTHER_FILE}"
        ) from None
    except OSError as error:
        logger.warning("%s can't be locked (%s): start no second run on it", path, error)


@dataclass
class Results:
    """What a file of results has.

    Attributes:
        hashes: of each line that has a result, by its number.
        models: names of the models that have answered.
        end: where the results end.
    """

    hashes: dict[int, str] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    end: int = 0


def read_results(path: Path) -> Results:
    """Read results, up to where the process was killed or the power failed: there are half a line,
    or NULs in the place of what the disk has not got."""
    found = Results()
    with path.open("rb") as file:
        for raw in file:
            text = raw.rstrip(b"\0")
            is_hole = b"\0" in raw and bool(found.hashes)
            if not is_hole and not PREFIX.startswith(text[: len(PREFIX)]):
                raise BatchFileError(
                    f"{path} holds something else than results of run-batch: {OTHER_FILE}"
                )
            if is_hole or not text.endswith(b"\n"):
                break
            try:
                record = json.loads(raw)
                number = int(record["id"].removeprefix("batch_req_"))
                found.hashes[number] = record["line_hash"]
                found.models.add(str(record["model"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise BatchFileError(
                    f"{path} has a broken line, or one of another version: {raw[:80]!r}; take it "
                    f"out, or {OTHER_FILE}"
                ) from None
            found.end += len(raw)
    return found


def check_lines(lines: Iterable[bytes], source: Path, old: Results, results: Path) -> int:
    """The number of lines. Lines with a result must be as they were; new lines may follow."""
    total = 0
    for total, raw in enumerate(lines, 1):
        if old.hashes.get(total) not in (None, line_hash(raw)):
            raise BatchFileError(
                f"line {total} of {source} is not the one that has a result in {results}: give the "
                f"input as it was, with new lines only at its end, or {OTHER_FILE}"
            )
    if old.hashes and (last := max(old.hashes)) > total:
        raise BatchFileError(
            f"{results} has a result of line {last}, and {source} has {total} lines: give the "
            f"input as it was, or {OTHER_FILE}"
        )
    return total


def line_hash(raw: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(raw.removeprefix(BOM).strip())


class Batch:
    """One run over a file.

    Args:
        done: the numbers of the lines that have a result.
        sink: takes the results.
        model_names: what requests may call the model, besides its own name.
        bar: counts lines.
        trusts_templates: as of run_batch.
    """

    def __init__(
        self,
        llm: LLM,
        done: Collection[int],
        sink: IO[bytes],
        model_names: Iterable[str],
        bar: Any,
        trusts_templates: bool,
    ):
        self.llm, self.done, self.sink, self.bar = llm, done, sink, bar
        self.tokenizer = llm.get_tokenizer()
        self.model = llm.config.model
        self.model_names = {self.model, *model_names}
        self.trusts_templates = trusts_templates
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
                assert line.request is not None
                body = make_response(line.request, outputs, self.model, self.tokenizer)
                self._write(line, body, None)

    def _fail(self, request_id: str, error: Exception) -> None:
        """A line's request was ended by an error, so all of the line's are."""
        failed, _ = self.running[request_id]
        for other in [id for id, (line, _) in self.running.items() if line is failed]:
            self.llm.abort(other)
            del self.running[other]
        self._write(failed, None, error)

    def _admit(self, number: int, raw: bytes) -> None:
        """Start a line's requests, unless it has a result."""
        content: Any = None
        broken: Exception | None = None
        try:
            content = json.loads(raw.removeprefix(BOM).decode())
        except (ValueError, RecursionError) as error:
            broken = error
        line = Line(number, line_hash(raw))
        if isinstance(content, dict) and isinstance(content.get("custom_id"), str):
            line.custom_id = content["custom_id"]
        if number in self.done or not raw.strip():
            self.seen.setdefault(line.custom_id or "", number)
            self.bar.update()
            return
        try:
            if broken:
                raise ValueError(f"not a line of JSON: {broken}")
            self._start(line, content)
        except (ValueError, TypeError) as error:
            self._write(line, None, error)

    @refuses_deep_nesting("the line")
    def _start(self, line: Line, content: Any) -> None:
        if not isinstance(content, dict):
            raise TypeError(f"a line must be a JSON object, got {content!r:.80}")
        if not line.custom_id:
            raise ValueError("the line has no custom_id: give a string that no other line has")
        if self.seen.setdefault(line.custom_id, line.number) != line.number:
            raise ValueError(f"line {self.seen[line.custom_id]} has the same custom_id")
        if content.get("method", "POST") != "POST":
            raise ValueError(f"method must be POST, got {content['method']!r:.80}")
        url, body = content.get("url"), content.get("body")
        request = read_request(self.llm, url, body, self.model_names, self.trusts_templates)
        request_ids: list[str] = []
        try:
            for prompt in request.prompts:
                request_ids.append(self.llm.add_request(prompt, request.params))
        except (ValueError, TypeError):
            for request_id in request_ids:
                self.llm.abort(request_id)
            raise
        line.request, line.outputs = request, [None] * len(request.prompts)
        self.running |= {id: (line, i) for i, id in enumerate(request_ids)}

    def _write(self, line: Line, body: Any, error: Exception | None) -> None:
        status, about = 200, None
        if error:
            is_users = isinstance(error, (ValueError, TypeError))
            status = 400 if is_users else 500
            kind = "invalid_request_error" if is_users else "server_error"
            about = {"message": str(error), "type": kind, "code": status}
        record = {
            "id": f"batch_req_{line.number}",
            "custom_id": line.custom_id,
            "line_hash": line.hash,
            "model": self.model,
            "response": {"status_code": status, "request_id": uuid4().hex, "body": body},
            "error": about,
        }
        self.sink.write(json.dumps(record).encode() + b"\n")
        self.sink.flush()
        self.num_good += not error
        self.num_errors += bool(error)
        self.bar.update()
