"""Which sequence a policy admits next, and which it preempts."""

from collections import OrderedDict
from operator import attrgetter

import pytest
from fake_worker import NEVER, assert_right, check_invariants, make_engine, make_sequence, take_step
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.policy import FirstComeFirstServed, Priority, RoundRobin

both_depths = pytest.mark.parametrize("depth", [1, 2])


def admissions(engine, seqs):
    """The request ids in the order in which they got a row, and which were preempted."""
    order, preempted = [], []
    for seq in seqs:
        engine.add(seq)
    running = {}
    while engine.has_unfinished:
        take_step(engine)
        check_invariants(engine)
        now = engine.scheduler.running
        preempted += [seq.request_id for seq in running if seq not in now and not seq.finished]
        order += [seq.request_id for seq in now if seq not in running]
        running = dict(now)
    assert_right(*seqs)
    return order, preempted


def one_at_a_time(policy, depth, *seqs):
    return admissions(make_engine(policy=policy, max_num_seqs=1, depth=depth), seqs)[0]


@both_depths
def test_first_come_first_served(depth):
    seqs = [make_sequence([i], str(i), max_tokens=4, priority=9 - i, caller=i) for i in range(6)]
    assert one_at_a_time(FirstComeFirstServed(), depth, *seqs) == list("012345")


@both_depths
def test_the_lowest_priority_is_first_and_equal_ones_are_in_order(depth):
    priorities = [1, 0, 2, 0, 1, -3]
    seqs = [
        make_sequence([i], str(i), max_tokens=4, priority=priority)
        for i, priority in enumerate(priorities)
    ]
    assert one_at_a_time(Priority(), depth, *seqs) == list("513042")


@both_depths
def test_callers_take_turns(depth):
    callers = "aaaabbcaab"
    seqs = [
        make_sequence([i], str(i), max_tokens=4, caller=caller) for i, caller in enumerate(callers)
    ]
    order = one_at_a_time(RoundRobin(), depth, *seqs)
    assert "".join(callers[int(i)] for i in order) == "abcababaaa"
    assert [i for i in order if callers[int(i)] == "a"] == list("012378")


def test_a_caller_that_comes_later_has_its_turn_after_the_others():
    engine = make_engine(policy=RoundRobin(), max_num_seqs=1)
    for i, caller in enumerate("aaabb"):
        engine.add(make_sequence([i], str(i), max_tokens=2, caller=caller))
    take_step(engine)
    engine.add(make_sequence([9], "9", max_tokens=2, caller="c"))
    order, _ = admissions(engine, [])
    assert order == list("31942")


def growing(*numbers, **fields):
    """Sequences of which not all have room to the end."""
    return [
        make_sequence(
            [i] * 5,
            str(i),
            max_tokens=30,
            stop_token_ids=[NEVER],
            **{name: values[i] for name, values in fields.items()},
        )
        for i in numbers
    ]


@both_depths
@pytest.mark.parametrize(
    ("policy", "first"), [(FirstComeFirstServed, "3"), (Priority, "0"), (RoundRobin, "2")]
)
def test_which_sequence_is_preempted(policy, first, depth):
    engine = make_engine(policy=policy(), num_blocks=12, mean_output=0, depth=depth)
    seqs = growing(0, 1, 2, 3, priority=[3, 0, 2, 1], caller="aaab")
    for seq in seqs:
        engine.add(seq)
    take_step(engine)
    assert len(engine.scheduler.running) == 4
    _, preempted = admissions(engine, [])
    assert_right(*seqs)
    assert preempted[0] == first


class PlainPriority:
    """The definition: a look at all that wait."""

    def next(self, waiting):
        return min(waiting, key=attrgetter("priority"))


class PlainRoundRobin:
    def __init__(self):
        self.callers, self.chosen = [], None

    def next(self, waiting):
        if self.chosen is not None and self.chosen not in waiting:  # it was admitted
            self.callers.remove(self.chosen.caller)
            self.callers.append(self.chosen.caller)
        firsts = {}
        for seq in waiting:
            firsts.setdefault(seq.caller, seq)
        self.callers += [caller for caller in firsts if caller not in self.callers]
        self.callers = [caller for caller in self.callers if caller in firsts]
        self.chosen = firsts[self.callers[0]]
        return self.chosen


EVENTS = st.lists(st.tuples(st.sampled_from("aaaannnnpxr"), st.integers(0, 9)), max_size=60)


@pytest.mark.parametrize(
    ("policy", "plain"), [(Priority, PlainPriority), (RoundRobin, PlainRoundRobin)]
)
@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(events=EVENTS)
def test_policies_choose_as_a_look_at_all_sequences_would(policy, plain, events):
    policy, plain, waiting, running = policy(), plain(), OrderedDict(), []
    for event, number in events:
        if event == "a":  # it arrives
            seq = make_sequence([1], "s", max_tokens=2, priority=number % 3, caller=number % 4)
            waiting[seq] = None
        elif event == "n" and waiting:
            seq = policy.next(waiting)
            assert seq is plain.next(waiting)
            if number:  # there is room for it
                del waiting[seq]
                running.append(seq)
        elif event == "p" and running:  # it is preempted
            waiting[running.pop(number % len(running))] = None
            waiting.move_to_end(next(reversed(waiting)), last=False)
        elif event == "x" and waiting:  # it is aborted
            del waiting[list(waiting)[number % len(waiting)]]
        elif event == "r":  # a step fails
            waiting = OrderedDict.fromkeys(sorted([*waiting, *running], key=id))
            running = []


class Watched(OrderedDict):
    """Counts the looks at its keys."""

    num_looks = 0

    def __iter__(self):
        for key in super().__iter__():
            self.num_looks += 1
            yield key

    def __reversed__(self):
        for key in super().__reversed__():
            self.num_looks += 1
            yield key


@pytest.mark.parametrize("policy", [FirstComeFirstServed, Priority, RoundRobin])
def test_an_admission_costs_no_look_at_all_that_wait(policy):
    policy, waiting = policy(), Watched()
    for i in range(3000):
        waiting[make_sequence([1], "s", max_tokens=2, priority=i % 7, caller=i % 5)] = None
    for i in range(3000):
        del waiting[policy.next(waiting)]
        if i % 10 == 0:
            waiting[make_sequence([1], "s", max_tokens=2, priority=i % 7, caller="late")] = None
    assert waiting.num_looks < 6 * 3000


@both_depths
@pytest.mark.parametrize("policy", [FirstComeFirstServed, Priority, RoundRobin])
def test_a_prompt_cut_by_the_budget_goes_on_before_others_start(policy, depth):
    engine = make_engine(policy=policy(), max_num_batched_tokens=8, depth=depth)
    long = make_sequence([1] * 30, "long", max_tokens=4, priority=5)
    engine.add(long)
    take_step(engine)
    first = make_sequence([2] * 3, "first", max_tokens=4, priority=0, caller=1)
    admissions(engine, [first])
    assert_right(long, first)
    assert long.metrics.first_token_time <= first.metrics.first_token_time
