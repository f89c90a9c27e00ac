"""Traps of inference, one small network each: what is claimed is what an expert writes, it is true, and no more is.

The tables are written by hand. ``more`` is what somebody in a hurry would claim, and it must fail.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_opt import Symmetry, infer_symmetry
from learned_opt.symmetry import Kind
from learned_opt.symmetry.infer import register_rule
from learned_opt.symmetry.infer.engine import Engine, Value
from learned_opt.symmetry.infer.network import Network, export
from learned_opt.symmetry.infer.operators import RULES
from learned_opt.symmetry.infer.trees import product
from learned_opt.symmetry.infer.verify import Check
from tests.symmetry.infer.expert_notation import Table, differences

EXACT, CHANGED = 1e-9, 1e-6


class Net(nn.Module):
    """A function of tensors: ``shapes`` of parameters, and buffers as they are."""

    def __init__(self, function: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def table(
    kinds: Mapping[str, Kind] | None = None, over: Mapping[str, tuple[str, ...]] | None = None, **lines: str
) -> Table:
    """Axes of each tensor, apart by commas; kinds of the scales; what labels are over."""
    t = Table()
    t.kinds |= kinds or {}
    t.over |= over or {}
    for name, line in lines.items():
        t.put(name, *(axis.strip() for axis in line.split(",")))
    return t


@dataclass(frozen=True)
class Trap:
    """``claimed`` is right; ``more`` must fail, on the inputs ``shown`` by those in which that shows."""

    model: Callable[[], nn.Module]
    claimed: Table
    more: Table | None
    inputs: tuple[Tensor, ...] = (torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),)
    shown: tuple[Tensor, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def hidden(function: Callable[[Tensor], Tensor], read: int = 6, **buffers: Tensor) -> Callable[[], nn.Module]:
    """``a`` writes 6 units, ``b`` reads what a function makes of them."""
    return lambda: Net(lambda m, x: F.linear(function(F.linear(x, m.a)), m.b), {"a": (6, 4), "b": (3, read)}, **buffers)


def net(function: Callable[..., Any], buffers: Mapping[str, Tensor] | None = None, **shapes: tuple[int, ...]) -> Any:
    """A constructor of :class:`Net`."""
    return lambda: Net(function, shapes, **{n: b.clone() for n, b in (buffers or {}).items()})


def two_names() -> nn.Module:
    """One matrix under two names."""
    model = Net(
        lambda m, x: F.linear(F.linear(F.linear(x, m.a).relu(), m.w).relu(), m.again), {"a": (6, 4), "w": (6, 6)}
    )
    model.again = model.w
    return Wrapped(model, nn.Linear(6, 3))


class Wrapped(nn.Sequential):
    """One after the other."""


class Modes(nn.Module):
    """Sums up in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b((h.cumsum(-1) if self.training else h).tanh())


def heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (2, 3))


def mixed(m: Any, h: Tensor) -> Tensor:
    return F.linear(heads(h).mT, m.w).mT.flatten(1)


def two_outputs(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, m.a).relu()
    return h, F.linear(h, m.b)


def places(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    value, place = F.conv1d(x, m.a).relu().max(2)
    return F.linear(value, m.b), place


def left_out(h: Tensor) -> Tensor:
    return h * h.new_empty(3, 1).bernoulli_(0.0)


def by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("btc,hdc->bthd", x, w) for w in (m.q, m.k, m.v))
    p = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return torch.einsum("bthd,hdo->bto", torch.einsum("bhts,bshd->bthd", p, v), m.o)


