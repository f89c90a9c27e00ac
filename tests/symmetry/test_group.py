"""The group laws, what an element does to weights and gradients, and what a symmetry refuses."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learned_opt.params import renamed
from learned_opt.symmetry import Element, Label, Role, Scale, Spec, Symmetry, SymmetryError, independent
from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum

KINDS = ("positive", "sign", "real")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(symmetry: Symmetry, seed: int = 0) -> dict[str, Tensor]:
    g = seeded(seed)
    return {n: torch.randn(s.shape, generator=g, dtype=torch.float64) for n, s in symmetry.specs.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-13)


# -------------------------------------------------------------------------------- random symmetries
@st.composite
def symmetries(draw: st.DrawFn) -> Symmetry:
    """Labels u, h, d and c over h, e over h and d; their scales; tensors with all kinds of axes."""
    size = st.integers(1, 4)
    labels = {
        "u": Label(draw(size)),
        "h": Label(draw(size)),
        "d": Label(draw(size), ("h",)),
        "c": Label(draw(size), ("h",)),
        "e": Label(draw(size), ("h", "d")),
    }
    scales: dict[str, Scale] = {"fixed": Scale(draw(st.sampled_from(KINDS)), 3)}
    for name, label in labels.items():
        for kind in draw(st.sets(st.sampled_from(KINDS))):
            scales[f"{name}.{kind}"] = Scale(kind, label.size, name)

    def leaf(name: str | None) -> Leaf:
        mine = [n for n, s in scales.items() if s.label == name]
        exponents = draw(st.lists(st.sampled_from((-2, -1, 0, 1, 2)), min_size=len(mine), max_size=len(mine)))
        scale = tuple((n, e) for n, e in zip(mine, exponents, strict=True) if e)
        return Leaf(3 if name is None else labels[name].size, name, scale)

    def axis() -> Axis:
        shapes = {
            "leaf": lambda: leaf(draw(st.sampled_from(("u", "h", None)))),
            "heads": lambda: Prod((leaf("h"), leaf("d"))),
            "flatten": lambda: Prod((leaf("u"), Leaf(2), Leaf(2))),
            "qkv": lambda: Sum(tuple(Prod((leaf("h"), leaf(n))) for n in "ddc")),
            "neox": lambda: Prod((leaf("h"), Sum((leaf("d"), leaf("d"), leaf("c"))))),
            "nested": lambda: Prod((Prod((leaf("h"), leaf("d"))), Prod((leaf("e"), leaf("u"))))),
            "cat": lambda: Sum((leaf("u"), Leaf(2), leaf("u"), leaf("h"))),
        }
        return shapes[draw(st.sampled_from(sorted(shapes)))]()

    roles: tuple[Role, ...] = ("out", "in", "kernel")
    specs = {}
    for i in range(draw(st.integers(1, 3))):
        axes = tuple(axis() for _ in range(draw(st.integers(0, 3))))
        specs[f"w{i}"] = Spec(axes, roles[: len(axes)])
    # a grouped convolution: the groups stand on the written side, the read side is fibred over them
    specs["grouped"] = Spec((Prod((leaf("h"), leaf("d"))), leaf("c"), Leaf(2)), roles)
    return Symmetry(specs, labels, scales)


seeds = st.integers(0, 2**32)
few = settings(max_examples=40, deadline=None)


@few
@given(symmetries(), seeds)
def test_without_scales_it_permutes_alike_and_scales_nothing(symmetry: Symmetry, seed: int) -> None:
    plain, w = symmetry.without_scales, weights_of(symmetry, seed)
    g = symmetry.sample(torch.Generator().manual_seed(seed))
    only = Element(g.perms, symmetry.identity().scales)
    assert_same(plain.act(Element(g.perms, {}), w), symmetry.act(only, w), rtol=0)
    assert not plain.scales and plain.labels == symmetry.labels
    assert symmetry.without_scales is plain


@few
@given(symmetries(), seeds)
def test_identity_does_nothing(symmetry: Symmetry, seed: int) -> None:
    w = weights_of(symmetry, seed)
    assert_same(symmetry.act(symmetry.identity(), w), w, rtol=0)


@few
@given(symmetries(), seeds)
def test_composition_is_acting_twice(symmetry: Symmetry, seed: int) -> None:
    rng, w = seeded(seed), weights_of(symmetry, seed)
    a, b = symmetry.sample(rng), symmetry.sample(rng)
    for dual in (False, True):
        twice = symmetry.act(a, symmetry.act(b, w, dual=dual), dual=dual)
        assert_same(symmetry.act(symmetry.compose(a, b), w, dual=dual), twice)


@few
@given(symmetries(), seeds)
def test_inverse_undoes_on_both_sides(symmetry: Symmetry, seed: int) -> None:
    g, w, one = symmetry.sample(seeded(seed)), weights_of(symmetry, seed), symmetry.identity()
    inverse = symmetry.invert(g)
    assert_same(symmetry.act(inverse, symmetry.act(g, w)), w)
    for product in (symmetry.compose(g, inverse), symmetry.compose(inverse, g)):
        assert_same(dict(product.perms), dict(one.perms), rtol=0)
        assert_same(dict(product.scales), dict(one.scales))


@few
@given(symmetries(), seeds)
def test_composition_is_associative(symmetry: Symmetry, seed: int) -> None:
    rng = seeded(seed)
    a, b, c = (symmetry.sample(rng) for _ in range(3))
    left = symmetry.compose(symmetry.compose(a, b), c)
    right = symmetry.compose(a, symmetry.compose(b, c))
    assert_same(dict(left.perms), dict(right.perms), rtol=0)
    assert_same(dict(left.scales), dict(right.scales))


@few
@given(symmetries(), seeds)
def test_the_dual_action_keeps_the_pairing_with_gradients(symmetry: Symmetry, seed: int) -> None:
    g, w, grad = (
        symmetry.sample(seeded(seed)),
        weights_of(symmetry, seed),
        weights_of(symmetry, seed + 1),
    )
    moved, pulled = symmetry.act(g, w), symmetry.act(g, grad, dual=True)
    for name in w:
        terms, before = moved[name] * pulled[name], w[name] * grad[name]
        torch.testing.assert_close(terms.sum(), before.sum(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms.flatten().sort()[0], before.flatten().sort()[0])


@few
@given(symmetries(), seeds)
def test_pieces_and_matrices_round_trip(symmetry: Symmetry, seed: int) -> None:
    for name, w in weights_of(symmetry, seed).items():
        pieces, matrices, blocks = (
            symmetry.pieces(name, w),
            symmetry.split(name, w),
            symmetry.blocks[name],
        )
        assert torch.equal(symmetry.assemble(name, pieces), w)
        assert torch.equal(symmetry.merge(name, matrices), w)
        assert [m.shape for m in matrices] == [b.shape for b in blocks]
        assert sum(m.numel() for m in matrices) == w.numel()
        for block, piece, matrix in zip(blocks, pieces, matrices, strict=True):
            assert torch.equal(block.unfold(matrix)[0], piece)


@few
@given(symmetries(), seeds)
def test_plain_data_round_trip(symmetry: Symmetry, seed: int) -> None:
    assert Symmetry.from_dict(symmetry.to_dict()) == symmetry
    again = Symmetry.from_dict(json.loads(json.dumps(symmetry.to_dict())))
    assert again == symmetry
    w, g = weights_of(symmetry, seed), symmetry.sample(seeded(seed))
    assert_same(again.act(g, w), symmetry.act(g, w), rtol=0)


# -------------------------------------------------------------------- what an element does, by hand
def test_an_element_moves_old_indices_and_scales_new_ones() -> None:
    hidden = Leaf(3, "u", (("s", 1),))
    symmetry = Symmetry(
        {
            "w1": Spec((hidden, Leaf(1)), ("out", "in")),
            "w2": Spec((Leaf(1), replace(hidden, scale=(("s", -1),))), ("out", "in")),
        },
        {"u": Label(3)},
        {"s": Scale("positive", 3, "u")},
    )
    g = Element({"u": torch.tensor([2, 0, 1])}, {"s": torch.tensor([10.0, 2.0, 4.0])})
    w = {
        "w1": torch.tensor([[1.0], [2.0], [3.0]]),
        "w2": torch.tensor([[40.0, 80.0, 120.0]]),
        "other": torch.ones(2),
    }
    moved = symmetry.act(g, w)
    assert moved["w1"].tolist() == [[30.0], [2.0], [8.0]]
    assert moved["w2"].tolist() == [[12.0, 20.0, 20.0]]
    assert moved["other"] is w["other"]
    pulled = symmetry.act(g, w, dual=True)
    torch.testing.assert_close(pulled["w1"], torch.tensor([[0.3], [0.5], [0.5]]))


def test_fibres_follow_their_base_index_by_index() -> None:
    labels = {"h": Label(3), "d": Label(2, ("h",))}
    scaled = Leaf(2, "d", (("s", 1),))
    symmetry = Symmetry(
        {"w": Spec((Prod((Leaf(3, "h"), scaled)), Leaf(2)), ("out", "in"))},
        labels,
        {"s": Scale("real", 2, "d")},
    )
    g = symmetry.sample(seeded(3))
    w = weights_of(symmetry)["w"]
    expected = torch.empty_like(w)
    for h in range(3):
        for d in range(2):
            old = int(g.perms["h"][h]) * 2 + int(g.perms["d"][h, d])
            expected[h * 2 + d] = w[old] * g.scales["s"][h, d]
    torch.testing.assert_close(symmetry.act(g, {"w": w})["w"], expected)


def test_blocks_of_fused_and_grouped_tensors() -> None:
    labels = {"h": Label(2), "d": Label(3, ("h",)), "c": Label(4, ("h",)), "e": Label(5)}
    h, d, c, e = (Leaf(labels[n].size, n) for n in "hdce")
    symmetry = Symmetry(
        {
            "qkv": Spec((Sum((Prod((h, d)), Prod((h, d)), Prod((h, d)))), e), ("out", "in")),
            "neox": Spec((Prod((h, Sum((d, d, c)))), e), ("out", "in")),
            "proj": Spec((e, Prod((h, d))), ("out", "in")),
            "conv": Spec((Prod((h, d)), c, Leaf(3)), ("out", "in", "kernel")),
            "embed": Spec((Leaf(7), e), ("lookup", "out")),
            "gain": Spec((e,), ("gain",)),
            "bias": Spec((e,), ("out",)),
        },
        labels,
    )
    w = weights_of(symmetry)
    split = {n: symmetry.split(n, x) for n, x in w.items()}
    for matrix, part in zip(split["qkv"], w["qkv"].chunk(3), strict=True):
        assert torch.equal(matrix, part[None])
    for matrix, part in zip(split["neox"], w["neox"].view(2, 10, 5).split([3, 3, 4], 1), strict=True):
        assert torch.equal(matrix, part.reshape(1, -1, 5))
    assert torch.equal(split["conv"][0], w["conv"].view(2, 3, 12))  # a group a matrix
    assert torch.equal(split["embed"][0], w["embed"].T[None])
    assert split["proj"][0].shape == (1, 5, 6)
    assert split["bias"][0].shape == (1, 5, 1)
    kinds = {n: [b.kind for b in blocks] for n, blocks in symmetry.blocks.items()}
    assert kinds == {
        "qkv": ["matrix"] * 3, "neox": ["matrix"] * 3, "proj": ["matrix"], "conv": ["matrix"],
        "embed": ["embedding"], "gain": ["gain"], "bias": ["vector"],
    }  # fmt: skip


def test_samples_belong_to_the_group() -> None:
    labels = {"h": Label(6), "d": Label(5, ("h",))}
    scales = {kind: Scale(kind, 5, "d") for kind in KINDS}
    g = Symmetry({}, labels, scales).sample(seeded(), scale_range=(0.5, 3.0))
    assert g.perms["h"].sort()[0].tolist() == list(range(6))
    assert g.perms["d"].shape == (6, 5)
    assert torch.equal(g.perms["d"].sort(-1)[0], torch.arange(5).expand(6, 5))
    assert len({tuple(row) for row in g.perms["d"].tolist()}) > 1  # one for every base
    assert g.scales["sign"].unique().tolist() == [-1, 1]
    for kind in ("positive", "real"):
        size = g.scales[kind].abs()
        assert 0.5 <= size.min() < size.max() <= 3.0
    assert (g.scales["positive"] > 0).all()
    assert (g.scales["real"] > 0).any() and (g.scales["real"] < 0).any()


# --------------------------------------------------------------------------------- gradients, check
def two_layers(activation: nn.Module, kind: str | None) -> tuple[nn.Sequential, Symmetry]:
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3))
    scale = () if kind is None else (("s", 1),)
    hidden, read = Leaf(6, "u", scale), Leaf(6, "u", tuple((n, -e) for n, e in scale))
    specs = {
        "0.weight": Spec((hidden, Leaf(4)), ("out", "in")),
        "0.bias": Spec((hidden,), ("out",)),
        "2.weight": Spec((Leaf(3), read), ("out", "in")),
        "2.bias": Spec((Leaf(3),), ("out",)),
    }
    scales = {} if kind is None else {"s": Scale(kind, 6, "u")}
    return model, Symmetry(specs, {"u": Label(6)}, scales)


CASES = [(nn.ReLU(), "positive"), (nn.Tanh(), "sign"), (nn.Identity(), "real"), (nn.GELU(), None)]


@pytest.mark.parametrize(("activation", "kind"), CASES)
def test_gradients_are_contragredient(activation: nn.Module, kind: str | None) -> None:
    model, symmetry = two_layers(activation, kind)
    x = torch.randn(16, 4, generator=seeded(1), dtype=torch.float64)

    def loss(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, w, (x,)).square().mean()

    w, g = weights_of(symmetry, 2), symmetry.sample(seeded(3))
    moved = torch.func.grad(loss)(symmetry.act(g, w))
    assert_same(moved, symmetry.act(g, torch.func.grad(loss)(w), dual=True))
    if kind not in (None, "sign"):  # signs are their own inverses, so there the two actions agree
        with pytest.raises(AssertionError):
            assert_same(moved, symmetry.act(g, torch.func.grad(loss)(w)), rtol=1e-3)


@pytest.mark.parametrize(("activation", "kind"), CASES)
def test_check_tells_a_true_symmetry_from_a_false_one(activation: nn.Module, kind: str | None) -> None:
    x = torch.randn(16, 4, generator=seeded(1))
    for claimed in (None, *KINDS):
        model, symmetry = two_layers(activation, claimed)
        before = {n: p.clone() for n, p in model.named_parameters()}
        holds = claimed in (None, kind) or kind == "real"
        error = symmetry.check(model, x)
        assert error < 1e-12 if holds else error > 1e-3
        assert_same(dict(model.named_parameters()), before, rtol=0)  # the model is left as it is


def test_check_moves_statistics_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).train()
    unit = Leaf(6, "u")
    names = ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    specs = {n: Spec((unit,), ("out",)) for n in names}
    specs["0.weight"] = Spec((unit, Leaf(4)), ("out", "in"))
    symmetry = Symmetry(specs, {"u": Label(6)})
    x = torch.randn(16, 4, generator=seeded(1))
    sort = {"output": lambda y: y.sort(-1)[0]}  # the output units are permuted here
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert symmetry.check(model, x, **sort) < 1e-12
    assert symmetry.check(model.eval(), x, **sort) < 1e-12
    assert_same(dict(model.named_buffers()), before, rtol=0)
    del specs["1.running_var"]
    assert Symmetry(specs, {"u": Label(6)}).check(model, x, **sort) > 1e-3


def test_check_leaves_constants_as_they_are() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("gate", torch.ones(6))
            self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.mask.softmax(-1) @ self.a(x)).relu() * self.gate)

    unit, leaf = Leaf(6, "u"), ("out", "in")
    specs = {"a.weight": Spec((unit, Leaf(4)), leaf), "a.bias": Spec((unit,), ("out",))}
    specs["b.weight"] = Spec((Leaf(3), unit), leaf)
    assert Symmetry(specs, {"u": Label(6)}).check(Masked(), torch.randn(5, 4, generator=seeded())) < 1e-12


def test_check_of_a_function_without_a_size_is_nan() -> None:
    model, symmetry = two_layers(nn.ReLU(), "positive")
    assert math.isnan(symmetry.check(model, torch.full((2, 4), math.nan)))
    assert math.isnan(symmetry.check(model, torch.ones(2, 4), output=lambda y: 0 * y))


class Returning(nn.Module):
    """A two-layer network that hands over its output as ``kind`` says."""

    def __init__(self, model: nn.Module, kind: Any) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Any, shift: Tensor | None = None) -> Any:
        x = x["x"] if isinstance(x, dict) else x
        y = self.model(x)
        return self.kind(y, x, y if shift is None else y + shift)


KINDS_OF_OUTPUT = {
    "tuple": lambda y, x, z: (x, (y, None)),
    "dict": lambda y, x, z: {"small": 1e-6 * y, "large": 1e6 * x, "n": 3},
    "list": lambda y, x, z: [torch.zeros(3), z, y > 0, torch.empty(0, 2)],
    "named": lambda y, x, z: torch.return_types.max((y, y.argmax(-1))),
}


@pytest.mark.parametrize("kind", KINDS_OF_OUTPUT.values(), ids=KINDS_OF_OUTPUT)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.DataParallel])
def test_check_compares_all_that_a_model_returns_however_it_is_wrapped(kind: Any, wrap: Any) -> None:
    x = torch.randn(16, 4, generator=seeded(1))
    for claimed, holds in (("positive", True), ("sign", False)):
        model, symmetry = two_layers(nn.ReLU(), claimed)
        wrapped = wrap(Returning(model, kind))
        with pytest.raises(SymmetryError, match="the model has no"):
            symmetry.check(wrapped, x)
        named = renamed(symmetry, lambda n: f"model.{n}", lambda n: n)
        for found in (named.check(wrapped, {"x": x}), named.check(wrapped, x, keywords={"shift": x[:, :1]})):
            assert found < 1e-12 if holds else found > 1e-9


def test_check_wants_something_to_compare() -> None:
    model, symmetry = two_layers(nn.ReLU(), "positive")
    with pytest.raises(SymmetryError, match="returns no tensor"):
        symmetry.check(model, torch.ones(2, 4), output=lambda y: object())


# ---------------------------------------------------------------------------------- what is refused
def test_validate_names_the_tensors_and_both_shapes() -> None:
    _, symmetry = two_layers(nn.ReLU(), "positive")
    fitting = weights_of(symmetry)
    symmetry.validate(fitting)
    with pytest.raises(SymmetryError) as error:
        symmetry.validate({**fitting, "0.weight": torch.zeros(6, 5), "extra": torch.zeros(7)})
    for part in ("0.weight", "(6, 5)", "(6, 4)", "extra", "(7,)", "2 of 5", "infer_symmetry"):
        assert part in str(error.value)
    with pytest.raises(SymmetryError, match="and 4 more"):
        symmetry.validate({f"w{i}": torch.zeros(1) for i in range(12)})


def test_contradictions_are_refused() -> None:
    leaf = Leaf(3, "u")
    vector = {"w": Spec((leaf,), ("out",))}
    scaled = {"w": Spec((replace(leaf, scale=(("s", 1),)),), ("out",))}
    with pytest.raises(SymmetryError, match="w: .*size 3 .*'u'.* not declared"):
        Symmetry(vector)
    with pytest.raises(SymmetryError, match="w: .*size 3 .*'u'.* has size 4"):
        Symmetry(vector, {"u": Label(4)})
    with pytest.raises(SymmetryError, match="scale 's'"):
        Symmetry(scaled, {"u": Label(3)})
    with pytest.raises(SymmetryError, match="scale 's'"):
        Symmetry(scaled, {"u": Label(3)}, {"s": Scale("real", 3)})
    with pytest.raises(SymmetryError, match="'d' is over"):
        Symmetry({}, {"d": Label(2, ("h",))})
    with pytest.raises(SymmetryError, match="'d' is over"):
        Symmetry({}, {"d": Label(2, ("d",))})
    with pytest.raises(SymmetryError, match="'e' is over"):
        Symmetry({}, {"h": Label(2), "d": Label(2, ("h",)), "e": Label(2, ("d",))})
    with pytest.raises(SymmetryError, match="2 axes but 1 roles"):
        Spec((leaf, leaf), ("out",))


def test_a_fibre_without_its_base_is_refused() -> None:
    symmetry = Symmetry({"w": Spec((Leaf(2, "d"),), ("out",))}, {"h": Label(2), "d": Label(2, ("h",))})
    with pytest.raises(SymmetryError, match="'d' is over 'h', which its tensor does not have"):
        symmetry.act(symmetry.sample(seeded()), weights_of(symmetry))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Prod((s, Leaf(1)))])
def test_two_concatenations_in_one_product(wrap) -> None:
    """Pieces in product order, the first factor slowest, as the blocks are."""
    pair = Sum((Leaf(1), Leaf(2)))
    symmetry = Symmetry({"w": Spec((Prod((wrap(pair), pair)),), ("out",))})
    w = torch.arange(9)
    pieces = symmetry.pieces("w", w)
    assert [p.flatten().tolist() for p in pieces] == [[0], [1, 2], [3, 6], [4, 5, 7, 8]]
    assert [p.numel() for p in pieces] == [b.shape[1] for b in symmetry.blocks["w"]]
    assert torch.equal(symmetry.assemble("w", pieces), w)


# -------------------------------------------------------------------------------------- independent
def test_independent_gives_every_axis_its_own_permutation() -> None:
    shapes = {"w": (3, 4), "b": (3,), "conv": (2, 3, 5, 5), "scalar": ()}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    symmetry = independent(tensors)
    symmetry.validate(tensors)
    assert sorted(symmetry.labels) == ["b.0", "conv.0", "conv.1", "w.0", "w.1"]
    assert not symmetry.scales
    assert symmetry.specs["conv"].roles == ("out", "in", "kernel", "kernel")
    w, g = weights_of(symmetry), symmetry.sample(seeded())
    moved = symmetry.act(g, w)
    rows, cols = g.perms["w.0"], g.perms["w.1"]
    assert torch.equal(moved["w"], w["w"][rows][:, cols])
    assert torch.equal(moved["conv"], w["conv"][g.perms["conv.0"]][:, g.perms["conv.1"]])


def test_a_role_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(SymmetryError, match="'embedding' are unknown; a role is one of out, in, kernel, lookup, gain"):
        Spec((Leaf(3), Leaf(4)), ("embedding", "out"))
