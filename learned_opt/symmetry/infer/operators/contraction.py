"""Linear maps: matrix products, convolutions, attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.elementwise import softmax
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.operators.shape import spatial, unsqueeze
from learned_opt.symmetry.infer.trees import ONE, Tree, normal, product, size_of
from learned_opt.symmetry.labels import Role


@register_rule("linear")
def linear(t: Engine, x: Value, w: Value, b: Value | None = None) -> Value:
    """``x W^T + b``."""
    if b is not None:  # also where x is made of weights: a bias has the units that its matrix writes
        t.role(w, {0: "out", 1: "in"} if len(w.axes) == 2 else {0: "in"})
    lead = list(range(len(x.axes) - 1))
    if len(w.axes) == 1:
        y = t.einsum(x, [*lead, "i"], w, ["i"], lead)
    else:
        y = t.einsum(x, [*lead, "i"], w, ["o", "i"], [*lead, "o"])
    return y if b is None else t.add(y, b)


@register_rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(t: Engine, a: Value, b: Value) -> Value:
    """Batched matrix product, as broadcast by ``torch.matmul``."""
    n, m = len(a.axes), len(b.axes)
    if m == 1:
        lead = list(range(n - 1))
        return t.einsum(a, [*lead, "k"], b, ["k"], lead)
    if n == 1:
        lead = list(range(m - 2))
        return t.einsum(a, ["k"], b, [*lead, "k", "c"], [*lead, "c"])
    batch = list(range(max(n, m) - 2))
    return t.einsum(
        a, [*batch[len(batch) - n + 2 :], "r", "k"], b, [*batch[len(batch) - m + 2 :], "k", "c"], [*batch, "r", "c"]
    )


@register_rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(t: Engine, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """``c + a b``."""
    return t.add(matmul(t, a, b), c)


@register_rule("einsum")
def einsum(t: Engine, equation: str, operands: Sequence[Value], **kwargs: Any) -> Value:
    """Any einsum without diagonals; several operands are contracted from left to right."""
    indices, out = _indices(equation, [len(x.axes) for x in operands])
    if any(len(set(i)) < len(i) for i in [*indices, out]):
        raise UnknownOperator(f"einsum({equation})")
    x, own = operands[0], indices[0]
    for k, y in enumerate(operands[1:], 1):
        needed = {*out, *(i for later in indices[k + 1 :] for i in later)}
        kept = [i for i in dict.fromkeys([*own, *indices[k]]) if i in needed]
        kept = out if k == len(operands) - 1 else kept
        x, own = t.einsum(x, own, y, indices[k], kept), kept
    if len(operands) == 1:
        gone = [d for d, i in enumerate(own) if i not in out]
        x = t.reduce(x, gone, True) if gone else x
        x = replace(x, axes=tuple(x.axes[own.index(i)] for i in out))
    return x


def _indices(equation: str, ndims: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The indices of the operands and of the result, an ellipsis being numbered from the right."""
    ins, arrow, out = equation.replace(" ", "").partition("->")
    parts = ins.split(",")
    if not arrow:
        letters = [i for p in parts for i in p.replace("...", "")]
        out = ("..." if "..." in ins else "") + "".join(sorted(i for i in set(letters) if letters.count(i) == 1))
    spread = [n - len(p.replace("...", "")) if "..." in p else 0 for p, n in zip(parts, ndims, strict=True)]

    def spelt(part: str, count: int) -> list[str]:
        before, dots, after = part.partition("...")
        return [*before, *(f"...{k}" for k in range(count, 0, -1) if dots), *after]

    return [spelt(p, n) for p, n in zip(parts, spread, strict=True)], spelt(out, max(spread))


@register_rule("outer", "ger")
def outer(t: Engine, a: Value, b: Value) -> Value:
    """Outer product of two vectors."""
    return t.einsum(a, ["a"], b, ["b"], ["a", "b"])


@register_rule("bilinear")
def bilinear(t: Engine, x: Value, y: Value, w: Value, b: Value | None = None) -> Value:
    """``sum_ij x_i W_oij y_j + b_o``."""
    lead = list(range(len(x.axes) - 1))
    half = t.einsum(x, [*lead, "i"], w, ["o", "i", "j"], [*lead, "o", "j"])
    z = t.einsum(half, [*lead, "o", "j"], y, [*lead, "j"], [*lead, "o"])
    return z if b is None else t.add(z, b)


@register_rule("cdist", "_cdist_forward")
def cdist(t: Engine, x: Value, y: Value, p: float = 2.0, mode: Any = None) -> Value:
    """``|x_i - y_j|_p``: an even norm of differences."""
    apart = t.add(unsqueeze(t, x, -2), unsqueeze(t, y, len(y.axes) - 2))
    return t.reduce(apart, -1, False, 0 if p == 0 else 1, "even")