def counted(m: Any, x: Tensor, function: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    h = function(F.linear(x, m.a))
    m.seen.mul_(0.9).add_(h.mean(0))
    return F.linear(h * m.seen, m.b)


_ABC = {"a": (6, 4), "b": (3, 6)}
_HEADS = {"q": (2, 3, 4), "k": (2, 3, 4), "v": (2, 3, 4), "o": (2, 3, 5)}
_RELU: Mapping[str, Kind] = {"h": "positive"}
_SIGN: Mapping[str, Kind] = {"h": "sign"}
_REAL: Mapping[str, Kind] = {"h": "real"}
FIXED, MOVES = table(), table(a="h, .", b="., h")
TRAPS: dict[str, Trap] = {
    # one tensor at several places
    "a matrix under two names": Trap(
        two_names,
        table({"h": "positive"}, **{"0.a": "h^h, .", "0.w": "h^h, h/h", "1.weight": "., h/h"}),
        table(**{"0.a": "g, .", "0.w": "h, g", "1.weight": "., h"}),
    ),
    "a matrix and its transpose": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.T), w=(6, 4)),
        table(w="h, ."),
        table(_RELU, w="h^h, ."),
    ),
    "a matrix and its transpose around an odd function": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), w=(6, 4)),
        table(_SIGN, w="h^h, ."),
        table(w="h, i"),
    ),
    "a square matrix and its transpose": Trap(
        net(lambda m, x: F.linear(F.linear(F.linear(F.linear(x, m.a), m.w).tanh(), m.w.T), m.b), w=(6, 6), **_ABC),
        table({"g": "real", "h": "sign"}, a="g^g, .", w="h^h, g/g", b="., g^g"),
        table({"g": "real", "h": "real"}, a="g^g, .", w="h^h, g/g", b="., g^g"),
    ),
    "one layer for two branches": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.a).relu(), m.b) + F.linear(F.linear(x, m.a).tanh(), m.b), **_ABC),
        MOVES,
        table(_SIGN, a="h^h, .", b="., h/h"),
    ),
    "a bias shared by heads": Trap(
        net(lambda m, x: F.linear((heads(F.linear(x, m.a)) + m.c).tanh().flatten(1), m.b), c=(3,), **_ABC),
        table({"d": "sign"}, {"g": ("d",)}, a="g:2*d:3^d, .", b="., g:2*d:3/d", c="d^d"),
        table({"d": "sign"}, {"d": ("g",)}, a="g:2*d:3^d, .", b="., g:2*d:3/d"),
    ),
    "a bias for every head": Trap(
        net(lambda m, x: F.linear((heads(F.linear(x, m.a)) + m.c).tanh().flatten(1), m.b), c=(2, 3), **_ABC),
        table({"d": "sign"}, {"d": ("g",)}, a="g:2*d:3^d, .", b="., g:2*d:3/d", c="g, d^d"),
        table({"d": "positive"}, {"d": ("g",)}, a="g:2*d:3^d, .", b="., g:2*d:3/d", c="g, d^d"),
    ),
    "heads that are mixed and matched": Trap(  # found by random graphs: heads beside heads in a product
        net(lambda m, x: F.linear(F.gelu(mixed(m, F.linear(x, m.a)) * F.linear(x, m.a)), m.b), w=(2, 2), **_ABC),
        table({"g": "real", "d": "sign"}, a="g:2^g*d:3^d, .", b="., g:2*d:3", w="g/g, g/g"),
        table({}, {"d": ("g",)}, a="g:2*d:3, .", b="., g:2*d:3", w="g, g"),
    ),
    # what the example says nothing of
    "rows that no input reaches": Trap(
        net(lambda m, x: F.linear((F.linear(x, m.a) + m.p[: x.shape[1]]).relu(), m.b), p=(9, 6), **_ABC),
        table(_RELU, a="h^h, .", p="., h^h", b="., h/h"),
        table(_RELU, a="h^h, .", p="5 | t:4, h^h", b="., h/h"),
        (torch.randn(2, 5, 4),),
        (torch.randn(2, 9, 4),),
    ),
    "one of two outputs": Trap(net(two_outputs, **_ABC), FIXED, MOVES),
    "an output that does not count": Trap(
        net(two_outputs, **_ABC), table(_RELU, a="h^h, .", b="., h/h"), None, settings={"outputs": lambda y: y[1]}
    ),
    "summed up in training": Trap(lambda: Modes().train(), FIXED, table(**{"a.weight": "h, .", "b.weight": "., h"})),
    "not summed up in evaluation": Trap(
        lambda: Modes().eval(), table(_SIGN, **{"a.weight": "h^h, .", "b.weight": "., h/h"}), None
    ),
    # constants and buffers
    "zeros that a mean is added to": Trap(
        hidden(lambda h: torch.zeros(3, 6) + h.mean(-1, keepdim=True)),
        table(a="g, .", b="., h"),
        table(_RELU, a="g, .", b="., h/h"),
    ),
    "zeros added": Trap(hidden(lambda h: h + torch.zeros(6)), table(_REAL, a="h^h, .", b="., h/h"), None),
    "a buffer that is written": Trap(net(counted, {"seen": torch.arange(6.0)}, **_ABC), FIXED, MOVES),
    "a buffer that is written, beside an operator that has to be decomposed": Trap(
        net(lambda m, x: counted(m, x, lambda h: torch.lerp(h, h.tanh(), 0.3)), {"seen": torch.zeros(6)}, **_ABC),
        FIXED,
        None,  # it would hold at the zeros of the start
    ),
    "a constant that tells units apart": Trap(
        hidden(lambda h: h * torch.arange(1, 7.0)), table(_REAL, a="6^h, .", b="., 6/h"), MOVES
    ),
    "a constant that does not": Trap(
        hidden(lambda h: h.tanh() * torch.full((6,), 3.0)), table(_SIGN, a="h^h, .", b="., h/h"), None
    ),
    "an inner product, which reads rows": Trap(
        net(lambda m, x: F.linear(torch.inner(F.linear(x, m.a).relu(), m.w).relu(), m.b), w=(6, 6), **_ABC),
        table({"g": "positive", "h": "positive"}, a="h^h, .", w="g^g, h/h", b="., g/g"),
        table(a="h, .", w="h, g", b="., g"),
    ),
    # what is not the same every time
    "a branch that a draw leaves out": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.a) + left_out(F.linear(x, m.c)), m.b), c=(6, 4), **_ABC),
        table(_REAL, a="h^h, .", b="., h/h", c="h^h, ."),
        None,  # one scale for a, and another one for c, would hold as long as it is left out
    ),
    "a running mean that is still zero": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.a) - m.running_mean, m.b), {"running_mean": torch.zeros(6)}, **_ABC),
        table(_REAL, a="h^h, .", b="., h/h", running_mean="h^h"),
        table(_REAL, a="h^h, .", b="., h/h"),
    ),
    # whole numbers
    "cut to integers": Trap(
        hidden(lambda h: (5 * h).int().float()), MOVES, table(_RELU, a="h^h, .", b="., h/h")
    ),
    "truth values": Trap(hidden(lambda h: h.bool().float()), MOVES, None),
    "places of maxima as an output": Trap(
        net(places, a=(6, 4, 1), b=(3, 6)),
        table(_RELU, a="6^h, ., .", b="., 6/h"),
        table(_RELU, a="h^h, ., .", b="., h/h"),
        (torch.randn(3, 4, 5),),
    ),
    "places of maxima over units": Trap(hidden(lambda h: h + h.max(-1, keepdim=True)[1]), FIXED, MOVES),
    "maxima without their places": Trap(hidden(lambda h: h - h.max(-1, keepdim=True)[0]), MOVES, None),
    # addressed units
    "every other unit": Trap(hidden(lambda h: h[:, ::2].tanh(), 3), FIXED, table(a="h, .", b="., 3")),
    "rolled as if it were flat": Trap(
        net(lambda m, x: F.linear(F.linear(x, m.a.roll(1)).tanh(), m.b), **_ABC), FIXED, MOVES
    ),
    "rolled": Trap(hidden(lambda h: h.roll(1, -1)), FIXED, MOVES),
    "rolled heads": Trap(
        hidden(lambda h: heads(h).tanh().roll(1, 1).flatten(1)),
        table({"d": "sign"}, a="2*d:3^d, .", b="., 2*d:3/d"),
        table({"d": "sign"}, {"d": ("g",)}, a="g:2*d:3^d, .", b="., g:2*d:3/d"),
    ),
    "a running sum": Trap(hidden(lambda h: h.cumsum(-1).tanh()), FIXED, MOVES),
    "one unit that gates the others": Trap(
        hidden(lambda h: h[:, :1] * h[:, 1:], 5), table({"h": "real"}, a="1 | h:5^h, .", b="., h/h"), None
    ),
    "one unit expanded": Trap(
        hidden(lambda h: (h[:, :1].expand(3, 5) + h[:, 1:]).relu(), 5),
        table(a="1 | h:5, .", b="., h"),
        table(_RELU, a="1 | h:5^h, .", b="., h/h"),
    ),
    "one head expanded": Trap(
        hidden(lambda h: heads(h)[:, :1].expand(3, 2, 3).flatten(1)),
        table({"d": "real", "e": "real"}, {"g": ("d",)}, a="d:3^d | e:3^e, .", b="., g:2*d:3/d"),
        table({}, {"d": ("g",)}, a="g:2*d:3, .", b="., g:2*d:3"),
    ),
    "attention by einsum": Trap(
        net(by_einsum, **_HEADS),
        table(
            {"d": "real", "e": "real"}, {"d": ("h",), "e": ("h",)},
            q="h, d^d, .", k="h, d/d, .", v="h, e^e, .", o="h, e/e, .",
        ),
        table({}, {"d": ("h",)}, q="h, d, .", k="h, d, .", v="h, d, .", o="h:2, e:3, ."),
        (torch.randn(2, 5, 4),),
    ),
}  # fmt: skip


