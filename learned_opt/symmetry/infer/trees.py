"""Axes while their labels are being inferred: trees of units that are unified and refined.

An :class:`Atom` is a label in the making: a union-find node that other atoms join, that may turn out to be composite
(``tree``: heads x head_dim, q | k | v), and that loses freedoms (``fixed``: no permutation, ``scaleless``: no scale,
``addressed``: nothing may be over it). All of that only ever goes one way, so propagation can be repeated until
nothing changes.

An axis of a value is a tree over :class:`Unit` leaves in normal form: a concatenation of row-major products of units
(a product of a concatenation and a rest is the concatenation of the products). A unit is an atom together with the
exponents with which the value scales along it, as linear forms in the exponents of the network's tensors.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Number = int | Fraction
Variable = tuple[str, int, int]  # tensor, axis, position of the leaf on the axis
Origin = frozenset[tuple[str, int]]  # the axes of tensors that an axis of a weight is a view of


class Atom:
    """A label in the making."""

    __slots__ = ("addressed", "birth", "fixed", "parent", "scaleless", "size", "tree", "why")

    def __init__(self, size: int, fixed: bool = False, scaleless: bool = False, why: str = "") -> None:
        self.size, self.fixed, self.scaleless, self.addressed, self.why = size, fixed, scaleless, False, why
        self.parent: Atom | None = None
        self.tree: Tree | None = None
        self.birth: tuple[str, int] | None = None  # the view, and its dimension, that made this factor

    def root(self) -> "Atom":
        """The atom that this one has joined."""
        atom = self
        while atom.parent is not None:
            atom = atom.parent
        return atom


@dataclass(frozen=True, slots=True)
class Exponent:
    """How a value scales along a unit: powers of positive scales, parity of signs (both forms in variables)."""

    positive: tuple[tuple[Variable, Number], ...] = ()
    sign: frozenset[Variable] = frozenset()

    def __add__(self, other: "Exponent") -> "Exponent":
        if not other.positive and not other.sign:
            return self
        if not self.positive and not self.sign:
            return other
        form = dict(self.positive)
        for v, c in other.positive:
            form[v] = form.get(v, 0) + c
        return Exponent(tuple(sorted((v, c) for v, c in form.items() if c)), self.sign ^ other.sign)

    def times(self, degree: Number, odd: bool) -> "Exponent":
        """The exponent after a homogeneous function of this degree, odd or even."""
        if degree == 1 and odd:
            return self
        positive = tuple((v, c * degree) for v, c in self.positive) if degree else ()
        return Exponent(positive, self.sign if odd else frozenset())

    def __sub__(self, other: "Exponent") -> "Exponent":
        return self + other.times(-1, True)


NONE = Exponent()


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A leaf of an axis: an atom, how the value scales along it, and what it is a view of."""

    atom: Atom
    exponent: Exponent = NONE
    origin: Origin = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Row-major product of axes."""

    factors: tuple["Tree", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Concatenation:
    """Axes one after the other."""

    parts: tuple["Tree", ...]


Tree = Unit | Product | Concatenation
ONE = Product(())  # an axis of size 1


def size_of(axis: Tree) -> int:
    """Number of positions."""
    if isinstance(axis, Unit):
        return axis.atom.size
    if isinstance(axis, Product):
        return math.prod(size_of(f) for f in axis.factors)
    return sum(size_of(p) for p in axis.parts)


def normal(axis: Tree) -> Tree:
    """The axis with every atom replaced by what it has become, in normal form."""
    if isinstance(axis, Unit):
        atom = axis.atom.root()
        if atom.tree is not None:
            return normal(each(atom.tree, lambda u: Unit(u.atom, axis.exponent, axis.origin)))
        return axis if atom is axis.atom else Unit(atom, axis.exponent, axis.origin)
    if isinstance(axis, Product):
        return product([normal(f) for f in axis.factors])
    return concatenation([normal(p) for p in axis.parts])


def product(factors: Sequence[Tree]) -> Tree:
    """A product in normal form of axes in normal form."""
    flat = [g for f in factors for g in (f.factors if isinstance(f, Product) else (f,))]
    if len(flat) == 1:
        return flat[0]
    if flat and isinstance(flat[0], Concatenation):
        return concatenation([product([p, *flat[1:]]) for p in flat[0].parts])
    return Product(tuple(flat))


def concatenation(parts: Sequence[Tree]) -> Tree:
    """A concatenation in normal form of axes in normal form."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Concatenation) else (p,))]
    return flat[0] if len(flat) == 1 else Concatenation(tuple(flat))


