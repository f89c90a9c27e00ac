"""A symmetry as text and as numbers: the table that ``print(symmetry)`` shows, and its summary.

Modules that repeat (``blocks.0`` ... ``blocks.11``, ``encoder_layer_0`` ...) are shown once, with the names of the
first, if they have the same structure: the same tensors with the same axes, up to the names of the labels and scales
that occur in one of them only. What several modules share (the residual stream) must be the very same label.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum, leaves_of
from learned_opt.symmetry.labels import AxisLabels, Scale
from learned_opt.text import counted

LEGEND = (
    "name:4 is an axis of 4 units with that label; + its units' scale multiplies, - divides, ^2 its power; a plain\n"
    "number is an axis that stays in place; | concatenates, * is a row-major product; {0..3} are alike"
)
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]*)")


# ------------------------------------------------------------------------------------------- numbers
class Summary(TypedDict):
    """What :meth:`Symmetry.summary` counts.

    A label that moves is neither fixed nor of size 1. Only labels and scales that some tensor carries are counted.
    """

    tensors: int  # described: parameters and statistics
    entries: int  # numbers in them
    covered: float  # share of the entries on at least one label that moves
    labels: int
    fixed_labels: int
    permutation_groups: int  # S_n once per label that moves and per index of what it is over: 1 + 12 for 12 heads
    log10_order: float  # of the product of the orders of these groups
    positive_scales: (
        int  # positive factors, one per unit (kinds positive and real): the dimension, if none is redundant
    )
    sign_generators: int  # units that may change sign (kinds sign and real)
    notes: int


def summary(symmetry: AxisLabels) -> Summary:
    """The numbers of a symmetry; see :class:`Summary`."""
    carriers = Carriers(symmetry)
    copies = {n: math.prod(symmetry.table_shape(n, 1)) for n in carriers.labels}
    moving = {n: symmetry.labels[n].size for n in carriers.labels if _moves(symmetry, n)}
    units = {n: math.prod(symmetry.table_shape(s.label, s.size)) for n, s in carriers.scales.items()}
    kinds = {n: symmetry.scales[n].kind for n in units}
    blocks = [(math.prod(b.shape), b.leaves) for some in symmetry.blocks.values() for b in some]
    entries = sum(size for size, _ in blocks)
    covered = sum(size for size, leaves in blocks if any(leaf.label in moving for leaf in leaves))
    return {
        "tensors": len(symmetry.specs),
        "entries": entries,
        "covered": covered / entries if entries else 0.0,
        "labels": len(carriers.labels),
        "fixed_labels": sum(symmetry.labels[n].fixed for n in carriers.labels),
        "permutation_groups": sum(copies[n] for n in moving),
        "log10_order": sum(copies[n] * math.lgamma(size + 1) for n, size in moving.items()) / math.log(10),
        "positive_scales": sum(count for n, count in units.items() if kinds[n] != "sign"),
        "sign_generators": sum(count for n, count in units.items() if kinds[n] != "positive"),
        "notes": len(symmetry.notes),
    }


def one_line(symmetry: AxisLabels) -> str:
    """The summary in one line, for logs."""
    s = summary(symmetry)
    words = [
        f"{counted(s['tensors'], 'tensor')}, {s['entries']:,} entries",
        f"{100 * s['covered']:.1f} % of them on a label that moves",
        counted(s["labels"], "label") + (f" ({s['fixed_labels']} fixed)" if s["fixed_labels"] else ""),
        f"{counted(s['permutation_groups'], 'independent permutation')} (10^{s['log10_order']:.1f} in all)",
        f"{counted(s['positive_scales'], 'positive scale')}, {counted(s['sign_generators'], 'sign')}",
    ]
    return "; ".join(words + ([counted(s["notes"], "note")] if s["notes"] else []))


def _moves(symmetry: AxisLabels, label: str) -> bool:
    return not symmetry.labels[label].fixed and symmetry.labels[label].size > 1


class Carriers:
    """Which tensors carry which labels and scales, and the scales of every label."""

    def __init__(self, symmetry: AxisLabels) -> None:
        self.symmetry = symmetry
        self.of_label: dict[str, set[str]] = defaultdict(set)
        self.of_scale: dict[str, set[str]] = defaultdict(set)
        for name, spec in symmetry.specs.items():
            for leaf in (leaf for axis in spec.axes for leaf in leaves_of(axis)):
                if leaf.label is not None:
                    self.of_label[leaf.label].add(name)
                for scale, _ in leaf.scale:
                    self.of_scale[scale].add(name)

    @cached_property
    def labels(self) -> list[str]:
        """Labels that some tensor carries, in the order of their first tensors."""
        return list(self.of_label)

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """Scales that some tensor carries, in the order of their first tensors."""
        return {n: self.symmetry.scales[n] for n in self.of_scale}

    @cached_property
    def scales_of(self) -> Mapping[str | None, list[str]]:
        """Label (None: fixed leaves) -> its scales."""
        found: dict[str | None, list[str]] = defaultdict(list)
        for name, scale in self.scales.items():
            found[scale.label].append(name)
        return found


# --------------------------------------------------------------------------------------------- folding
@dataclass(frozen=True)
class Fold:
    """Modules of one structure: ``stem`` + index + '.', of which the first is shown by its ``items``."""

    stem: str
    indices: tuple[int, ...]
    items: tuple["Item", ...]

    @property
    def first(self) -> str:
        """Prefix of the names of the module that is shown."""
        return f"{self.stem}{self.indices[0]}."

    @property
    def head(self) -> str:
        """Prefix of all of them: ``blocks.{0..11}.``"""
        return f"{self.stem}{{{_ranges(self.indices)}}}."

    @property
    def names(self) -> set[str]:
        """The tensors that are shown."""
        return {n for item in self.items for n in (item.names if isinstance(item, Fold) else {item})}


Item = str | Fold


def fold(symmetry: AxisLabels, *, repeats: bool = True) -> list[Item]:
    """The tensors' names, module by module, with repeated modules folded (all of them if not ``repeats``)."""
    return list(_fold(list(symmetry.specs), "", Carriers(symmetry), repeats))