@register_rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def grouped_mm(
    t: Engine, x: Value, w: Value, offs: Value | None = None, bias: Value | None = None, *args: Any, **kwargs: Any
) -> Value:
    """Rows ``[n, k]`` in runs, each times the matrix of its expert ``w[e]`` ``[k, m]``.

    Experts and rows stay in place; the units of all experts are one label.
    """
    offs, bias = kwargs.get("offs", offs), kwargs.get("bias", bias)
    if len(x.axes) != 2 or len(w.axes) != 3 or offs is None or bias is not None:
        raise UnknownOperator("grouped_mm of other shapes")
    for axis in (x.axes[0], w.axes[0], offs.axes[0]):
        t.unscaled(axis)
        t.restrict(axis, "experts")
    t.role(w, {0: "out", 1: "in", 2: "out"})
    y = t.einsum(replace(x, axes=(ONE, x.axes[1])), ["n", "k"], replace(w, axes=w.axes[1:]), ["k", "m"], ["n", "m"])
    return replace(y, axes=(x.axes[0], y.axes[1]))


# ------------------------------------------------------------------------------------ convolutions
@register_rule("conv1d", "conv2d", "conv3d")
def conv(
    t: Engine, x: Value, w: Value, b: Value | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    """A convolution: channels as in a linear map, space and kernel fixed."""
    return _convolve(t, x, w, b, groups, out=0)


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    t: Engine, x: Value, w: Value, b: Value | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    """A transposed convolution: its weight is ``[in, out / groups, *kernel]``."""
    return _convolve(t, x, w, b, groups, out=1)


@register_rule("convolution")
def convolution(
    t: Engine, x: Value, w: Value, b: Value | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    """What the convolutions above decompose to."""
    return _convolve(t, x, w, b, groups, out=int(transposed))


def _convolve(t: Engine, x: Value, w: Value, b: Value | None, groups: int, out: int) -> Value:
    if groups > 1 and out == 1:
        if w.shape[:2] != [groups, 1]:
            raise UnknownOperator("a grouped transposed convolution")
        out = 0  # a kernel for each channel
    space = len(w.axes) - 2
    batched = len(x.axes) == space + 2
    roles: dict[int, Role] = {out: "out", 1 - out: "in"}
    t.role(w, roles | dict.fromkeys(range(2, space + 2), "kernel"))
    for axis in w.axes[2:]:
        t.unscaled(axis)
        t.restrict(axis, "a kernel")
    shape = t.meta.shape[-space:]
    spaces = [spatial(t, a, n, "space") for a, n in zip(x.axes[-space:], shape, strict=True)]
    channels = normal(x.axes[-space - 1])
    if groups == 1:
        t.contract(channels, w.axes[1 - out], "a convolution")
        units, summed = normal(w.axes[out]), w.axes[1 - out]
    else:
        units, summed = _grouped(t, channels, w, groups)
    y = Value((*(x.axes[:1] if batched else ()), normal(units), *spaces))
    t.note(replace(y, axes=(*y.axes, normal(summed))))  # before the sum, as in an einsum
    return y if b is None else t.add(y, _at_channel(t, b, space))


def _grouped(t: Engine, channels: Tree, w: Value, groups: int) -> tuple[Tree, Tree]:
    """Within a group of channels a linear map of its own; the groups are a batch. What is written, and summed over."""
    g, c = t.factor(channels, [groups, size_of(channels) // groups], "groups of channels")
    h, o = t.factor(w.axes[0], [groups, size_of(w.axes[0]) // groups], "groups of channels")
    t.contract(c, w.axes[1], "a convolution") if size_of(c) > 1 else None
    return product([t.joined(g, h, "groups of channels"), normal(o)]), w.axes[1]


def _at_channel(t: Engine, v: Value, space: int) -> Value:
    t.role(v, {0: "out"})
    return replace(v, axes=(v.axes[0], *[ONE] * space))


# ---------------------------------------------------------------------------------------- attention
@register_rule("scaled_dot_product_attention")
def attention(
    t: Engine, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """``softmax(q k^T + mask) v``; a causal mask fixes the positions."""
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        return _grouped_queries(t, q, k, v, attn_mask, is_causal)
    batch = list(range(max(len(z.axes) for z in (q, k, v)) - 2))

    def at(z: Value, *last: str) -> list[Any]:
        return [*batch[len(batch) - len(z.axes) + 2 :], *last]

    logits = t.einsum(q, at(q, "l", "d"), k, at(k, "s", "d"), [*batch, "l", "s"])
    if attn_mask is not None:
        logits = t.add(logits, attn_mask)
    if is_causal:
        for axis in logits.axes[-2:]:
            t.restrict(axis, "a causal mask")
    p = t.note(softmax(t, logits))
    return t.einsum(p, [*batch, "l", "s"], v, at(v, "s", "e"), [*batch, "l", "e"])


def _grouped_queries(t: Engine, q: Value, k: Value, v: Value, mask: Value | None, causal: bool) -> Value:
    """Query heads are (key heads) x (queries per key)."""
    heads, kv = q.shape[-3], k.shape[-3]
    split = t.factor(q.axes[-3], [kv, heads // kv], "grouped queries")
    q = replace(q, axes=(*q.axes[:-3], *split, *q.axes[-2:]))
    k, v = unsqueeze(t, k, -3), unsqueeze(t, v, -3)
    if mask is not None and len(mask.axes) > 2:
        mask = unsqueeze(t, mask, -3)
    y = attention(t, q, k, v, mask, 0.0, causal)
    return replace(y, axes=(*y.axes[:-4], product([normal(a) for a in y.axes[-4:-2]]), *y.axes[-2:]))
