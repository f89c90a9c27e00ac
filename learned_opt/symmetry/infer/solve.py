"""From labels and exponent equations to a :class:`~learned_opt.symmetry.Symmetry`.

For every atom the exponents of its scales satisfy linear equations over the rationals (positive scales) and over the
field of two elements (signs). A basis of solutions of each, made sparse, are the scales; a positive solution whose
parities solve the second system too is a real scale: any factor but zero.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum
from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.infer import trees
from learned_opt.symmetry.infer.graph import Propagation
from learned_opt.symmetry.infer.trees import Atom, Number, Tree, Unit, Variable, normal, together, units
from learned_opt.symmetry.labels import UNKNOWN, Kind, Label, Role, Scale, Spec

Generator = dict[Variable, int]


def symmetry_of(parameters: Mapping[str, Sequence[int]], t: Propagation, *, declare_fixed: bool = False) -> Symmetry:
    """What the propagation has found, under the names of the model.

    Args:
        parameters: shape of every parameter; those that the graphs do not have are fixed.
        t: labels, exponents and roles.
        declare_fixed: give every fixed axis a (fixed) label too, so that it can be spoken of.
    """
    return _Assembly(parameters, t, declare_fixed).symmetry()


class _Assembly:
    def __init__(self, parameters: Mapping[str, Sequence[int]], t: Propagation, declare_fixed: bool) -> None:
        self.t, self.parameters, self.declare_fixed = t, parameters, declare_fixed
        for name in t.tensors:
            if name not in t.read:  # no value has it: the example says nothing of its axes
                for axis in t.axes[name]:
                    t.restrict(axis, "not used by the model on the example inputs")
        self.axes = {n: [normal(a) for a in axes] for n, axes in t.axes.items()}
        self.roles = {n: _roles(n, len(a), t.roles) for n, a in self.axes.items()}
        self.places: dict[Atom, list[Variable]] = {}  # where each atom stands
        for name, axes in self.axes.items():
            for i, axis in enumerate(axes):
                for k, u in enumerate(units(axis)):
                    self.places.setdefault(u.atom, []).append((name, i, k))
        self._fix_unread_segments()
        self.scales = {a: self._generators(a, places) for a, places in self.places.items()}
        self.over = fibres(self.places, t)
        self._drop_implied()
        self.names = self._label_names()

    def _fix_unread_segments(self) -> None:
        axes = [a for v in self.t.values if not v.weight for a in v.axes] + self.t.met
        read = {u.atom for a in axes for u in units(normal(a))}
        for atom in self.places:
            if atom not in read and not (atom.fixed and atom.scaleless):
                self.t.restrict(Unit(atom), "not used by the model on the example inputs")

    # -- scales
    def _generators(self, atom: Atom, places: list[Variable]) -> list[tuple[Kind, Generator]]:
        if atom.scaleless:
            return []
        positive = _nullspace([dict(f) for f in self.t.positive.get(atom, [])], places)
        signs = _nullspace_mod2(self.t.sign.get(atom, []), places)
        found: list[tuple[Kind, Generator]] = []
        spanned: list[frozenset[Variable]] = []
        for g in positive:
            odd = frozenset(v for v, c in g.items() if c % 2)
            real = not _rest(odd, signs)
            if real:
                spanned = _extend(spanned, odd)
            found.append(("real" if real and odd else "positive", self._oriented(g)))
        for s in signs:
            rest = _rest(s, spanned)
            if rest:
                spanned = _extend(spanned, s)
                found.append(("sign", {v: -1 if self._reads(v) else 1 for v in sorted(s, key=places.index)}))
        return found

    def _drop_implied(self) -> None:
        """A scale of heads that scales of head_dim, one per head, already contain."""
        for base, found in self.scales.items():
            inner = [g for a, over in self.over.items() if base in over for g in self.scales[a]]
            if found and inner:
                self.scales[base] = [g for g in found if not self._implied(g, inner)]

    def _implied(self, scale: tuple[Kind, Generator], inner: Sequence[tuple[Kind, Generator]]) -> bool:
        kind, g = scale
        usable = {"positive": ("positive", "real"), "real": ("real",), "sign": ("sign", "real")}[kind]
        others = [self._on_pieces(h) for k, h in inner if k in usable]
        mine = self._on_pieces(g)
        if kind == "sign":
            odd = [frozenset(v for v, c in h.items() if c % 2) for h in [mine, *others]]
            return not _rest(odd[0], odd[1:])
        places = list(dict.fromkeys(v for h in [mine, *others] for v in h))
        columns = [(f"{k}", 0, 0) for k in range(len(others) + 1)]
        rows: list[dict[Variable, Number]] = [
            {c: h.get(v, 0) for c, h in zip(columns, [*others, mine], strict=True)} for v in places
        ]
        return any(columns[-1] in solution for solution in _nullspace(rows, columns))

    def _on_pieces(self, g: Generator) -> dict[Variable, int]:
        """A generator's exponent on every piece of every tensor: ``(tensor, piece, 0)``."""
        result: dict[Variable, int] = {}
        for name in dict.fromkeys(v[0] for v in g):
            per_axis = []
            for i, axis in enumerate(self.axes[name]):
                position = {id(u): k for k, u in enumerate(units(axis))}
                per_axis.append([sum(g.get((name, i, position[id(u)]), 0) for u in alt) for alt in together(axis)])
            for piece, exponents in enumerate(itertools.product(*per_axis)):
                if sum(exponents):
                    result[(name, piece, 0)] = sum(exponents)
        return result

    def _reads(self, v: Variable) -> bool:
        return self.roles[v[0]][v[1]] in ("in", "kernel", "lookup")

    def _oriented(self, g: Generator) -> Generator:
        """+1 where the scale is written, -1 where it is read."""
        votes = sum(c * (-1 if self._reads(v) else 1) for v, c in g.items())
        first = next(iter(g.values()))
        return {v: -c for v, c in g.items()} if votes < 0 or (votes == 0 and first < 0) else g

    # -- names
    def _label_names(self) -> dict[Atom, str]:
        wanted = {b for over in self.over.values() for b in over}
        names: dict[Atom, str] = {}
        taken: set[str] = set()
        for atom, places in self.places.items():
            scaled_in_fibre = bool(self.scales[atom] and self.over[atom])
            if atom.size > 1 and (not atom.fixed or atom in wanted or scaled_in_fibre or self.declare_fixed):
                names[atom] = _unique(self._name(places), taken)
        return names

    def _name(self, places: list[Variable]) -> str:
        """After the first tensor that writes it."""
        rank: dict[Role, int] = {"out": 0, "gain": 1, "in": 2, "lookup": 3, "kernel": 4}
        name, i, k = min(places, key=lambda v: rank[self.roles[v[0]][v[1]]])
        several = len({u.atom for u in units(self.axes[name][i])}) > 1
        return _module(name) + (f"/{k}" if several else "")

    # -- the result
    def symmetry(self) -> Symmetry:
        leaf_scales: dict[Variable, list[tuple[str, int]]] = {}
        scales: dict[str, Scale] = {}
        for atom, found in self.scales.items():
            for kind, g in found:
                writer = max(g, key=lambda v: g[v] > 0 and not self._reads(v))
                name = _unique(_module(writer[0]), scales)
                scales[name] = Scale(kind, atom.size, self.names.get(atom))
                for v, c in g.items():
                    leaf_scales.setdefault(v, []).append((name, c))
        labels = {
            name: Label(atom.size, tuple(self.names[b] for b in self.over[atom]), atom.fixed)
            for atom, name in self.names.items()
        }
        specs = {}
        for name, axes in self.axes.items():
            built = []
            for i, axis in enumerate(axes):
                count = iter(range(10**9))
                built.append(self._axis(axis, lambda i=i, c=count, n=name: leaf_scales.get((n, i, next(c)), [])))
            specs[name] = Spec(tuple(built), self.roles[name])
        for name, shape in self.parameters.items():
            if name not in specs:
                specs[name] = Spec(tuple(map(Leaf, shape)), _roles(name, len(shape), {}))
        order = {n: i for i, n in enumerate(self.parameters)}
        ordered = dict(sorted(specs.items(), key=lambda item: order.get(item[0], len(order))))
        return Symmetry(ordered, labels, scales, tuple(self._notes()))

    def _axis(self, axis: Tree, scale: Any) -> Axis:
        if isinstance(axis, Unit):
            return Leaf(axis.atom.size, self.names.get(axis.atom), tuple(scale()))
        if isinstance(axis, trees.Product):
            return Prod(tuple(self._axis(f, scale) for f in axis.factors)) if axis.factors else Leaf(1)
        return Sum(tuple(self._axis(p, scale) for p in axis.parts))

    def _notes(self) -> Iterable[str]:
        for name, count in self.t.unknown.items():
            yield f"{name} ({count}x) {UNKNOWN}"


