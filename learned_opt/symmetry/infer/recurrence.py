"""Recurrent layers and cells in an export, as operators of their own.

*Packed sequences.* How many sequences are there at each time step depends on data, and is held constant: the lengths of
the example are taken from a run of the model. A packed sequence is the rows of the padded one, picked by constant
indices, and a recurrent layer on it is one operator (``packed_recurrent``).

*Padded sequences.* A recurrent layer is one operator as well (``recurrent``): torch would trace all of its steps, for
seconds to minutes, to find out the shape of its output.

*Cells.* A step of a cell is one operator (``cell``): to trace what torch makes of it takes ten times as long, and a
loop has hundreds of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import _VF, Tensor
from torch.nn.modules import rnn as layers
from torch.nn.utils import rnn as utilities

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


class UnknownLengths(Exception):
    """A model packs sequences, whose lengths are not known."""


class _Sizes(list[int]):
    """Batch sizes as plain numbers, in the place of a tensor."""

    device = torch.device("cpu")

    def size(self, dim: int = 0) -> int:
        """Number of time steps."""
        return len(self)


@torch.library.custom_op("learned_opt::packed_recurrent", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def packed_recurrent(
    kind: str, data: Tensor, sizes: Sequence[int], start: Sequence[Tensor], params: Sequence[Tensor], bias: bool,
    layers: int, dropout: float, train: bool, bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A recurrent layer on packed rows ``[n, features]``: its outputs, its last states, and cells of an LSTM."""
    return _packed(kind, data, sizes, start, params, bias, layers, dropout, train, bidirectional)


