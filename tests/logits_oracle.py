"""What logits become by a request's parameters, from transformers' processors and OpenAI's
definitions."""

import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

PADDING = [-5] * 10  # transformers skips words that are longer than the text


def asked_logits(params, logits, prompt, output, stops=()):
    """[vocab] of the next token, from the model's. In vLLM's order."""
    scores = logits[None].clone()
    if params.allowed_token_ids is not None:
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[0, params.allowed_token_ids] = False
        scores[mask] = -torch.inf
    if params.bad_words_token_ids:
        processor = NoBadWordsLogitsProcessor(params.bad_words_token_ids)
        scores = processor(torch.tensor([PADDING + output]), scores)
    if len(output) < params.min_tokens:
        scores[0, list(stops)] = -torch.inf
    if params.logit_bias:
        biases = {(token,): bias for token, bias in params.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(biases)(torch.tensor([prompt + output]), scores)
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(
        torch.tensor([prompt + output]), scores
    )
    for token in set(output):
        scores[0, token] -= output.count(token) * params.frequency_penalty
        scores[0, token] -= params.presence_penalty
    return scores[0]


@torch.no_grad()
def asked_greedy(oracle, params, prompt, num_tokens):
    """Greedy tokens, each from a forward over the whole sequence."""
    output = []
    for _ in range(num_tokens):
        logits = oracle(torch.tensor([prompt + output])).logits[0, -1]
        output.append(int(asked_logits(params, logits, prompt, output).argmax()))
    return output
