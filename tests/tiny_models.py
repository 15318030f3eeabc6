"""Tiny random checkpoints made by transformers, and what transformers says of them: the oracle of
the model tests."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from nanovllm import LLM
from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import StepShape

CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_checkpoint(folder: Path, family: str, *, max_shard_size: str = "5GB", **changes) -> Path:
    """A random checkpoint of two layers, its weights large enough for logits well apart."""
    sizes = dict(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        eos_token_id=None,
        bos_token_id=None,
    )
    config = CONFIGS[family](**{**sizes, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            if (
                param.dim() == 1
            ):  # transformers starts norms at 1 and biases at 0, which hides mistakes
                param.add_(torch.randn_like(param) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Set keys of a config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def oracle_logits(oracle: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """[n, vocab] of one sequence."""
    return oracle(torch.tensor([token_ids])).logits[0]


@torch.no_grad()
def oracle_greedy(oracle: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, each from a forward over the whole sequence."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(oracle_logits(oracle, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


@torch.inference_mode()
def engine_logits(llm: LLM, token_ids: list[int], chunk: int) -> torch.Tensor:
    """[n, vocab] of one sequence from the worker, `chunk` tokens a step, on scattered blocks."""
    executor = llm.llm_engine.executor
    runner, groups = executor.runner, executor.groups
    num_blocks = -(-len(token_ids) // groups[0].block_size)
    tables = tuple(
        np.arange(group.num_blocks, dtype=np.int32)[::-1][:num_blocks] for group in groups
    )
    logits = []
    for start in range(0, len(token_ids), chunk):
        query = token_ids[start : start + chunk]
        step = StepInput(chunks=[Chunk(0, start, query, samples=True)])
        step.decode_blocks = np.empty((len(groups), 0), np.int32)
        record = runner.take_record()
        if start == 0:
            start_row = RowStart(0, 0, SamplingParams(), 0, (), 0, tables)
            runner.rows.start([start_row], record)
        arrays = record.upload(runner.inputs.begin(step, record))
        shape = StepShape(len(query), 0, is_decode=False, max_query_len=len(query))
        logits.append(runner.model.logits(runner.forward(shape, arrays).hidden))
    return torch.cat(logits)
