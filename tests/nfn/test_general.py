"""The general layer: equivariant for every symmetry, complete where it claims to be, and wrong where it must be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learned_opt import SymmetryError
from learned_opt.nfn.equivariant_basis import Dim, PartitionLinear, terms
from learned_opt.nfn.general import Framed, GeneralLinear, GeneralPool, frame_of, merge_blocks, split_blocks
from learned_opt.symmetry import Element, Label, Scale, Spec, Symmetry
from learned_opt.symmetry.axes import Leaf, Prod, Sum
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer

BATCH, CHANNELS = 2, 3


def symmetry_of(model):
    """The one place that knows where a model's symmetry comes from."""
    return infer(model)


def transformer():
    return Transformer(nn.Embedding(5, 4), 3, 5, width=4, heads=2, depth=1, hidden=3, causal=True, fused=True)


def residual():
    """x + up(relu(down x)) twice, after an embedding: one label for the stream, whichever block writes it."""
    stream = Leaf(4, "stream")
    specs = {"embed": Spec((stream, Leaf(3)), ("out", "in")), "head": Spec((Leaf(2), stream), ("out", "in"))}
    labels = {"stream": Label(4)}
    for i in range(2):
        hidden = Leaf(5, f"h{i}")
        labels[f"h{i}"] = Label(5)
        specs[f"{i}.down"] = Spec((hidden, stream, Leaf(3), Leaf(3)), ("out", "in", "kernel", "kernel"))
        specs[f"{i}.up"] = Spec((stream, hidden), ("out", "in"))
        specs[f"{i}.bias"] = Spec((stream,), ("out",))
    specs["square"] = Spec((stream, stream), ("out", "in"))
    return Symmetry(specs, labels)


def lstm():
    """Gates i | f | g | o, each of the hidden units that are fed back."""
    hidden = Leaf(3, "h")
    gates = Sum((hidden,) * 4)
    return Symmetry(
        {
            "ih": Spec((gates, Leaf(2)), ("out", "in")),
            "hh": Spec((gates, hidden), ("out", "in")),
            "bias": Spec((gates,), ("out",)),
            "head": Spec((Leaf(2), hidden), ("out", "in")),
        },
        {"h": Label(3)},
    )


SYMMETRIES = {
    "mlp": lambda: symmetry_of(mlp([3, 4, 5, 2], "relu")),
    "cnn": lambda: symmetry_of(cnn((2, 4, 4), (3, 4), 2, "relu", norm=True)),
    "transformer": lambda: symmetry_of(transformer()),
    "residual": residual,
    "lstm": lstm,
}
every_symmetry = pytest.mark.parametrize("kind", SYMMETRIES)


class Pointwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return {n: self.function(x) for n, x in features.items()}


def permutation(symmetry, seed=1):
    g = symmetry.sample(torch.Generator().manual_seed(seed))
    return Element(g.perms, symmetry.identity().scales)


def act(symmetry, g, features, dual=False):
    """The group on features: alike in every network and channel."""
    moved = {n: torch.empty_like(x) for n, x in features.items()}
    for b in range(BATCH):
        for c in range(next(iter(features.values())).shape[1]):
            one = symmetry.act(g, {n: x[b, c] for n, x in features.items()}, dual=dual)
            for n, x in one.items():
                moved[n][b, c] = x
    return moved


def random_features(symmetry, channels=CHANNELS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(BATCH, channels, *s.shape, generator=g, dtype=torch.float64) for n, s in symmetry.specs.items()
    }


