"""Small networks of several kinds, and random tensors like theirs."""

import pytest
import torch
from torch import nn

from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer

MODELS = {
    "mlp": lambda: mlp([4, 6, 6, 3], "relu"),
    "tanh": lambda: mlp([4, 6, 6, 5], "tanh"),  # the first layer is thin
    "cnn": lambda: cnn((2, 4, 4), (6, 5), 2, "relu", norm=True),
    "transformer": lambda: Transformer(
        nn.Embedding(5, 6), 3, 5, width=6, heads=2, depth=1, hidden=6, causal=True, fused=True
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def noise_like(tensors, seed, *lead):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*lead, *p.shape, generator=g, dtype=p.dtype) for n, p in tensors.items()}


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-10, "atol": 1e-13} | tolerance))
