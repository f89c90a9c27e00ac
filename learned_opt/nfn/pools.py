"""From features to numbers that no symmetry of a chain moves: ``[batch, channels, pooled]``, flattened."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.features import split_channels
from learned_opt.nfn.monomial import Slot, read_rows, row_count, slots
from learned_opt.symmetry import SymmetryError


def hnp_pooled(chain: Chain) -> int:
    """Numbers per channel that :class:`HNPPool` and :class:`MonomialPool` return."""
    ends = {0: chain.n_in, chain.depth - 1: chain.n_out}
    weights = sum(layer.filters * ends.get(i, 1) for i, layer in enumerate(chain.layers))
    return weights + sum(1 if i < chain.depth - 1 else chain.n_out for kind, i in slots(chain) if kind == "bias")


class NPPool(nn.Module):
    """Means over all units of every weight (per kernel position) and bias: invariant to all permutations.

    Returns ``[batch, channels * outputs]`` with ``outputs = sum_i f_i + number of biases``.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain
        self.outputs = sum(x.filters + int(x.bias is not None) for x in chain.layers)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, channels * outputs]``."""
        self.chain.validate(features)
        parts = []
        for layer in self.chain.layers:
            parts.append(_per_channel(layer.rows(features[layer.weight]).mean((-1, -2)), layer.filters))
            if layer.bias is not None:
                parts.append(features[layer.bias].mean(-1, keepdim=True))
        return torch.cat(parts, -1).flatten(1)


class HNPPool(nn.Module):
    """Means over hidden units: invariant to their permutations; inputs and outputs keep their places.

    Returns ``[batch, channels * outputs]`` with ``outputs`` = :func:`hnp_pooled`.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain, self.outputs = chain, hnp_pooled(chain)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, channels * outputs]``."""
        self.chain.validate(features)
        channels = features[self.chain.names[0]].shape[1]
        parts = [_pool(rows) for rows in read_rows(self.chain, features).values()]
        return torch.cat([_per_channel(p, p.shape[0] // channels) for p in parts], -1).flatten(1)


class MonomialPool(nn.Module):
    """Invariant to permutations and positive scales (and to signs after :class:`Magnitude`).

    Every entry's channels (times kernel positions) form one vector v; ``gamma * v / max(|v|, 1e-12) + delta`` has no
    scale, and its means over hidden units are returned (mode ``param_mul_L2`` of the official HNPSPool). The output
    bias is invariant as it is; its gamma and delta, which the official code has but does not use, act on it
    directly.

    Args:
        chain: the network.
        channels: weight-like channels.
        gradients: further channels that transform like gradients; they are normalised by themselves.
    """

    def __init__(self, chain: Chain, channels: int, *, gradients: int = 0) -> None:
        super().__init__()
        self.chain, self.channels, self.gradients = chain, channels, gradients
        self.outputs = hnp_pooled(chain)
        self.gain, self.shift = nn.ParameterDict(), nn.ParameterDict()
        for kind, i in slots(chain):
            per_channel = chain.layers[i].filters if kind == "weight" else 1
            for table in (self.gain, self.shift):
                table[f"{kind}{i}"] = torch.randn((channels + gradients) * per_channel)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, (channels + gradients) * outputs]``."""
        self.chain.validate(features, self.channels + self.gradients)
        streams = split_channels(features, self.channels) if self.gradients else (features,)
        widths = (self.channels, self.gradients)
        pooled = [self._directions(x, n) for x, n in zip(streams, widths, strict=False)]
        parts = []
        for kind, i in slots(self.chain):
            x = torch.cat([p[kind, i] for p in pooled])
            gain, shift = self.gain[f"{kind}{i}"], self.shift[f"{kind}{i}"]
            fixed = x.shape[0] // len(gain)  # input or output units stand innermost in the rows
            x = x * gain.repeat_interleave(fixed).unsqueeze(1) + shift.repeat_interleave(fixed).unsqueeze(1)
            parts.append(_per_channel(x, x.shape[0] // (self.channels + self.gradients)))
        return torch.cat(parts, -1).flatten(1)

    def _directions(self, features: Features, channels: int) -> dict[Slot, Tensor]:
        """Mean direction of every parameter's entries: ``[rows, batch]``."""
        pooled: dict[Slot, Tensor] = {}
        for slot, rows in read_rows(self.chain, features).items():
            kind, i = slot
            if slot == ("bias", self.chain.depth - 1):
                pooled[slot] = rows
                continue
            per_entry = channels * (self.chain.layers[i].filters if kind == "weight" else 1)
            entries = rows.unflatten(0, (per_entry, -1))
            norm = torch.linalg.vector_norm(entries, dim=0, keepdim=True).clamp(min=1e-12)
            pooled[slot] = _pool((entries / norm).flatten(0, 1))
        return pooled


class UnitPool(nn.Module):
    """Invariant to permutations and positive scales (and to signs after :class:`Magnitude`), with magnitudes kept.

    :class:`MonomialPool` returns mean directions of single entries, in which an entry that is ten times another looks
    like it. Here the scale of every hidden unit is divided out instead (:func:`in_frame`: the canonical frame of this
    library's optimizer, brought to chains), and ratios of entries stay. Every row (channel, kernel position, fixed
    input or output) gives ``mean / s`` and ``log s``, with s its root mean square over hidden units: a number between
    -1 and 1, and one by which products of many weights cannot span decades. The output bias is invariant as it is.

    Gradient-like channels have no place in the frame: :class:`MonomialPool` takes them.

    Args:
        chain: the network.
        channels: channels of the features.

    Attributes:
        outputs: numbers per network.
    """

    def __init__(self, chain: Chain, channels: int) -> None:
        super().__init__()
        self.chain, self.channels = chain, channels
        self.fixed: Slot = ("bias", chain.depth - 1)
        self.outputs = sum((1 if s == self.fixed else 2) * channels * row_count(chain, s) for s in slots(chain))

    def forward(self, features: Features) -> Tensor:
        """Features of ``channels`` channels -> ``[batch, outputs]``."""
        self.chain.validate(features, self.channels)
        framed = in_frame(self.chain, read_rows(self.chain, features))
        return torch.cat([x if slot == self.fixed else _shape_and_size(x) for slot, x in framed.items()]).T


def _shape_and_size(rows: Tensor) -> Tensor:
    """``mean / s`` and ``log s`` over the moved units: ``[rows, batch, *moved] -> [2 rows, batch]``."""
    x = rows.flatten(2)
    s = (x.square().mean(-1) + 1e-6).sqrt()  # what is a thousandth of a unit's scale is nothing
    return torch.cat([x.mean(-1) / s, s.log()])


def in_frame(chain: Chain, rows: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Rows as they would be had every hidden unit scale 1: what positive scales of units do not change, and all of it.

    The walk that :mod:`learned_opt.frame` begins with. A unit's potential ``c_j`` is the norm of what is written into
    it (channels, kernel positions, inputs that are in the frame already, bias), and is scaled by ``d_j`` when the unit
    is; so ``W_jk c_k / c_j`` and ``b_j / c_j`` are invariant. Nothing else is lost: they are themselves the network,
    its units scaled by ``1 / c_j``. What reads a unit into which nothing is written is multiplied by ``c_k = 0``, for
    in the network it does not count either.

    Args:
        chain: the network.
        rows: as :func:`read_rows` gives them.

    Returns:
        Rows of the same shapes; the same rows where the chain's units have no positive scale.
    """
    if chain.scale != "positive":
        return dict(rows)
    framed = dict(rows)
    for i in range(chain.depth - 1):
        w, bias = framed["weight", i], framed.get(("bias", i))
        inputs = (0,) if chain.side(i) == "in" else (0, -1)
        written = w.square().sum(inputs) + (0 if bias is None else bias.square().sum(0))  # [batch, units]
        divisor = torch.where(written > 0, written, 1).sqrt()
        framed["weight", i] = w / (divisor if chain.side(i) == "in" else divisor.unsqueeze(-1))
        if bias is not None:
            framed["bias", i] = bias / divisor
        c = torch.where(written > 0, divisor, 0)
        framed["weight", i + 1] = framed["weight", i + 1] * (c if chain.side(i + 1) == "out" else c.unsqueeze(-2))
    return framed


def _pool(rows: Tensor) -> Tensor:
    """Mean over the moved units: ``[rows, batch, *moved] -> [rows, batch]``."""
    return rows.flatten(2).mean(-1) if rows.ndim > 2 else rows


def _per_channel(rows: Tensor, per_channel: int) -> Tensor:
    """``[channels * per_channel, batch] -> [batch, channels, per_channel]``."""
    return rows.unflatten(0, (-1, per_channel)).permute(2, 0, 1)


class Magnitude(nn.Module):
    """Absolute value of every entry: what signs cannot change. Permutation layers and pools may follow."""

    def forward(self, features: Features) -> Features:
        """Features -> features of the same shape."""
        return {n: x.abs() for n, x in features.items()}


POINTWISE = {
    "relu": (torch.relu, {"positive"}),
    "leaky_relu": (nn.functional.leaky_relu, {"positive"}),
    "abs": (torch.abs, {"positive"}),
    "identity": (lambda x: x, {"positive", "sign"}),
    "tanh": (torch.tanh, {"sign"}),
    "sin": (torch.sin, {"sign"}),
    "square": (lambda x: x * x.abs(), {"sign"}),
}


class Pointwise(nn.Module):
    """One function of every entry, see :func:`pointwise`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, features: Features) -> Features:
        """Features -> features of the same shape."""
        function = POINTWISE[self.kind][0]
        return {n: function(x) for n, x in features.items()}

    def extra_repr(self) -> str:
        """The function's name."""
        return self.kind


def pointwise(kind: str, group: str | None) -> Pointwise:
    """The nonlinearity ``kind`` if it commutes with ``group``.

    Args:
        kind: ``relu``, ``leaky_relu``, ``abs``, ``identity``, ``tanh``, ``sin``, ``square`` (``x |x|``).
        group: what its features must keep: ``"positive"`` (homogeneous functions of degree 1), ``"sign"`` (odd ones)
            or None (permutations: any).

    Raises:
        SymmetryError: when it does not.
    """
    if kind not in POINTWISE:
        raise SymmetryError(f"unknown nonlinearity {kind!r}; there are {', '.join(POINTWISE)}")
    if group is not None and group not in POINTWISE[kind][1]:
        fits = ", ".join(k for k, (_, groups) in POINTWISE.items() if group in groups)
        raise SymmetryError(f"{kind} does not commute with {group} scales; {fits} do")
    return Pointwise(kind)