def randomised(module, seed=3):
    """Biases start at zero: an error in them would not be seen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g))
    return module.double()


def error(module, symmetry, g, channels=CHANNELS, told=None):
    """Relative ``|f(g x) - g f(x)|`` (``|f(g x) - f(x)|`` for a tensor), largest over tensors."""
    x = random_features(symmetry, channels)
    left, right = module(act(symmetry, g, x)), module(x)
    if isinstance(right, torch.Tensor):
        return ((left - right).abs().max() / right.abs().max()).item()
    right = act(symmetry, g, right)
    return max(((left[n] - right[n]).abs().max() / (right[n].abs().max() + 1e-30)).item() for n in right)


# ------------------------------------------------------------------------------------- equivariance
@pytest.mark.parametrize("exact", [False, True])
@every_symmetry
def test_a_layer_commutes_with_permutations(kind, exact):
    symmetry = SYMMETRIES[kind]()
    layer = randomised(GeneralLinear(symmetry, CHANNELS, 2, exact=exact))
    assert error(layer, symmetry, permutation(symmetry)) < 1e-12


@every_symmetry
def test_a_stack_with_an_activation_and_a_pool_is_invariant(kind):
    symmetry = SYMMETRIES[kind]()
    pool = GeneralPool(symmetry, 4)
    stack = nn.Sequential(
        GeneralLinear(symmetry, CHANNELS, 4), Pointwise(torch.relu), GeneralLinear(symmetry, 4, 4), pool
    )
    assert error(randomised(stack), symmetry, permutation(symmetry)) < 1e-12
    assert stack(random_features(symmetry)).shape == (BATCH, pool.out_features)


@every_symmetry
def test_an_arbitrary_relabelling_is_not_followed(kind):
    """A layer that shared every weight by position would pass the tests above for g = 1 only; this one must fail."""
    symmetry = SYMMETRIES[kind]()
    layer = randomised(GeneralLinear(symmetry, CHANNELS, 2))
    name = next(n for n, s in symmetry.specs.items() if len(s.shape) > 1)
    x = random_features(symmetry)
    shuffled = {n: t.flip(-2) if n == name else t for n, t in x.items()}
    left, right = layer(shuffled), layer(x)
    assert (left[name] - right[name].flip(-2)).abs().max() > 1e-3


@pytest.mark.parametrize("exact", [False, True])
def test_heads_are_bases_and_a_layer_that_forgets_it_fails(exact):
    """One permutation of head_dim for every head: without `over` the layer averages over heads what differs."""
    symmetry = without_scales(symmetry_of(transformer()))
    flat = Symmetry(symmetry.specs, {n: replace(label, over=()) for n, label in symmetry.labels.items()})
    told = randomised(GeneralLinear(flat, CHANNELS, 2, exact=exact))
    assert error(told, symmetry, permutation(symmetry)) > 1e-2
    assert error(told, flat, permutation(flat)) < 1e-12


def without_scales(symmetry):
    """Without scales: those of a fibre have another shape than those of a plain label."""

    def bare(axis):
        if isinstance(axis, Leaf):
            return Leaf(axis.size, axis.label)
        return Prod(tuple(map(bare, axis.factors))) if isinstance(axis, Prod) else Sum(tuple(map(bare, axis.parts)))

    specs = {n: Spec(tuple(map(bare, s.axes)), s.roles) for n, s in symmetry.specs.items()}
    return Symmetry(specs, symmetry.labels)


# --------------------------------------------------------------------------- random symmetries
@st.composite
def symmetries(draw):
    """Labels, a fibre over each of two, a real scale on three, in plain, product and concatenated axes."""
    size = st.integers(1, 4)
    labels = {"a": Label(draw(size)), "b": Label(draw(size), fixed=draw(st.booleans())), "c": Label(draw(size))}
    labels |= {"ad": Label(draw(st.integers(1, 3)), ("a",)), "bd": Label(draw(st.integers(1, 3)), ("b",))}
    scales = {n: Scale("real", labels[n].size, n) for n in ("a", "c", "ad")}

    @st.composite
    def leaf(draw, names):
        name = draw(st.sampled_from(names))
        if name is None:
            return Leaf(draw(st.sampled_from((2, 3))))
        exponent = draw(st.sampled_from((-1, 0, 0, 1))) if name in scales else 0
        return Leaf(labels[name].size, name, ((name, exponent),) if exponent else ())

    plain = leaf(["a", "c", None])
    fibred = st.one_of(*(st.tuples(leaf([n]), leaf([n + "d"])).map(Prod) for n in "ab"))
    any_axis = st.one_of(plain, fibred)
    axis = st.one_of(any_axis, st.tuples(plain, any_axis).map(Prod), st.tuples(fibred, any_axis).map(Sum))
    specs = {}
    for i in range(draw(st.integers(1, 3))):
        axes = draw(st.lists(axis, min_size=1, max_size=2))
        if len(axes) < 2 or not any(isinstance(a, Sum) for a in axes):  # or it gets large
            specs[f"t{i}"] = Spec(tuple(axes), ("out", "in")[: len(axes)])
    specs["vector"] = Spec((draw(plain),), ("out",))
    return Symmetry(specs, labels, scales)


@settings(max_examples=40, deadline=None)
@given(symmetries(), st.booleans(), st.sampled_from(("none", "exact")), st.integers(0, 100))
def test_any_symmetry_is_followed(symmetry, exact, scale, seed):
    torch.manual_seed(seed)
    g = permutation(symmetry, seed)
    if scale == "exact":
        g = symmetry.sample(torch.Generator().manual_seed(seed), scale_range=(0.5, 2))
    layer = randomised(GeneralLinear(symmetry, 1, 1, exact=exact, scale=scale, fold=1 + seed % 4), seed)
    assert error(layer, symmetry, g, channels=1) < 1e-12


@settings(max_examples=40, deadline=None)
@given(symmetries())
def test_blocks_and_back(symmetry):
    x = random_features(symmetry)
    back = merge_blocks(symmetry, split_blocks(symmetry, x))
    assert all(torch.equal(x[n], back[n]) for n in x)


# ------------------------------------------------------------------------------ the exact basis
def flatten(features):
    return torch.cat([x.flatten(1) for x in features.values()], 1)


def matrix(function, symmetry):
    """A linear map on one-channel features as a matrix."""
    sizes = {n: torch.Size(s.shape).numel() for n, s in symmetry.specs.items()}
    basis = torch.eye(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()), 1)
    x = {n: b.reshape(-1, 1, *symmetry.specs[n].shape) for n, b in zip(sizes, basis, strict=True)}
    return flatten(function(x)).T.contiguous()


def dimension(symmetry, scales=False, samples=16):
    """Number of independent equivariant linear maps: the kernel of ``M -> G M - M G``, by singular values."""
    n = sum(torch.Size(s.shape).numel() for s in symmetry.specs.values())
    eye, constraints = torch.eye(n, dtype=torch.float64), []
    for seed in range(samples):
        g = symmetry.sample(torch.Generator().manual_seed(seed), scale_range=(0.5, 2.0))
        g = g if scales else Element(g.perms, symmetry.identity().scales)
        rho = matrix(
            lambda x, g=g: {
                n: torch.func.vmap(lambda w, n=n: symmetry.act(g, {n: w})[n])(t[:, 0]) for n, t in x.items()
            },
            symmetry,
        )
        constraints.append(torch.kron(rho, eye) - torch.kron(eye, rho.T.contiguous()))
    squares = sum(c.T @ c for c in constraints)
    return int((torch.linalg.eigvalsh(squares) < 1e-8).sum())


def rank(symmetry, scale="none"):
    """Rank of the layer's parameters as linear maps, and their number."""
    layer = GeneralLinear(symmetry, 1, 1, exact=True, bias=False, scale=scale).double()
    count, maps = sum(p.numel() for p in layer.parameters()), []
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for p in layer.parameters():
            for i in range(p.numel()):
                p.view(-1)[i] = 1
                maps.append(matrix(layer, symmetry).flatten())
                p.view(-1)[i] = 0
    return int(torch.linalg.matrix_rank(torch.stack(maps))), count


