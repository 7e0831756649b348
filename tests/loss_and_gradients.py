"""A model's loss and gradients, to compare ways to compute them."""

import torch


def loss_and_gradients(model, tokens, autocast=False):
    """The loss of tokens against their mirror image, and the gradients of all parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(tokens, tokens.flip(1))
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found
