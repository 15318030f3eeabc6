"""From logits to tokens and log-probabilities in plain torch: what a CPU runs, and what kernels are
tested against.
"""

import torch
import torch.nn.functional as F

SAMPLED_LOGITS = 2**19  # logits that are sampled from at a time, to stay in a CPU's cache
VOCAB_BLOCK = 4096  # tokens per block of the vocabulary: a draw is of a block, then of its tokens


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    noise_keys: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a token for each row from softmax(logits / temperature), cut down to the most likely
    tokens by the row's limits; at temperature 0 take the most likely one, the first of several.

    A row's noise comes from its keys alone, so its draw does not depend on the batch.

    Args:
        logits: [S, vocab].
        temperature: [S] float32.
        noise_keys: [S, 2] int64, two 32-bit keys for each row.
        top_k: [S] int64, the vocabulary's size keeps all; None: no row has a limit.
        top_p, min_p: [S] float32, or None.

    Returns: [S] int64.
    """
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    random = temperature > 0
    token_ids[~random] = logits[~random].argmax(-1)
    num_rows = max(1, SAMPLED_LOGITS // logits.shape[1])
    for rows in random.nonzero().squeeze(1).split(num_rows):
        logits32, t = logits[rows].float(), temperature[rows, None]
        limits = [None if limit is None else limit[rows] for limit in (top_k, top_p, min_p)]
        cut_down(logits32, t, *limits)
        token_ids[rows] = draw(logits32, t, noise_keys[rows])
    return token_ids


def cut_down(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    """Set to -inf what the rows' limits drop. What is kept stays as it is, so that it is drawn as
    in a row without limits. Rows without limits are left out, and limits that no row has: top_k and
    top_p sort the logits.

    Args:
        logits: [n, vocab] float32, changed in place.
        temperature: [n, 1].
        top_k, top_p, min_p: [n] each, or None.
    """
    has_limit = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    limits: list[torch.Tensor | None] = []
    for limit, neutral in ((top_k, logits.shape[1]), (top_p, 1), (min_p, 0)):
        is_one = None if limit is None else limit != neutral
        if is_one is None or not is_one.any():
            limits.append(None)
        else:
            limits.append(limit)
            has_limit |= is_one
    rows = has_limit.nonzero().squeeze(1)
    if len(rows):
        of_rows = (None if limit is None else limit[rows] for limit in limits)
        dropped = keep_likely(logits[rows] / temperature[rows], *of_rows) == -torch.inf
        logits[rows] = logits[rows].masked_fill_(dropped, -torch.inf)


def draw(logits: torch.Tensor, temperature: torch.Tensor, noise_keys: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits / temperature) by the Gumbel-max trick, the argmax of
    log-probability plus Gumbel noise: first a block of the vocabulary, then a token of the block.

    Args:
        logits: [S, vocab] float32.
        temperature: [S, 1] above 0.
        noise_keys: [S, 2] int64, two 32-bit keys a row.

    Returns: [S] int64.
    """
    vocab = logits.shape[1]
    block_size = min(VOCAB_BLOCK, vocab)
    if vocab % block_size:
        logits = F.pad(logits, (0, -vocab % block_size), value=-torch.inf)
    blocks = logits.unflatten(1, (-(-vocab // block_size), block_size))
    best = blocks.amax(-1)
    sums = (blocks - best[:, :, None]).div_(temperature[:, :, None]).exp_().sum(-1)
    sums.masked_fill_(sums.isnan(), 1.0)  # inf - inf: the best is infinite
    # A block's noise is the noise of the id -1 - block, which no token has.
    block_ids = -1 - torch.arange(best.shape[1], device=logits.device)
    weights = log_weights(best, temperature).add_(sums.log_())
    block = weights.add_(gumbel_noise(noise_keys, block_ids)).argmax(-1, keepdim=True)

    tokens = block * block_size + torch.arange(block_size, device=logits.device)  # [S, block]
    weights = log_weights(logits.gather(1, tokens), temperature)
    weights.add_(gumbel_noise(noise_keys, tokens)).masked_fill_(tokens >= vocab, -torch.inf)
    return tokens.gather(1, weights.argmax(-1, keepdim=True)).squeeze(1)


def log_weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """logits / temperature, less the largest: the largest is 0, also if it is infinite. Differences
    are divided, so that a low temperature can't overflow."""
    best = logits.amax(-1, keepdim=True)
    return (logits - best).div_(temperature).masked_fill_(logits == best, 0.0)


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for each id: -log(E), E exponential, from 32 hashed bits. With the same
    keys, different ids have different bits.

    Args:
        keys: [S, 2] int64, two 32-bit keys a row.
        ids: [n] or [S, n] int64, of which 32 bits count.

    Returns: [S, n] float32.
    """
    # The low 32 bits of int64; int32 arithmetic wraps as unsigned arithmetic does.
    first, second = keys.int().split(1, dim=1)
    bits = _mix32((ids * 0x9E3779B9).int() + first)
    return gumbel_of_bits(_mix32(bits.bitwise_xor_(second)).long().bitwise_and_(0xFFFFFFFF))


def gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of uniform 32-bit values in int64. Through log1p small E, which decide the draw,
    keep all their bits. E is finite, or the only token that is left might lose to a masked one."""
    minus_uniform = bits.float().add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_uniform.log1p_().neg_().log_().neg_()


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finalizer (Appleby 2011), in place. The masks make >> shift in zeros."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - 2**32)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def keep_likely(
    logits: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """Set to -inf the tokens that min_p, then top_k, then top_p (on the renormalised rest) drop, in
    vLLM's order. At least one token stays."""
    if min_p is not None:
        threshold = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_k is None and top_p is None:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(ordered.shape[1], device=logits.device)
        ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    if top_p is not None:
        probs = ordered.softmax(-1)
        reached_before = probs.cumsum(-1) - probs  # the probability of all more likely tokens
        # A row with top_p 1 must not lose tokens by rounding.
        drop = (reached_before >= top_p[:, None]) & (top_p[:, None] < 1)
        drop[:, 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, indices, ordered)


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of a given token in each row, and of the row's most likely tokens.

    Args:
        logits: [n, vocab].
        token_ids: [n] int64, the given tokens.
        num_top: number of most likely tokens, which come in descending order.

    Returns: token ids, the given one first, [n, 1 + num_top] int64; their log-probabilities,
        float32; and the rank of the given one, [n]: the number of tokens at least as likely.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs >= own).sum(-1)
    # For one token topk takes several times as long, and may choose another of equal ones.
    top, top_ids = logprobs.max(-1, keepdim=True) if num_top == 1 else logprobs.topk(num_top)
    return torch.cat((token_ids[:, None], top_ids), 1), torch.cat((own, top), 1), ranks