def one_hidden_label():
    return symmetry_of(mlp([2, 3, 2], "relu"))


def fibred_case():
    d, out = Prod((Leaf(2, "h"), Leaf(2, "d"))), Leaf(2)
    return Symmetry(
        {"q": Spec((d, out), ("out", "in")), "b": Spec((d,), ("out",)), "h": Spec((Leaf(2, "h"),), ("out",))},
        {"h": Label(2), "d": Label(2, ("h",))},
    )


def repeated_label():
    h = Leaf(4, "h")  # four indices: no partition of (row, column) and (row, column) is lost
    return Symmetry({"hh": Spec((h, h), ("out", "in"))}, {"h": Label(4)})


def fixed_heads():
    d = Prod((Leaf(2, "h"), Leaf(3, "d")))
    return Symmetry({"v": Spec((d,), ("out",))}, {"h": Label(2, fixed=True), "d": Label(3, ("h",))})


@pytest.mark.parametrize(
    ("build", "known"),
    [(one_hidden_label, None), (fibred_case, None), (repeated_label, 15), (fixed_heads, 2 * 2 + 2)],
)
def test_the_exact_basis_has_as_many_terms_as_there_are_equivariant_maps(build, known):
    symmetry = build()
    found, count = rank(symmetry)
    assert found == count == dimension(symmetry)
    assert known is None or found == known


