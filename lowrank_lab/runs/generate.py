"""Sample text from a trained run."""

from __future__ import annotations

import torch

from lowrank_lab.data.tokenizer import TextEncoder
from lowrank_lab.runs.run import Run


def sample(
    run: Run, prompt: str = "", tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> str:
    """Continue `prompt` with text sampled from a trained run; returns both.

    Args:
        tokens: number of new tokens.
        temperature: softmax temperature; 0 takes the most likely token.
    """
    encoder = TextEncoder.of(run.tokenizer).plain  # as the texts of its corpus were encoded
    ids = encoder.encode(prompt or "\n", add_special_tokens=False).ids
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(tokens):
            context = torch.tensor([ids[-run.config.sequence_length :]])
            logits = run.model(context)[0, -1].float()
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                p = (logits / temperature).softmax(0)
                ids.append(int(torch.multinomial(p, 1, generator=generator)))
    text: str = run.tokenizer.decode(ids)
    return text
