"""Symmetry as data: which axes of which weights move together, and how.

A network does not change when its hidden units are permuted, or rescaled (ReLU) or sign-flipped (tanh, sin) on the
side that writes them and inversely on the side that reads them. A :class:`Symmetry` says so, axis by axis:

* an axis (:mod:`learned_opt.axes`) is made of leaves, each with the *permutation label* of its units and their *scale
  labels*;
* a permutation label may be **over** others (a fibre): head_dim has one permutation for every head, and heads move
  as wholes.

Nothing here holds weights. A group element acts on weights by :meth:`Symmetry.act`, on gradients by its
contragredient (``dual=True``): permutations and signs alike, positive scales inversely.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from learned_opt.axes import (
    Axis,
    Block,
    Leaf,
    Prod,
    Sum,
    alternatives,
    assembled,
    axis_from_data,
    axis_to_data,
    choices,
    lay,
    pieces_of,
    size_of,
)

if TYPE_CHECKING:
    from learned_opt.describe import Summary

# whoever writes a symmetry by hand finds its axes here too (docs/symmetry.md)
__all__ = [
    "Axis",
    "Block",
    "Element",
    "Kind",
    "Label",
    "Leaf",
    "Prod",
    "Role",
    "Scale",
    "Shape",
    "Spec",
    "Sum",
    "Symmetry",
    "SymmetryError",
    "independent",
    "randomised",
]

Role = Literal["out", "in", "kernel", "lookup", "gain"]
Kind = Literal["positive", "sign", "real"]
Shape = tuple[int, ...]

STATISTICS = ("running_mean", "running_var")  # that a symmetry may describe, and no optimizer has


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
class Element:
    """A group element. ``perms[l][..., i]`` is the old index that moves to ``i``; ``scales[s][..., i]`` multiplies
    the new index ``i``. Leading dimensions run over the labels that a fibred label is over.
    """

    perms: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


# ------------------------------------------------------------------------------------------- symmetry
@dataclass(frozen=True)
class Symmetry:
    """The group of a network: a :class:`Spec` per tensor (parameters and statistics), and the labels' groups.

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

    # -- the group
    def table_shape(self, label: str | None, size: int) -> Shape:
        """Shape of a table with one entry per unit of a label: the labels that it is over, then itself."""
        over = self.labels[label].over if label is not None else ()
        return (*(self.labels[b].size for b in over), size)

    def sample(
        self,
        generator: torch.Generator | None = None,
        *,
        scale_range: tuple[float, float] = (0.1, 10.0),
        dtype: torch.dtype = torch.float64,
    ) -> Element:
        """A random group element: uniform permutations, scales log-uniform in ``scale_range``, random signs."""
        low, high = (math.log(x) for x in scale_range)
        perms, scales = {}, {}
        for name, label in self.labels.items():
            noise = torch.rand(self.table_shape(name, label.size), generator=generator)
            perms[name] = torch.arange(label.size).expand(noise.shape) if label.fixed else noise.argsort(-1)
        for name, scale in self.scales.items():
            shape = self.table_shape(scale.label, scale.size)
            size = torch.rand(shape, generator=generator, dtype=dtype)
            sign = torch.randint(0, 2, shape, generator=generator).to(dtype) * 2 - 1
            value = torch.ones(shape, dtype=dtype)
            if scale.kind != "sign":
                value = torch.exp(low + (high - low) * size)
            scales[name] = value if scale.kind == "positive" else value * sign
        return Element(perms, scales)

    def identity(self, dtype: torch.dtype = torch.float64) -> Element:
        """The element that changes nothing."""
        shape = self.table_shape
        return Element(
            {n: torch.arange(g.size).expand(shape(n, g.size)).clone() for n, g in self.labels.items()},
            {n: torch.ones(shape(s.label, s.size), dtype=dtype) for n, s in self.scales.items()},
        )

    def _permute(self, g: Element, x: Tensor, labels: list[str | None]) -> Tensor:
        """Move every dimension of ``x`` (dimension i has label ``labels[i]``) by ``g``; bases before fibres."""
        dims = [(self._depth(name), i, name) for i, name in enumerate(labels) if name is not None]
        for _, dim, name in sorted(dims):
            over = self.labels[name].over
            index = g.perms[name].to(x.device)
            if not over:
                x = x.index_select(dim, index)
            else:
                at = [base_dim(labels, b, dim) for b in over]
                x = x.gather(dim, lay(index, [*at, dim], x.ndim).expand(x.shape))
        return x

    def _depth(self, label: str | None) -> int:
        over = self.labels[label].over if label is not None else ()
        return 1 + max((self._depth(b) for b in over), default=0)

    def _scale(self, g: Element, x: Tensor, leaves: tuple[Leaf, ...], dual: bool) -> Tensor:
        labels = [leaf.label for leaf in leaves]
        for dim, leaf in enumerate(leaves):
            for name, exponent in leaf.scale:
                at = [base_dim(labels, b, dim) for b in self.over(leaf)]
                d = g.scales[name].to(x) ** (-exponent if dual else exponent)
                x = x * lay(d, [*at, dim], x.ndim)
        return x

    def act(self, g: Element, weights: Mapping[str, Tensor], *, dual: bool = False) -> dict[str, Tensor]:
        """``g . weights`` (tensors that the symmetry does not name pass through).

        With ``dual=True`` the contragredient action, by which gradients and momenta transform.
        """
        moved = {}
        for name, tensor in weights.items():
            if name not in self.specs:
                moved[name] = tensor
                continue
            pieces = self.pieces(name, tensor)
            out = []
            for piece, choice in zip(pieces, choices(self.specs[name].axes), strict=True):
                leaves = tuple(leaf for part in choice for leaf in part)
                piece = self._permute(g, piece, [leaf.label for leaf in leaves])
                out.append(self._scale(g, piece, leaves, dual))
            moved[name] = self.assemble(name, out)
        return moved

    def compose(self, a: Element, b: Element) -> Element:
        """The element that acts like ``b`` first, then ``a``."""
        perms = {n: self._move_table(a, n, b.perms[n]) for n in self.labels}
        scales = {n: a.scales[n] * self._move_table(a, s.label, b.scales[n]) for n, s in self.scales.items()}
        return Element(perms, scales)

    def invert(self, g: Element) -> Element:
        """The element that undoes ``g``."""
        perms: dict[str, Tensor] = {}
        for name in sorted(self.labels, key=self._depth):
            over = self.labels[name].over
            # at new base index h the fibre undone is the one that g put at old base index perms[h]
            table = self._permute(Element(perms, {}), g.perms[name], [*over, None])
            perms[name] = table.argsort(-1)
        inverse = Element(perms, {})
        scales = {n: 1 / self._move_table(inverse, s.label, g.scales[n]) for n, s in self.scales.items()}
        return Element(perms, scales)

    def _move_table(self, g: Element, label: str | None, table: Tensor) -> Tensor:
        if label is None:
            return table
        return self._permute(g, table, [*self.labels[label].over, label])

    # -- checks
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

    def check(
        self,
        model: nn.Module,
        *inputs: Any,
        samples: int = 3,
        generator: torch.Generator | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> float:
        """Largest relative change of the function under random group elements, in float64 at random weights.

        Initial values hide errors (zero biases, unit gains), so every parameter and statistic is randomised. Other
        buffers stay as they are: a mask or a table of positions is part of the function.

        Args:
            model: left as it is; a float64 copy is used, in its training or evaluation mode.
            inputs: example inputs; floating ones are cast to float64.
            samples: number of random group elements.
            generator: source of the weights and of the group elements; default: seeded with 0.
            output: picks the tensor to compare from what the model returns; default: that tensor itself.

        Returns:
            ``max |f(g.W) - f(W)| / max |f(W)|``: about 1e-15 for a true symmetry, NaN where f is zero,
            infinite or NaN.
        """
        generator = generator or torch.Generator().manual_seed(0)
        output = output or (lambda y: y)
        model = copy.deepcopy(model).double()
        inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        weights = {n: w.detach() for n, w in model.named_buffers()}
        moving = {n: w for n, w in weights.items() if n in self.specs or n.rpartition(".")[2] in STATISTICS}
        moving = dict(model.named_parameters()) | moving
        weights |= {n: randomised(w.detach(), generator) for n, w in moving.items()}
        self.validate({n: w for n, w in weights.items() if n in self.specs})

        def evaluate(w: dict[str, Tensor]) -> Tensor:
            fresh = {n: x.clone() for n, x in w.items()}  # running statistics are updated in place
            with torch.no_grad():
                return output(torch.func.functional_call(model, fresh, inputs))

        reference = evaluate(weights)
        moved = torch.stack([evaluate(self.act(self.sample(generator), weights)) for _ in range(samples)])
        return ((moved - reference).abs().max() / reference.abs().max()).item()

    # -- as text and plain data
    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, strings, numbers) for checkpoints and JSON."""
        return {
            "specs": {n: [[axis_to_data(a) for a in s.axes], list(s.roles)] for n, s in self.specs.items()},
            "labels": {n: [g.size, list(g.over), g.fixed] for n, g in self.labels.items()},
            "scales": {n: [s.kind, s.size, s.label] for n, s in self.scales.items()},
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Symmetry":
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

    def __str__(self) -> str:
        from learned_opt.describe import text

        return text(self)

    def __repr__(self) -> str:
        from learned_opt.describe import counted

        sizes = {"tensor": len(self.specs), "label": len(self.labels), "scale": len(self.scales)}
        sizes |= {"note": len(self.notes)} if self.notes else {}
        return f"Symmetry({', '.join(counted(n, noun) for noun, n in sizes.items())})"

    def summary(self) -> "Summary":
        """How much symmetry there is, in plain numbers: see :class:`learned_opt.describe.Summary`."""
        from learned_opt.describe import summary

        return summary(self)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the tensors and the labels that join them to an SVG, PNG or PDF file: :func:`learned_opt.picture.draw`.

        Needs matplotlib (extra ``meta``).
        """
        from learned_opt.picture import draw

        draw(self, path)


