"""Scheduling policies: which waiting sequence is admitted next, which running one is preempted.

The scheduler has one, an argument of LLM. A policy of your own is a class with the same two
methods; it is called for each admission and each preemption, and decides nothing else.
"""

from collections import Counter
from operator import attrgetter
from typing import Protocol

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

    def next(self, waiting: Sequences) -> Sequence:
        return min(waiting, key=attrgetter("priority"))

    def victim(self, running: Sequences) -> Sequence:
        return max(reversed(running), key=attrgetter("priority"))


class RoundRobin:
    """Callers (Sequence.caller) take turns; the youngest of the caller with the most running
    sequences is preempted."""

    def __init__(self) -> None:
        self.callers: dict[str | int, None] = {}  # with waiting sequences; whose turn it is first
        self.chosen: Sequence | None = None

    def next(self, waiting: Sequences) -> Sequence:
        if self.chosen is not None and self.chosen not in waiting:  # it was admitted
            self.callers.pop(self.chosen.caller, None)
        firsts: dict[str | int, Sequence] = {}
        for seq in waiting:
            firsts.setdefault(seq.caller, seq)
        self.callers = {c: None for c in [*self.callers, *firsts] if c in firsts}
        self.chosen = firsts[next(iter(self.callers))]
        return self.chosen

    def victim(self, running: Sequences) -> Sequence:
        num_running = Counter(seq.caller for seq in running)
        return max(reversed(running), key=lambda seq: num_running[seq.caller])
