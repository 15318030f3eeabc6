"""The order in which a whole batch is queued: the one in which it is done soonest.

LLM.generate and LLM.enqueue use it; results come back in the order of the prompts.
"""

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence


def batch_order(seqs: list[Sequence], scheduler: Scheduler) -> list[Sequence]:
    """Longest first where rows are too few: what starts last would else run on alone. As given
    where blocks are too few: sequences of like length need their most blocks at the same time."""
    blocks, max_num_seqs = scheduler.block_manager, scheduler.max_num_seqs
    num_blocks = sum(blocks.blocks_for(seq.max_len) for seq in seqs)
    if len(seqs) <= max_num_seqs or num_blocks * max_num_seqs > blocks.num_blocks * len(seqs):
        return seqs
    return sorted(seqs, key=lambda seq: seq.num_prompt_tokens - seq.max_len)