@pytest.mark.parametrize(("activation", "scale"), [("relu", "exact"), ("tanh", "exact"), ("tanh", "sign")])
def test_the_exact_basis_with_scales_too(activation, scale):
    symmetry = symmetry_of(mlp([2, 3, 3, 2], activation))
    found, count = rank(symmetry, scale)
    assert found == count == dimension(symmetry, scales=True)


def test_a_fibre_is_not_averaged_over_its_base():
    """(h, d) to (h, d): the same entry, the mean of its head, the mean of all; but not d across heads."""
    dims = (Dim(3, "h"), Dim(4, "d", (0,)))
    assert {(t.x, t.y) for t in terms(dims, dims)} == {((0, 1), (0, 1)), ((0, 1), (0, 2)), ((0, 1), (2, 3))}


def test_partition_linear_against_loops():
    """Slow reference: M[y, x] by the definition of a class, index by index."""
    x, y = (Dim(3, "a"), Dim(3, "a"), Dim(2)), (Dim(3, "a"), Dim(2))
    layer = randomised(PartitionLinear([x], [y], 1, 1))
    value = torch.randn(1, 1, 3, 3, 2, dtype=torch.float64)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for (i, term), weight in zip(layer.terms[0], layer.weights, strict=True):
        for a in range(3):
            for f in range(2):
                if i is None:
                    expected[a, f] += weight[0, f]
                    continue
                hits = [
                    (p, q)
                    for p in range(3)
                    for q in range(3)
                    if all(
                        (u == v) or (cu != cv)
                        for (u, cu) in ((p, term.x[0]), (q, term.x[1]), (a, term.y[0]))
                        for (v, cv) in ((p, term.x[0]), (q, term.x[1]), (a, term.y[0]))
                    )
                ]
                for g in range(2):
                    expected[a, f] += sum(weight[0, 0, g, f] * value[0, 0, p, q, g] for p, q in hits) / len(hits)
    torch.testing.assert_close(layer([value])[0][0, 0], expected)


# ---------------------------------------------------------------------------------- scales and frame
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_exact_scale_follows_the_whole_group(kind, exact):
    symmetry = SYMMETRIES[kind]()
    g = symmetry.sample(torch.Generator().manual_seed(1))
    layer = randomised(GeneralLinear(symmetry, CHANNELS, 2, exact=exact, scale="exact"))
    assert error(layer, symmetry, g) < 1e-12
    assert error(randomised(GeneralLinear(symmetry, CHANNELS, 2, exact=exact)), symmetry, g) > 1e-2


def stack(symmetry, function, **settings):
    first, second = (GeneralLinear(symmetry, c, e, **settings) for c, e in ((CHANNELS, 4), (4, 2)))
    return nn.Sequential(first, Pointwise(function), second)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_framed_layers_follow_positive_scales(kind):
    symmetry = SYMMETRIES[kind]()
    assert any(s.kind != "sign" for s in symmetry.scales.values())
    g = symmetry.sample(torch.Generator().manual_seed(1), scale_range=(1e-2, 1e2))
    g = Element(g.perms, {n: x.abs() for n, x in g.scales.items()})
    inner = randomised(stack(symmetry, torch.relu))
    assert error(Framed(inner, symmetry), symmetry, g) < 1e-9
    assert error(inner, symmetry, g) > 1e-2
    pooled = nn.Sequential(inner, GeneralPool(symmetry, 2))
    assert error(Framed(pooled, symmetry), symmetry, g) < 1e-9


def test_framed_layers_that_respect_signs_follow_the_whole_real_group():
    symmetry = symmetry_of(transformer())
    assert {s.kind for s in symmetry.scales.values()} == {"real"}
    g = symmetry.sample(torch.Generator().manual_seed(1))
    assert error(Framed(randomised(stack(symmetry, torch.tanh, scale="sign")), symmetry), symmetry, g) < 1e-9
    assert error(Framed(randomised(stack(symmetry, torch.tanh)), symmetry), symmetry, g) > 1e-2


