"""The papers' stacks for chains: predict a vector from weights, or edit weights.

The default settings give the official models, parameter by parameter. Zhou et al. 2023 (NP, HNP), Tran et al. 2024
(Monomial-NFN), Vo et al. 2024 (MAGEP-NFN), Unterthiner et al. 2020 (StatNN).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from learned_opt.nfn.baselines import FlatWeights, GraphPool, StatNN
from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.encodings import ChannelDropout, FourierFeatures, IOSinusoidal, LearnedScale
from learned_opt.nfn.magep import MAGEPInvariant, MAGEPLinear
from learned_opt.nfn.monomial import MonomialLinear, MonomialSignLinear
from learned_opt.nfn.permutation import HNPLinear, NPLinear
from learned_opt.nfn.pools import HNPPool, Magnitude, MonomialPool, UnitPool, pointwise
from learned_opt.symmetry import SymmetryError

Kind = Literal["np", "hnp", "monomial", "magep", "stat", "mlp", "graph"]
Pool = Literal["official", "units"]
EditKind = Literal["np", "hnp", "monomial", "magep", "exact", "mlp"]
_HEADS = {"monomial": 200, "magep": 500, "graph": 200}
_CHANNELS: dict[str, tuple[int, ...]] = {"magep": (20, 20)}
_READ_OUT = (8, 8, 5)  # channels of the monomial layers that magep's pool="units" reads


def head(inputs: int, width: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """The MLP behind every pool: two hidden layers of ``width``."""
    layers: list[nn.Module] = []
    for i, o in ((inputs, width), (width, width)):
        layers += [nn.Linear(i, o), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class InvariantNFN(nn.Module):
    """Weights of a network -> a vector that its symmetry does not move (features, equivariant layers, pool, head).

    What the kinds respect: ``np`` and ``hnp`` permutations; ``monomial`` and ``magep`` scales or signs too, whichever
    the chain has; ``stat`` any rearrangement; ``graph`` permutations; ``mlp`` nothing. Fourier features reduce every
    kind to permutations, and so ``monomial`` refuses them: put signs first by ``front``.

    Args:
        chain: the network whose weights are read.
        outputs: size of the vector.
        kind: which layers.
        channels: channels after every equivariant layer; default the papers' on the CNN zoo.
        head_width: width of the head; default the papers' on the CNN zoo.
        in_channels: channels of the features.
        activation: default ReLU, or tanh where the layers keep signs.
        fourier: scale of Fourier features before the layers (None: none).
        io_bands: frequencies of the sinusoidal codes of layer, input and output (0: none).
        front: channels of three sign-equivariant layers with sines, made invariant by absolute values, before all
            else (0: none): Monomial-NFN's classifier of sine networks with ``kind`` np or hnp.
        dropout: in the head.
        channel_dropout: after every equivariant layer.
        norm: normalise what is pooled over the batch. What ``monomial`` pools differs little from network to network
            beside what the networks have in common, and is hard to learn from as it is.
        pool: ``official``, or ``units``, which tells more networks apart: moments of entries relative to the scales of
            their units (:class:`UnitPool`), for ``monomial`` in place of mean directions of entries
            (:class:`MonomialPool`); for ``magep`` beside its polynomials, of three monomial layers (8, 8, 5 channels)
            that see the kernels, which polynomials are free of.

    Raises:
        SymmetryError: when the kind needs scales that the chain does not have, or the parts do not fit.
    """

    def __init__(
        self,
        chain: Chain,
        outputs: int,
        kind: Kind,
        *,
        channels: Sequence[int] | None = None,
        head_width: int | None = None,
        in_channels: int = 1,
        activation: str | None = None,
        fourier: float | None = None,
        io_bands: int = 0,
        front: int = 0,
        dropout: float = 0.0,
        channel_dropout: float = 0.0,
        norm: bool = False,
        pool: Pool = "official",
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise SymmetryError(f"unknown kind {kind!r}; there are {', '.join(get_args(Kind))}")
        if pool not in get_args(Pool) or (pool != "official" and kind not in ("monomial", "magep")):
            raise SymmetryError(f"pool is {pool!r}; there is 'official' and, for kind='monomial' and 'magep', 'units'")
        if (kind == "monomial" or pool == "units") and (fourier is not None or io_bands):
            raise SymmetryError(
                "Fourier features and codes keep no scales or signs: use kind='np' or 'hnp' with front= channels"
            )
        self.chain, self.kind = chain, kind
        layers, width = _encoders(chain, in_channels, fourier, io_bands, front)
        wide = tuple(channels if channels is not None else _CHANNELS.get(kind, (16, 16, 5)))
        group = chain.scale if kind in ("monomial", "magep") else None
        if kind == "monomial" and group is None:
            raise SymmetryError("the chain's hidden units have no scale: use kind='hnp', which asks for permutations")
        act = activation or ("tanh" if group == "sign" else "relu")
        dropouts = [ChannelDropout(channel_dropout)] if channel_dropout else []
        last: nn.Module
        if kind in ("stat", "mlp"):
            last = StatNN(chain) if kind == "stat" else FlatWeights(chain)
            pooled = width * last.outputs
        elif kind == "graph":
            last = GraphPool(chain, width)
            pooled = last.outputs
        elif kind == "magep":
            # as in the paper's stack for sines the group is given up where Fourier features come first
            keeps = None if fourier is not None or io_bands else group
            plain = chain.without_kernels()
            terms: list[nn.Module] = [MonomialLinear(chain, width, wide[0], to=plain), pointwise(act, keeps), *dropouts]
            for a, b in zip((wide[0], *wide), wide, strict=False):
                terms += [MAGEPLinear(plain, a, b), pointwise(act, keeps), *dropouts]
            last, pooled = MAGEPInvariant(plain, wide[-1], wide[-1]), wide[-1]
            if pool == "units":
                kernels, width = _linear_layers("monomial", chain, width, _READ_OUT, act, group, dropouts)
                units = UnitPool(chain, width)
                pooled += units.outputs
                last = Beside(nn.Sequential(*terms, last), nn.Sequential(*kernels, units))
            else:
                layers += terms
        else:
            stack, width = _linear_layers(kind, chain, width, wide, act, group, dropouts, io_embed=not io_bands)
            layers += stack
            if pool == "units":
                last = UnitPool(chain, width)
                pooled = last.outputs
            else:
                last = MonomialPool(chain, width) if kind == "monomial" else HNPPool(chain)
                pooled = width * last.outputs
        self.layers, self.pool = nn.Sequential(*layers), last
        self.head = head(pooled, head_width or _HEADS.get(kind, 1000), outputs, dropout)
        if norm:
            self.head.insert(0, nn.BatchNorm1d(pooled))

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, outputs]`` (no sigmoid or softmax)."""
        return self.head(self.pool(self.layers(features)))


