"""Scheduling policies as options of LLM; tests/engine/test_policy.py tests the policies."""

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.policy import FirstComeFirstServed, RoundRobin

OPTIONS = dict(max_model_len=256, max_num_seqs=1)
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def order_of(llm, priorities):
    """The order in which requests end that were added with these priorities."""
    for i, priority in enumerate(priorities):
        llm.add_request("The king", PARAMS, request_id=str(i), priority=priority)
    ended = []
    while not llm.is_finished():
        ended += [int(output.request_id) for output in llm.step() if output.finished]
    return ended


def test_the_lowest_priority_runs_first(tiny):
    with LLM(tiny, scheduling_policy="priority", **OPTIONS) as llm:
        assert order_of(llm, [2, 0, 1, 0, -1]) == [4, 1, 3, 2, 0]
        outputs = llm.generate(["a", "b"], PARAMS, use_tqdm=False, priority=[1, 0])
        assert [output.prompt for output in outputs] == ["a", "b"]


@pytest.mark.parametrize("scheduler", [RoundRobin, FirstComeFirstServed()], ids=["class", "object"])
def test_a_policy_of_ones_own(tiny, scheduler):
    with LLM(tiny, scheduler=scheduler, **OPTIONS) as llm:
        assert order_of(llm, [2, 0, 1]) == [0, 1, 2]


def test_priority_needs_a_policy(tiny):
    with LLM(tiny, **OPTIONS) as llm:
        for call in (llm.generate, llm.enqueue):
            with pytest.raises(ValueError, match="give scheduling_policy='priority'"):
                call("The king", PARAMS, priority=[1])
        assert llm.is_finished()
    with pytest.raises(ValueError, match="scheduling_policy must be 'fcfs' or 'priority'"):
        LLM(tiny, scheduling_policy="sjf")
