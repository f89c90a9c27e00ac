"""The primitives that every operator's rule is composed of: what contractions, sums, products, elementwise functions
and reshapes do to the labels and to the exponents of a value. Composition is what keeps the rules right.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from learned_opt.symmetry.infer.trees import (
    NONE,
    ONE,
    Atom,
    Exponent,
    Forest,
    Number,
    Tree,
    Unit,
    Variable,
    concatenation,
    each,
    normal,
    product,
    size_of,
    units,
)
from learned_opt.symmetry.labels import Role

Parity = Literal["odd", "even"] | None


class UnknownOperator(Exception):
    """No rule says what this operator does to labels."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph: its axes; ``zero``: the constant zero, which any group element leaves alone;
    ``weight``: computed from constants and the network's tensors only, so that its axes are views of theirs."""

    axes: tuple[Tree, ...]
    zero: bool = False
    weight: bool = False

    @property
    def shape(self) -> list[int]:
        """Sizes of the axes."""
        return [size_of(a) for a in self.axes]


@dataclass(frozen=True, eq=False)
class Stack:
    """A tensor that is different tensors along one dimension: q, k and v after ``view(B, T, 3, H, D)``."""

    dim: int
    pieces: tuple[Value, ...]

    @property
    def shape(self) -> list[int]:
        """Sizes, that of the stack at ``dim``."""
        inner = self.pieces[0].shape
        return [*inner[: self.dim], len(self.pieces), *inner[self.dim :]]