def units(axis: Tree) -> Iterator[Unit]:
    """The leaves, in order."""
    if isinstance(axis, Unit):
        yield axis
    else:
        for a in axis.factors if isinstance(axis, Product) else axis.parts:
            yield from units(a)


def each(axis: Tree, f: Callable[[Unit], Unit]) -> Tree:
    """The same axis with every leaf replaced."""
    if isinstance(axis, Unit):
        return f(axis)
    if isinstance(axis, Product):
        return Product(tuple(each(a, f) for a in axis.factors))
    return Concatenation(tuple(each(a, f) for a in axis.parts))


def together(axis: Tree) -> Iterator[tuple[Unit, ...]]:
    """The alternatives of an axis: the units that index a position of it, part by part."""
    if isinstance(axis, Unit):
        yield (axis,)
    elif isinstance(axis, Concatenation):
        for p in axis.parts:
            yield from together(p)
    else:
        for choice in itertools.product(*(list(together(f)) for f in axis.factors)):
            yield sum(choice, ())


class Forest:
    """All atoms of one inference. ``changes`` counts what was learnt: a pass that adds none is the last."""

    def __init__(self) -> None:
        self.changes = 0
        self._atoms: dict[tuple[str, int], Atom] = {}
        self._place, self._count = "", 0

    def at(self, place: str) -> None:
        """Atoms made from now on belong to this node of the graph; a second visit gets the same again."""
        self._place, self._count = place, 0

    def atom(self, size: int, fixed: bool = False, scaleless: bool = False, why: str = "") -> Tree:
        """A new axis of one unit (no unit if its size is 1)."""
        if size == 1:
            return ONE
        key = (self._place, self._count)
        self._count += 1
        found = self._atoms.get(key)
        if found is None or found.size != size:
            found = self._atoms[key] = Atom(size, fixed, scaleless, why)
            self.changes += 1
        return normal(Unit(found))

    # -- what only ever goes one way
    def restrict(
        self, axis: Tree, why: str, *, fixed: bool = True, scaleless: bool = True, addressed: bool = True
    ) -> None:
        """Take freedoms away from every unit of the axis."""
        for u in units(normal(axis)):
            self._restrict(u.atom, fixed, scaleless, addressed, why)

    def _restrict(self, atom: Atom, fixed: bool, scaleless: bool, addressed: bool, why: str) -> None:
        if fixed and not atom.fixed:
            atom.fixed, atom.why = True, atom.why or why
            self.changes += 1
        if scaleless and not atom.scaleless:
            atom.scaleless = True
            self.changes += 1
        if addressed and not atom.addressed:
            atom.addressed = True
            self.changes += 1

    def _refine(self, atom: Atom, tree: Tree) -> None:
        atom.tree = tree
        self.changes += 1
        for u in units(normal(tree)):
            self._restrict(u.atom, atom.fixed, atom.scaleless, atom.addressed, atom.why)

    def _join(self, a: Atom, b: Atom) -> None:
        if a is not b:
            b.parent = a
            a.birth = a.birth or b.birth
            self.changes += 1
            self._restrict(a, b.fixed, b.scaleless, b.addressed, b.why)

    # -- unification and refinement
    def unify(self, a: Tree, b: Tree, why: str) -> bool:
        """Make two axes one: position i of the one is position i of the other. False: their structures do not fit,
        and both are fixed."""
        a, b = normal(a), normal(b)
        if size_of(a) != size_of(b):
            raise AssertionError(f"sizes {size_of(a)} and {size_of(b)} at {self._place}")
        if isinstance(a, Unit) and isinstance(b, Unit):
            self._join(a.atom, b.atom)
            return True
        if isinstance(a, Unit) or isinstance(b, Unit):
            unit, tree = (a, b) if isinstance(a, Unit) else (b, a)
            assert isinstance(unit, Unit)
            if any(u.atom is unit.atom for u in units(tree)):
                if not isinstance(tree, Product):
                    return self._misfit(a, b, why)
                for u in units(tree):  # all others are of size 1
                    if u.atom is not unit.atom:
                        self._refine(u.atom, ONE)
                return True
            self._refine(unit.atom, each(tree, lambda u: Unit(u.atom)))
            return True
        if isinstance(a, Concatenation) or isinstance(b, Concatenation):
            cuts = sorted({c for x in (a, b) for c in itertools.accumulate(map(size_of, _parts(x)))})
            sizes = [y - x for x, y in zip([0, *cuts], cuts, strict=False)]
            if len(sizes) == 1:
                return self._misfit(a, b, why)
            xs, ys = self.cut(a, sizes, why), self.cut(b, sizes, why)
        else:
            sizes = [size_of(f) for f in a.factors]
            xs, ys = list(a.factors), self.factor(b, sizes, why)
        return all([self.unify(x, y, why) for x, y in zip(xs, ys, strict=True)])

    def _misfit(self, a: Tree, b: Tree, why: str) -> bool:
        for x in (a, b):
            self.restrict(x, f"{why}: axes that do not fit each other")
        return False

    def _child(self, atom: Atom, size: int) -> Unit:
        child = Atom(size, atom.fixed, atom.scaleless, atom.why)
        child.addressed = atom.addressed
        return Unit(child)

    def cut(self, axis: Tree, sizes: Sequence[int], why: str) -> list[Tree]:
        """The axis as consecutive segments of the given sizes; where it cannot be cut there, it is fixed."""
        axis, sizes = normal(axis), list(sizes)
        if len(sizes) == 1:
            return [axis]
        if isinstance(axis, Unit):
            children = [self._child(axis.atom, n) for n in sizes]
            self._refine(axis.atom, Concatenation(tuple(children)))
            return [Unit(c.atom, axis.exponent, axis.origin) for c in children]
        if isinstance(axis, Concatenation):
            segments: list[Tree] = []
            todo = list(axis.parts)
            for n in sizes:
                taken: list[Tree] = []
                while n:
                    part = todo.pop(0)
                    if size_of(part) > n:
                        part, rest = self.cut(part, [n, size_of(part) - n], why)
                        todo.insert(0, rest)
                    taken.append(part)
                    n -= size_of(part)
                segments.append(concatenation(taken))
            return segments
        block = math.prod(size_of(f) for f in axis.factors[1:])
        if axis.factors and all(n % block == 0 for n in sizes):
            leading = self.cut(axis.factors[0], [n // block for n in sizes], why)
            return [product([p, *map(normal, axis.factors[1:])]) for p in leading]
        return self._fresh(axis, sizes, f"{why}: cut across a product")

    def factor(
        self, axis: Tree, sizes: Sequence[int], why: str, births: Sequence[tuple[str, int] | None] = ()
    ) -> list[Tree]:
        """The axis as a row-major product of axes of the given sizes; where it is none, it is fixed."""
        axis, result = normal(axis), []
        todo: list[Tree] = list(axis.factors) if isinstance(axis, Product) else [axis]
        for k, n in enumerate(sizes):
            taken: list[Tree] = []
            while n > 1:
                head = normal(todo.pop(0))
                m = size_of(head)
                if m == 1 and not isinstance(head, Unit):
                    continue
                if isinstance(head, Product):
                    todo = [*head.factors, *todo]
                elif n % m == 0:
                    taken.append(head)
                    n //= m
                elif m % n == 0 and (halves := self._halve(head, n, births[k] if births else None, why)):
                    taken.append(halves[0])
                    todo.insert(0, halves[1])
                    n = 1
                else:
                    return self._fresh(axis, sizes, f"{why}: a view across labels")
            result.append(product(taken))
        return [normal(r) for r in result]

    def _halve(self, head: Tree, n: int, birth: tuple[str, int] | None, why: str) -> tuple[Tree, Tree] | None:
        """``head`` as a product with a leading factor of size ``n``."""
        if isinstance(head, Unit):
            first, second = self._child(head.atom, n), self._child(head.atom, head.atom.size // n)
            first.atom.birth = birth
            self._refine(head.atom, Product((first, second)))
            return Unit(first.atom, head.exponent, head.origin), Unit(second.atom, head.exponent, head.origin)
        inner = size_of(head) // n
        if not isinstance(head, Concatenation) or any(size_of(p) % inner for p in head.parts):
            return None
        # (a x q | b x q) is (a | b) x q if the q agree, also in how they scale
        halves = [self.factor(p, [size_of(p) // inner, inner], why) for p in head.parts]
        for _, q in halves[1:]:
            self.agree(halves[0][1], q, why)
        return concatenation([h for h, _ in halves]), halves[0][1]

    def agree(self, a: Tree, b: Tree, why: str) -> None:
        """Unify two axes that must also scale alike (overridden where scales are tracked)."""
        self.unify(a, b, why)

    def _fresh(self, axis: Tree, sizes: Sequence[int], why: str) -> list[Tree]:
        self.restrict(axis, why)
        return [self.atom(n, True, True, why) for n in sizes]


def _parts(axis: Tree) -> tuple[Tree, ...]:
    return axis.parts if isinstance(axis, Concatenation) else (axis,)
