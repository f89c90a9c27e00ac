"""A bias as a column of the matrix that it is added to.

``W x + b = [W, b / s] [x, s]``: a bias is the weights of one more input, which always has the size s. So a matrix and
its bias take one step, along the polar factor of ``[n, s n_b]``, of whose last column the bias moves s times as far.
Steps of its own (twice Adam's direction, as those of all other vectors) go where those of the matrix go already, as
far as inputs have a mean, and have the size of a sign where there is signal, the size of a fifth where there is noise:
too large in regressions and too small in classification (experiments, 47).

A bias whose Adam direction is smaller than chance makes it (RMS 0.23) has gradients that alternate, and a step of one
size would go on shaking it: there the step is shorter by as much.

A matrix's bias has the same axis as the matrix's output, and its name but for "bias" in the place of "weight". One that
has no such name moves like other vectors, and so do those of thin matrices, which take Adam's direction themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from learned_opt.layout import Layout, Stack
from learned_opt.symmetry import Symmetry
from learned_opt.symmetry.axes import Block

THIN = 4  # rows or columns up to which a matrix takes the Adam direction
SIZE = 3.0  # s
NOISE = 0.2  # RMS of Adam's direction below which steps are shorter


def is_wide(block: Block | Stack) -> bool:
    """Whether it is a matrix, or matrices, that are not thin."""
    return block.kind == "matrix" and min(block.shape[1:]) > THIN


@lru_cache(maxsize=256)
def weights_of(layout: Layout) -> dict[str, str]:
    """The weight of every bias."""
    known = set(layout.names)
    pairs = [(_bias_name(name), name) for name in layout.names]
    return {b: w for b, w in pairs if b in known and b != w and _are_one(layout.symmetry, w, b)}


def _bias_name(weight: str) -> str:
    path, dot, name = weight.rpartition(".")
    return path + dot + name.replace("weight", "bias")


def _are_one(symmetry: Symmetry, weight: str, bias: str) -> bool:
    """Whether a bias is cut into the same rows as its matrix, written by the same units, all of its blocks wide."""
    matrices, vectors = symmetry.blocks[weight], symmetry.blocks[bias]
    return (
        all(is_wide(block) for block in matrices)
        and all(block.kind == "vector" for block in vectors)
        and [(block.batch, block.rows) for block in matrices] == [(block.batch, block.rows) for block in vectors]
    )


@dataclass(frozen=True, eq=False)
class Biases:
    """Where the biases of a layout's matrices are.

    Attributes:
        places: of a stack of matrices, that of its biases, and where in it; past the end: none.
        back: of a stack of vectors, those of its matrices, and where in itself and all of these a vector comes from.
    """

    places: dict[int, tuple[int, Tensor]]
    back: dict[int, tuple[tuple[int, ...], Tensor]]

    @property
    def stacks(self) -> tuple[int, ...]:
        """Those of vectors that have biases."""
        return tuple(self.back)

    def columns(self, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """From stacks of vectors ``[N, R, 1]`` to those of matrices: their biases, zero for one that has none."""
        ends = {j: torch.cat([vectors[j], torch.zeros_like(vectors[j][:1])]) for j in self.back}
        return {i: ends[j].index_select(0, index) for i, (j, index) in self.places.items()}

    def replaced(self, stacks: Sequence[Tensor], columns: Mapping[int, Tensor]) -> list[Tensor]:
        """The stacks, with the columns ``[N, R, 1]`` of matrices in the places of their biases."""
        new = list(stacks)
        for j, (own, index) in self.back.items():
            new[j] = torch.cat([stacks[j], *(columns[i] for i in own)]).index_select(0, index)
        return new


@lru_cache(maxsize=256)
def biases_of(layout: Layout) -> Biases:
    """The biases of a layout's matrices."""
    bias = {weight: name for name, weight in weights_of(layout).items()}
    at = _positions(layout)
    places: dict[int, tuple[int, Tensor]] = {}
    back: dict[int, dict[int, list[int]]] = {}  # of a stack of vectors: those of matrices, and their biases' places
    for i, stack in enumerate(layout.stacks):
        found = [at[bias[n], k] if n in bias else (None, b * [-1]) for n, k, b in stack.members]
        if of := {j for j, _ in found if j is not None}:
            (j,) = of  # vectors of one length
            end = layout.stacks[j].shape[0]
            index = [end if p < 0 else p for _, ps in found for p in ps]
            places[i] = j, _tensor(index, layout)
            back.setdefault(j, {})[i] = index
    return Biases(
        places, {j: (tuple(own), _tensor(_inverse(layout.stacks[j].shape[0], own), layout)) for j, own in back.items()}
    )


def _positions(layout: Layout) -> dict[tuple[str, int], tuple[int, list[int]]]:
    """Of every block of every parameter, its stack and where in it."""
    found = {}
    for i, stack in enumerate(layout.stacks):
        start = 0
        for name, k, batch in stack.members:
            found[name, k] = i, list(range(start, start + batch))
            start += batch
    return found


def _inverse(count: int, indices: Mapping[int, list[int]]) -> list[int]:
    """Where in vectors and all columns, one after the other, each of ``count`` vectors is to be taken from."""
    source, start = list(range(count)), count
    for index in indices.values():
        for place, vector in enumerate(index):
            if vector < count:
                source[vector] = start + place
        start += len(index)
    return source


def _tensor(index: list[int], layout: Layout) -> Tensor:
    return torch.tensor(index, dtype=torch.long, device=layout.stacks[0].fixed.device)
