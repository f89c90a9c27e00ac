"""MLPs and CNNs as chains of weights, and the views by which the layers of this package read and write them.

A chain has weights ``W^(1) .. W^(L)``, each read by the next one only. Every hidden unit may be permuted, and rescaled
(ReLU) or sign-flipped (tanh, sin). A weight-space feature of a parameter is ``[batch, channels, *its shape]``.

Layers work on *rows*: whatever no symmetry moves (channels, kernel positions, input and output units) is flattened
into the first axis, batch and hidden units follow. An equivariant linear map is then one matrix times the rows. Rows
are also how features are laid out in memory by the layers, so that from layer to layer nothing is copied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from learned_opt.symmetry import Spec, Symmetry, SymmetryError
from learned_opt.symmetry.axes import Axis, Leaf, Prod

Features = dict[str, Tensor]
ScaleKind = Literal["positive", "sign"]
Side = Literal["none", "in", "out"]
_REFUSED = "Chains are plain MLPs and CNNs; learned_opt.nfn.general has the equivariant layer for any Symmetry."


@dataclass(frozen=True)
class ChainLayer:
    """One weight ``[n_out, n_in, *kernel]`` and its bias ``[n_out]``.

    With ``flat`` the kernel is the positions of a flattened image: the parameter is ``[n_out, n_in * positions]``.
    """

    weight: str
    bias: str | None
    n_out: int
    n_in: int
    kernel: tuple[int, ...] = ()
    flat: bool = False

    @property
    def filters(self) -> int:
        """Kernel positions: how many numbers join two units."""
        return math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (self.n_out, self.n_in * self.filters) if self.flat else (self.n_out, self.n_in, *self.kernel)

    def rows(self, weight: Tensor, side: Side = "none") -> Tensor:
        """A feature of the weight with all that is fixed in front.

        Args:
            weight: ``[batch, channels, *shape]``.
            side: which of the two unit axes is fixed too.

        Returns:
            ``[channels * filters, batch, n_out, n_in]``; ``[channels * filters * n_in, batch, n_out]`` for ``in``;
            ``[channels * filters * n_out, batch, n_in]`` for ``out``; channels slowest, then the kernel.
        """
        if self.flat:
            weight = weight.unflatten(3, (self.n_in, self.filters))
        kernel = range(4, weight.ndim)
        ends = {"none": (0, 2, 3), "in": (3, 0, 2), "out": (2, 0, 3)}[side]
        return weight.permute(1, *kernel, *ends).flatten(0, -4 if side == "none" else -3)

    def weight_from(self, rows: Tensor, side: Side = "none") -> Tensor:
        """Inverse of :meth:`rows`."""
        fixed = {"none": (), "in": (self.n_in,), "out": (self.n_out,)}[side]
        x = rows.unflatten(0, (-1, *self.kernel, *fixed))
        k = len(self.kernel)
        batch = x.ndim - (3 if side == "none" else 2)
        out, inp = {"none": (batch + 1, batch + 2), "in": (batch + 1, batch - 1), "out": (batch - 1, batch + 1)}[side]
        x = x.permute(batch, 0, out, inp, *range(1, k + 1))
        return x.flatten(3) if self.flat else x


@dataclass(frozen=True)
class Chain:
    """The weights of an MLP or CNN in order, and what kind of scale its hidden units have.

    ``scale`` is ``"positive"`` (ReLU), ``"sign"`` (tanh, sin) or None (permutations only). Build one with
    :meth:`from_symmetry` (``learned_opt.infer_symmetry`` gives one) or :meth:`from_state_dict`.

    Raises:
        SymmetryError: fewer than two weights, or one that does not read what the one before it writes.
    """

    layers: tuple[ChainLayer, ...]
    scale: ScaleKind | None = None

    def __post_init__(self) -> None:
        if len(self.layers) < 2:
            raise SymmetryError(f"a chain needs at least two weights (one hidden layer), got {len(self.layers)}")
        for a, b in zip(self.layers, self.layers[1:], strict=False):
            if a.n_out != b.n_in:
                raise SymmetryError(
                    f"{b.weight} reads {b.n_in} units, but {a.weight} writes {a.n_out}: the weights are no chain. "
                    + _REFUSED
                )

    # -- where it comes from
    @classmethod
    def from_symmetry(cls, symmetry: Symmetry) -> "Chain":
        """The chain that a symmetry describes, found by following its labels.

        Raises:
            SymmetryError: when the network is no chain: labels read more than once (residual streams), norms,
                grouped convolutions, hidden units without a permutation.
        """
        weights = {n: s for n, s in symmetry.specs.items() if len(s.axes) > 1}
        vectors = {n: s for n, s in symmetry.specs.items() if len(s.axes) == 1}
        layers: list[ChainLayer] = []
        scales: list[set[str]] = []
        label: str | None = None
        while weights:
            readers = [n for n, s in weights.items() if _label(s, n, "in") == label]
            if len(readers) != 1:
                what = f"label {label!r}" if layers else "the fixed inputs"
                raise SymmetryError(f"{what} is read by {readers or 'nothing'}, not by one weight. {_REFUSED}")
            name = readers[0]
            spec = weights.pop(name)
            label = _label(spec, name, "out")
            if (label is None) != (not weights):
                why = "writes fixed units, but is not last" if weights else "is last, but its outputs are permuted"
                raise SymmetryError(f"{name} {why}. {_REFUSED}")
            layers.append(_layer(name, spec, _bias(name, label, vectors, symmetry)))
            scales.append(_kinds(symmetry, spec))
        if vectors:
            raise SymmetryError(f"{', '.join(vectors)}: belongs to no weight of a chain (a norm?). {_REFUSED}")
        hidden = scales[:-1]
        candidates: tuple[ScaleKind, ...] = ("positive", "sign")
        common = [k for k in candidates if hidden and all(k in kinds for kinds in hidden)]
        return cls(tuple(layers), common[0] if common else None)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], scale: ScaleKind | None = None) -> "Chain":
        """The chain of weights in the order of a state_dict; a vector is the bias of the weight before it.

        Args:
            state: weights ``[out, in, *kernel]`` and biases.
            scale: a state_dict does not show the activation, so say what its units' scale is.
        """
        layers: list[ChainLayer] = []
        for name, x in state.items():
            if x.ndim == 1 and layers and layers[-1].bias is None and x.shape[0] == layers[-1].n_out:
                layers[-1] = ChainLayer(**{**vars(layers[-1]), "bias": name})
            elif x.ndim < 2:
                raise SymmetryError(f"{name} {tuple(x.shape)} is no bias of a weight before it. {_REFUSED}")
            else:
                n_in, kernel, flat = x.shape[1], tuple(x.shape[2:]), False
                units = layers[-1].n_out if layers else n_in
                if x.ndim == 2 and units != n_in and n_in % units == 0:
                    n_in, kernel, flat = units, (n_in // units,), True
                layers.append(ChainLayer(name, None, x.shape[0], n_in, kernel, flat))
        return cls(tuple(layers), scale)

    # -- what it is
    @property
    def depth(self) -> int:
        """Number of weights, L."""
        return len(self.layers)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """``n_0 .. n_L``."""
        return (self.layers[0].n_in, *(layer.n_out for layer in self.layers))

    @property
    def n_in(self) -> int:
        """Number of inputs, n_0."""
        return self.widths[0]

    @property
    def n_out(self) -> int:
        """Number of outputs, n_L."""
        return self.widths[-1]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters: weight, bias, weight, bias, ..."""
        return tuple(n for layer in self.layers for n in (layer.weight, layer.bias) if n is not None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            shapes[layer.weight] = layer.shape
            if layer.bias is not None:
                shapes[layer.bias] = (layer.n_out,)
        return shapes

    def side(self, i: int) -> Side:
        """Which axis of weight ``i`` (from 0) no symmetry moves: the inputs of the first, the outputs of the last."""
        return "in" if i == 0 else "out" if i == self.depth - 1 else "none"

    def without_kernels(self) -> "Chain":
        """The same units joined by single numbers: names and widths are kept, kernels dropped."""
        layers = (ChainLayer(x.weight, x.bias, x.n_out, x.n_in) for x in self.layers)
        return Chain(tuple(layers), self.scale)

    def validate(self, features: Mapping[str, Tensor], channels: int | None = None) -> None:
        """Raise :class:`SymmetryError` unless the features are this chain's.

        Args:
            features: ``{name: [batch, channels, *shape]}``.
            channels: number of channels that they must have.
        """
        for name, shape in self.shapes.items():
            x = features.get(name)
            if x is None:
                raise SymmetryError(f"no features of {name}; the chain has {', '.join(self.names)}")
            if x.ndim < 2 or tuple(x.shape[2:]) != shape:
                raise SymmetryError(
                    f"features of {name} have shape {tuple(x.shape)}, expected [batch, channels, "
                    f"{', '.join(map(str, shape))}]. features_of(state_dicts) makes them."
                )
            if channels is not None and x.shape[1] != channels:
                raise SymmetryError(f"features of {name} have {x.shape[1]} channels, the layer reads {channels}")


# --------------------------------------------------------------------------------------------- a symmetry's parts
def _flat_leaf(axis: Axis, name: str) -> tuple[Leaf, int]:
    """The units of an axis and how many positions each has (channel x height x width)."""
    if isinstance(axis, Leaf):
        return axis, 1
    leaves = axis.factors if isinstance(axis, Prod) else ()
    if leaves and all(isinstance(x, Leaf) for x in leaves):
        sizes = [x.size for x in leaves if isinstance(x, Leaf)]
        if all(x.label is None and not x.scale for x in leaves if isinstance(x, Leaf)):
            return Leaf(math.prod(sizes)), 1
        first = leaves[0]
        if isinstance(first, Leaf) and all(isinstance(x, Leaf) and x.label is None for x in leaves[1:]):
            return first, math.prod(sizes[1:])
    raise SymmetryError(f"{name} has a composite axis that is not channels x positions. {_REFUSED}")


def _label(spec: Spec, name: str, role: str) -> str | None:
    roles = ("out", "in", *("kernel",) * (len(spec.roles) - 2))
    if spec.roles != roles:
        raise SymmetryError(
            f"{name} has axes {', '.join(spec.roles)}, a chain's weights have out, in, kernel. {_REFUSED}"
        )
    return _flat_leaf(spec.axes[roles.index(role)], name)[0].label


def _layer(name: str, spec: Spec, bias: str | None) -> ChainLayer:
    out, spread = _flat_leaf(spec.axes[0], name)
    inp, positions = _flat_leaf(spec.axes[1], name)
    if spread > 1 or (positions > 1 and len(spec.axes) > 2):
        raise SymmetryError(f"{name}: only a dense weight may read flattened positions. {_REFUSED}")
    kernel = tuple(spec.shape[2:]) if positions == 1 else (positions,)
    return ChainLayer(name, bias, out.size, inp.size, kernel, positions > 1)


def _bias(weight: str, label: str | None, vectors: dict[str, Spec], symmetry: Symmetry) -> str | None:
    """The bias of a weight; removes it from the vectors that are left."""
    written = symmetry.specs[weight].axes[0]
    found = [n for n, s in vectors.items() if s.roles == ("out",) and s.axes[0] == written]
    if label is None:  # fixed units have no name of their own: the nearest vector of their size
        same = weight.rpartition(".")[0]
        found = [n for n in found if n.rpartition(".")[0] == same] or found
    if len(found) > 1:
        raise SymmetryError(f"{', '.join(found)} all belong to what {weight} writes (a norm?). {_REFUSED}")
    for n in found:
        vectors.pop(n)
    return found[0] if found else None


def _kinds(symmetry: Symmetry, spec: Spec) -> set[str]:
    """What may scale the units that a weight writes."""
    leaf, _ = _flat_leaf(spec.axes[0], "")
    kinds = {symmetry.scales[name].kind for name, exponent in leaf.scale if exponent == 1}
    return {"positive", "sign"} if "real" in kinds else set(kinds)