def _module(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.endswith((".weight", ".bias")) else name


def _unique(name: str, taken: Any) -> str:
    candidate, k = name, 1
    while candidate in taken:
        k += 1
        candidate = f"{name}#{k}"
    if isinstance(taken, set):
        taken.add(candidate)
    return candidate


def _roles(name: str, ndim: int, found: Mapping[tuple[str, int], Role]) -> tuple[Role, ...]:
    """The roles that the operators gave; what is left open is written, read, kernel in this order."""
    roles: list[Role] = []
    known = [found.get((name, i)) for i in range(ndim)]
    standard: list[Role] = [] if {"gain", "lookup"} & set(known) else ["out", "in"]
    for role in known:
        free = [r for r in standard if r not in known and r not in roles]
        roles.append(role or (free[0] if free else "kernel"))
    return tuple(roles)


# --------------------------------------------------------------------------------------- fibres
def fibres(atoms: Iterable[Atom], t: Propagation) -> dict[Atom, list[Atom]]:
    """For every label those that it is over: wherever it occurs, in any value, they occur beside it (once)."""
    atoms = list(atoms)
    known = set(atoms)
    company: dict[Atom, set[Atom]] = {}
    for combination in {c for v in t.values for c in _combinations(v)}:
        for i, a in enumerate(combination):
            if a in known:
                beside = {b for j, b in enumerate(combination) if j != i and b is not a and combination.count(b) == 1}
                company[a] = company[a] & beside if a in company else beside
    over = {a: {b for b in company.get(a, ()) if b in known and not b.addressed and b.size > 1} for a in atoms}
    rank = {a: k for k, a in enumerate(atoms)}
    for a in atoms:  # of two that always come together one is the base: the earlier
        over[a] -= {b for b in over[a] if a in over[b] and rank[a] < rank[b]}
    for _ in atoms:  # what a base is over must be listed too
        smaller = {a: {b for b in over[a] if over[b] <= over[a]} for a in atoms}
        if smaller == over:
            break
        over = smaller
    free = {a for a in atoms if not (a.fixed and a.scaleless)}
    return {a: sorted(over[a], key=rank.__getitem__) if a in free else [] for a in atoms}


def _combinations(v: Any) -> set[tuple[Atom, ...]]:
    """The atoms that index one entry of a value, for every combination of alternatives of its axes.

    Axes are concatenations seldom, so that the product is small; where it is not, an atom's company is counted axis
    by axis, which can only lose some.
    """
    per_axis = [[tuple(u.atom for u in alt) for alt in together(normal(a))] for a in v.axes]
    per_axis = [list(dict.fromkeys(alternatives)) for alternatives in per_axis]
    if math.prod(len(a) for a in per_axis) > 256:
        return {alt for alternatives in per_axis for alt in alternatives}
    result: set[tuple[Atom, ...]] = {()}
    for alternatives in per_axis:
        result = {r + alt for r in result for alt in alternatives}
    return result


# ------------------------------------------------------------------------------------ linear algebra
def _nullspace(forms: list[dict[Variable, Number]], variables: Sequence[Variable]) -> list[Generator]:
    """Sparse integer basis of the exponents for which every form is zero."""
    order = {v: i for i, v in enumerate(variables)}
    pivots: dict[Variable, dict[Variable, Fraction]] = {}  # pivot = - sum of the rest; the last variable is the pivot
    for form in forms:
        row = {v: Fraction(c) for v, c in form.items() if c and v in order}
        while row:
            pivot = max(row, key=order.__getitem__)
            if pivot not in pivots:
                pivots[pivot] = {v: c / row[pivot] for v, c in row.items()}
                break
            factor = row[pivot]
            for v, c in pivots[pivot].items():
                row[v] = row.get(v, Fraction(0)) - factor * c
            row = {v: c for v, c in row.items() if c}
    free = [v for v in variables if v not in pivots]
    basis = []
    for f in free:
        g = {f: Fraction(1)}
        for pivot in sorted(pivots, key=order.__getitem__):  # a pivot depends on earlier variables only
            value = -sum((c * g[v] for v, c in pivots[pivot].items() if v != pivot and v in g), Fraction(0))
            if value:
                g[pivot] = value
        basis.append(g)
    return [_integral(g, order) for g in _sparse(basis)]


def _sparse(basis: list[dict[Variable, Fraction]]) -> list[dict[Variable, Fraction]]:
    """Subtract basis vectors from each other as long as that makes one shorter."""
    changed = True
    while changed:
        changed = False
        for i, a in enumerate(basis):
            for j, b in enumerate(basis):
                if i == j or not a.keys() & b.keys():
                    continue
                for factor in {a[v] / b[v] for v in a.keys() & b.keys()}:
                    c = {v: a.get(v, Fraction(0)) - factor * b.get(v, Fraction(0)) for v in [*a, *b]}
                    c = {v: x for v, x in c.items() if x}
                    if len(c) < len(a):
                        basis[i], a, changed = c, c, True
                        break
    return basis


def _integral(g: dict[Variable, Fraction], order: Mapping[Variable, int]) -> Generator:
    denominator = math.lcm(*(c.denominator for c in g.values()))
    divisor = math.gcd(*(int(c * denominator) for c in g.values()))
    return {v: int(g[v] * denominator) // divisor for v in sorted(g, key=order.__getitem__)}


def _nullspace_mod2(forms: Iterable[frozenset[Variable]], variables: Sequence[Variable]) -> list[frozenset[Variable]]:
    """Basis of the sets of variables that meet every form an even number of times."""
    order = {v: i for i, v in enumerate(variables)}
    pivots: dict[Variable, frozenset[Variable]] = {}
    for form in forms:
        row = frozenset(v for v in form if v in order)
        while row:
            pivot = max(row, key=order.__getitem__)
            if pivot not in pivots:
                pivots[pivot] = row
                break
            row = row ^ pivots[pivot]
    basis = []
    for f in (v for v in variables if v not in pivots):
        g = {f}
        for pivot in sorted(pivots, key=order.__getitem__):
            if len((pivots[pivot] - {pivot}) & g) % 2:
                g.add(pivot)
        basis.append(frozenset(g))
    changed = True
    while changed:
        changed = False
        for i, a in enumerate(basis):
            for j, b in enumerate(basis):
                if i != j and len(a ^ b) < len(a):
                    basis[i], a, changed = a ^ b, a ^ b, True
    return basis


def _extend(basis: list[frozenset[Variable]], row: frozenset[Variable]) -> list[frozenset[Variable]]:
    return [*basis, row] if _rest(row, basis) else basis


def _rest(row: frozenset[Variable], basis: Iterable[frozenset[Variable]]) -> frozenset[Variable]:
    """What is left of a row after elimination by a basis; empty if the basis spans it."""
    pivots: dict[Variable, frozenset[Variable]] = {}
    for b in [*basis, None]:
        r = row if b is None else b
        while r:
            pivot = max(r)
            if pivot not in pivots:
                break
            r = r ^ pivots[pivot]
        if b is None:
            return r
        if r:
            pivots[max(r)] = r
    return frozenset()
