"""Recurrent layers as exported: one operator for all layers and directions, or one for a single step of a cell."""

from collections.abc import Sequence
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, Stack, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.contraction import linear
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.trees import Tree, concatenation, normal, size_of


def _recurrent(
    t: Engine, x: Value, start: Sequence[Value], params: Sequence[Value], has_bias: bool, layers: int,
    bidirectional: bool, gates: int, odd: int, batch_first: bool, relu: bool = False,
) -> list[Any]:  # fmt: skip
    """All gates share the hidden label; the sign of a hidden unit is that of its odd gate (the candidate).

    ReLU units (``relu``) have a positive scale instead. An initial state other than zero is not covered, nor are
    projections.
    """
    directions, per = 1 + bidirectional, 4 if has_bias else 2
    if not all(h.zero for h in start):
        raise UnknownOperator("a recurrent layer with an initial state")
    if len(params) != per * layers * directions:
        raise UnknownOperator("a recurrent layer with projections")
    for axis in x.axes[:-1]:
        t.unscaled(axis)
    t.restrict(x.axes[-2] if batch_first else x.axes[0], "time")
    current, last = normal(x.axes[-1]), []
    for layer in range(layers):
        outputs: list[Tree] = []
        for direction in range(directions):
            first = (layer * directions + direction) * per
            outputs.append(_cell(t, x.axes[:-1], current, params[first : first + per], gates, odd, relu))
        last += outputs
        current = concatenation([normal(o) for o in outputs])
    batch = [x.axes[0 if batch_first else 1]] if len(x.axes) > 2 else []
    state = Stack(0, tuple(Value((*batch, h)) for h in last))
    return [Value((*x.axes[:-1], current)), state, state]


def _cell(t: Engine, lead: Sequence[Tree], x: Tree, params: Sequence[Value], gates: int, odd: int, relu: bool) -> Tree:
    """``lead``: time and batch, which stand beside both sides of the products."""
    w_ih, w_hh, *biases = params
    t.role(w_ih, {0: "out", 1: "in"})
    t.role(w_hh, {0: "out", 1: "in"})
    hidden = size_of(w_ih.axes[0]) // gates
    t.contract(x, w_ih.axes[1], "a recurrent layer")
    parts = [t.cut(v.axes[0], [hidden] * gates, "gates") for v in (w_ih, w_hh, *biases)]
    for b in biases:
        t.role(b, {0: "out"})
    h = normal(parts[0][odd])
    for gate in range(gates):
        for part in (p[gate] for p in parts):
            if gate == odd:
                t.agree(h, part, "gates")
            else:
                t.unify(h, part, "gates")
                t.unscaled(part)
    h = t.unscaled(h, positive=not relu, sign=relu)
    t.contract(h, w_hh.axes[1], "a recurrent layer")
    for summed in (x, h):
        t.note(Value((*lead, normal(h), normal(summed))))  # before the sum, as in an einsum
    return t.note(Value((normal(h),))).axes[0]


@register_rule("lstm")
def lstm(
    t: Engine, x: Value, start: Any, params: Any, has_bias: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False,
) -> list[Any]:  # fmt: skip
    """Gates i, f, g, o; g is odd."""
    return _recurrent(t, x, start, params, has_bias, layers, bidirectional, 4, 2, batch_first)


@register_rule("gru")
def gru(
    t: Engine, x: Value, start: Value, params: Any, has_bias: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False,
) -> list[Any]:  # fmt: skip
    """Gates r, z, n; n is odd."""
    return _recurrent(t, x, [start], params, has_bias, layers, bidirectional, 3, 2, batch_first)[:2]


@register_rule("rnn_tanh")
def rnn_tanh(
    t: Engine, x: Value, start: Value, params: Any, has_bias: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False,
) -> list[Any]:  # fmt: skip
    """One odd gate."""
    return _recurrent(t, x, [start], params, has_bias, layers, bidirectional, 1, 0, batch_first)[:2]


@register_rule("rnn_relu")
def rnn_relu(
    t: Engine, x: Value, start: Value, params: Any, has_bias: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool = False,
) -> list[Any]:  # fmt: skip
    """One gate that lets positive scales through."""
    return _recurrent(t, x, [start], params, has_bias, layers, bidirectional, 1, 0, batch_first, relu=True)[:2]