def loss_of(model: nn.Module, symmetry: Symmetry, trap: Trap) -> float:
    """How much the function changes under the group."""
    inputs = trap.shown or trap.inputs
    return Check(Network(model, export(model, inputs, {}, trap.settings.get("outputs")))).sampled(symmetry, 4)


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap(name: str) -> None:
    trap = TRAPS[name]
    model = trap.model()
    expert = trap.claimed.symmetry(model)
    symmetry = infer_symmetry(model, *trap.inputs, verify=False, **trap.settings)
    found = differences(symmetry, expert)
    assert not found, "\n" + "\n".join(found) + f"\n{symmetry}"
    assert loss_of(model, symmetry, trap) < EXACT
    if trap.more is not None:
        assert loss_of(model, trap.more.symmetry(model), trap) > CHANGED


# ------------------------------------------------------------------------------------- shared memory
def in_memory(views: Mapping[str, Callable[[Tensor], Tensor]]) -> nn.Module:
    """``a`` writes 6 units, ``c`` is added, ``b`` reads them; some are views of one buffer."""
    model = Net(lambda m, x: F.linear(F.linear(x, m.a).relu() + m.c, m.b), {"a": (6, 4), "b": (3, 6), "c": (6,)})
    memory = torch.randn(60)
    for name, view in views.items():
        model.register_parameter(name, nn.Parameter(view(memory)))
    return model