# --------------------------------------------------------------------------------------------- helpers
def base_dim(labels: list[str | None], base: str, dim: int) -> int:
    """Where a fibre's base label stands in a block: the nearest before it, else the first."""
    at = [i for i, name in enumerate(labels) if name == base]
    if not at:
        raise SymmetryError(f"label {labels[dim]!r} is over {base!r}, which its tensor does not have")
    before = [i for i in at if i < dim]
    return before[-1] if before else at[0]


def randomised(x: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor near ``x`` without its initial regularities (zero biases, unit gains); what is positive stays so."""
    if not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if x.numel() and bool((x > 0).all()):  # gains and variances stay positive
        return x * torch.exp(0.3 * noise)
    return x + (0.5 * x.square().mean().sqrt() + 0.1) * noise if x.numel() else x


def independent(tensors: Mapping[str, Tensor]) -> Symmetry:
    """Every axis its own label, no scale: a larger permutation group than any network has, hence always safe.

    Vectors are taken as written; matrices as ``[out, in]``; higher ranks as convolutions ``[out, in, *kernel]``.
    """
    specs, labels = {}, {}
    for name, tensor in tensors.items():
        roles: tuple[Role, ...] = (("out", "in") + ("kernel",) * tensor.ndim)[: tensor.ndim]
        axes = []
        for i, (size, role) in enumerate(zip(tensor.shape, roles, strict=True)):
            label = None if role == "kernel" else f"{name}.{i}"
            if label is not None:
                labels[label] = Label(size)
            axes.append(Leaf(size, label))
        specs[name] = Spec(tuple(axes), roles)
    return Symmetry(specs, labels)