@register_rule("packed_recurrent")
def packed_recurrent(
    t: Engine, kind: str, data: Value, sizes: Sequence[int], start: Any, params: Any, bias: bool,
    layers: int, dropout: float, train: bool, bidirectional: bool,
) -> list[Any]:  # fmt: skip
    """Any of them on the rows of a packed sequence."""
    gates, odd = {"lstm": (4, 2), "gru": (3, 2)}.get(kind, (1, 0))
    y, state, _ = _recurrent(
        t, data, start, params, bias, layers, bidirectional, gates, odd, False, relu=kind == "rnn_relu"
    )
    batch = t.opaque(sizes[0], "a batch") if sizes[0] > 1 else t.atom(1)
    state = Stack(0, tuple(Value((batch, h.axes[0])) for h in state.pieces))
    return [y, state, state if kind == "lstm" else t.given([0])]


@register_rule("recurrent")
def recurrent(
    t: Engine, kind: str, x: Value, start: Any, params: Any, bias: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> list[Any]:  # fmt: skip
    """Any of them, as they are exported."""
    settings = (params, bias, layers, dropout, train, bidirectional, batch_first)
    if kind == "lstm":
        return lstm(t, x, start, *settings)
    rules = {"gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}
    return [*rules[kind](t, x, start[0], *settings), t.given([0])]


# ------------------------------------------------------------------------------------------ single steps
def _gates(t: Engine, x: Value, h: Value, params: Sequence[Value | None], count: int) -> list[list[Value]]:
    """What the input and the state write, gate by gate."""
    w_ih, w_hh, b_ih, b_hh = [*params, None, None][:4]
    assert w_ih is not None and w_hh is not None
    both = linear(t, x, w_ih, b_ih), linear(t, h, w_hh, b_hh)
    size = h.shape[-1]
    return [t.segments(y, -1, [size] * count) for y in both]


@register_rule("lstm_cell")
def lstm_cell(t: Engine, x: Value, state: Sequence[Value], *params: Value | None) -> list[Value]:
    """Gates i, f, g, o of one step."""
    h, c = state
    i, f, g, o = (t.add(a, b) for a, b in zip(*_gates(t, x, h, params, 4), strict=True))
    i, f, o = (t.unary(z, None, None) for z in (i, f, o))
    c = t.add(t.mul(f, c), t.mul(i, t.unary(g, None, "odd")))
    return [t.note(t.mul(o, t.unary(c, None, "odd"))), t.note(c)]


@register_rule("gru_cell")
def gru_cell(t: Engine, x: Value, h: Value, *params: Value | None) -> Value:
    """Gates r, z, n of one step."""
    (ri, zi, ni), (rh, zh, nh) = _gates(t, x, h, params, 3)
    r, z = (t.unary(t.add(a, b), None, None) for a, b in ((ri, rh), (zi, zh)))
    n = t.unary(t.add(ni, t.mul(r, nh)), None, "odd")
    return t.add(n, t.mul(z, t.add(h, n)))


@register_rule("rnn_tanh_cell")
def rnn_tanh_cell(t: Engine, x: Value, h: Value, *params: Value | None) -> Value:
    """One odd gate of one step."""
    return t.unary(_one_gate(t, x, h, params), None, "odd")


@register_rule("rnn_relu_cell")
def rnn_relu_cell(t: Engine, x: Value, h: Value, *params: Value | None) -> Value:
    """One gate of one step that lets positive scales through."""
    return t.unary(_one_gate(t, x, h, params), 1, None)


def _one_gate(t: Engine, x: Value, h: Value, params: Sequence[Value | None]) -> Value:
    (a,), (b,) = _gates(t, x, h, params, 1)
    return t.add(a, b)


@register_rule("cell")
def cell(t: Engine, kind: str, x: Value, state: Sequence[Value], params: Sequence[Value]) -> list[Any]:
    """Any of them, as they are exported."""
    if kind == "lstm_cell":
        return lstm_cell(t, x, state, *params)
    rules = {"gru_cell": gru_cell, "rnn_tanh_cell": rnn_tanh_cell, "rnn_relu_cell": rnn_relu_cell}
    return [rules[kind](t, x, state[0], *params), t.given([0])]
