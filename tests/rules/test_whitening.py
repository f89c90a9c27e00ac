"""Second moments of hidden units' gradients, their roots, and what is stepped in them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from learned_opt import infer_symmetry
from learned_opt.layout import layout_of
from learned_opt.rules import whitening
from learned_opt.rules.nominal import Nominal, youth
from learned_opt.rules.whitening import (
    AT_FIRST,
    AVERAGE,
    EARLY_POWER,
    EVERY,
    FLOOR,
    LARGEST,
    POWER,
    Whitening,
    inverse_root,
)
from learned_opt.symmetry import independent
from tasks.conv import cnn
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
    root, early = (inverse_root(scale * a, torch.zeros_like(a), YES, power) for power in (POWER, EARLY_POWER))
    relative = a / a.diagonal(dim1=-2, dim2=-1).mean() + FLOOR * torch.eye(size, dtype=torch.float64)
    back = torch.linalg.matrix_power(torch.linalg.inv(root), 8)
    assert (POWER, EARLY_POWER) == (-1 / 8, -3 / 4)
    torch.testing.assert_close(back, relative, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(early, torch.linalg.matrix_power(root, 6), rtol=1e-7, atol=1e-9)


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


# ------------------------------------------------------------------------------------------- the slots
def test_slots_follow_from_the_shape_alone():
    sizes = lambda *shape: {k: tuple(x.shape) for k, x in whitening.fresh(torch.zeros(shape)).items()}  # noqa: E731
    assert sizes(5) == {} == sizes()
    assert sizes(5, 1) == {"moment0": (5, 5), "root0": (5, 5)}
    assert sizes(LARGEST + 1, 2) == {"moment1": (2, 2), "root1": (2, 2)}
    assert sizes(4, 3, 2, 1).keys() == {f"{k}{i}" for k in ("moment", "root") for i in range(3)}
    assert whitening.fresh(torch.zeros(3, 3, dtype=torch.bfloat16))["root0"].dtype == torch.float32


def whitened(model, steps=1, seed=0, youth=1.0):
    """Layout, gradients of every step by name, and the last whitening; no frame."""
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    layout = layout_of(infer(model), tuple(params), torch.device("cpu"))
    state, seen, g = Nominal().init(params), [], torch.Generator().manual_seed(seed)
    for _ in range(steps):
        seen.append({n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()})
        state = {n: {**s, "step": s["step"] + 1} for n, s in state.items()}
        white = Whitening(layout, layout.gather(seen[-1]), state, torch.tensor(youth))
        state = white.state
    return layout, seen, white


def test_moments_are_averages_of_unfolded_gradients_on_hidden_axes_alone():
    model = cnn((2, 4, 4), (6, 5), 7, "relu")
    _, seen, white = whitened(model, steps=3)
    convolutions = [n for n, p in model.named_parameters() if p.ndim == 4]
    hidden = {convolutions[0]: [0], convolutions[1]: [0, 1]}
    for name, slots in white.state.items():
        for i in whitening.axes_with_slots(tuple(seen[0][name].shape)):
            expected = torch.zeros_like(slots[f"moment{i}"])
            for grads in seen:
                x = grads[name].movedim(i, 0).flatten(1)
                expected = AVERAGE * expected + (1 - AVERAGE) * x @ x.mT / x.shape[1]
            wanted = i in hidden.get(name, [1] if seen[0][name].ndim == 2 else [])  # the last layer reads hidden units
            torch.testing.assert_close(slots[f"moment{i}"], expected * wanted)
            assert bool(slots[f"root{i}"].any()) == wanted


def test_roots_are_renewed_at_first_and_then_every_tenth_step():
    model = mlp([8, 6, 6, 8], "tanh")
    roots = [whitened(model, steps=t)[2].state["2.weight"]["root0"] for t in range(1, 2 * EVERY + 2)]
    renewed = [1] + [t + 1 for t in range(1, len(roots)) if not torch.equal(roots[t], roots[t - 1])]
    assert renewed == [*range(1, AT_FIRST + 1), EVERY, 2 * EVERY]


def test_an_axis_that_another_symmetry_did_not_whiten_gets_its_root_at_once():
    params = {n: p.detach() for n, p in mlp([8, 6, 7], "tanh").named_parameters()}
    rule, state = Nominal(), Nominal().init(params)
    grads = {n: torch.ones_like(p) for n, p in params.items()}
    for _ in range(AT_FIRST + 2):
        _, state = rule(params, grads, state, infer(mlp([8, 6, 7], "tanh")))
    assert not state["0.weight"]["root1"].any()
    updates, state = rule(params, grads, state, independent(params))
    assert state["0.weight"]["root1"].any() and updates["0.weight"].any()


def test_tensors_are_multiplied_by_the_roots_along_every_whitened_axis():
    layout, seen, white = whitened(mlp([8, 6, 6, 7], "tanh"), steps=2)
    out = layout.scatter(white(layout.gather(seen[0])))
    roots = {n: {k: s[k] for k in s if k[:4] == "root"} for n, s in white.state.items()}
    expected = {
        "0.weight": roots["0.weight"]["root0"] @ seen[0]["0.weight"],
        "2.weight": roots["2.weight"]["root0"] @ seen[0]["2.weight"] @ roots["2.weight"]["root1"],
        "4.weight": seen[0]["4.weight"] @ roots["4.weight"]["root1"],
        "0.bias": roots["0.weight"]["root0"] @ seen[0]["0.bias"],
        "2.bias": roots["2.weight"]["root0"] @ seen[0]["2.bias"],
    }
    for name, x in out.items():
        torch.testing.assert_close(x, expected.get(name, seen[0][name]))
    by_name = {
        n: bool(w)
        for stack, whole in zip(layout.stacks, white.whole, strict=True)
        for (n, _, _), w in zip(stack.members, torch.as_tensor(whole).expand(stack.shape[0], 1, 1), strict=True)
    }
    assert {n for n, both in by_name.items() if both} == {"2.weight", "2.bias"}


def test_a_step_turns_with_the_hidden_units():
    """The moments are matrices, so more than signed permutations commute with a step: every rotation of the units."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    left, right = (torch.linalg.qr(draw(6, 6))[0] for _ in range(2))
    params = {"w": draw(6, 6)}
    turned = {"w": left @ params["w"] @ right}
    rule, symmetry = Nominal(), independent(params)
    here, there = rule.init(params), rule.init(turned)
    for _ in range(12):
        grad = draw(6, 6)
        step, here = rule(params, {"w": grad}, here, symmetry)
        other, there = rule(turned, {"w": left @ grad @ right}, there, symmetry)
        torch.testing.assert_close(other["w"], left @ step["w"] @ right, rtol=1e-7, atol=1e-10)
    entries = copy.copy(rule)
    entries.whiten = False  # then entries have second moments of their own, which do not turn
    step, _ = entries(params, {"w": grad}, here, symmetry)
    other, _ = entries(turned, {"w": left @ grad @ right}, there, symmetry)
    assert (other["w"] - left @ step["w"] @ right).norm() > 1e-3 * step["w"].norm()


