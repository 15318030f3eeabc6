"""LLM.stream's iterator: increments of some requests, as they come.

It steps the engine when there is nothing new, and leaves checking and queueing to llm.py.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.requests import Requests, by_request
from nanovllm.outputs import RequestOutput


def stream(
    seqs: list[Sequence],
    requests: Requests,
    use_engine: Callable[[], AbstractContextManager[Engine]],
    owned: AbstractContextManager[None],
) -> Iterator[Any]:
    """Nothing first, then the increments.

    Args:
        seqs: to be queued when nothing has come: from then on they are sure not to stay.
        requests: makes the outputs.
        use_engine: the engine, for as long as no other thread steps it.
        owned: at its end those that are left are aborted.
    """
    running = {seq: i for i, samples in enumerate(by_request(seqs)) for seq in samples}
    with owned:
        yield
        while running:
            with use_engine() as engine:
                outputs = _increments(running, requests, engine)
            yield from outputs


def _increments(
    running: dict[Sequence, int], requests: Requests, engine: Engine
) -> list[RequestOutput]:
    """What is new of some sequences, after a step if nothing is: others may have stepped. Takes
    those that have ended out of `running`."""
    outputs = []
    while not (news := [seq for seq in running if seq.finished or seq.has_undelivered]):
        engine.step()
    for samples in by_request(news):
        output = requests.output(engine, samples, delta=True)
        output.index = running[samples[0]]
        outputs.append(output)
    for seq in news:
        if seq.finished:
            del running[seq]
        engine.advanced.pop(seq, None)
    return outputs