def _fold(names: Sequence[str], prefix: str, carriers: Carriers, repeats: bool) -> Iterator[Item]:
    children: dict[str, list[str]] = defaultdict(list)  # module or tensor -> its tensors
    for name in names:
        child, dot, _ = name[len(prefix) :].partition(".")
        children[child + dot].append(name)
    alike: dict[object, list[str]] = defaultdict(list)  # stem and structure -> modules
    stems: dict[str, str] = {}  # of the modules that end in a number
    for child, inside in children.items():
        numbered = _NUMBERED.fullmatch(child[:-1]) if repeats and child.endswith(".") else None
        if numbered:
            stems[child] = numbered[1]
        alike[(numbered[1], _structure(inside, prefix + child, carriers)) if numbered else child].append(child)
    folded = {child: same for same in alike.values() for child in same if _saves_lines(len(same), children[child])}
    for child, inside in children.items():
        items = inside if not child.endswith(".") else _fold(inside, prefix + child, carriers, repeats)
        same = folded.get(child, [child])
        if child not in folded:
            yield from items
        elif child == same[0]:
            stem = stems[child]
            yield Fold(prefix + stem, tuple(int(c[len(stem) : -1]) for c in same), tuple(items))


def _saves_lines(modules: int, tensors: Sequence[str]) -> bool:
    return modules * len(tensors) > 1 + len(tensors)


def _folds(items: Iterable[Item]) -> Iterator[Fold]:
    """All folds, outer ones first."""
    for item in items:
        if isinstance(item, Fold):
            yield item
            yield from _folds(item.items)


def _structure(names: Sequence[str], prefix: str, carriers: Carriers) -> tuple[object, ...]:
    """What modules must have in common to be shown once: everything but the names of their own labels."""
    symmetry, inside, numbers = carriers.symmetry, set(names), dict[tuple[str, str], int]()

    def label(name: str | None) -> object:
        if name is None or not carriers.of_label[name] <= inside:
            return name
        group = symmetry.labels[name]
        return numbers.setdefault(("label", name), len(numbers)), group.size, group.fixed, *map(label, group.over)

    def scale(name: str) -> object:
        if not carriers.of_scale[name] <= inside:
            return name
        group = symmetry.scales[name]
        return numbers.setdefault(("scale", name), len(numbers)), group.kind, group.size, label(group.label)

    def axis(a: Axis) -> object:
        if isinstance(a, Leaf):
            return a.size, label(a.label), tuple((scale(s), e) for s, e in a.scale)
        parts = a.factors if isinstance(a, Prod) else a.parts
        return type(a), tuple(axis(part) for part in parts)

    specs = ((n[len(prefix) :], symmetry.specs[n]) for n in names)
    return tuple((n, s.roles, tuple(axis(a) for a in s.axes)) for n, s in specs)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ``0..3,5,8..11``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)


# ---------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """One line of the table: a fold's head (no names) or tensors with the same axes."""

    depth: int
    text: str
    names: tuple[str, ...] = ()


def rows_of(symmetry: AxisLabels, items: Iterable[Item], words: "Words") -> list[Row]:
    """The lines of the table; ``x.weight`` and ``x.bias`` with the same axes are one, ``x.{weight,bias}``."""
    return list(_rows(symmetry, items, words, 0, ""))


def _rows(symmetry: AxisLabels, items: Iterable[Item], words: "Words", depth: int, scope: str) -> Iterator[Row]:
    pending: list[str] = []  # tensors of one module with the same axes

    def key(name: str) -> tuple[str, str]:
        return name.rpartition(".")[0], words.axes(name)

    def flush() -> Iterator[Row]:
        if pending:
            module, dot, last = pending[0][len(scope) :].rpartition(".")
            tails = [n.rpartition(".")[2] for n in pending]
            yield Row(depth, module + dot + (f"{{{','.join(tails)}}}" if tails[1:] else last), tuple(pending))
            pending.clear()

    for item in items:
        if isinstance(item, Fold):
            yield from flush()
            yield Row(depth, item.head[len(scope) :])
            yield from _rows(symmetry, item.items, words, depth + 1, item.first)
            continue
        if pending and (key(pending[0]) != key(item) or len(pending) == 4):
            yield from flush()
        pending.append(item)
    yield from flush()


