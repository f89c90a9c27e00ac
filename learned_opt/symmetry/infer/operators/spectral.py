"""Fourier transforms, and complex numbers: group elements are real, so that both parts of a number move alike."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learned_opt.symmetry.infer.engine import Engine, UnknownOperator, Value
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.operators.shape import spatial


def _transformed(t: Engine, x: Value, dims: Sequence[int]) -> Value:
    """Linear along axes that are fixed, and other axes afterwards."""
    axes = list(x.axes)
    for d in {d % len(axes) for d in dims}:
        axes[d] = spatial(t, axes[d], int(t.meta.shape[d]), "a Fourier transform")
    return replace(x, axes=tuple(axes))


@register_rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def fft(t: Engine, x: Value, n: int | None = None, dim: int = -1, norm: Any = None) -> Value:
    """Along one axis."""
    return _transformed(t, x, [dim])


@register_rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2")
def fft2(t: Engine, x: Value, s: Any = None, dim: Sequence[int] = (-2, -1), norm: Any = None) -> Value:
    """Along two axes."""
    return _transformed(t, x, dim)


@register_rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
def fftn(t: Engine, x: Value, s: Any = None, dim: Any = None, norm: Any = None) -> Value:
    """Along several axes: all of them, or as many as have sizes, unless they are named."""
    last = len(x.axes) if s is None else len(s)
    return _transformed(t, x, range(-last, 0) if dim is None else dim)


@register_rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fft_of(t: Engine, x: Value, dims: Sequence[int], *args: Any) -> Value:
    """As decomposed."""
    return _transformed(t, x, dims)


@register_rule("fft_fftshift", "fft_ifftshift")
def fftshift(t: Engine, x: Value, dim: Any = None) -> Value:
    """Positions moved."""
    dims = range(len(x.axes)) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    return _transformed(t, x, dims)


@register_rule("view_as_complex")
def view_as_complex(t: Engine, x: Value) -> Value:
    """The last axis, of size 2, becomes the two parts."""
    spatial(t, x.axes[-1], 2, "parts of a complex number")
    return replace(x, axes=x.axes[:-1])


@register_rule("view_as_real")
def view_as_real(t: Engine, x: Value) -> Value:
    """The two parts become an axis."""
    return replace(x, axes=(*x.axes, t.opaque(2, "parts of a complex number")))


@register_rule("real", "imag", "conj", "_conj", "conj_physical", "_conj_physical", "resolve_conj", "resolve_neg")
def part(t: Engine, x: Value) -> Value:
    """Linear over real factors."""
    return x


@register_rule("complex")
def from_parts(t: Engine, real: Value, imaginary: Value) -> Value:
    """Two parts that scale alike."""
    return t.add(real, imaginary)


@register_rule("angle")
def angle(t: Engine, x: Value) -> Value:
    """Does not see positive factors."""
    return t.unary(x, 0, None)


@register_rule("polar")
def polar(t: Engine, size: Value, phase: Value) -> Value:
    """Its size scales, its phase does not."""
    return t.mul(size, t.unary(phase, None, None))


@register_rule("stft", "istft")
def stft(t: Engine, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Its parts are known."""
    raise UnknownOperator("stft")
