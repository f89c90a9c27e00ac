"""Second moments of hidden units' gradients, their roots, and what is stepped in them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from learned_opt import NFNOpt, batches
from learned_opt.rules.whitened_polar import WhitenedPolar
from learned_opt.rules.whitening import FLOOR, POWER, inverse_root, packed, unpacked
from learned_opt.symmetry import independent
from tasks.mlp import mlp
from tests.inferred import infer

YES = torch.tensor([True])


def moments(count, size, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, rank or 2 * size, generator=g, dtype=torch.float64)
    return x @ x.mT


# ------------------------------------------------------------------------------------------- the roots
@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1e-20, 1.0, 1e20]), deficient=st.booleans()
)
def test_the_root_is_of_the_moment_in_units_of_its_mean(size, seed, scale, deficient):
    a = moments(1, size, seed, rank=1 if deficient else None)
    root = inverse_root(scale * a, torch.zeros_like(a), YES)
    relative = a / a.diagonal(dim1=-2, dim2=-1).mean() + FLOOR * torch.eye(size, dtype=torch.float64)
    back = torch.linalg.matrix_power(torch.linalg.inv(root), 8)
    torch.testing.assert_close(back, relative, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 9])
def test_a_symmetric_matrix_is_kept_in_half_the_memory(size):
    a = moments(3, size)
    a = a + a.mT  # to the bit
    p = packed(a)
    assert p.shape == (3, size, size // 2 + 1)
    assert torch.equal(p[..., 0], a.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(unpacked(p), a)
    assert torch.equal(vmap(lambda x: unpacked(packed(x)))(a), a)


@pytest.mark.parametrize("which", [[True, False, True], [False, False, False], [True, True, True]])
@pytest.mark.parametrize("batched", [False, True])
def test_only_what_is_due_is_new_and_costs(which, batched, monkeypatch):
    a, old, due = moments(3, 4), moments(3, 4, seed=1), torch.tensor(which)
    seen, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: seen.append(len(x)) or eigh(x))
    if batched:  # particles of their own age
        roots = vmap(lambda *each: inverse_root(*(x[None] for x in each))[0])(a, old, due)
    else:
        roots = inverse_root(a, old, due)
    assert seen == ([sum(which)] if any(which) else [])
    for i, new in enumerate(which):
        expected = inverse_root(a[i : i + 1], old[i : i + 1], YES)[0] if new else old[i]
        torch.testing.assert_close(roots[i], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 0.5], [3.0, 1.0, 1e-9, 0.0]])
def test_derivatives_also_where_eigenvalues_coincide(values):
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
    a = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.mT
    old = moments(2, 4, seed=3).requires_grad_()
    half = torch.linalg.cholesky(a + 1e-3 * torch.eye(4))
    factor = torch.stack([half, half + 0.1]).requires_grad_()
    due = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda x, old: inverse_root(x @ x.mT, old, due), (factor, old), atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_as_no_moment_and_leaves_the_others_alone(bad):
    a = moments(2, 3)
    alone = inverse_root(a[1:], a[1:], YES)
    a[0, 1, 2] = bad
    roots = inverse_root(a, torch.zeros_like(a), torch.tensor([True, True]))
    torch.testing.assert_close(roots[0], FLOOR**POWER * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(roots[1:], alone)
    zero = inverse_root(torch.zeros_like(a), a, torch.tensor([True, True]))
    torch.testing.assert_close(zero[0], roots[0])


def test_eigenvalues_that_rounding_makes_negative_count_as_zero():
    """Products with less than float32's precision inside are not positive semidefinite."""
    a = torch.diag(torch.tensor([2.0, 1.0, -0.01], dtype=torch.float64))[None]
    root = inverse_root(a, torch.zeros_like(a), YES)[0].diagonal()
    torch.testing.assert_close(root[2], torch.tensor(FLOOR, dtype=torch.float64) ** POWER)
    assert root[0] < root[1] < root[2]


def some_rows(seed, size=50, awake=13):
    """float32 moments of units of which few ever had a gradient."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(size, 64).index_add(
        0, torch.randperm(size, generator=g)[:awake], torch.randn(awake, 64, generator=g)
    )
    return (x @ x.mT)[None]


@pytest.mark.parametrize("failing", [False, True])
def test_roots_in_float32_where_most_units_sleep_and_where_lapack_fails(failing, monkeypatch):
    eigh = torch.linalg.eigh

    def half_broken(x):
        if x.dtype == torch.float64:
            return eigh(x)
        if len(x) > 1:
            raise torch.linalg.LinAlgError("did not converge")
        return tuple(torch.full_like(part, torch.nan) for part in eigh(x))

    if failing:
        monkeypatch.setattr(torch.linalg, "eigh", half_broken)
    for a in (some_rows(0), torch.cat([some_rows(seed) for seed in range(20)])):
        yes = torch.ones(len(a), dtype=torch.bool)
        root = inverse_root(a, torch.zeros_like(a), yes)
        exact = inverse_root(a.double(), torch.zeros_like(a).double(), yes)
        torch.testing.assert_close(root.double(), exact, rtol=1e-3, atol=5e-3)


def test_units_without_gradients_are_mixed_with_none():
    a = moments(1, 6)
    a[:, 2], a[:, :, 2] = 0, 0
    root = inverse_root(a, torch.zeros_like(a), YES)[0]
    others = [i for i in range(6) if i != 2]
    assert not root[2, others].any() and not root[others, 2].any() and root[2, 2] > root.diagonal()[others].max()


# ------------------------------------------------------------------------------------------- the steps
def test_roots_are_renewed_at_first_then_every_tenth_step_then_rarely():
    model = mlp([8, 6, 6, 8], "tanh")
    optimizer, renewed = NFNOpt(model, symmetry=infer(model)), []
    before = None
    for t in range(1, 90):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        root = optimizer.state[model[2].weight]["root0"].clone()
        if before is None or not torch.equal(root, before):
            renewed.append(t)
        before = root
    assert renewed == [1, 2, 3, 10, 20, 30, 40, 50, 60, 72, 87]


def turned_steps(symmetry):
    """Steps of a matrix, and of it turned by rotations of its rows and columns, turned back."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    left, right = (torch.linalg.qr(draw(6, 6))[0] for _ in range(2))
    params, rule = {"w": draw(6, 6)}, WhitenedPolar()
    turned = {"w": left @ params["w"] @ right}
    here, there = rule.init(params, symmetry), rule.init(turned, symmetry)
    for _ in range(12):
        grad = draw(6, 6)
        step, here = rule(params, {"w": grad}, here, symmetry)
        other, there = rule(turned, {"w": left @ grad @ right}, there, symmetry)
    return step["w"], left.T @ other["w"] @ right.T


def test_a_step_turns_with_the_hidden_units(monkeypatch):
    """The moments are matrices, so more than signed permutations commute with a step: every rotation of the units."""
    symmetry = independent({"w": torch.zeros(6, 6)})
    torch.testing.assert_close(*turned_steps(symmetry), rtol=1e-7, atol=1e-10)
    monkeypatch.setattr(batches, "BOUND", 5)  # then the moments are diagonals, which do not turn
    step, other = turned_steps(independent({"w": torch.zeros(6, 6)}))
    assert (step - other).norm() > 1e-3 * step.norm()