class Words:
    """Names of labels and scales as they are shown, and axes in words.

    What only a folded module carries is called without the module's prefix, unless that is another's name.
    """

    def __init__(self, symmetry: AxisLabels, items: Iterable[Item]) -> None:
        self.symmetry = symmetry
        self.carriers = Carriers(symmetry)
        self.labels = self._short(self.carriers.of_label, items)
        self.scales = self._short(self.carriers.of_scale, items)

    def _short(self, carriers: Mapping[str, set[str]], items: Iterable[Item]) -> dict[str, str]:
        short = {n: n for n in carriers}
        for f in _folds(items):
            local = {n: n.removeprefix(f.first) for n, where in carriers.items() if where <= f.names}
            count = Counter({**short, **local}[n] for n, where in carriers.items() if where & f.names)
            short |= {n: s for n, s in local.items() if s and count[s] == 1}
        return short

    def axes(self, name: str) -> str:
        """The axes of a tensor: ``[(heads:4 * qk:8+ | ...), stream:32]``."""
        return f"[{', '.join(self.axis(a, '*') for a in self.symmetry.specs[name].axes)}]"

    def axis(self, axis: Axis, inside: str = "") -> str:
        """One axis; a product inside of a sum needs no brackets."""
        if isinstance(axis, Leaf):
            return self.leaf(axis)
        if isinstance(axis, Sum):
            return f"({' | '.join(self.axis(a, '|') for a in axis.parts)})"
        text = " * ".join(self.axis(a, "*") for a in axis.factors)
        return text if inside == "|" else f"({text})"

    def leaf(self, leaf: Leaf) -> str:
        """One leaf: ``32``, ``qk:8+``, or ``stream:32 ln1-`` where the label has several scales."""
        text = str(leaf.size) if leaf.label is None else f"{self.labels[leaf.label]}:{leaf.size}"
        only = leaf.label is not None and len(self.carriers.scales_of[leaf.label]) == 1
        for scale, e in leaf.scale:
            text += ("" if only else f" {self.scales[scale]}") + {1: "+", -1: "-"}.get(e, f"^{e}")
        return text

    def kinds(self, label: str | None) -> str:
        """Kinds of a label's scales with their numbers: ``real x 3, sign``."""
        count = Counter(self.symmetry.scales[s].kind for s in self.carriers.scales_of[label])
        return ", ".join(kind + (f" x {n}" if n > 1 else "") for kind, n in count.items())


# --------------------------------------------------------------------------------------------- tables
def text(symmetry: AxisLabels) -> str:
    """What ``print(symmetry)`` shows: the tensors, the labels, the notes, the summary."""
    items = fold(symmetry)
    words = Words(symmetry, items)
    tensors = [("tensor", "shape", "axes")]
    for row in rows_of(symmetry, items, words):
        shape = " x ".join(map(str, symmetry.specs[row.names[0]].shape)) if row.names else ""
        tensors.append(("  " * row.depth + row.text, shape, words.axes(row.names[0]) if row.names else ""))
    parts = [_aligned(tensors)]
    labels = list(_label_rows(items, words))
    if labels:
        parts += [_aligned([("label", "size", "over", "units", "scales", "tensors"), *labels]), LEGEND]
    if symmetry.notes:
        parts.append("\n".join(f"note: {note}" for note in symmetry.notes))
    return "\n\n".join([*parts, one_line(symmetry)])


def _label_rows(items: Iterable[Item], words: Words) -> list[tuple[str, ...]]:
    """One line per label (and per scale of fixed leaves): those of the whole model, then those of every fold."""
    symmetry, carriers = words.symmetry, words.carriers
    bare = {n: where for n, where in carriers.of_scale.items() if symmetry.scales[n].label is None}

    def line(name: str) -> tuple[str, ...]:
        if name in bare:
            scale = symmetry.scales[name]
            return words.scales[name], str(scale.size), "", "fixed", scale.kind, str(len(bare[name]))
        group = symmetry.labels[name]
        over, units = ", ".join(words.labels.get(b, b) for b in group.over), "fixed" if group.fixed else "permute"
        return words.labels[name], str(group.size), over, units, words.kinds(name), str(len(carriers.of_label[name]))

    def section(items: Iterable[Item], mine: list[str], scope: str) -> Iterator[tuple[str, ...]]:
        folds = [item for item in items if isinstance(item, Fold)]
        inside = [[n for n in mine if {**carriers.of_label, **bare}[n] <= f.names] for f in folds]
        yield from (line(n) for n in mine if not any(n in some for some in inside))
        for f, some in zip(folds, inside, strict=True):
            if some:
                yield f.head[len(scope) :], "", "", "", "", ""
                yield from (("  " + name, *rest) for name, *rest in section(f.items, some, f.first))

    shown = {n for item in items for n in (item.names if isinstance(item, Fold) else {item})}
    return list(section(items, [n for n, where in {**carriers.of_label, **bare}.items() if where & shown], ""))


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, columns aligned and two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