def test_embeddings_and_vectors_are_not_whitened():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    params = {n: p.detach() for n, p in model.named_parameters()}
    state = Nominal().init(params)
    x = torch.randint(0, 9, (5,))
    nn.functional.cross_entropy(model(x), torch.randint(0, 4, (5,))).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    _, state = Nominal()(params, grads, state, infer_symmetry(model, x))
    moved = {n for n, s in state.items() if any(x.any() for k, x in s.items() if k[:6] == "moment")}
    assert moved == {"1.weight", "3.weight"}


# ------------------------------------------------------------------------------- thin matrices, in youth
@pytest.mark.parametrize("youth", [1.0, 0.25, 0.0])
def test_thin_matrices_turn_from_whitened_momenta_to_adams_direction(youth):
    layout, seen, white = whitened(mlp([3, 6, 6, 2], "tanh"), steps=2, youth=youth)
    momenta, adam = (layout.gather(x) for x in seen)
    turned = layout.scatter(list(white.turned(momenta, dict(enumerate(adam))).values()))
    size = lambda x: x.square().mean().sqrt()  # noqa: E731
    for name, x in turned.items():
        n, old = (x[name] for x in seen)
        if name in ("0.weight", "4.weight"):
            axis = "01"[name == "4.weight"]
            a = white.state[name][f"moment{axis}"]
            values, basis = torch.linalg.eigh(a / a.diagonal().mean() + FLOOR * torch.eye(6, dtype=a.dtype))
            root = (basis * values**EARLY_POWER) @ basis.T
            n = root @ n if axis == "0" else n @ root
            mixed = (1 - youth) * old + youth * n * size(old) / size(n)
            old = mixed * size(old) / size(mixed)
        torch.testing.assert_close(x, old)


def test_roots_of_thin_matrices_are_computed_in_youth_alone():
    model = mlp([3, 6, 6, 2], "tanh")
    for share, rooted in ((0.01, True), (0.0, False)):
        state = whitened(model, youth=share)[2].state
        assert state["2.weight"]["root0"].any()
        assert bool(state["0.weight"]["root0"].any()) == bool(state["4.weight"]["root1"].any()) == rooted


def test_youth_is_an_eighth_of_the_run_and_fades_in_another():
    at = lambda total, *steps: [float(youth(torch.tensor(float(t)), total)) for t in steps]  # noqa: E731
    assert at(240, 1, 30, 45, 60, 240) == [1, 1, 0.5, 0, 0]
    assert at(None, 50, 75, 100) == at(10_000, 50, 75, 100) == [1, 0.5, 0]
    assert at(20, 10, 15, 20) == [1, 0.5, 0]


def test_in_a_run_thin_matrices_step_along_adams_direction_later_and_at_its_size_before():
    """Against the same rule without whitening, where they always do."""
    params = {n: p.detach().double() for n, p in mlp([3, 6, 6, 2], "tanh").named_parameters()}
    symmetry, g = infer(mlp([3, 6, 6, 2], "tanh")), torch.Generator().manual_seed(0)
    rule, plain = Nominal(), Nominal()
    plain.whiten = False
    state = {r: r.init(params) for r in (rule, plain)}
    cosines = []
    for _ in range(25):
        grads = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}
        steps = {}
        for r in state:
            updates, state[r] = r(params, grads, state[r], symmetry, total_steps=80)
            steps[r] = updates["4.weight"]
        a, b = steps.values()
        torch.testing.assert_close(a.norm(), b.norm())
        cosines.append(float((a * b).sum() / a.norm() / b.norm()))
    assert max(cosines[1:10]) < 0.99 and min(cosines[19:]) > 1 - 1e-9
