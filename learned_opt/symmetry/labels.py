"""The labels of a network's axes as data: which indices of which tensors move together, and how.

An axis (:mod:`learned_opt.symmetry.axes`) is made of leaves, each with the *permutation label* of its units and their
*scale labels*. A permutation label may be **over** others (a fibre): head_dim has one permutation for every head, and
heads move as wholes. What these labels let one do to weights is in :mod:`learned_opt.symmetry.group`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, get_args

from torch import Tensor

from learned_opt.symmetry.axes import (
    Axis,
    Block,
    Leaf,
    alternatives,
    assembled,
    axis_from_data,
    axis_to_data,
    choices,
    leaves_of,
    pieces_of,
    size_of,
)
from learned_opt.text import listed

Role = Literal["out", "in", "kernel", "lookup", "gain"]
Kind = Literal["positive", "sign", "real"]
Shape = tuple[int, ...]

STATISTICS = ("running_mean", "running_var")  # that a symmetry may describe, and no optimizer has
UNKNOWN = "is not known: the axes that meet it are fixed"  # how a note on an operator ends


class SymmetryError(ValueError):
    """A symmetry that does not fit the tensors, or contradicts itself."""


def is_statistic(name: str) -> bool:
    """Whether a tensor is called as a running mean or variance is."""
    return name.rpartition(".")[2] in STATISTICS


# --------------------------------------------------------------------------------------------- tensors
@dataclass(frozen=True)
class Spec:
    """The axes of one tensor and what each is to the network.

    Roles: ``out`` is written, ``in`` is read, ``kernel`` is folded to the read side, ``lookup`` is indexed
    (vocabulary, positions), ``gain`` multiplies a unit (the weight of a normalisation).
    """

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.roles):
            raise SymmetryError(f"{len(self.axes)} axes but {len(self.roles)} roles")
        unknown = [r for r in self.roles if r not in get_args(Role)]
        if unknown:
            known = listed(get_args(Role))
            raise SymmetryError(f"roles {listed(map(repr, unknown))} are unknown; a role is one of {known}")

    @property
    def shape(self) -> Shape:
        """Shape of the tensor that the axes describe."""
        return tuple(size_of(a) for a in self.axes)


@dataclass(frozen=True)
class Label:
    """A permutation group: ``size`` indices, with one permutation for every index of the labels in ``over``.

    A ``fixed`` label has the identity only. It is declared where something else is over it (one permutation of
    head_dim for every head, and heads that ALiBi tells apart) or is scaled by its index within a fibre (RoPE).
    """

    size: int
    over: tuple[str, ...] = ()
    fixed: bool = False


@dataclass(frozen=True)
class Scale:
    """A scaling group: one factor per index of permutation label ``label`` (or of a fixed leaf of ``size``)."""

    kind: Kind
    size: int
    label: str | None = None


@dataclass(frozen=True)
class AxisLabels:
    """A :class:`Spec` per tensor (parameters and statistics), and what its labels stand for.

    ``notes`` says in words what is not claimed and why (unknown operators, labels demoted by a numeric check).

    Raises:
        SymmetryError: when an axis names a label that is not declared, or of another size.
    """

    specs: Mapping[str, Spec]
    labels: Mapping[str, Label] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, label in self.labels.items():
            for base in label.over:
                declared = base in self.labels and base != name
                if not declared or not set(self.labels[base].over) <= set(label.over):
                    raise SymmetryError(
                        f"label {name!r} is over {label.over}: each must be declared and not be"
                        " itself, and what they are over must be listed too"
                    )
        for name, spec in self.specs.items():
            for leaf in (leaf for axis in spec.axes for alt in alternatives(axis) for leaf in alt):
                if leaf.label is not None:
                    group = self.labels.get(leaf.label)
                    if group is None or group.size != leaf.size:
                        found = "is not declared" if group is None else f"has size {group.size}"
                        raise SymmetryError(
                            f"{name}: an axis of size {leaf.size} has label {leaf.label!r}, which {found}"
                        )
                for scale, _ in leaf.scale:
                    units = self.scales.get(scale)
                    if units is None or (units.size, units.label) != (leaf.size, leaf.label):
                        raise SymmetryError(
                            f"{name}: scale {scale!r} on an axis of size {leaf.size}, label {leaf.label!r},"
                            f" is declared as {units}"
                        )

    # -- the network's tensors as matrices
    @cached_property
    def blocks(self) -> Mapping[str, tuple[Block, ...]]:
        """Every tensor as one or more blocks of matrices, in the order of :meth:`split`."""
        return {name: tuple(self._blocks(name, spec)) for name, spec in self.specs.items()}

    def _blocks(self, name: str, spec: Spec) -> Iterable[Block]:
        for choice in choices(spec.axes):
            leaves = [leaf for piece in choice for leaf in piece]
            roles = [r for r, piece in zip(spec.roles, choice, strict=True) for _ in piece]
            yield self._block(name, leaves, roles)

    def _block(self, name: str, leaves: list[Leaf], roles: list[Role]) -> Block:
        rows = [i for i, r in enumerate(roles) if r in ("out", "gain")]
        cols = [i for i, r in enumerate(roles) if r in ("in", "kernel", "lookup")]
        bases = {b for i in cols for b in self.over(leaves[i]) if b not in [leaves[j].label for j in cols]}
        batch = [i for i in rows if leaves[i].label in bases]
        rows = [i for i in rows if i not in batch]
        if "in" in roles:
            kind: Literal["matrix", "embedding", "vector", "gain"] = "matrix"
        elif "lookup" in roles:
            kind = "embedding"
        else:
            kind = "gain" if "gain" in roles else "vector"
        pick = lambda index: tuple(leaves[i] for i in index)  # noqa: E731
        return Block(name, pick(batch), pick(rows), pick(cols), tuple(batch + rows + cols), kind)

    def entangled(self, name: str) -> tuple[frozenset[int], frozenset[int]]:
        """Axes of a tensor whose units are permuted differently for every index of another axis, and those others.

        So it is in a convolution by groups: what each group reads has a permutation of its own.
        """
        axes = [list(leaves_of(axis)) for axis in self.specs[name].axes]
        labels = [{leaf.label for leaf in leaves} for leaves in axes]
        over = [{b for leaf in leaves for b in self.over(leaf)} for leaves in axes]
        bases = [b - own for b, own in zip(over, labels, strict=True)]
        fibres = frozenset(i for i, b in enumerate(bases) if any(b & own for own in labels))
        return fibres, frozenset(j for j, own in enumerate(labels) if any(bases[i] & own for i in fibres))

    def over(self, leaf: Leaf) -> tuple[str, ...]:
        """The labels that a leaf's label is over."""
        return self.labels[leaf.label].over if leaf.label is not None else ()

    def pieces(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor, one per block, with one dimension per leaf."""
        return pieces_of(tensor, self.specs[name].axes)

    def assemble(self, name: str, pieces: list[Tensor]) -> Tensor:
        """Inverse of :meth:`pieces`."""
        return assembled(pieces, self.specs[name].axes)

    def split(self, name: str, tensor: Tensor) -> list[Tensor]:
        """A tensor as its blocks' matrices, each ``[B, R, C]``."""
        pieces = self.pieces(name, tensor)
        return [b.fold(p[None]) for b, p in zip(self.blocks[name], pieces, strict=True)]

    def merge(self, name: str, matrices: list[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        blocks = self.blocks[name]
        return self.assemble(name, [b.unfold(m)[0] for b, m in zip(blocks, matrices, strict=True)])

    def table_shape(self, label: str | None, size: int) -> Shape:
        """Shape of a table with one entry per unit of a label: the labels that it is over, then itself."""
        over = self.labels[label].over if label is not None else ()
        return (*(self.labels[b].size for b in over), size)

    # -- checks and plain data
    def validate(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`SymmetryError` unless every tensor is described with its very shape."""
        wrong = []
        for name, tensor in tensors.items():
            if name not in self.specs:
                wrong.append(f"{name} {tuple(tensor.shape)} is not described")
            elif self.specs[name].shape != tuple(tensor.shape):
                wrong.append(f"{name} has shape {tuple(tensor.shape)}, described as {self.specs[name].shape}")
        if wrong:
            shown = "\n  ".join(wrong[:8]) + (f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise SymmetryError(
                f"the symmetry does not fit {len(wrong)} of {len(tensors)} tensors:\n  {shown}\n"
                "Pass symmetry=infer_symmetry(model, x) and model.named_parameters(), or leave symmetry out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, strings, numbers) for checkpoints and JSON."""
        return {
            "specs": {n: [[axis_to_data(a) for a in s.axes], list(s.roles)] for n, s in self.specs.items()},
            "labels": {n: [g.size, list(g.over), g.fixed] for n, g in self.labels.items()},
            "scales": {n: [s.kind, s.size, s.label] for n, s in self.scales.items()},
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        return cls(
            {
                n: Spec(tuple(axis_from_data(a) for a in axes), tuple(roles))
                for n, (axes, roles) in data["specs"].items()
            },
            {n: Label(size, tuple(over), *fixed) for n, (size, over, *fixed) in data["labels"].items()},
            {n: Scale(kind, size, label) for n, (kind, size, label) in data["scales"].items()},
            tuple(data.get("notes", ())),
        )


def base_dim(labels: list[str | None], base: str, dim: int) -> int:
    """Where a fibre's base label stands in a block: the nearest before it, else the first."""
    at = [i for i, name in enumerate(labels) if name == base]
    if not at:
        raise SymmetryError(f"label {labels[dim]!r} is over {base!r}, which its tensor does not have")
    before = [i for i in at if i < dim]
    return before[-1] if before else at[0]
