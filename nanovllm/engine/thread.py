"""The thread that owns the engine. It makes the engine, runs the functions that callers post, steps
while a client needs it, and tells each client what is new of its requests.

LLM and AsyncLLM post; what a client does with the news is frontend/clients.py's business.
"""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Answer = Callable[[Any, BaseException | None], None]
_threads: "weakref.WeakSet[EngineThread]" = weakref.WeakSet()


def take(queue: "SimpleQueue[Result]") -> Result:
    """The next item, when there is one. The wait ends now and then for an interrupt that no signal
    of the system's brings: of another thread, or on Windows."""
    while True:
        with suppress(Empty):
            return queue.get(timeout=0.5)


class Client:
    """Requests of one caller. The engine's thread calls its methods.

    Attributes:
        drives: whether the thread steps by itself until its sequences have ended.
        wants_tokens: whether it is told of each token, and not only of ends.
        seqs: its sequences that have not ended.
        news: the sequences that have more than the caller was given.
        number: what its sequences have as their caller.
    """

    drives = wants_tokens = True
    number = 0

    def __init__(self) -> None:
        self.seqs: dict[Sequence, None] = {}
        self.news: dict[Sequence, None] = {}

    def advance(self, seqs: list[Sequence]) -> None:
        """These sequences have news. While the client drives it is called after each round."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """A step has failed in which its sequences ran, or the engine is gone: nothing follows."""
        raise NotImplementedError

    def holds(self, request_id: str) -> bool:
        """Whether the client has news of a request that its caller has not taken."""
        return False

    def after_fork(self) -> None:
        """In a forked process, where it goes on."""


class Command(NamedTuple):
    """A function for the engine's thread, what takes its result and its error there, and what of
    the caller's thread counts."""

    function: Callable[[Any], Any]
    answer: Answer | None
    context: Context
    num_threads: int


