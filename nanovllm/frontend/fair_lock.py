"""A lock for threads that share an LLM and take it anew for each step: who has just had it comes
after those that wait. (threading's locks mostly go back to a thread that takes them in a loop.)"""

import threading


class FairLock:
    """Reentrant; used by `with`. Who holds it for long lets go when it `is_wanted`."""

    def __init__(self) -> None:
        # One thread waits for the lock, behind the door; the others in front of it.
        self._lock, self._door = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self.is_wanted = False

    @property
    def is_nested(self) -> bool:
        """Whether the thread that asks, which holds it, took it more than once."""
        return self._depth > 1

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            with self._door:
                self.is_wanted = True
                self._lock.acquire()
                self.is_wanted = False
            self._owner = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