def _linear_layers(
    kind: str,
    chain: Chain,
    width: int,
    wide: Sequence[int],
    act: str,
    group: str | None,
    dropouts: Sequence[nn.Module],
    io_embed: bool = False,
) -> tuple[list[nn.Module], int]:
    """Equivariant linear layers with nonlinearities, the last one even where signs flip; and the channels returned."""
    make: Any = {"np": NPLinear, "hnp": HNPLinear, "monomial": MonomialLinear}[kind]
    extra = {"io_embed": True} if kind == "np" and io_embed else {}
    layers: list[nn.Module] = []
    for i, n in enumerate(wide):
        even = group == "sign" and i == len(wide) - 1
        layers += [make(chain, width, n, **extra), Magnitude() if even else pointwise(act, group), *dropouts]
        width = n
    return layers, width


def _encoders(
    chain: Chain, in_channels: int, fourier: float | None, io_bands: int, front: int
) -> tuple[list[nn.Module], int]:
    """What comes before the layers, and how many channels it returns."""
    layers: list[nn.Module] = []
    width = in_channels
    if front:
        for a, b in ((width, front), (front, front)):
            layers += [MonomialSignLinear(chain, a, b), pointwise("sin", "sign")]
        layers += [MonomialSignLinear(chain, front, 1), Magnitude()]
        width = 1
    if fourier is not None:
        waves = FourierFeatures(width, scale=fourier)
        layers.append(waves)
        width = waves.out_channels
    if io_bands:
        layers.append(IOSinusoidal(chain, bands=io_bands))
        width += 2 * io_bands + 1
    return layers, width


