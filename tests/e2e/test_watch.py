"""example.py --watch: its numbers and its map are the engine's."""

import contextlib
import io
import re

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.watch import block_map, watch

PROMPTS = [f"Tell me in a few plain words all that you know about {it}." for it in "abcdefgh"]
PARAMS = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, stop_token_ids=[7])


@pytest.fixture(scope="module")
def small_llm(tiny):
    with LLM(
        str(tiny),
        dtype="float32",
        num_gpu_blocks_override=48,
        block_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=24,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def watched(small_llm):
    """Its outputs, and what it printed: (numbers, reason, map) of each step."""
    printed = io.StringIO()
    small_llm.llm_engine.scheduler.mean_output = 0  # admit too many, so that some are preempted
    with contextlib.redirect_stdout(printed):
        outputs = watch(small_llm, PROMPTS, PARAMS, color=False)
    lines = printed.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step")) + 1
    steps = []
    for line, cells in zip(lines[first::2], lines[first + 1 :: 2], strict=True):
        numbers, reason = re.fullmatch(r"((?: *\d+){7}) *(\w*)", line).groups()
        steps.append(([int(n) for n in numbers.split()], reason, cells.strip()))
    return outputs, steps


def test_watching_changes_no_token(watched, small_llm):
    outputs, _ = watched
    again = small_llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in again]


def test_a_bad_prompt_leaves_no_request_behind(small_llm):
    with pytest.raises(ValueError, match="tokens"):
        watch(small_llm, ["a", "b " * 400], PARAMS, color=False)
    assert small_llm.is_finished()


def test_only_an_idle_llm_is_watched(small_llm):
    other = small_llm.add_request("a", PARAMS)
    with pytest.raises(ValueError, match="has other requests"):
        watch(small_llm, ["b"], PARAMS, color=False)
    assert not small_llm.is_finished()
    small_llm.abort(other)


def test_the_lines_add_up(watched):
    outputs, steps = watched
    assert [numbers[0] for numbers, _, _ in steps] == list(range(1, len(steps) + 1))
    _, running, waiting, prefill, decode, cached, preempted = map(
        sum, zip(*(numbers for numbers, _, _ in steps), strict=True)
    )
    assert all(numbers[1] + numbers[2] <= len(PROMPTS) for numbers, _, _ in steps)
    assert preempted >= 1 and waiting > 0 and running > 0
    known = sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in outputs)
    # What is computed again after a preemption comes on top, less what the cache still had.
    assert known <= prefill + decode + cached <= known + preempted * 48 * 4
    assert {reason for _, reason, _ in steps} == {
        *("max_num_batched_tokens", "max_num_seqs", "blocks", "preemption", "")
    }


def test_the_map_shows_who_holds_what(watched):
    _, steps = watched
    assert all(len(cells) == 48 for _, _, cells in steps)
    assert set(steps[0][2]) & set("ABCDEFGH") and re.search(r"[2-6]", steps[0][2])
    assert set(steps[-1][2]) <= set("-.")  # all are done, and their pages free


def test_the_map_is_that_of_the_block_tables(small_llm):
    ids = [small_llm.add_request(prompt, PARAMS) for prompt in PROMPTS[:3]]
    for _ in range(5):
        small_llm.step()
    scheduler = small_llm.llm_engine.scheduler
    names = dict(zip(ids, "XYZ", strict=True))
    [plain] = block_map(scheduler, names, color=False)
    [colored] = block_map(scheduler, names, color=True)
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == plain
    assert colored.count("\033[30;48;5;") == sum(cell not in "-." for cell in plain)
    holders = {}
    for seq in scheduler.running:
        for block in seq.block_tables[0]:
            holders.setdefault(block, []).append(names[seq.request_id])
    for block, cell in enumerate(plain):
        who = holders.get(block, [])
        assert cell in "-." if not who else cell == (who[0] if len(who) == 1 else str(len(who)))
    for id in ids:
        small_llm.abort(id)
