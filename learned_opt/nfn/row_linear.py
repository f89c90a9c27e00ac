"""The one parameterised operation of the chain layers: a matrix times rows, and how such matrices start."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RowLinear(nn.Module):
    """``y = sum_s A_s x_s + c`` on rows: ``x_s`` is ``[in_rows_s, *free]``, ``y`` is ``[out_rows, *free]``.

    For the backward pass autograd keeps the inputs and the matrices, nothing else.

    Args:
        out_rows: rows of the result.
        in_rows: rows of every source.
        constant: add a learned constant per row.
    """

    def __init__(self, out_rows: int, in_rows: Sequence[int], constant: bool = False) -> None:
        super().__init__()
        self.out_rows, self.in_rows = out_rows, tuple(in_rows)
        self.matrices = nn.ParameterList([torch.empty(out_rows, n) for n in in_rows])
        self.constant = nn.Parameter(torch.empty(out_rows, 1)) if constant else None

    def forward(self, *sources: Tensor) -> Tensor:
        """Sources ``[in_rows_s, *free]`` -> ``[out_rows, *free]``."""
        free = sources[0].shape[1:]
        y: Tensor | None = self.constant
        for matrix, source in zip(self.matrices, sources, strict=True):
            x = source.flatten(1)
            y = matrix @ x if y is None else torch.addmm(y, matrix, x)
        assert y is not None
        return y.unflatten(1, free)

    def extra_repr(self) -> str:
        """Rows in and out."""
        return f"{list(self.in_rows)} -> {self.out_rows}"


@torch.no_grad()
def uniform_(*linears: RowLinear) -> None:
    """``U(-1/sqrt(F), 1/sqrt(F))`` for maps that feed one output, F the sum of all their inputs (NFN's default)."""
    bound = 1 / math.sqrt(sum(n for linear in linears for n in linear.in_rows))
    for linear in linears:
        for p in linear.parameters():
            p.uniform_(-bound, bound)


@torch.no_grad()
def xavier_(*linears: RowLinear) -> None:
    """``N(0, 2 / (fan_in + fan_out))`` with both fans summed over all maps that feed one output.

    A constant has fan_in 0 and counts as a map of its own (Monomial-NFN's initialisation).
    """
    fans = [n + linear.out_rows for linear in linears for n in linear.in_rows]
    fans += [linear.out_rows for linear in linears if linear.constant is not None]
    std = math.sqrt(2 / sum(fans))
    for linear in linears:
        for p in linear.parameters():
            p.normal_(0, std)
