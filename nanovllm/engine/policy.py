"""Scheduling policies: which waiting sequence is admitted next, which running one is preempted.

The scheduler has one, an argument of LLM. A policy of your own is a class with the same two
methods; it is called for each admission and each preemption, and decides nothing else.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import takewhile
from operator import attrgetter
from typing import Any, Protocol

from nanovllm.engine.sequence import Sequence

Sequences = dict[Sequence, None]  # in some order


class Policy(Protocol):
    def next(self, waiting: Sequences) -> Sequence:
        """The sequence to admit next; while it has no room, it is offered again.

        Args:
            waiting: at least one sequence, in order of arrival; preempted ones come first.
        """
        ...

    def victim(self, running: Sequences) -> Sequence:
        """The sequence to preempt.

        Args:
            running: at least two sequences, in order of admission.
        """
        ...


class FirstComeFirstServed:
    """In order of arrival; the youngest is preempted."""

    def next(self, waiting: Sequences) -> Sequence:
        return next(iter(waiting))

    def victim(self, running: Sequences) -> Sequence:
        return next(reversed(running))


class Priority:
    """The lowest Sequence.priority first, as in vLLM; among equals in order of arrival."""

    def __init__(self) -> None:
        self.queues = Queues(rank=attrgetter("priority"))

    def next(self, waiting: Sequences) -> Sequence:
        self.queues.update(waiting)
        return self.queues.offer(None)

    def victim(self, running: Sequences) -> Sequence:
        return max(reversed(running), key=attrgetter("priority"))


class RoundRobin:
    """Callers (Sequence.caller) take turns; the youngest of the caller with the most running
    sequences is preempted."""

    def __init__(self) -> None:
        self.queues = Queues(name=attrgetter("caller"))
        self.turns: dict[str | int, None] = {}  # callers; whose turn it is first

    def next(self, waiting: Sequences) -> Sequence:
        admitted = self.queues.update(waiting)
        if admitted is not None:
            del self.turns[admitted.caller]
            self.turns[admitted.caller] = None
        self.turns |= dict.fromkeys(self.queues.heaps)
        self.turns = {caller: None for caller in self.turns if caller in self.queues.heaps}
        return self.queues.offer(next(iter(self.turns)))

    def victim(self, running: Sequences) -> Sequence:
        num_running = Counter(seq.caller for seq in running)
        return max(reversed(running), key=lambda seq: num_running[seq.caller])


class Queues:
    """Waiting sequences in queues, each by rank and then in their order. A hundred thousand may
    wait: an update looks at new ones alone.

    Args:
        name: the queue of a sequence.
        rank: of a sequence in its queue, the lowest first.

    Attributes:
        heaps: the queues that are not empty, by name.
        numbers: of all that waited at the last update, in their order.
        offered: the sequence that was offered last, while it waits.
    """

    def __init__(
        self,
        name: Callable[[Sequence], Any] = lambda _: None,
        rank: Callable[[Sequence], int] = lambda _: 0,
    ):
        self.name, self.rank = name, rank
        self.heaps: dict[Any, list[tuple[int, int, Sequence]]] = {}
        self.numbers: dict[Sequence, int] = {}
        self.waiting: Sequences = {}
        self.offered: Sequence | None = None
        self.first = self.last = 0

    def update(self, waiting: Sequences) -> Sequence | None:
        """Take note of what has changed. Returns the offered sequence if it waits no more."""
        admitted = None
        if self.offered is not None and self.offered not in waiting:
            admitted, self.offered = self.offered, None
            heappop(self.heaps[self.name(admitted)])
            del self.numbers[admitted]
            if not self.heaps[self.name(admitted)]:
                del self.heaps[self.name(admitted)]
        preempted = self._new(waiting)
        self.first -= len(preempted)
        arrived = self._new(reversed(waiting))[::-1] if len(preempted) < len(waiting) else []
        self._add(preempted, self.first)
        self._add(arrived, self.last)
        self.last += len(arrived)
        if len(self.numbers) != len(waiting) or waiting is not self.waiting:
            # Aborted requests are gone, or all start over after a failed step.
            self.waiting, self.heaps, self.numbers, self.offered = waiting, {}, {}, None
            self.first, self.last = 0, len(waiting)
            self._add(waiting, 0)
        return admitted

    def offer(self, name: Any) -> Sequence:
        """The first sequence of a queue."""
        self.offered = self.heaps[name][0][2]
        return self.offered

    def _new(self, seqs: Iterable[Sequence]) -> list[Sequence]:
        return list(takewhile(lambda seq: seq not in self.numbers, seqs))

    def _add(self, seqs: Iterable[Sequence], first: int) -> None:
        for number, seq in enumerate(seqs, first):
            self.numbers[seq] = number
            heappush(self.heaps.setdefault(self.name(seq), []), (self.rank(seq), number, seq))
