"""What gradients say of scales: along the orbit of a scale the loss of the training does not change."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from learned_opt.symmetry.axes import choices
from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.labels import base_dim

CHANGED, COARSE = 0.02, 0.25  # of what a gradient that knows nothing of the scale would have; in low precision
LARGEST = 20_000_000  # entries: a product with the gradient is made for each tensor


def broken_scales(
    symmetry: Symmetry,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    coarse: bool = False,
    elsewhere: Collection[str] = (),
    total: Callable[[Tensor], Tensor] = lambda x: x,
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
        elsewhere: weights that other processes have, with gradients.
        total: the sum over all processes; they must all call this with the same scales.
    """
    coarse = coarse or any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients.values())
    changed = COARSE if coarse else CHANGED
    change: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    judged: dict[str, None] = {}
    blind: set[str] = set()
    for name, spec in symmetry.specs.items():
        scaled = {s for choice in choices(spec.axes) for part in choice for leaf in part for s, _ in leaf.scale}
        scaled -= {s for s in scaled if symmetry.scales[s].kind == "sign"}
        known = name in gradients or name in elsewhere
        if not scaled or not known or math.prod(spec.shape) > LARGEST:
            blind |= scaled
            continue
        judged |= dict.fromkeys(sorted(scaled))
        if name not in gradients:
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
                        _add(change, scale, exponent * along)
                        _add(size, scale, exponent**2 * squares)
    names = [s for s in judged if s not in blind]
    if not names:
        return []
    units = [math.prod(symmetry.table_shape(symmetry.scales[s].label, symmetry.scales[s].size)) for s in names]
    none = [torch.zeros(n, dtype=torch.float64) for n in units]
    found = [x[s].reshape(-1) if s in x else zero for x in (change, size) for s, zero in zip(names, none, strict=True)]
    sums = total(torch.cat(found)).split(2 * units)
    pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
    return [s for s, along, squares in pairs if bool(along.square().sum() > changed**2 * squares.sum())]


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
