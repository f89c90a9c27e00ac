"""Small networks with weights, gradients and a state that has seen some steps, in float64: for tests of rules."""

import pytest
import torch
from torch import nn

from learned_opt import features
from learned_opt.rules import whitening
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer

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


def accumulated(grads, state):
    """The state one step on: averages of the gradients, and the age."""
    averages = {n: {k: x for k, x in s.items() if k in features.AVERAGES} for n, s in state.items()}
    ages = {n: {k: s[k] + 1 for k in ("step", "clock")} for n, s in state.items()}
    return {n: s | ages[n] | features.averaged(grads[n], averages[n]) for n, s in state.items()}


def make(kind, steps=3):
    """Symmetry, weights, gradients and a state that has seen some steps, in float64."""
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    params = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()}
    state = features.fresh(params)
    for t in range(steps):
        state = accumulated(noise_like(params, 10 + t), state)
    slots = seen_by_whitening if steps else whitening.fresh
    state = {n: s | slots(params[n]) for n, s in state.items()}
    return infer(model), params, noise_like(params, 1), state


def seen_by_whitening(p):
    """Slots that hold some second moments and their roots."""
    slots = whitening.fresh(p)
    for i in whitening.axes_with_slots(tuple(p.shape)):
        x = torch.randn(p.shape[i], 3 * p.shape[i], dtype=p.dtype)
        slots[f"moment{i}"] = x @ x.mT
        roots = whitening.inverse_root((x @ x.mT)[None], slots[f"root{i}"][None], torch.tensor([True]))
        slots[f"root{i}"] = roots[0]
    return slots


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-10, "atol": 1e-13} | tolerance))