def _packed(
    kind: str, data: Tensor, sizes: Sequence[int], start: Sequence[Tensor], params: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _three(data, getattr(_VF, kind)(data, torch.tensor(sizes), _state(kind, start), list(params), *rest))


def _padded(
    kind: str, x: Tensor, start: Sequence[Tensor], params: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _three(x, getattr(_VF, kind)(x, _state(kind, start), list(params), *rest))


def _state(kind: str, start: Sequence[Tensor]) -> Any:
    return list(start) if kind == "lstm" else start[0]


def _three(x: Tensor, found: tuple[Tensor, ...]) -> Any:
    return (*found, x.new_empty(0)) if len(found) == 2 else found


@packed_recurrent.register_fake
def _(
    kind: str, data: Tensor, sizes: Sequence[int], start: Sequence[Tensor], params: Sequence[Tensor], bias: bool,
    layers: int, dropout: float, train: bool, bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _shapes(kind, data, start, bidirectional)


def _shapes(kind: str, x: Tensor, start: Sequence[Tensor], bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    width = start[0].shape[-1] * (2 if bidirectional else 1)
    cell = torch.empty_like(start[1]) if kind == "lstm" else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], width), torch.empty_like(start[0]), cell


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = inputs


def _gradients(
    run: Callable[[list[Tensor]], Sequence[Tensor]], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Any]:
    """Of the tensors, by running it again."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        outputs = run(leaves)
    used = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad and g is not None]
    ys, gs = zip(*used, strict=True)
    return torch.autograd.grad(ys, leaves, gs, allow_unused=True)


def _layer_gradients(
    run: Callable[..., Sequence[Tensor]],
    x: Tensor,
    start: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[Any, list[Any], list[Any]]:
    n = 1 + len(start)
    found = _gradients(lambda ts: run(ts[0], ts[1:n], ts[n:]), [x, *start, *params], grads)
    return found[0], list(found[1:n]), list(found[n:])


def _packed_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    kind, data, sizes, start, params, *rest = ctx.inputs
    x, h, w = _layer_gradients(lambda x, h, w: _packed(kind, x, sizes, h, w, *rest), data, start, params, grads)
    return None, x, None, h, w, *[None] * len(rest)


packed_recurrent.register_autograd(_packed_backward, setup_context=_remember)


@torch.library.custom_op("learned_opt::recurrent", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def recurrent(
    kind: str, x: Tensor, start: Sequence[Tensor], params: Sequence[Tensor], bias: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A recurrent layer on padded sequences: its outputs, its last states, and cells of an LSTM."""
    return _padded(kind, x, start, params, bias, layers, dropout, train, bidirectional, batch_first)


@recurrent.register_fake
def _(
    kind: str, x: Tensor, start: Sequence[Tensor], params: Sequence[Tensor], bias: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _shapes(kind, x, start, bidirectional)


def _padded_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    kind, given, start, params, *rest = ctx.inputs
    x, h, w = _layer_gradients(lambda x, h, w: _padded(kind, x, h, w, *rest), given, start, params, grads)
    return None, x, h, w, *[None] * len(rest)


recurrent.register_autograd(_padded_backward, setup_context=_remember)

# what torch differentiates by itself, with the same dropout in both passes: the formulas above would draw it again
DIFFERENTIABLE: dict[str, Callable[..., Any]] = {"packed_recurrent": _packed, "recurrent": _padded}


@torch.library.custom_op("learned_opt::cell", mutates_args=())
def cell(kind: str, x: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of a cell: its state, and the cell of an LSTM."""
    return _step(kind, x, state, params)


def _step(kind: str, x: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    both = kind == "lstm_cell"
    found = getattr(_VF, kind)(x, list(state) if both else state[0], *params)
    return found if both else (found, x.new_empty(0))


@cell.register_fake
def _(kind: str, x: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state[0]), torch.empty_like(state[1]) if kind == "lstm_cell" else x.new_empty(0)


def _cell_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    kind, x, state, params = ctx.inputs
    n = 1 + len(state)
    found = _gradients(lambda ts: _step(kind, ts[0], ts[1:n], ts[n:]), [x, *state, *params], grads)
    return None, found[0], list(found[1:n]), list(found[n:])


cell.register_autograd(_cell_backward, setup_context=_remember)


class _Functions:
    """``torch._VF`` with other functions in some places."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.__dict__ |= functions

    def __getattr__(self, name: str) -> Any:
        return getattr(_VF, name)


@contextmanager
def _replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    instead = _Functions(**functions)
    with mock.patch.object(utilities, "_VF", instead), mock.patch.object(layers, "_VF", instead):
        yield


@contextmanager
def recorded_lengths(found: list[list[int]]) -> Iterator[None]:
    """Note the batch sizes of every sequence that is packed."""

    def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> Any:
        data, sizes = _VF._pack_padded_sequence(x, lengths, batch_first)
        found.append(sizes.tolist())
        return data, sizes

    with _replaced(_pack_padded_sequence=pack):
        yield


@contextmanager
def as_operators(known: Sequence[Sequence[int]]) -> Iterator[None]:
    """Recurrent layers and cells are the operators above.

    Sequences have the batch sizes that are known, in order of packing. :class:`UnknownLengths`: there are no more.
    """
    left = iter(known)

    def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> Any:
        sizes = next(left, None)
        if sizes is None:
            raise UnknownLengths
        rows = [(b, t) for t, n in enumerate(sizes) for b in range(n)]
        at, times = (torch.tensor(i, device=x.device) for i in zip(*rows, strict=True))
        return (x[at, times] if batch_first else x[times, at]), _Sizes(sizes)

    def pad(data: Tensor, sizes: Any, batch_first: bool, value: float, total: int) -> Any:
        if not isinstance(sizes, _Sizes):
            return _VF._pad_packed_sequence(data, sizes, batch_first, value, total)
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        places = [[s + b if b < n else -1 for b in range(sizes[0])] for s, n in zip(starts, sizes, strict=True)]
        places += [[-1] * sizes[0]] * (total - len(sizes))
        at = torch.tensor(places, device=data.device)
        at = at.T if batch_first else at
        there = (at >= 0).reshape(*at.shape, *[1] * (data.ndim - 1))
        padded = torch.where(there, data[at.clamp(min=0)], value)
        return padded, torch.tensor([sum(n > b for n in sizes) for b in range(sizes[0])])

    def layer(kind: str) -> Callable[..., Any]:
        def states(given: Any) -> list[Tensor]:
            return list(given) if kind == "lstm" else [given]

        def run(x: Tensor, *given: Any) -> Any:
            if isinstance(given[0], _Sizes):
                sizes, state, params, *rest = given
                found = packed_recurrent(kind, x, list(sizes), states(state), list(params), *rest)
            elif isinstance(given[2], bool):  # of padded sequences, in this order: state, parameters, whether biases
                state, params, *rest = given
                found = recurrent(kind, x, states(state), list(params), *rest)
            else:
                return getattr(_VF, kind)(x, *given)
            return found if kind == "lstm" else found[:2]

        return run

    def one_step(kind: str) -> Callable[..., Any]:
        def run(x: Tensor, state: Any, *params: Tensor | None) -> Any:
            held = [p for p in params if p is not None]
            found = cell(kind, x, list(state) if kind == "lstm_cell" else [state], held)
            return found if kind == "lstm_cell" else found[0]

        return run

    ours = {k: layer(k) for k in _KINDS} | {k: one_step(k) for k in _CELLS}
    with _replaced(_pack_padded_sequence=pack, _pad_packed_sequence=pad, **ours):
        yield
