"""The modules that fitting takes for a weight space, and the outputs of many networks for their losses."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Features
from learned_opt.nfn.fit.weight_spaces import Space
from learned_opt.nfn.general import Framed, GeneralLinear, GeneralPool
from learned_opt.nfn.models import EquivariantNFN, InvariantNFN, head
from learned_opt.nfn.pools import pointwise
from learned_opt.nfn.transformer import TransformerLinear, TransformerNFN, TransformerReLU
from learned_opt.nfn.transformer_space import TransformerSpec
from learned_opt.symmetry import Symmetry


def _flips(symmetry: Symmetry) -> bool:
    """Whether units may change their sign."""
    return any(s.kind != "positive" for s in symmetry.scales.values())


def general_features(symmetry: Symmetry, widths: Sequence[int]) -> list[nn.Module]:
    """Equivariant layers for any symmetry, a nonlinearity after each: 1 channel -> the last of ``widths``."""
    sign = _flips(symmetry)
    layers: list[nn.Module] = []
    for a, b in zip((1, *widths), widths, strict=False):
        layer = GeneralLinear(symmetry, a, b, scale="sign" if sign else "none")
        layers += [layer, pointwise("tanh", "sign") if sign else pointwise("relu", None)]
    return layers


def _no_kind(space: TransformerSpec, kind: str | None) -> None:
    if kind is not None:
        raise ValueError(
            f"kind={kind!r} has nothing to say: a {type(space).__name__} has layers of one kind; leave it out"
        )


def make_predictor(space: Space, outputs: int, kind: str | None, options: Mapping[str, Any]) -> nn.Module:
    """The module that reads prepared features of the space; see :class:`WeightSpacePredictor`."""
    if isinstance(space, TransformerSpec):
        _no_kind(space, kind)
        return TransformerNFN(space, outputs=outputs, sigmoid=False, **options)
    if isinstance(space, Symmetry):
        widths = tuple(options.get("channels", (16, 16)))
        if unknown := options.keys() - {"channels", "head_width"}:
            raise ValueError(f"unknown options {sorted(unknown)}; a general symmetry has channels and head_width")
        layers = general_features(space, widths)
        pool = GeneralPool(space, widths[-1], signed=not _flips(space))
        return nn.Sequential(*layers, pool, head(pool.out_features, options.get("head_width", 200), outputs))
    name: Any = kind or ("monomial" if space.scale else "hnp")  # InvariantNFN refuses one that is no Kind
    return InvariantNFN(space, outputs, name, **options)


class _TransformerEditor(nn.Module):
    """Transformer weights plus a learned equivariant change."""

    def __init__(self, spec: TransformerSpec, width: int = 10, start: float = 0.01) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.Sequential(
            TransformerLinear(spec, 1, width), TransformerReLU(), TransformerLinear(spec, width, 1)
        )
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, x: Features) -> Features:
        packed = self.spec.pack(x)
        changed = self.spec.unpack(self.layers(packed))
        outside = self.spec.rest.keys()  # the layers pass these through
        return {n: x[n] if n in outside else x[n] + self.scale * changed[n] for n in x}


class _GeneralEditor(nn.Module):
    """Weights plus a learned change that is equivariant to any symmetry."""

    def __init__(self, symmetry: Symmetry, channels: Sequence[int] = (16, 16), start: float = 0.01) -> None:
        super().__init__()
        sign = _flips(symmetry)
        last = GeneralLinear(symmetry, channels[-1], 1, scale="sign" if sign else "none")
        self.change = Framed(nn.Sequential(*general_features(symmetry, channels), last), symmetry)
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, x: Features) -> Features:
        change = self.change(x)
        assert not isinstance(change, Tensor)
        return {n: x[n] + self.scale * change[n] for n in x}


def make_editor(space: Space, kind: str | None, options: Mapping[str, Any]) -> nn.Module:
    """The module from features with one channel to features with one channel; see :class:`WeightSpaceEditor`."""
    if isinstance(space, TransformerSpec):
        _no_kind(space, kind)
        return _TransformerEditor(space, **options)
    if isinstance(space, Symmetry):
        return _GeneralEditor(space, **options)
    name: Any = kind or ("exact" if space.scale else "hnp")  # EquivariantNFN refuses one that is no EditKind
    return EquivariantNFN(space, name, **options)


def network_outputs(model: nn.Module, inputs: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from weights ``{name: [batch, *shape]}`` to the networks' outputs ``[batch, *output]``.

    For the losses of editors, such as ``lambda w, images: (render(w) - images).square().mean()``.

    Args:
        model: one network of the architecture; its own weights do not matter and it is not changed.
        inputs: what every network is evaluated on, ``[points, ...]`` (coordinates, images).
    """
    model = copy.deepcopy(model)

    def one(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (inputs.to(next(iter(weights.values()))),))

    return lambda weights: torch.func.vmap(one)(dict(weights))
