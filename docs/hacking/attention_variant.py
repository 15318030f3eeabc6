"""An attention variant: attention sinks and a window (StreamingLLM, Xiao et al. 2023).

python docs/hacking/attention_variant.py

Every query sees the first keys of its sequence and the last ones, whatever the model was trained
with. This is for a CPU, in plain torch; on a GPU the same class takes the place of a kernel's.
"""

import torch
import torch.nn.functional as F

from nanovllm import LLM, SamplingParams
from nanovllm.ops.batch import ForwardBatch, KVLayer
from nanovllm.ops.reference_attention import TorchAttention

SINKS, WINDOW = 4, 32


class SinkAttention(TorchAttention):
    """The first SINKS keys, and the last WINDOW keys before each query token."""

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """
        Args:
            q: [T, heads, head_dim], the batch's query tokens, sequence after sequence.
            kv: this layer's blocks, [blocks, block_size, kv_heads, head_dim]; the step's own keys
                and values are stored already.
        """
        group, out = batch.groups[kv.group], torch.empty_like(q)
        starts, rows = group.arrays["query_start"].tolist(), group.arrays["rows"].tolist()
        for i, length in enumerate(group.arrays["context_lens"].tolist()):
            tokens = slice(starts[i], starts[i + 1])
            table = group.block_tables[rows[i], : -(-length // kv.k.shape[1])]
            k, v = (x[table].flatten(0, 1)[:length].transpose(0, 1) for x in (kv.k, kv.v))
            query = torch.arange(length - (tokens.stop - tokens.start), length)[:, None]
            key = torch.arange(length)
            mask = (key <= query) & ((key < SINKS) | (key > query - WINDOW))
            q_HTD = q[tokens].transpose(0, 1)
            o_HTD = F.scaled_dot_product_attention(q_HTD, k, v, mask, scale=scale, enable_gqa=True)
            out[tokens] = o_HTD.transpose(0, 1)
        return out


def main() -> list[str]:
    """The same prompt with all keys and with sinks and a window."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    texts = []
    for backend in ("auto", lambda *_: SinkAttention()):
        with LLM("assets/tiny-qwen3", max_model_len=512, attention_backend=backend) as llm:
            texts.append(llm.generate("In the beginning", params, use_tqdm=False)[0]["text"])
            print(repr(texts[-1]))
    return texts


if __name__ == "__main__":
    main()
