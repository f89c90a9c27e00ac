"""From features to numbers that no symmetry of a chain moves: ``[batch, channels, pooled]``, flattened."""

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.features import split_channels
from learned_opt.nfn.monomial import Slot, read_rows, slots
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