APART = {"a": lambda t: t[:24].view(6, 4), "b": lambda t: t[24:42].view(3, 6), "c": lambda t: t[42:48]}
OVERLAPS = {
    "by an end": APART | {"c": lambda t: t[40:46]},
    "inside of another": APART | {"a": lambda t: t[:48:2].view(6, 4), "b": lambda t: t[1:19].view(3, 6)},
    "transposed": APART | {"a": lambda t: t[24:48].view(4, 6).T},
}


def test_parameters_in_one_buffer_that_do_not_overlap() -> None:
    model = in_memory(APART)
    expert = table({"h": "positive"}, a="h^h, .", b="., h/h", c="h^h").symmetry(model)
    assert differences(infer_symmetry(model, torch.randn(2, 4)), expert) == []


@pytest.mark.parametrize("how", OVERLAPS)
def test_parameters_that_overlap_stay_in_place(how: str) -> None:
    model = in_memory(OVERLAPS[how])
    symmetry = infer_symmetry(model, torch.randn(2, 4))
    assert differences(symmetry, FIXED.symmetry(model)) == []


# ------------------------------------------------------------------------------ operators of one's own
@torch.library.custom_op("learned_opt_tests::cut_off", mutates_args=())
def cut_off(x: Tensor, heads: int) -> Tensor:
    """ReLU where the mean of a head is positive, else 0."""
    h = x.unflatten(-1, (heads, -1))
    return (h.relu() * (h.mean(-1, keepdim=True) > 0)).flatten(-2)


@cut_off.register_fake
def _(x: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


def per_head(t: Engine, x: Value, heads: int) -> Value:
    """Heads as wholes, units within; one scale for a head."""
    head, unit = t.factor(x.axes[-1], [heads, x.shape[-1] // heads], "heads")
    return t.unary(replace(x, axes=(*x.axes[:-1], product([head, t.unscaled(unit)]))), 1, None)


def careless(t: Engine, x: Value, heads: int) -> Value:
    """As if every unit were by itself."""
    return t.unary(x, 1, None)


def broken(t: Engine, x: Value) -> Value:
    """Takes too few arguments."""
    return x


@pytest.fixture
def with_rule(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[nn.Module, Tensor]]:
    def register(rule: Any) -> tuple[nn.Module, Tensor]:
        monkeypatch.setitem(RULES, "cut_off", None)  # so that it is taken out again
        if rule is None:
            del RULES["cut_off"]
        else:
            register_rule("cut_off")(rule)
        return hidden(lambda h: torch.ops.learned_opt_tests.cut_off(h, 2))(), torch.randn(3, 4)

    return register


def test_a_custom_operator_with_its_rule(with_rule: Any) -> None:
    model, x = with_rule(per_head)
    symmetry = infer_symmetry(model, x)
    expert = table({"g": "positive"}, {"d": ("g",)}, a="g:2^g*d:3, .", b="., g:2/g*d:3").symmetry(model)
    assert differences(symmetry, expert) == [] and symmetry.notes == ()
    assert symmetry.check(model, x) < EXACT


def test_a_custom_operator_without_rule_is_named_and_fixed(with_rule: Any) -> None:
    symmetry = infer_symmetry(*with_rule(None))
    assert differences(symmetry, FIXED.symmetry(with_rule(None)[0])) == []
    assert "learned_opt_tests.cut_off" in symmetry.notes[0]


def test_a_rule_that_claims_too_much_is_caught_by_the_check(with_rule: Any) -> None:
    model, x = with_rule(careless)
    assert infer_symmetry(model, x, verify=False).check(model, x) > CHANGED
    with pytest.warns(UserWarning, match="changed the function"):
        assert infer_symmetry(model, x).check(model, x) < EXACT


def test_a_rule_that_fails_claims_nothing(with_rule: Any) -> None:
    symmetry = infer_symmetry(*with_rule(broken))
    assert not symmetry.scales and all(g.fixed for g in symmetry.labels.values())
    assert "cut_off" in symmetry.notes[0] and "TypeError" in symmetry.notes[0]
