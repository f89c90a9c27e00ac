"""The symmetry of a network: the group that the labels of its axes define, and how it acts on weights.

A network does not change when its hidden units are permuted, or rescaled (ReLU) or sign-flipped (tanh, sin) on the
side that writes them and inversely on the side that reads them. Nothing here holds weights. A group element acts on
weights by :meth:`Symmetry.act`, on gradients by its contragredient (``dual=True``): permutations and signs alike,
positive scales inversely.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from learned_opt.calls import unwrapped
from learned_opt.names import known_names
from learned_opt.symmetry import plot, table
from learned_opt.symmetry.axes import Leaf, choices, lay, map_leaves
from learned_opt.symmetry.labels import STATISTICS, AxisLabels, Label, Role, Spec, SymmetryError, base_dim
from learned_opt.text import counted, listed


@dataclass(frozen=True)
class Element:
    """A group element. ``perms[l][..., i]`` is the old index that moves to ``i``; ``scales[s][..., i]`` multiplies
    the new index ``i``. Leading dimensions run over the labels that a fibred label is over.
    """

    perms: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


@dataclass(frozen=True)
class Symmetry(AxisLabels):
    """The group of a network, by the labels of its axes (:class:`AxisLabels` has the fields)."""

    # -- the group
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
        """``g . weights`` (tensors that the symmetry does not name, up to wrappers' prefixes, pass through).

        With ``dual=True`` the contragredient action, by which gradients and momenta transform.
        """
        moved = {}
        names = known_names(weights, self.specs)
        for given, tensor in weights.items():
            name = names[given]
            if name not in self.specs:
                moved[given] = tensor
                continue
            pieces = self.pieces(name, tensor)
            out = []
            for piece, choice in zip(pieces, choices(self.specs[name].axes), strict=True):
                leaves = tuple(leaf for part in choice for leaf in part)
                piece = self._permute(g, piece, [leaf.label for leaf in leaves])
                out.append(self._scale(g, piece, leaves, dual))
            moved[given] = self.assemble(name, out)
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

    @cached_property
    def without_scales(self) -> "Symmetry":
        """The group of the permutations alone; the same object every time."""
        specs = {
            n: Spec(tuple(map_leaves(lambda leaf: replace(leaf, scale=()), axis) for axis in spec.axes), spec.roles)
            for n, spec in self.specs.items()
        }
        return replace(self, specs=specs, scales={})

    # -- checks
    def check(
        self,
        model: nn.Module,
        *inputs: Any,
        samples: int = 3,
        generator: torch.Generator | None = None,
        output: Callable[[Any], Any] | None = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> float:
        """Largest relative change of the function under random group elements, in float64 at random weights.

        Initial values hide errors (zero biases, unit gains), so every parameter and statistic is randomised. Other
        buffers stay as they are: a mask or a table of positions is part of the function.

        Args:
            model: left as it is; a float64 copy is used, in its training or evaluation mode. It may be wrapped.
            inputs: example inputs, tensors or trees of them; floating ones are cast to float64.
            samples: number of random group elements.
            generator: source of the weights and of the group elements; default: seeded with 0.
            output: picks what to compare from what the model returns; default: all of it.
            keywords: example keyword inputs.

        Returns:
            ``max |f(g.W) - f(W)| / max |f(W)|``, the largest over the tensors of f (a tuple, a dict, any pytree): about
            1e-15 for a true symmetry, NaN where f is zero, infinite or NaN.

        Raises:
            SymmetryError: the model lacks tensors that are described, has them in another shape, or returns none.
        """
        generator = generator or torch.Generator().manual_seed(0)
        output = output or (lambda y: y)
        model = copy.deepcopy(unwrapped(model)).double()
        inputs, kwargs = pytree.tree_map(_wide, (inputs, dict(keywords or {})))
        weights = {n: w.detach() for n, w in model.named_buffers()}
        here = {*weights, *dict(model.named_parameters())}
        names = {known: n for n, known in known_names(here, self.specs).items() if known in self.specs}
        if missing := [n for n in self.specs if n not in names]:
            raise SymmetryError(f"the model has no {listed(missing)}, which the symmetry describes")
        described = {*names.values()}
        moving = {n: w for n, w in weights.items() if n in described or n.rpartition(".")[2] in STATISTICS}
        moving = dict(model.named_parameters()) | moving
        weights |= {n: randomised(w.detach(), generator) for n, w in moving.items()}
        own = {known: weights[n] for known, n in names.items()}
        self.validate(own)

        def evaluate(moved: Mapping[str, Tensor]) -> list[Tensor]:
            fresh = weights | {names[known]: x for known, x in moved.items()}
            fresh = {n: x.clone() for n, x in fresh.items()}  # running statistics are updated in place
            with torch.no_grad():
                found = pytree.tree_leaves(output(torch.func.functional_call(model, fresh, inputs, kwargs)))
            return [x if x.is_complex() else x.double() for x in found if isinstance(x, Tensor) and x.numel()]

        reference = evaluate(own)
        if not reference:
            raise SymmetryError(f"{type(model).__name__} returns no tensor that could be compared: pass output=")
        errors = [
            (a - b).abs().max() / b.abs().max()
            for _ in range(samples)
            for a, b in zip(evaluate(self.act(self.sample(generator), own)), reference, strict=True)
            if a.any() or b.any()  # NaN is not nothing
        ]
        return torch.stack(errors).max().item() if errors else math.nan

    # -- for people
    def __str__(self) -> str:
        return table.text(self)

    def __repr__(self) -> str:
        sizes = {"tensor": len(self.specs), "label": len(self.labels), "scale": len(self.scales)}
        sizes |= {"note": len(self.notes)} if self.notes else {}
        return f"Symmetry({', '.join(counted(n, noun) for noun, n in sizes.items())})"

    def summary(self) -> table.Summary:
        """How much symmetry there is, in plain numbers: see :class:`learned_opt.symmetry.table.Summary`."""
        return table.summary(self)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the tensors and the labels that join them to an SVG, PNG or PDF file: see
        :func:`learned_opt.symmetry.plot.draw`. Needs matplotlib (extra ``meta``).
        """
        plot.draw(self, path)


# --------------------------------------------------------------------------------------------- helpers
def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


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
