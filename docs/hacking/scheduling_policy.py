"""A scheduling policy: the shortest job first.

python docs/hacking/scheduling_policy.py

A policy decides two things: which waiting sequence is admitted next, and which running sequence is
preempted when blocks run out. nanovllm/engine/policy.py has three: first come first served,
priority, and round robin by caller.
"""

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence


class ShortestFirst:
    """The sequence with the fewest tokens to come is next; the one with the most is preempted. The
    mean latency of a queue gets smaller, and long requests may wait for ever."""

    def next(self, waiting: dict[Sequence, None]) -> Sequence:
        """
        Args:
            waiting: at least one sequence, in order of arrival; preempted ones come first.
        """
        return min(waiting, key=tokens_to_come)

    def victim(self, running: dict[Sequence, None]) -> Sequence:
        """
        Args:
            running: at least two sequences, in order of admission.
        """
        return max(running, key=tokens_to_come)


def tokens_to_come(seq: Sequence) -> int:
    return seq.max_len - len(seq.token_ids)


def main() -> list[int]:
    """The order in which four requests end, one at a time."""
    llm = LLM("assets/tiny-qwen3", max_model_len=512, max_num_seqs=1, scheduler=ShortestFirst())
    for max_tokens in (30, 10, 40, 20):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        llm.add_request("The king said unto", params)
    order = []
    while not llm.is_finished():
        for output in llm.step():
            if output.finished:
                order.append(len(output["token_ids"]))
    print("requests end in the order of", order)
    return order


if __name__ == "__main__":
    main()
