"""Text from a model, for the eye: the whole sequence is computed anew for each token."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rsotrain.config.data import GenerateConfig
from rsotrain.data.tokenizer import Tokenizer


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    eos_id: int,
    num_ids: int,
    max_context: int,
    device: torch.device,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The new tokens of each prompt, ended by eos (left out) or ``max_new_tokens``.

    prompts: at least one token each. ``num_ids``: ids from there on, which pad the vocabulary, are never
    drawn. The model sees the last ``max_context`` tokens. Each prompt has a generator of its own, so what
    follows it does not depend on the others. ``between`` is called before each token; it may raise.
    """
    was_training = model.training
    model.eval()
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(prompts))]
    rows = [list(prompt) for prompt in prompts]
    unfinished = set(range(len(rows)))
    # One shape throughout, for compiled models; what stands after a row's end is not attended to.
    length = min(max_context, max(map(len, rows)) + config.max_new_tokens)
    try:
        for _ in range(config.max_new_tokens):
            between()
            contexts = [row[-length:] for row in rows]
            tokens = torch.tensor([context + [0] * (length - len(context)) for context in contexts])
            logits = model(tokens.to(device))
            for i in sorted(unfinished):
                token = _draw(logits[i, len(contexts[i]) - 1, :num_ids].float().cpu(), config, generators[i])
                if token == eos_id:
                    unfinished.remove(i)
                else:
                    rows[i].append(token)
            if not unfinished:
                break
    finally:
        model.train(was_training)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _draw(logits: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """One id from logits (num_ids,)."""
    if config.temperature == 0:
        return int(logits.argmax())
    if config.top_k is not None and config.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    logits = (logits - logits.max()).double() / config.temperature  # a small one must not overflow
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


def generate_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    config: GenerateConfig,
    *,
    max_context: int,
    device: torch.device,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of ``config.prompts``; a text begins after the separator."""
    encoded = tokenizer.encode(list(config.prompts))
    prompts = [np.concatenate([[tokenizer.eos_id], ids]).tolist() for ids in encoded]
    continued = generate_tokens(
        model,
        prompts,
        config,
        eos_id=tokenizer.eos_id,
        num_ids=tokenizer.vocab_size,
        max_context=max_context,
        device=device,
        seed=seed,
        between=between,
    )
    return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(config.prompts, continued, strict=True)]
