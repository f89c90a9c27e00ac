"""What gradients say of scales: along the orbit of a scale the loss of the training does not change."""

from collections.abc import Mapping

import torch
from torch import Tensor

from learned_opt.symmetry.axes import choices
from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.labels import base_dim

CHANGED, COARSE = 0.02, 0.25  # of what a gradient that knows nothing of the scale would have; in low precision
LARGEST = 20_000_000  # entries: a product with the gradient is made for each tensor


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
        gradients: of those that have one. A scale that acts on another tensor, or on a very large one, is not judged,
            nor is one with gradients that are not finite.
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
        if not scaled or name not in gradients or weights[name].numel() > LARGEST:
            blind |= scaled
            continue
        slopes = weights[name].detach() * gradients[name].detach()
        slopes = slopes if slopes.dtype == torch.float64 else slopes.float()
        for piece, choice in zip(symmetry.pieces(name, slopes), choices(spec.axes), strict=True):
            leaves = tuple(leaf for part in choice for leaf in part)
            labels = [leaf.label for leaf in leaves]
            for dim, leaf in enumerate(leaves):
                wanted = [(s, e) for s, e in leaf.scale if s in scaled]
                if wanted:
                    at = [*(base_dim(labels, b, dim) for b in symmetry.over(leaf)), dim]
                    along, squares = _along(piece, at)
                    for scale, exponent in wanted:
                        _add(total, scale, exponent * along)
                        _add(size, scale, exponent**2 * squares)
    return [s for s, t in total.items() if s not in blind and bool(t.square().sum() > changed**2 * size[s].sum())]


def _along(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Sums of the entries, and of their squares, over all other dimensions; these in order."""
    others = [d for d in range(x.ndim) if d not in dims]
    order = sorted(dims)
    sums = x.sum(others) if others else x
    squares = torch.linalg.vector_norm(x, dim=others).square() if others else x.square()
    to = [order.index(d) for d in dims]
    return sums.permute(to).to("cpu", torch.float64), squares.permute(to).to("cpu", torch.float64)


def _add(to: dict[str, Tensor], name: str, x: Tensor) -> None:
    to[name] = to[name] + x if name in to else x