def test_framed_gradients_transform_inversely():
    symmetry = SYMMETRIES["mlp"]()
    g = symmetry.sample(torch.Generator().manual_seed(1))
    x, dx = random_features(symmetry, 1), random_features(symmetry, 2, seed=5)

    def both(weights, gradients):
        return {n: torch.cat([weights[n], gradients[n]], 1) for n in weights}

    moved = both(act(symmetry, g, x), act(symmetry, g, dx, dual=True))
    inner = randomised(stack(symmetry, torch.relu))
    for told, dual, small in [((1, 2), False, True), ((1, 2), True, True), ((), False, False)]:
        module = Framed(inner, symmetry, gradients=told, dual=dual)
        left, right = flatten(module(moved)), flatten(act(symmetry, g, module(both(x, dx)), dual=dual))
        assert (((left - right).abs().max() / right.abs().max()).item() < 1e-9) == small


def test_a_batch_of_frames_is_each_networks_frame():
    symmetry = SYMMETRIES["cnn"]()
    weights = {n: x[:, 0] for n, x in random_features(symmetry).items()}
    both = frame_of(symmetry, weights)
    for b in range(BATCH):
        alone = frame_of(symmetry, {n: x[b : b + 1] for n, x in weights.items()})
        for n in both:
            torch.testing.assert_close(both[n][b], alone[n][0])


# ------------------------------------------------------------------------------------ use and misuse
@pytest.mark.parametrize("exact", [False, True])
def test_every_parameter_gets_a_gradient(exact):
    symmetry = residual()
    layer = randomised(GeneralLinear(symmetry, 2, 2, exact=exact))
    x = {n: t.requires_grad_() for n, t in random_features(symmetry, 2).items()}
    flatten(layer(x)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in x.values())


def test_the_cheap_layer_grows_linearly_and_the_exact_one_quadratically():
    def count(depth, exact):
        layer = GeneralLinear(symmetry_of(mlp([2] + [3] * depth + [2], "relu")), 2, 2, exact=exact)
        return sum(p.numel() for p in layer.parameters())

    cheap, exact = ([count(d, e) for d in (3, 4, 5)] for e in (False, True))
    assert cheap[2] - cheap[1] == cheap[1] - cheap[0]
    assert exact[2] - exact[1] > exact[1] - exact[0]


def test_features_that_do_not_fit_are_refused():
    symmetry = SYMMETRIES["mlp"]()
    layer = GeneralLinear(symmetry, CHANNELS, 2).double()
    x = random_features(symmetry)
    name = next(iter(x))
    with pytest.raises(SymmetryError, match="missing"):
        layer({n: t for n, t in x.items() if n != name})
    with pytest.raises(SymmetryError, match="unknown"):
        layer(x | {"more": x[name]})
    with pytest.raises(SymmetryError, match="shape"):
        layer(x | {name: x[name][..., :-1]})
    with pytest.raises(SymmetryError, match="channels"):
        layer(random_features(symmetry, 1))
    with pytest.raises(SymmetryError, match="differ in batch"):
        layer(x | {name: x[name][:1]})


def test_scale_of_a_symmetry_with_scaled_fixed_units():
    """A scale on units that are not permuted (a fixed leaf) is respected too."""
    unit = Leaf(3, None, (("s", 1),))
    read = Leaf(3, None, (("s", -1),))
    symmetry = Symmetry(
        {
            "w": Spec((unit, Leaf(2)), ("out", "in")),
            "b": Spec((unit,), ("out",)),
            "v": Spec((Leaf(2), read), ("out", "in")),
        },
        {},
        {"s": Scale("positive", 3)},
    )
    for exact in (False, True):
        layer = randomised(GeneralLinear(symmetry, CHANNELS, 2, exact=exact, scale="exact"))
        assert error(layer, symmetry, symmetry.sample(torch.Generator().manual_seed(1))) < 1e-12
    found, count = rank(symmetry, "exact")
    assert found == count == dimension(symmetry, scales=True)
