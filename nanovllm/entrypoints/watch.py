"""See the engine work: after each step a line of what it did, and a map of the KV cache's blocks.

example.py --watch calls it. It drives LLM.step as any user may, and only reads the engine: what
metrics.py counts, and the block tables of the sequences that run.
"""

from collections.abc import Sequence
from string import ascii_uppercase

from nanovllm.core.metrics import StepMetrics
from nanovllm.engine.scheduler import Scheduler
from nanovllm.llm import LLM, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

MAP_WIDTH = 64
COLOURS = (117, 156, 222, 218, 183, 159, 229, 210, 152, 193, 216, 147)  # of 256, all light
LEGEND = """\
A cell is a block of the KV cache after the step. A letter: the request that holds it; a digit: how
many requests share it ("+": ten or more); "-": free, but its content can be hit; ".": free, empty.
"""
HEADER = "step  running waiting  prefill decode  prefix hits  preempted  no more joined because of"


def watch(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, color: bool
) -> list[RequestOutput]:
    """Generate for these prompts, and print each step.

    Args:
        llm: one that has nothing else to do.
        prompts, params: as for llm.generate.
        color: whether the map has colours.
    """
    if not llm.is_finished():
        raise ValueError("the LLM to watch has other requests; let them end, or abort them")
    request_ids: list[str] = []
    try:
        for prompt in prompts:
            request_ids.append(llm.add_request(prompt, params))
        return _run(llm, request_ids, color)
    except BaseException:
        for request_id in request_ids:
            llm.abort(request_id)
        raise


def _run(llm: LLM, request_ids: list[str], color: bool) -> list[RequestOutput]:
    engine = llm.llm_engine
    names = {id: ascii_uppercase[i % 26] for i, id in enumerate(request_ids)}
    outputs: dict[str, RequestOutput] = {}
    print(LEGEND)
    print(HEADER)
    steps = engine.metrics.steps
    while not llm.is_finished():
        outputs |= {output.request_id: output for output in llm.step()}
        if engine.metrics.steps > steps:  # the last rounds of an overlapping engine only read
            steps = engine.metrics.steps
            print(step_line(steps, engine.metrics.last_step))
            for row in block_map(engine.scheduler, names, color):
                print("      " + row)
    return [outputs[id] for id in request_ids]


def step_line(number: int, step: StepMetrics) -> str:
    return (
        f"{number:4}  {step.running:7} {step.waiting:7}  {step.prefill_tokens:7} "
        f"{step.decode_tokens:6}  {step.cached_tokens:11}  {step.preemptions:9}  {step.stopped_by}"
    ).rstrip()


def block_map(scheduler: Scheduler, names: dict[str, str], color: bool) -> list[str]:
    """A character for each block of the first group of layers, in rows.

    Args:
        scheduler: knows which sequence holds which blocks.
        names: the requests' letters.
        color: colour each block by the request that has held it longest.
    """
    pool = scheduler.block_manager.pools[0]
    cells = ["." if content is None else "-" for content in pool.contents]
    for seq in reversed(scheduler.running):  # so that the oldest holder has the last word
        for block in seq.block_tables[0]:
            if block >= 0:
                cells[block] = _cell(names[seq.request_id], pool.ref_counts[block], color)
    return ["".join(cells[i : i + MAP_WIDTH]) for i in range(0, len(cells), MAP_WIDTH)]


def _cell(name: str, holders: int, color: bool) -> str:
    text = name if holders == 1 else str(holders) if holders < 10 else "+"
    if not color:
        return text
    background = COLOURS[ord(name) % len(COLOURS)]
    return f"\033[30;48;5;{background}m{text}\033[0m"
