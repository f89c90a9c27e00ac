"""What gradients say of scales: along the orbit of a scale the loss of the training does not change."""

from collections.abc import Mapping

import torch
from torch import Tensor

from learned_opt.symmetry.axes import choices
from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.labels import base_dim

CHANGED, COARSE = 0.02, 0.25  # of what a gradient that knows nothing of the scale would have; in low precision


def broken_scales(
    symmetry: Symmetry, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], coarse: bool = False
) -> list[str]:
    """Positive scales along which the loss changes to first order.

    The derivative by the factor of a unit is the sum of ``exponent * weight * gradient`` over its entries, which is
    zero if the loss has the symmetry, whatever it is made of. Rounding errors are far below what counts; a loss
    that breaks the symmetry a little (a weak penalty) passes too.

    Args:
        symmetry: with the names of the weights.
        weights: parameters.
        gradients: of those that have one, finite. A scale that acts on another tensor is not judged.
        coarse: the gradients were computed in low precision.
    """
    coarse = coarse or any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients.values())
    changed = COARSE if coarse else CHANGED
    total: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    blind: set[str] = set()
    for name, spec in symmetry.specs.items():
        scaled = {s for choice in choices(spec.axes) for part in choice for leaf in part for s, _ in leaf.scale}
        scaled -= {s for s in scaled if symmetry.scales[s].kind == "sign"}
        if not scaled or name not in gradients:
            blind |= scaled
            continue
        slopes = weights[name].detach().float() * gradients[name].detach().float()
        for piece, choice in zip(symmetry.pieces(name, slopes), choices(spec.axes), strict=True):
            leaves = tuple(leaf for part in choice for leaf in part)
            labels = [leaf.label for leaf in leaves]
            for dim, leaf in enumerate(leaves):
                at = [*(base_dim(labels, b, dim) for b in symmetry.over(leaf)), dim]
                for scale, exponent in leaf.scale:
                    if scale in scaled:
                        _add(total, scale, exponent * _along(piece, at))
                        _add(size, scale, exponent**2 * _along(piece.square(), at))
    return [
        s
        for s, t in total.items()
        if s not in blind and bool(t.square().sum() > changed**2 * size[s].sum()) and bool(size[s].sum() > 0)
    ]


def _along(x: Tensor, dims: list[int]) -> Tensor:
    """Sum over all other dimensions; these in order."""
    others = [d for d in range(x.ndim) if d not in dims]
    y = x.sum(others) if others else x
    order = sorted(dims)
    return y.permute([order.index(d) for d in dims])


def _add(to: dict[str, Tensor], name: str, x: Tensor) -> None:
    x = x.to("cpu", torch.float64)
    to[name] = to[name] + x if name in to else x
