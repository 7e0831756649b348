"""The states of the generators that optimizers of other packages draw from, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

PREFIX = "random/"


def random_states() -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's global generators."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor(
            [] if python_gauss is None else [python_gauss], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {PREFIX + name: state for name, state in states.items()}


def set_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Restore what `random_states` returned; checkpoints of earlier versions have less of it."""
    states = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "numpy" in states:
        *keys, position, has_gauss = states["numpy"].tolist()
        gauss = states["numpy_gauss"].item()
        words = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", words, position, has_gauss, gauss))
        version, *words_of_python = states["python"].tolist()
        left = states["python_gauss"].tolist()
        random.setstate((version, tuple(words_of_python), left[0] if left else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
