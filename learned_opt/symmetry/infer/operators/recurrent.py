"""Recurrent layers as exported: one operator for all layers and directions."""

from collections.abc import Sequence
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, Stack, UnknownOperator, Value
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