class EngineThread:
    """An engine and its thread, until close(). What a signal handler, a garbage collection or any
    thread may call only puts commands into a queue.

    Args:
        make: makes the engine, and the client whose requests run when a caller says step; the news
            of this client wait for the caller. It is called in the thread: a second thread that
            ran torch's parallel loops would keep worker threads of its own, and where there are
            more of them than CPUs each loop waits for the system (decode on two CPUs -15%).
        survives_fork: whether a forked process can use the executor.
        get_num_threads, set_num_threads: torch's; a number counts for one thread.

    Raises: what `make` raises; an interrupt of the caller interrupts `make`.
    """

    by_hand: Client

    def __init__(
        self,
        make: Callable[[], tuple[Engine, Client]],
        survives_fork: bool,
        get_num_threads: Callable[[], int],
        set_num_threads: Callable[[int], None],
    ):
        self.engine: Engine | None = None
        self.survives_fork = survives_fork
        self.get_num_threads, self.set_num_threads = get_num_threads, set_num_threads
        self.clients: dict[str, Client] = {}  # request id -> whose it is, until it has ended
        self.driving: dict[Client, None] = {}
        self.num_clients = 0
        self.why_closed = "this LLM is closed"
        self.is_closing = self.is_closed = self.is_forked = False
        self._start_anew()

        def start(_: Any) -> None:
            self.engine, self.by_hand = make()

        try:
            self.call(start)
        except BaseException as error:
            self.is_closing = True
            self.inbox.put(None)
            if self.thread is not None and not isinstance(error, Exception):
                _interrupt(self.thread, error)
            raise
        _threads.add(self)

    def _start_anew(self) -> None:
        self.inbox: SimpleQueue[Command | None] = SimpleQueue()
        self.thread: threading.Thread | None = None  # started when a command comes
        self._starting = threading.RLock()

    # Called from any thread

    def call(
        self, function: Callable[[Engine], Result], undo: Callable[[Result], None] | None = None
    ) -> Result:
        """Have function(engine) called between two rounds, and wait for its result.

        Args:
            undo: called in the engine's thread with a result that an interrupt, which hits the
                caller, has kept from being returned.

        Raises: what the function raises; RuntimeError if the engine is closed; as post.
        """
        bell: SimpleQueue[None] = SimpleQueue()
        answers: list[tuple[Any, BaseException | None]] = []  # emptied when nothing can interrupt

        def answer(result: Any, error: BaseException | None) -> None:
            answers.append((result, error))
            bell.put(None)

        def take_back(_: Engine) -> None:
            for result, error in answers:
                if undo is not None and error is None:
                    undo(result)

        try:
            self.post(function, answer)
            take(bell)
            result, error = answers[0]
            if error is not None:
                raise error
            answers.clear()
            return result
        except BaseException:
            self.post(take_back, starts=False)
            raise
        finally:
            error = None  # it holds this frame

    def post(
        self,
        function: Callable[[Engine], Any],
        answer: Answer | None = None,
        starts: bool = True,
    ) -> None:
        """Have function(engine) called between two rounds.

        Args:
            answer: called with the result and the error, in the engine's thread too.
            starts: False for an abort: without a thread there is nothing to do.

        Raises: RuntimeError if the engine's thread calls, unless for an abort.
        """
        if starts:
            self.refuse_own_call()
            with self._starting:
                if self.thread is None and not self.is_closed:
                    self.thread = threading.Thread(target=self._run, name="nanovllm", daemon=True)
                    self.thread.start()
        elif self.thread is None:
            return
        self.inbox.put(Command(function, answer, copy_context(), self.get_num_threads()))
        if self.is_closed:  # the thread may have looked into its inbox for the last time
            self._empty_inbox()

    def refuse_own_call(self) -> None:
        """Raise RuntimeError if the engine's thread calls: a step would wait for itself."""
        if threading.current_thread() is self.thread:
            raise RuntimeError("an LLM can't be used by what its own step calls")

    def close(self, why: str | None = None) -> None:
        """Free the model's and the cache's memory after the step that runs; unfinished requests are
        gone. If a garbage collection in the engine's thread calls, that is when its step ends."""
        if self.is_closed:
            return
        self.why_closed = why or self.why_closed
        self.is_closing = True
        with self._starting:
            thread = self.thread
            if thread is None:
                self._end()
                return
        self.inbox.put(None)
        if thread is not threading.current_thread():
            thread.join()

    # In the engine's thread

    def add(self, client: Client, seqs: list[Sequence], own_id: bool = False) -> None:
        """Queue a client's sequences, all of them or none.

        Args:
            own_id: the caller has chosen the request id; else it is a number, and may change.

        Raises:
            ValueError: the caller's id is in use.
            RuntimeError: weights or cache sleep.
        """
        assert self.engine is not None
        if self.engine.executor.sleeping:
            raise RuntimeError("this LLM sleeps: call wake_up() first")
        if client.number == 0:
            self.num_clients += 1
            client.number = self.num_clients
        for seq in seqs:
            while seq.index == 0 and (
                seq.request_id in self.clients or self.by_hand.holds(seq.request_id)
            ):
                if own_id:
                    raise ValueError(
                        f"request_id {seq.request_id!r} is in use by an unfinished request"
                    )
                seq.request_id += "'"  # a caller has chosen our number
            seq.request_id, seq.caller = seq.samples[0].request_id, client.number
        self.engine.add_batch(seqs)
        for seq in seqs:
            client.seqs[seq], self.clients[seq.request_id] = None, client
        if seqs and client.drives:
            self.driving[client] = None

    def abort(self, request_id: str) -> None:
        """End a request, and tell its client."""
        if self.engine is not None and request_id in self.engine.unfinished:
            [seq, *_] = self.engine.unfinished[request_id]
            ended = self.engine.abort(seq.samples)
            self._tell({self.clients[request_id]: ended}, ended)

    def drop(self, client: Client, seqs: list[Sequence]) -> None:
        """End some of a client's sequences, of which the caller wants to hear no more."""
        assert self.engine is not None
        self._forget(self.engine.abort(seqs))
        for seq in seqs:
            client.news.pop(seq, None)
        if not client.seqs:
            self.driving.pop(client, None)
            if client is self.by_hand:  # another caller may wait for its end
                client.advance([])

    def round(self) -> BaseException | None:
        """One step of the engine, and its news to the clients. Returns what the executor raised."""
        assert self.engine is not None
        news = self.engine.step()
        told: dict[Client, list[Sequence]] = {client: [] for client in self.driving}
        wants_tokens = self.by_hand.seqs or any(client.wants_tokens for client in told)
        for seq in news.advanced if wants_tokens else news.ended:
            told.setdefault(self.clients[seq.request_id], []).append(seq)
        if wants_tokens:
            for seq in news.advanced:
                if seq.logprobs is not None:
                    self.engine.scheduler.logprobs.take(seq)
        self._tell(told, news.ended)
        if news.error is not None:
            self._fail(news.error, bool(news.ended))
        return news.error

    def _tell(self, told: dict[Client, list[Sequence]], ended: list[Sequence]) -> None:
        self._forget(ended)
        for client, seqs in told.items():
            try:
                client.advance(seqs)
            except BaseException as error:  # a tokenizer may raise anything
                self._give_up(client, error)
            if not client.seqs:
                self.driving.pop(client, None)

    def _forget(self, ended: list[Sequence]) -> None:
        for seq in ended:
            del self.clients[seq.request_id].seqs[seq]
        for seq in ended:
            if seq.request_finished:
                self.clients.pop(seq.request_id, None)

    def _fail(self, error: BaseException, has_ended: bool) -> None:
        """A step has failed: its requests end, but for the requests that are stepped by hand. If
        no request ran (a policy may raise), all would fail for ever, so all end."""
        self._close_if_lost(error)
        ran = [
            client
            for client in self.driving
            if any(seq.failed_at == len(seq.token_ids) for seq in client.seqs)
        ]
        for client in ran if ran or has_ended else list(self.driving):
            self._give_up(client, error)

    def _give_up(self, client: Client, error: BaseException) -> None:
        client.fail(error)
        self.driving.pop(client, None)
        if client is not self.by_hand:
            self.drop(client, [*client.seqs, *client.news])

    def _close_if_lost(self, error: BaseException) -> None:
        """After some errors of a kernel every call to CUDA fails."""
        if self.engine is not None and not self.engine.executor.is_usable():
            self.is_closing = True
            self.why_closed = (
                f"this LLM is closed: its GPU failed, and can't be used any more in this process "
                f"({error}); start another one"
            )

    def _run(self) -> None:
        try:
            if self.is_forked:
                self._recover_from_fork()
            while not self.is_closing:
                if self.driving and self.inbox.empty():
                    self.round()
                else:
                    self._execute(self.inbox.get())
        except BaseException as error:
            logger.exception("the engine's thread failed")
            self.why_closed = f"this LLM is closed: its thread failed ({error!r})"
        finally:
            self._end()

    def _execute(self, command: Command | None) -> None:
        if command is None:
            return
        function, answer, context, num_threads = command
        try:
            if self.is_closed:
                raise RuntimeError(self.why_closed)
            if self.get_num_threads() != num_threads:
                self.set_num_threads(num_threads)
            result = context.run(function, self.engine)
        except BaseException as error:  # the caller's
            if isinstance(error, RuntimeError):
                self._close_if_lost(error)
            if answer is not None:
                answer(None, error)
        else:
            if answer is not None:
                answer(result, None)

    def _empty_inbox(self) -> None:
        with suppress(Empty):
            while True:
                self._execute(self.inbox.get_nowait())

    def _end(self) -> None:
        engine, self.engine = self.engine, None
        clients = {*self.clients.values()}
        if engine is not None:
            clients.add(self.by_hand)
        self.clients, self.driving = {}, {}
        try:
            if engine is not None:
                engine.executor.close()
        finally:
            self.is_closed = True
            for client in clients:
                client.fail(RuntimeError(self.why_closed))
            self._empty_inbox()

    # After a fork

    def after_fork(self) -> None:
        """In a forked process: the thread is not there, and may have been in the middle of a step.
        Requests stay with the process that was forked, but for the requests stepped by hand."""
        self._start_anew()
        self.is_forked = True
        clients = {*self.clients.values()} - {self.by_hand}
        self.driving = {}
        self.clients = {id: self.by_hand for id, c in self.clients.items() if c is self.by_hand}
        if not self.survives_fork:
            self.is_closing = self.is_closed = True  # the memory is the other process's
            self.why_closed = (
                "this LLM was made before the process forked, and a GPU can't be used in the "
                "forked one: make the LLM there, or start processes by 'spawn'"
            )
        self.by_hand.after_fork()
        for client in clients:
            client.fail(RuntimeError("this request runs in the process that was forked"))

    def _recover_from_fork(self) -> None:
        assert self.engine is not None
        self.is_forked = False
        unfinished = self.engine.unfinished
        self.engine.unfinished = {id: unfinished[id] for id in self.clients if id in unfinished}
        ended = self.engine.restart()
        self._tell({self.by_hand: ended}, ended)


def _interrupt(thread: threading.Thread, error: BaseException) -> None:
    """Raise such an error in a thread, and give it the time to free what it holds."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(type(error))
    )
    thread.join(timeout=10)


def _after_fork() -> None:
    for thread in list(_threads):
        thread.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
