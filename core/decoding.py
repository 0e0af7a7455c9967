"""Continuing a text, one token at a time, from the cache."""

import torch
from torch import Tensor

from tangram.core.contracts import Tokenizer
from tangram.core.model import Model
from tangram.core.records import Batch, Progress


@torch.no_grad()
def generate(model: Model, prompt: Tensor, count: int, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
    """Return `count` tokens that continue prompt int64 [B, S], int64 [B, count].

    Args:
        model: The model.
        prompt: Sequences of one length, each one document.
        count: Tokens to make.
        temperature: Divides the logits before drawing; 0 takes the likeliest token.
        seed: Seed of the draws.
    """
    batch, length = prompt.shape
    caches = [block.attention.new_cache(batch, length + count) for _, block in model.trunk()]
    shared = model.shared
    stream = torch.Generator(prompt.device).manual_seed(seed)
    tokens, made = prompt, []
    for start in [0, *range(length, length + count - 1)]:
        positions = torch.arange(start, start + tokens.shape[1], device=prompt.device).expand_as(tokens)
        carry = model(Batch(tokens, None, positions, torch.zeros_like(tokens), 0, batch), Progress(), caches)
        logits = shared.head(shared.norm(carry.trunk[:, -1:]))[:, -1]
        if temperature > 0:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=stream)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        made.append(tokens)
    return torch.cat(made, 1)


def sample(model: Model, tokenizer: Tokenizer, prompt: str, count: int, *, temperature: float, seed: int) -> str:
    """Return `prompt` and its continuation by `count` tokens, up to the end of the document."""
    device = next(model.parameters()).device
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]], device=device)
    made = generate(model, ids, count, temperature=temperature, seed=seed)[0].tolist()
    if tokenizer.eos in made:
        made = made[: made.index(tokenizer.eos)]
    return prompt + tokenizer.decode(made)