class Constraints(Forest):
    """Labels, exponents and roles in the making: where they come from, and what axes require of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.positive: dict[Atom, list[dict[Variable, Number]]] = {}  # forms that must be 0
        self.sign: dict[Atom, list[frozenset[Variable]]] = {}  # forms that must be even
        self.roles: dict[tuple[str, int], Role] = {}
        self.values: list[Value] = []  # every value in which labels occur together
        self.met: list[Tree] = []  # axes that have met another one in a product or a contraction
        self.stacked: set[tuple[str, int]] = set()  # dimensions of views along which different tensors are stacked
        self.node = ""
        self.meta: Any = None  # the fake tensors that the node returns
        self.given_as: Any = ()  # the arguments of the node, as fake tensors
        self.results: set[Any] = set()  # which of several results are read

    def begin_pass(self) -> None:
        """Forget what depends on the trees, which may have changed."""
        self.positive, self.sign, self.values, self.met = {}, {}, [], []

    def begin(self, node: str, meta: Any) -> None:
        """What follows belongs to this node of the graph."""
        self.at(node)
        self.node, self.meta = node, meta

    # -- exponents
    def _require(self, u: Unit, positive: bool, sign: bool) -> None:
        if positive and u.exponent.positive:
            self.positive.setdefault(u.atom, []).append(dict(u.exponent.positive))
        if sign and u.exponent.sign:
            self.sign.setdefault(u.atom, []).append(u.exponent.sign)

    def unscaled(self, axis: Tree, *, positive: bool = True, sign: bool = True) -> Tree:
        """Require that nothing scales along the axis; the axis without exponents of that kind."""
        axis = normal(axis)
        for u in units(axis):
            self._require(u, positive, sign)

        def bare(u: Unit) -> Unit:
            kept = Exponent(() if positive else u.exponent.positive, frozenset() if sign else u.exponent.sign)
            return replace(u, exponent=kept)

        return each(axis, bare)

    def _matched(self, a: Tree, b: Tree, why: str) -> list[tuple[Unit, Unit]]:
        """Make two axes one; their units, pairwise. Axes that do not fit in some place are fixed as a whole (and no
        unit is given): the rest could not be paired."""
        self.unify(a, b, why)
        pairs = list(itertools.zip_longest(units(normal(a)), units(normal(b))))
        if all(u and v and u.atom is v.atom for u, v in pairs):
            return pairs
        self._misfit(a, b, why)
        return []

    def agree(self, a: Tree, b: Tree, why: str) -> None:
        """Make two axes one, and require that they scale alike."""
        for u, v in self._matched(a, b, why):
            self._require(replace(u, exponent=u.exponent - v.exponent), True, True)

    def joined(self, a: Tree, b: Tree, why: str, *, minus: bool = False) -> Tree:
        """Make two axes one; the exponents add (or subtract)."""
        pairs = self._matched(a, b, why)
        self.met.append(a)
        if not pairs:
            return each(normal(a), lambda u: replace(u, exponent=NONE))
        at = iter(pairs)

        def total(_: Unit) -> Unit:
            u, v = next(at)
            exponent = u.exponent - v.exponent if minus else u.exponent + v.exponent
            return Unit(u.atom, exponent, u.origin | v.origin)

        return each(normal(a), total)

    def contract(self, a: Tree, b: Tree, why: str) -> None:
        """Sum over two axes made one: what scales the one must unscale the other."""
        self.unscaled(self.joined(a, b, why))

    # -- roles
    def role(self, value: Value, roles: Mapping[int, Role]) -> None:
        """Say what axes of a weight are to the network (what is said first stays)."""
        if value.weight:
            for dim, role in roles.items():
                for u in units(value.axes[dim]):
                    for key in u.origin:
                        self.roles.setdefault(key, role)

    def note(self, value: Value) -> Value:
        """These labels occur together: in a value, or within a fused operator."""
        self.values.append(value)
        return value

    # -- where labels come from
    def opaque(self, size: int, why: str) -> Tree:
        """An axis that is neither permuted nor scaled."""
        return self.atom(size, True, True, why)

    def given(self, shape: Sequence[int], why: str = "input") -> Value:
        """A tensor that no group element moves: an input, or what an unknown operator returns."""
        return Value(tuple(self.opaque(n, why) for n in shape))

    def constant(self, profile: "Profile") -> Value:
        """A constant: free along axes where it does not vary, and altogether if it is zero."""
        if profile.zero:
            return Value(tuple(self.atom(n) for n in profile.shape), zero=True, weight=True)
        pairs = zip(profile.shape, profile.varies, strict=True)
        return Value(tuple(self.atom(n, fixed=v, why="a constant" if v else "") for n, v in pairs), weight=True)

    def opaque_one(self) -> Tree:
        """One position, as part of a concatenation (an axis of size 1 has no unit of its own)."""
        key = (self._place, self._count)
        self._count += 1
        found = self._atoms.get(key)
        if found is None or found.size != 1:
            found = self._atoms[key] = Atom(1, True, True, "one position")
            self.changes += 1
        return Unit(found.root())

    def kill(self, value: Any, why: str) -> None:
        """Fix every axis of a value (or of a nested list of values)."""
        if isinstance(value, Stack):
            value = value.pieces
        if isinstance(value, Value):
            for axis in value.axes:
                self.restrict(axis, why)
        elif isinstance(value, (list, tuple)):
            for v in value:
                self.kill(v, why)


class Engine(Constraints):
    """The primitives that the rules of operators are composed of: what a tensor operation does to labels."""

    def unary(self, x: Value, degree: Number | None, parity: Parity) -> Value:
        """An elementwise function: f(d x) = d^degree f(x) for d > 0 (None: for no d but 1), f(-x) = -f(x) or f(x)."""

        def through(axis: Tree) -> Tree:
            axis = self.unscaled(axis, positive=degree is None, sign=parity is None)
            power = 1 if degree is None else degree
            return each(axis, lambda u: replace(u, exponent=u.exponent.times(power, parity == "odd")))

        stays = parity == "odd" or (degree is not None and degree > 0)  # f(0) = 0
        return replace(x, axes=tuple(map(through, x.axes)), zero=x.zero and stays)

    def add(self, *terms: Any) -> Value:
        """Broadcast sum (also a choice between them): all must scale alike, and where one is spread, not at all."""
        xs = [x for x in terms if isinstance(x, Value)]
        self._bias_roles(xs)
        loud = [x for x in xs if not x.zero]
        shifted = any(x != 0 for x in terms if not isinstance(x, Value))
        for x, y in itertools.combinations(xs, 2):
            common = min(len(x.axes), len(y.axes))
            self._aligned([(x.axes[d], y.axes[d]) for d in range(-common, 0)], x, y)
        axes: list[Tree] = []
        for d in range(-max(len(x.axes) for x in xs), 0):
            own = [x for x in xs if len(x.axes) >= -d and size_of(x.axes[d]) > 1]
            if not own:
                axes.append(ONE)
                continue
            first = next((x for x in own if not x.zero), own[0])
            for x in own:
                if x is not first and not (x.zero or first.zero):
                    self.agree(first.axes[d], x.axes[d], "a sum")
                elif x is not first:
                    self.unify(first.axes[d], x.axes[d], "a sum")
            axis = normal(first.axes[d])
            if shifted or len([x for x in own if not x.zero]) < len(loud):
                axis = self.unscaled(axis)
            axes.append(axis)
        return Value(tuple(axes), not loud and not shifted, all(x.weight for x in xs))

    def _bias_roles(self, xs: list[Value]) -> None:
        if not all(x.weight for x in xs):
            for x in xs:
                wide = [d for d in range(len(x.axes)) if size_of(x.axes[d]) > 1]
                self.role(x, {d: "out" if d == wide[-1] else "lookup" for d in wide})

    def mul(self, x: Value, y: Value, *, inverse: bool = False) -> Value:
        """Broadcast product (or quotient): exponents add (subtract)."""
        if x.weight != y.weight:
            for z in (x, y):
                self.role(z, dict.fromkeys(range(len(z.axes)), "gain"))
        axes: list[Tree] = []
        common = min(len(x.axes), len(y.axes))
        self._aligned([(x.axes[d], y.axes[d]) for d in range(-common, 0)], x, y)
        for d in range(-max(len(x.axes), len(y.axes)), 0):
            a, b = (z.axes[d] if len(z.axes) >= -d else ONE for z in (x, y))
            if size_of(a) > 1 and size_of(b) > 1:
                axes.append(self.joined(a, b, "a product", minus=inverse))
            elif size_of(b) > 1:
                axes.append(
                    each(normal(b), lambda u: replace(u, exponent=u.exponent.times(-1 if inverse else 1, True)))
                )
            else:
                axes.append(normal(a))
        return Value(tuple(axes), x.zero or (y.zero and not inverse), x.weight and y.weight)

    def einsum(self, x: Value, xi: Sequence[Any], y: Value, yi: Sequence[Any], out: Sequence[Any]) -> Value:
        """``einsum("xi,yi->out", x, y)``, indices being anything hashable."""
        if not (_owned(x) and _owned(y)):
            for z, zi in ((x, xi), (y, yi)):
                self.role(z, {d: "out" if i in out else "in" for d, i in enumerate(zi)})
        else:  # a product of weights, such as a low-rank update: the left one reads what the right one writes
            self.role(x, {d: "in" for d, i in enumerate(xi) if i not in out})
            self.role(y, {d: "out" for d, i in enumerate(yi) if i not in out})
        if x.zero or y.zero:  # of zeros nothing is required: a state at the start
            sizes = {i: size_of(a) for z, zi in ((x, xi), (y, yi)) for i, a in zip(zi, z.axes, strict=True)}
            sizes |= {i: n for z, zi in ((x, xi), (y, yi)) for i, n in zip(zi, z.shape, strict=True) if n > 1}
            return Value(tuple(self.atom(sizes[i]) for i in out), True, x.weight and y.weight)
        at: dict[Any, Tree] = {}
        for i in dict.fromkeys([*xi, *yi]):
            axes = [z.axes[list(zi).index(i)] for z, zi in ((x, xi), (y, yi)) if i in zi]
            wide = [a for a in axes if size_of(a) > 1]
            axis = normal(wide[0]) if wide else ONE
            if len(wide) == 2:
                axis = self.joined(wide[0], wide[1], "a contraction")
            at[i] = axis if i in out else self.unscaled(axis)
        self.note(Value(tuple(at.values())))  # before the sum: what is summed over stands beside what is written
        self._aligned([(x.axes[list(xi).index(i)], y.axes[list(yi).index(i)]) for i in at if i in xi and i in yi], x, y)
        return Value(tuple(at[i] for i in out), False, x.weight and y.weight)

    def _aligned(self, pairs: Sequence[tuple[Tree, Tree]], x: Value, y: Value) -> None:
        """Note the axes that two values share index by index. A label is over another only where both are so shared:
        in ``x @ x.T`` head_dim meets that of another head."""
        if all(_owned(z) or not z.weight for z in (x, y)):
            self.note(Value(tuple(a for a, b in pairs if size_of(a) > 1 and size_of(b) > 1)))

    def reduce(
        self, x: Value, dims: Any = None, keep: bool = False, degree: Number | None = 1, parity: Parity = "odd"
    ) -> Value:
        """A symmetric reduction that is homogeneous: sum, mean (odd), norm (even), maximum (neither)."""
        n = len(x.axes)
        listed = dims if isinstance(dims, (list, tuple)) else [dims]
        gone = {d % n for d in listed} if dims is not None and listed else set(range(n))
        y = self.unary(x, degree, parity)
        for d in gone:
            self.unscaled(x.axes[d], sign=parity != "even")
        axes = [ONE if d in gone else a for d, a in enumerate(y.axes) if keep or d not in gone]
        return replace(y, axes=tuple(axes))

    def view(self, x: Value, shape: Sequence[int]) -> Value | Stack:
        """Split and merge row-major axes."""
        ins, outs = x.shape, [int(n) for n in shape]
        marked = next((d for d in range(len(outs)) if (self.node, d) in self.stacked), None)
        groups = [(product([normal(x.axes[d]) for d in i]), o) for i, o in _groups(ins, outs)]
        # per piece of the stack (one if there is none)
        axes: list[list[Tree]] = [[] for _ in range(1 if marked is None else outs[marked])]
        for axis, dims in groups:
            sizes = [outs[d] for d in dims]
            if marked in dims:
                at = dims.index(marked)
                stacked, rest = sizes[at], sizes[at + 1 :]
                inner = int(torch.Size(rest).numel())
                *before, last = self.factor(axis, [*sizes[:at], stacked * inner], "a view")
                parts = self.cut(last, [inner] * stacked, "a stack")
                for piece, part in zip(axes, parts, strict=True):
                    piece += [*before, *(self.factor(part, rest, "a view") if rest else [])]
            else:
                births = [(self.node, d) for d in dims]
                split = self.factor(axis, sizes, "a view", births)
                for piece in axes:
                    piece += split
        values = tuple(replace(x, axes=tuple(map(normal, a))) for a in axes)
        return Stack(marked, values) if marked is not None else values[0]

    def segments(self, x: Value, dim: int, sizes: Sequence[int]) -> list[Value]:
        """Consecutive segments along a dimension."""
        dim %= len(x.axes)
        self.mark_stack(x.axes[dim], sizes)
        parts = self.cut(x.axes[dim], sizes, "a slice") if len(sizes) > 1 else [normal(x.axes[dim])]
        parts = [p if size_of(p) > 1 else self.single(p) for p in parts]
        return [replace(x, axes=(*x.axes[:dim], p, *x.axes[dim + 1 :])) for p in parts]

    def single(self, axis: Tree) -> Tree:
        """An axis of one position: its unit is picked out, so it must not scale."""
        self.unscaled(axis)
        return ONE

    def mark_stack(self, axis: Tree, sizes: Sequence[int]) -> None:
        """A factor made by a view, addressed one by one: different tensors are stacked there; infer again so."""
        axis = normal(axis)
        birth = axis.atom.birth if isinstance(axis, Unit) and not axis.atom.fixed else None
        if birth and 1 in sizes and birth not in self.stacked:
            self.stacked.add(birth)
            self.changes += 1

    def collapse(self, x: Any) -> Any:
        """A stack as one tensor: its pieces share their labels."""
        if not isinstance(x, Stack):
            return x
        axes = list(x.pieces[0].axes)
        for piece in x.pieces[1:]:
            for a, b in zip(axes, piece.axes, strict=True):
                if size_of(a) > 1:
                    self.agree(a, b, "a stack used as one tensor")
        axes = [normal(a) for a in axes]
        axes.insert(x.dim, self.opaque(len(x.pieces), "a stack"))
        return replace(x.pieces[0], axes=tuple(axes), zero=all(p.zero for p in x.pieces))

    def join(self, xs: Sequence[Value], dim: int) -> Value:
        """Concatenate along a dimension; along the others all must agree."""
        dim %= len(xs[0].axes)
        self._bias_roles(list(xs))
        loud = [x for x in xs if not x.zero] or list(xs)
        axes = []
        for d in range(len(xs[0].axes)):
            if d == dim:
                present = [a for a in (normal(x.axes[d]) for x in xs) if size_of(a)]
                parts = [a if size_of(a) > 1 else self.opaque_one() for a in present]
                axes.append(concatenation(parts))
                continue
            for x in xs:
                if x is not loud[0] and size_of(x.axes[d]) > 1:
                    unite = self.unify if x.zero else self.agree
                    unite(loud[0].axes[d], x.axes[d], "a concatenation")
            axes.append(normal(loud[0].axes[d]))
        return Value(tuple(axes), all(x.zero for x in xs), all(x.weight for x in xs))


@dataclass(frozen=True)
class Profile:
    """What matters of a constant: its shape, along which axes it varies, and whether it is zero."""

    shape: tuple[int, ...]
    varies: tuple[bool, ...]
    zero: bool

    @classmethod
    def of(cls, t: Tensor) -> "Profile":
        """Look at the values of a constant."""
        if t.is_complex():
            t = torch.view_as_real(t)[..., 0]  # a complex constant is not analysed further than this
            return cls(tuple(t.shape), (True,) * t.ndim, False)
        zero = bool(t.numel()) and not bool(t.any())
        varies = tuple(n > 1 and not zero and bool((t != t.narrow(d, 0, 1)).any()) for d, n in enumerate(t.shape))
        return cls(tuple(t.shape), varies, zero)


def _owned(x: Value) -> bool:
    return x.weight and any(u.origin for a in x.axes for u in units(normal(a)))


def _groups(ins: list[int], outs: list[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of input and output dimensions with the same number of positions."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(ins) or j < len(outs):
        gi: list[int] = []
        gj: list[int] = []
        p = q = 1
        while p != q or not (gi or gj) or p == 1:
            if i < len(ins) and (p <= q):
                p, gi, i = p * ins[i], [*gi, i], i + 1
            elif j < len(outs):
                q, gj, j = q * outs[j], [*gj, j], j + 1
            elif i < len(ins):
                p, gi, i = p * ins[i], [*gi, i], i + 1
            else:
                break
        result.append((gi, gj))
    return result
