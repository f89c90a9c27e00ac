"""Normalisations and pooling."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, Value
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.operators.shape import spatial
from learned_opt.symmetry.infer.trees import ONE, Tree, normal, product, size_of
from learned_opt.symmetry.labels import Role


@register_rule("batch_norm", "cudnn_batch_norm")
def batch_norm(
    t: Engine, x: Value, w: Value | None, b: Value | None, mean: Value | None, var: Value | None, training: bool,
    *args: Any,
) -> Value:  # fmt: skip
    """``(x - mean) / sqrt(var + eps) w + b`` per channel.

    In training the statistics are those of x: its sign passes, its positive scale would cancel but for eps and is
    not claimed. In evaluation they are tensors of the network, the mean scaling like x and the variance not.
    """
    for axis in (*x.axes[:1], *x.axes[2:]):
        t.unscaled(axis)
    c = normal(x.axes[1])
    roles: list[tuple[Value | None, Role]] = [(w, "gain"), (b, "out"), (mean, "out"), (var, "out")]
    for v, role in roles:
        if v is not None:
            t.role(v, {0: role})
            t.unify(c, v.axes[0], "a batch norm")
    c = normal(c)
    t.note(Value((c,)))  # the statistics, without the other axes
    if training or mean is None:
        c = t.unscaled(c, sign=False)
    if mean is not None:  # in training it is not read, but will be in evaluation
        t.agree(c, mean.axes[0], "a running mean")
    if var is not None:
        t.unscaled(var.axes[0])
    y = Value((x.axes[0], c, *x.axes[2:]))
    tail = [ONE] * (len(x.axes) - 2)
    if w is not None:
        y = t.mul(y, replace(w, axes=(w.axes[0], *tail)))
    return t.add(y, replace(b, axes=(b.axes[0], *tail))) if b is not None else y


@register_rule("_native_batch_norm_legit_no_training")
def batch_norm_eval(t: Engine, x: Value, w: Any, b: Any, mean: Any, var: Any, *args: Any) -> list[Any]:
    """As decomposed."""
    return [batch_norm(t, x, w, b, mean, var, False), None, None]


@register_rule("_native_batch_norm_legit_functional", "_native_batch_norm_legit", "native_batch_norm")
def batch_norm_native(t: Engine, x: Value, w: Any, b: Any, mean: Any, var: Any, training: Any, *args: Any) -> list[Any]:
    """As decomposed (``no_stats``: with ``training`` in the place of the mean)."""
    if isinstance(mean, bool):
        mean, var, training = None, None, mean
    return [batch_norm(t, x, w, b, mean, var, training), None, None, None, None]


def _normalised(t: Engine, x: Value, count: int, signs: bool, w: Value | None, b: Value | None) -> Value:
    """Normalise over the last ``count`` axes, whose labels the statistics lack."""
    lead = len(x.axes) - count
    t.note(Value(x.axes[:lead]))
    axes: list[Tree] = [t.unscaled(a, sign=d >= lead and not signs) for d, a in enumerate(x.axes)]
    y = Value(tuple(axes))
    y = y if w is None else t.mul(y, w)
    return y if b is None else t.add(y, b)


@register_rule("layer_norm")
def layer_norm(
    t: Engine, x: Value, shape: Sequence[int], w: Value | None = None, b: Value | None = None, *a: Any
) -> Value:
    """Ends every scale of the axes that it normalises over; its weight and bias start another."""
    return _normalised(t, x, len(shape), False, w, b)


@register_rule("native_layer_norm")
def native_layer_norm(t: Engine, x: Value, shape: Sequence[int], w: Any, b: Any, eps: float) -> list[Any]:
    """As decomposed."""
    return [layer_norm(t, x, shape, w, b), None, None]


@register_rule("rms_norm", "_fused_rms_norm")
def rms_norm(t: Engine, x: Value, shape: Sequence[int], w: Value | None = None, *a: Any) -> Value:
    """Lets signs through."""
    return _normalised(t, x, len(shape), True, w, None)


@register_rule("group_norm")
def group_norm(t: Engine, x: Value, groups: int, w: Value | None = None, b: Value | None = None, *a: Any) -> Value:
    """Statistics per group of channels: groups may be exchanged, and channels within a group."""
    g, _ = t.factor(x.axes[1], [groups, x.shape[1] // groups], "groups of channels")
    t.note(Value((x.axes[0], g)))
    y = Value(tuple(t.unscaled(axis) for axis in x.axes))
    tail = [ONE] * (len(x.axes) - 2)
    if w is not None:
        y = t.mul(y, replace(w, axes=(w.axes[0], *tail)))
    return t.add(y, replace(b, axes=(b.axes[0], *tail))) if b is not None else y


@register_rule("native_group_norm")
def native_group_norm(
    t: Engine, x: Value, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[Any]:
    """As decomposed."""
    return [group_norm(t, x, groups, w, b), None, None]


@register_rule("instance_norm")
def instance_norm(t: Engine, x: Value, w: Any, b: Any, mean: Any, var: Any, training: bool, *a: Any) -> Value:
    """Per channel and example: as batch norm, in training unless it reads the running statistics."""
    return batch_norm(t, x, w, b, mean, var, training)


# ------------------------------------------------------------------------------------------ pooling
def _pool(t: Engine, x: Value, shape: Sequence[int], space: int, linear: bool) -> Value:
    spaces = [spatial(t, a, n, "space") for a, n in zip(x.axes[-space:], shape[-space:], strict=True)]
    y = Value((*x.axes[:-space], *spaces))
    return y if linear else t.unary(y, 1, None)


def _space(name: str) -> int:
    return int(name[-2])


for _name in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
              "_adaptive_avg_pool2d", "adaptive_avg_pool3d"):  # fmt: skip

    @register_rule(_name)
    def average_pool(t: Engine, x: Value, *args: Any, _space: int = _space(_name), **kwargs: Any) -> Value:
        """Linear in the channels."""
        return _pool(t, x, t.meta.shape, _space, True)


for _name in ("max_pool1d", "max_pool2d", "max_pool3d"):

    @register_rule(_name)
    def max_pool(t: Engine, x: Value, *args: Any, _space: int = _space(_name), **kwargs: Any) -> Value:
        """Lets positive scales through."""
        return _pool(t, x, t.meta.shape, _space, False)


for _name in ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"):

    @register_rule(_name)
    def adaptive_max_pool(t: Engine, x: Value, *args: Any, _space: int = _space(_name), **kwargs: Any) -> list[Value]:
        """With its indices."""
        return _with_indices(t, _pool(t, x, t.meta[0].shape, _space, False))


@register_rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_indices(t: Engine, x: Value, kernel: Sequence[int], *args: Any, **kwargs: Any) -> list[Value]:
    """As decomposed."""
    return _with_indices(t, _pool(t, x, t.meta[0].shape, len(kernel), False))


def _with_indices(t: Engine, largest: Value) -> list[Value]:
    """Maxima, and their places, which do not scale."""
    return [largest, t.unary(largest, 0, None)]


@register_rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_linear1d",
               "upsample_bicubic2d", "_upsample_nearest_exact2d")  # fmt: skip
def upsample(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Linear in the channels."""
    return _pool(t, x, t.meta.shape, len(x.axes) - 2, True)


@register_rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(t: Engine, x: Value, groups: int) -> Value:
    """``[groups, c] -> [c, groups]``."""
    g, c = t.factor(x.axes[1], [groups, size_of(x.axes[1]) // groups], "groups of channels")
    return replace(x, axes=(x.axes[0], product([c, g]), *x.axes[2:]))
