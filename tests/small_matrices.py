"""A small matrix and its gradients, for optimizers that project; and how two results differ."""

import torch

LR, GAP, STEPS = 0.01, 10, 35  # three refreshes after the first
SQUARE, TALL, WIDE = (16, 16), (24, 10), (10, 24)
ONE_SIDED = ("std", "reverse_std", "left", "right")


def gradients(shape, steps=STEPS, dtype=torch.float32):
    """A low-rank signal of changing size under noise."""
    chance = torch.Generator().manual_seed(0)
    m, n = shape
    rank = max(1, min(shape) // 3)
    signal = torch.randn(m, rank, generator=chance) @ torch.randn(rank, n, generator=chance)
    sizes, noise = torch.rand(steps, generator=chance), torch.randn(steps, m, n, generator=chance)
    return [(2 * s * signal + 0.5 * e).to(dtype) for s, e in zip(sizes, noise, strict=True)]


def spiky_gradients(shape, steps=80, dtype=torch.float32):
    """Noise of changing size with a spike in single entries now and then."""
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn((steps, *shape), generator=chance)
    spikes = torch.rand((steps, *shape), generator=chance) < 0.01
    sizes = torch.rand((steps, *[1] * len(shape)), generator=chance) + 0.1
    return list((noise * sizes * torch.where(spikes, 2000.0, 1.0)).to(dtype).unbind(0))


def noisy_gradients(shape, steps=STEPS, dtype=torch.float32):
    """Noise of changing size."""
    chance = torch.Generator().manual_seed(0)
    sizes, noise = torch.rand(steps, generator=chance), torch.randn(steps, *shape, generator=chance)
    return [((s + 0.1) * G).to(dtype) for s, G in zip(sizes, noise, strict=True)]


def start(shape, dtype=torch.float32):
    """The initial matrix and vector."""
    chance = torch.Generator().manual_seed(1)
    W, b = torch.randn(shape, generator=chance), torch.randn(shape[:1] or (1,), generator=chance)
    return (0.1 * W).to(dtype), (0.1 * b).to(dtype)


def factors_of(shape, rank, dtype=torch.float32, seed=1):
    """Two initial factors, B (m×r) and A (r×n)."""
    chance, (m, n) = torch.Generator().manual_seed(seed), shape
    B, A = torch.randn(m, rank, generator=chance), torch.randn(rank, n, generator=chance)
    return B.to(dtype), A.to(dtype)


def advance(W, b, optimizer, grads):
    for G in grads:
        W.grad, b.grad = G.clone(), G.sum(1)
        optimizer.step()


def is_left(proj_type, shape):
    tall = shape[0] >= shape[1]
    return proj_type in ("left", "full") or (proj_type, tall) in (
        ("std", False),
        ("reverse_std", True),
    )


def is_right(proj_type, shape):
    return proj_type == "full" or not is_left(proj_type, shape)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def error_of_update(W, reference, shape, dtype=torch.float32):
    """Relative error of the accumulated update, stricter than that of the weights."""
    W0 = start(shape, dtype)[0].double()
    return relative(W - W0, reference - W0)


def readable(value):
    """The part of a test's name for one parameter."""
    return (
        "x".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", None)
    )


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def growing(shape, dtype):
    """Gradients that keep Fira's limiter at work."""
    return [1.3**i * G for i, G in enumerate(gradients(shape, dtype=dtype))]
