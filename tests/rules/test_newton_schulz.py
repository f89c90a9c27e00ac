"""The Newton-Schulz iteration: Muon's."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from learned_opt.rules.newton_schulz import newton_schulz


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (1, 9), (40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_bfloat16_it_is_torch_muons(shape, dtype):
    x = random(*shape, dtype=dtype)
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(newton_schulz(x.bfloat16()[None])[0], theirs, rtol=0, atol=4e-2)


def test_it_brings_singular_values_near_one_and_keeps_singular_vectors():
    x = random(2, 6, 4)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ newton_schulz(x) @ vt.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-12
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-17, 1e-3, 1e15])
def test_it_does_not_depend_on_the_scale(scale):
    x = random(1, 6, 4, dtype=torch.float32).clamp(-3, 3)
    torch.testing.assert_close(newton_schulz(x * scale), newton_schulz(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-24, 1e-30, 1e-40])
def test_matrices_whose_squares_are_zero_stay_finite(scale):
    y = newton_schulz(random(3, 6, 4, dtype=torch.float32) * scale)
    assert y.isfinite().all() and y.abs().max() < 1.3


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [1, 12])
def test_it_is_the_plain_iteration_on_either_side(steps, rank):
    x = random(2, 12, rank) @ random(2, rank, 60)
    y = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    torch.testing.assert_close(newton_schulz(x, steps), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(x.mT, steps).mT, y, rtol=0, atol=1e-12)


def test_rows_of_zero_stay_exactly_zero():
    x = random(1, 6, 9)
    x[:, 2], x[:, :, 5] = 0, 0
    y = newton_schulz(x)
    assert not y[:, 2].any() and not y[:, :, 5].any() and y[:, 0].any()


def test_of_zero_it_is_zero_with_finite_derivative():
    x = torch.zeros(6, 3, 4, requires_grad=True)
    y = newton_schulz(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and x.grad.isfinite().all()


def test_of_a_batch_it_is_that_of_each_matrix():
    x = random(2, 3, 5, 4)
    each = torch.stack([torch.cat([newton_schulz(m[None]) for m in row]) for row in x])
    torch.testing.assert_close(torch.func.vmap(newton_schulz)(x), each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4, 3), (2, 2, 7)])
def test_it_has_the_right_derivatives(shape):
    x = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz, (x,))
    assert torch.autograd.gradgradcheck(newton_schulz, (x,))