def inr_classifier(
    chain: Chain, kind: Literal["np", "hnp", "monomial", "magep", "mlp"], data: str = "mnist", outputs: int = 10
) -> InvariantNFN:
    """The papers' classifiers of sine networks of images.

    ``monomial`` is sign-invariant; ``magep`` is not (its Fourier features come first, as in the official code), only
    permutation-invariant.

    Args:
        chain: the sine network (2 -> 32 -> 32 -> 1 or 3).
        kind: which layers.
        data: ``mnist``, ``fashion`` or ``cifar``.
        outputs: classes.
    """
    if data not in ("mnist", "fashion", "cifar"):
        raise ValueError(f"data is {data!r}, one of mnist, fashion, cifar is known")
    mnist, cifar = data == "mnist", data == "cifar"
    if kind == "mlp":
        return InvariantNFN(chain, outputs, "mlp")
    common: dict[str, Any] = {"fourier": 3.0 if mnist else 10.0, "dropout": 0.1 if mnist else 0.5}
    if kind == "magep":
        width = 64 if cifar else 128
        wide = (width,) * 3
        return InvariantNFN(chain, outputs, "magep", channels=wide, head_width=1000, activation="sin", **common)
    common |= {"channels": (256,) * 3, "channel_dropout": 0.1 if mnist else 0.0}
    front = (16 if cifar else 64) if kind == "monomial" else 0
    body: Kind = kind if kind != "monomial" else ("np" if cifar else "hnp")
    bands = (3 if mnist else 6) if body == "np" else 0
    head_width = 500 if kind == "monomial" and data == "fashion" else 1000
    return InvariantNFN(chain, outputs, body, head_width=head_width, front=front, io_bands=bands, **common)


class EquivariantNFN(nn.Module):
    """Weights of a network -> edited weights: themselves plus a learned change.

    ``np`` and ``hnp`` are Fourier features and permutation layers; ``monomial`` and ``magep`` put monomial
    layers in front of the ``np`` net, as the official code does, and keep permutations only. ``exact`` is made of
    monomial layers alone and keeps the whole group of the chain. ``mlp`` works on flattened weights and keeps nothing.

    Args:
        chain: the network whose weights are edited.
        kind: which layers.
        width: channels of the hidden layers.
        depth: number of hidden layers.
        front: channels of the monomial layers of ``monomial`` and ``magep``.
        fourier: scale of the Fourier features.

    Raises:
        SymmetryError: ``exact`` for a chain without scales.
    """

    def __init__(
        self,
        chain: Chain,
        kind: EditKind,
        *,
        width: int = 128,
        depth: int = 3,
        front: int = 16,
        fourier: float = 10.0,
    ) -> None:
        super().__init__()
        if kind not in get_args(EditKind):
            raise SymmetryError(f"unknown kind {kind!r}; there are {', '.join(get_args(EditKind))}")
        self.chain, self.kind = chain, kind
        layers: list[nn.Module] = []
        n = 1
        if kind == "mlp":
            flat = FlatWeights(chain)
            hidden = [m for i in (flat.outputs, 1000, 1000) for m in (nn.Linear(i, 1000), nn.ReLU())]
            layers = [flat, *hidden, nn.Linear(1000, flat.outputs), _Unflatten(flat)]
        elif kind == "exact":
            if chain.scale is None:
                raise SymmetryError("the chain's hidden units have no scale: use kind='hnp'")
            make: Any = MonomialSignLinear if chain.scale == "sign" else MonomialLinear
            for _ in range(depth):
                layers += [make(chain, n, width), pointwise("tanh" if chain.scale == "sign" else "relu", chain.scale)]
                n = width
            layers.append(make(chain, n, 1))
        else:
            first: Any = MonomialLinear if chain.scale == "positive" else MonomialSignLinear
            if kind == "monomial":
                layers += [first(chain, 1, front), first(chain, front, 1)]
            elif kind == "magep":
                n = 2 * front
                layers += [first(chain, 1, front), MAGEPLinear(chain, front, front), first(chain, front, n)]
            encoders, n = _encoders(chain, n, fourier, 0 if kind == "hnp" else 6, 0)
            layers += encoders
            for _ in range(depth):
                layers += [_permutation(kind, chain, n, width), pointwise("relu", None)]
                n = width
            layers.append(_permutation(kind, chain, n, 1))
        self.layers = nn.Sequential(*layers)
        self.scale = LearnedScale(chain)

    def forward(self, features: Features) -> Features:
        """Features with one channel -> edited features with one channel."""
        self.chain.validate(features, 1)
        change = self.scale(self.layers(features))
        return {n: x + change[n] if n in change else x for n, x in features.items()}


def _permutation(kind: str, chain: Chain, n: int, m: int) -> nn.Module:
    return HNPLinear(chain, n, m) if kind == "hnp" else NPLinear(chain, n, m)


class Beside(nn.Module):
    """Several functions of the same features, their numbers one after the other."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, numbers of all parts]``."""
        return torch.cat([part(features) for part in self.parts], -1)


class _Unflatten(nn.Module):
    """Numbers back to the shapes of the parameters."""

    def __init__(self, flat: FlatWeights) -> None:
        super().__init__()
        self.inverse = flat.inverse

    def forward(self, flat: Tensor) -> Features:
        return self.inverse(flat)
