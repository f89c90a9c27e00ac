"""A notation for the symmetry of a model, one line per tensor, and whether two symmetries are the same.

An axis is text: ``heads:4*qk:8^a | heads*vo:8`` is a concatenation (``|``) of products (``*``) of leaves. A leaf is a
label with an optional size (needed once, where no tensor has it as a whole axis) and its scales: ``^a`` written, ``/a``
read. ``.`` is a fixed axis, a number a fixed factor (which may scale, too), and axes that are not mentioned are fixed.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import nn

from learned_opt.symmetry import Kind, Label, Role, Scale, Spec, Symmetry
from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum, leaves_of, size_of

_LEAF = re.compile(r"([\w.]+)(?::(\d+))?((?:[\^/][\w.]+)*)")


# ------------------------------------------------------------------------------------------- the notation
class Table:
    """A symmetry being written. Scales are declared where units are, sizes come from the text or the model."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[str, ...]] = {}
        self.kinds: dict[str, Kind] = {}
        self.over: dict[str, tuple[str, ...]] = {}
        self.fixed: set[str] = set()

    def put(self, name: str, *axes: str) -> None:
        self.lines[name] = axes

    def units(self, label: str, kind: Kind | None) -> tuple[str, str]:
        """Units as written and as read, with a scale of this kind (None: they only permute)."""
        if kind is None:
            return label, label
        self.kinds[label] = kind
        return f"{label}^{label}", f"{label}/{label}"

    def affine(self, name: str, out: str, read: str, bias: bool = True) -> None:
        """A linear layer or a convolution."""
        self.put(f"{name}.weight", out, read)
        if bias:
            self.put(f"{name}.bias", out)

    def norm(self, name: str, label: str, *, bias: bool = True, blocked: bool = False) -> str:
        """Gain and bias of a normalisation, whose scale the next layer reads (unless blocked); how it reads it."""
        scale = "" if blocked else name
        if scale:
            self.kinds[name] = "real"
        for part in ("weight", "bias")[: 1 + bias]:
            self.put(f"{name}.{part}", f"{label}^{scale}" if scale else label)
        return f"{label}/{scale}" if scale else label

    def batch_norm(self, conv: str, bn: str, label: str, read: str, out: str = "", *, bias=False, train=False) -> None:
        """A layer before a batch-norm, both on one label; ``out`` is the scale of the result, if any.

        In evaluation the layer scales against the gain, with the running mean; in training the batch's statistics
        absorb a size only up to the norm's epsilon, so just the sign is claimed.
        """
        self.kinds[conv] = "sign" if train else "real"
        self.affine(conv, f"{label}^{conv}", read, bias)
        self.put(f"{bn}.running_mean", f"{label}^{conv}")
        self.put(f"{bn}.running_var", label)
        self.put(f"{bn}.weight", f"{label}/{conv}{out}")
        self.put(f"{bn}.bias", f"{label}{out}")

    def attention(self, name: str, heads: int, qk: int, vo: int, base: str = "") -> tuple[str, str, str, str]:
        """Axes of the query, key and value that are written and of the value that the output projection reads."""
        base = base or f"{name}.heads"
        for inner in (f"{name}.qk", f"{name}.vo"):
            self.over[inner] = (base,)
            self.kinds[inner] = "real"
        q = f"{base}:{heads}*{name}.qk:{qk}"
        v = f"{base}:{heads}*{name}.vo:{vo}"
        return f"{q}^{name}.qk", f"{q}/{name}.qk", f"{v}^{name}.vo", f"{v}/{name}.vo"

    def symmetry(self, model: nn.Module) -> Symmetry:
        """The symmetry of a model, every tensor of which has a line or is fixed."""
        shapes = {n: tuple(p.shape) for n, p in (*model.named_parameters(), *model.named_buffers())}
        unknown = [n for n in self.lines if n not in shapes]
        assert not unknown, f"lines for tensors that the model does not have: {unknown}"
        sizes = dict(self._sizes(shapes))
        specs = {}
        for name, shape in shapes.items():
            line = self.lines.get(name, ())
            axes = tuple(_parse(text, size, sizes) for text, size in zip(line, shape, strict=False))
            axes += tuple(Leaf(n) for n in shape[len(line) :])
            roles: tuple[Role, ...] = (("out", "in") + ("kernel",) * len(shape))[: len(shape)]
            specs[name] = Spec(axes, roles)
        used = {leaf for spec in specs.values() for axis in spec.axes for leaf in leaves_of(axis)}
        labels = {leaf.label for leaf in used if leaf.label is not None}
        units = {scale: leaf for leaf in used for scale, _ in leaf.scale}
        return Symmetry(
            specs,
            {n: Label(sizes[n], self.over.get(n, ()), n in self.fixed) for n in sorted(labels)},
            {n: Scale(self.kinds[n], leaf.size, leaf.label) for n, leaf in sorted(units.items())},
        )

    def _sizes(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
        for name, line in self.lines.items():
            for text, size in zip(line, shapes[name], strict=False):
                for match in _LEAF.finditer(text):
                    label, given, _ = match.groups()
                    if given or match.group() == text:
                        yield label, int(given or size)


def _parse(text: str, size: int, sizes: dict[str, int]) -> Axis:
    """``text`` as an axis of ``size`` positions."""
    position = 0
    tokens = re.findall(r"[()*|]|[^()*|\s]+", text)

    def joined(sign: str, part: Callable[[], Axis], kind: Callable[[tuple[Axis, ...]], Axis]) -> Axis:
        nonlocal position
        parts = [part()]
        while position < len(tokens) and tokens[position] == sign:
            position += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else kind(tuple(parts))

    def leaf() -> Axis:
        nonlocal position
        token = tokens[position]
        position += 1
        if token == "(":
            inner = joined("|", product, Sum)
            position += 1
            return inner
        if token == ".":
            return Leaf(size)
        if token.isdigit():
            return Leaf(int(token))
        match = _LEAF.fullmatch(token)
        assert match, f"{token!r} in {text!r} is not a leaf"
        label, _, scales = match.groups()
        signs = re.findall(r"([\^/])([\w.]+)", scales)
        scale = tuple((s, 1 if sign == "^" else -1) for sign, s in signs)
        return Leaf(int(label), None, scale) if label.isdigit() else Leaf(sizes[label], label, scale)

    def product() -> Axis:
        return joined("*", leaf, Prod)

    axis = joined("|", product, Sum)
    assert position == len(tokens) and size_of(axis) == size, f"{text!r} does not describe an axis of {size}"
    return axis


# ------------------------------------------------------------------------------------------- comparison
def canonical(axis: Axis) -> Axis:
    """The same axis in one form: flat, no unit factors, fixed leaves merged, sums to the left of products."""
    if isinstance(axis, Leaf):
        return Leaf(1) if axis.size == 1 and not axis.scale else axis
    if isinstance(axis, Sum):
        return _concatenated([canonical(a) for a in axis.parts])
    done: Axis = Leaf(1)
    for factor in reversed(axis.factors):
        done = _multiplied(canonical(factor), done)
    return done


def _is_fixed(axis: Axis) -> bool:
    return isinstance(axis, Leaf) and axis.label is None and not axis.scale


def _concatenated(parts: Sequence[Axis]) -> Axis:
    flat: list[Axis] = []
    for part in parts:
        for a in part.parts if isinstance(part, Sum) else (part,):
            if flat and _is_fixed(flat[-1]) and _is_fixed(a):
                flat[-1] = Leaf(size_of(flat[-1]) + size_of(a))
            else:
                flat.append(a)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def _multiplied(a: Axis, b: Axis) -> Axis:
    if isinstance(a, Prod):
        for factor in reversed(a.factors):
            b = _multiplied(factor, b)
        return b
    if _is_fixed(b) and size_of(b) == 1:
        return a
    if isinstance(a, Sum):
        return _concatenated([_multiplied(part, b) for part in a.parts])
    if _is_fixed(a):
        return Leaf(size_of(a) * size_of(b)) if _is_fixed(b) else _concatenated([b] * size_of(a))
    return Prod((a, *b.factors) if isinstance(b, Prod) else (a, b))


def differences(found: Symmetry, expert: Symmetry) -> list[str]:
    """Why two symmetries differ, in words; empty where they are the same up to names of labels and scales.

    The same: equal trees, a bijection of labels, equal fibres, and per label equal spaces of scale exponents
    (over the rationals for positive scales, modulo two for signs; a real scale is both).
    """
    said, pairs = [], []
    for name in sorted({*found.specs, *expert.specs}):
        a, b = ([canonical(x) for x in s.specs[name].axes] if name in s.specs else None for s in (found, expert))
        if a is None or b is None:
            missing = not all(map(_is_fixed, a or b or []))
            said += [f"{name}: only in {'the expert' if a is None else 'what was inferred'}"] if missing else []
            continue
        matched = [_matched(x, y) for x, y in zip(a, b, strict=True)] if len(a) == len(b) else [None]
        if any(m is None for m in matched):
            said.append(f"{name}: inferred [{_text(found, name)}]\n{'':{len(name)}}  expert   [{_text(expert, name)}]")
        pairs += [(name, x, y) for m in matched if m for x, y in m]
    forward: dict[str | None, dict[str | None, str]] = {}
    for name, x, y in pairs:
        forward.setdefault(y.label, {}).setdefault(x.label, name)
    backward = {x: y for y, xs in forward.items() for x in xs}
    for y, xs in forward.items():
        if len(xs) > 1:
            said.append(f"expert's label {y} is several: " + ", ".join(f"{x} (in {at})" for x, at in xs.items()))
        for x in xs:
            if backward[x] != y:
                said.append(f"inferred label {x} is several of the expert's: {y}, {backward[x]} (in {xs[x]})")
    if said:
        return said
    for x, y in backward.items():
        if x is not None and y is not None:
            said += _group_differences(found, x, expert, y, backward)
        leaves = [(a, b) for _, a, b in pairs if b.label == y]
        said += _scale_differences(y, found, [a for a, _ in leaves], expert, [b for _, b in leaves])
    return said


def _matched(a: Axis, b: Axis) -> list[tuple[Leaf, Leaf]] | None:
    """The leaves of two axes, pairwise; None if the trees differ."""
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        same = a.size == b.size and (a.label is None) == (b.label is None)
        return [(a, b)] if same else None
    if type(a) is not type(b) or isinstance(a, Leaf) or isinstance(b, Leaf):
        return None
    xs, ys = (x.factors if isinstance(x, Prod) else x.parts for x in (a, b))
    matched = [_matched(x, y) for x, y in zip(xs, ys, strict=False)]
    if len(xs) != len(ys) or any(m is None for m in matched):
        return None
    return [pair for m in matched if m for pair in m]


def _group_differences(
    found: Symmetry, x: str, expert: Symmetry, y: str, names: dict[str | None, str | None]
) -> list[str]:
    a, b = found.labels[x], expert.labels[y]
    over_a = {names.get(n, n) for n in a.over if found.labels[n].size > 1}
    over_b = {n for n in b.over if expert.labels[n].size > 1}
    said = []
    if over_a != over_b:
        said.append(f"label {y} is over {sorted(over_b)}, inferred ({x}) over {sorted(map(str, over_a))}")
    if a.fixed != b.fixed:
        said.append(f"label {y} is fixed: {b.fixed}, inferred ({x}): {a.fixed}")
    return said


def _scale_differences(
    label: str | None, found: Symmetry, xs: list[Leaf], expert: Symmetry, ys: list[Leaf]
) -> list[str]:
    said = []
    for kind, modulus in (("positive", 0), ("sign", 2)):
        a, b = _exponents(found, xs, kind), _exponents(expert, ys, kind)
        ranks = tuple(_rank(m, modulus) for m in (a, b, np.concatenate((a, b))))
        if len(set(ranks)) > 1:
            said.append(f"label {label}: {ranks[1]} {kind} scales, inferred {ranks[0]} (together {ranks[2]})")
    return said


def _exponents(symmetry: Symmetry, leaves: list[Leaf], kind: str) -> np.ndarray:
    """One row of exponents for each scale that acts on the leaves with this kind."""
    rows: dict[str, np.ndarray] = {}
    for i, leaf in enumerate(leaves):
        for name, exponent in leaf.scale:
            if symmetry.scales[name].kind in (kind, "real"):
                rows.setdefault(name, np.zeros(len(leaves), dtype=int))[i] += exponent
    return np.stack(list(rows.values())) if rows else np.zeros((0, len(leaves)), dtype=int)


def _rank(matrix: np.ndarray, modulus: int) -> int:
    if not modulus:
        return int(np.linalg.matrix_rank(matrix.astype(float))) if matrix.size else 0
    basis: list[int] = []  # each row's bits as one integer, reduced by those before it
    for row in matrix % 2:
        bits = int("".join(map(str, row)) or "0", 2)
        for b in basis:
            bits = min(bits, bits ^ b)
        if bits:
            basis.append(bits)
    return len(basis)


def _text(symmetry: Symmetry, name: str) -> str:
    return ", ".join(map(_axis_text, symmetry.specs[name].axes))


def _axis_text(axis: Axis) -> str:
    """The inverse of parsing, with every size."""
    if isinstance(axis, Leaf):
        scales = "".join(("^" if e > 0 else "/") + (s if abs(e) == 1 else f"{s}({abs(e)})") for s, e in axis.scale)
        return f"{axis.label}:{axis.size}{scales}" if axis.label else f"{axis.size}{scales}"
    sign, parts = ("*", axis.factors) if isinstance(axis, Prod) else (" | ", axis.parts)
    return "(" + sign.join(map(_axis_text, parts)) + ")"
