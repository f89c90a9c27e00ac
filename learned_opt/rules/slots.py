"""The slots of a batch's state, and arithmetic on batches: where gradients enter the frame and updates leave it."""

from collections.abc import Callable, Collection
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from learned_opt.batches import BatchLayout, FlatBatch, TensorBatch, has_matrix, root_dtype, scales
from learned_opt.rules import auto_lr, whitening
from learned_opt.rules.auto_lr import Measured, Number
from learned_opt.rules.base import State, Weights
from learned_opt.rules.numerics import NEGLIGIBLE, TINY, root

Slots = dict[str, Tensor]

FRAME = ("row_scale", "col_scale", "scale")  # slots that hold a batch's part of the frame
PER_TENSOR = ("step", "mean_square", "size", "decay", "update_norm")  # of every tensor


def whitened_axes(b: TensorBatch) -> tuple[int, ...]:
    """Axes of a matrix that step in whitened units: those of hidden units that are not too many."""
    return tuple(i for i in b.axes if i in b.hidden and has_matrix(b.shape[i]))


def extended(b: TensorBatch, axis: int, root: Tensor) -> Tensor:
    """A root of columns with one more for the bias, which it leaves alone, and with padding."""
    if not whitening.is_extended(b, axis):
        return root
    corner = torch.zeros(b.padded, b.padded, dtype=root.dtype, device=root.device)
    corner[b.C, b.C] = 1
    return functional.pad(root, (0, b.padded - b.C, 0, b.padded - b.C)) + corner


def gathered(b: TensorBatch | FlatBatch, tensors: Weights, in_place: bool) -> Tensor:
    """The tensors of a batch; new memory where it may be written to."""
    return b.copied(tensors) if in_place and isinstance(b, TensorBatch) else b.gather(tensors)


def framed(b: TensorBatch | FlatBatch, x: Tensor, own: Slots, in_place: bool, inverse: bool = False) -> Tensor:
    """Multiply by the frame's scales (gradients into the frame, updates out of it); with ``inverse`` divide (weights
    into the frame). ``x``: ``[N, R, K]``, or ``[Z]`` of a flat batch. In place, a matrix batch is overwritten."""
    if b.scaling is None:
        return x
    shape = x.shape
    for scale in (own[k] for k in ("scale", "row_scale", "col_scale") if k in own):
        if isinstance(b, TensorBatch) and len(scale) != len(x):
            x = x.reshape(len(scale), -1, shape[-1])
        x = x / scale if inverse else torch.mul(x, scale, out=x if in_place and isinstance(b, TensorBatch) else None)
    return x.reshape(shape)


def norms(b: TensorBatch | FlatBatch, x: Tensor) -> Tensor:
    """Frobenius norm of each tensor of a batch, its bias included: ``[N]``."""
    if isinstance(b, FlatBatch):
        return root(b.sums(x.square()))
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def times(b: TensorBatch | FlatBatch, x: Tensor, factor: Tensor) -> Tensor:
    """The tensors of a batch, each times a number."""
    return x * (factor.index_select(0, b.segment) if isinstance(b, FlatBatch) else factor[:, None, None])


def negligible(mean_square: Tensor) -> Tensor:
    """Below which entries count as zero, of the mean square of each tensor's gradients ``[T]``: ``[T]``."""
    return NEGLIGIBLE * root(mean_square)


def without_negligible(b: TensorBatch | FlatBatch, x: Tensor, floor: Tensor, in_place: bool) -> Tensor:
    """``x`` with zero for entries of at most their tensor's ``floor`` [N] (:func:`negligible`). In place, overwritten.

    Products of matrices with such entries get subnormal numbers, with which a processor is many times as slow: those of
    units that are dead, or far from all examples, of tokens that have become rare, of inputs in unlike units.
    """
    floor = floor.to(x.dtype)
    floor = floor.index_select(0, b.segment) if isinstance(b, FlatBatch) else floor[:, None, None]
    small = x.abs() <= floor
    return x.masked_fill_(small, 0.0) if in_place else x.masked_fill(small, 0.0)


def by_shape(function: Callable[..., Tensor], *parts: list[Tensor]) -> list[Tensor]:
    """``function(*matrices)`` of each part, called once for all parts whose matrices have one shape.

    Args:
        function: of batches of matrices ``[n, r, c]``, which treats each matrix by itself.
        parts: one list for each argument; the shapes of the first one's count.
    """
    first = parts[0]
    if len(first) == 1:
        return [function(*(x[0] for x in parts))]
    places: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(first):
        places.setdefault(x.shape[-2:], []).append(i)
    found = list(first)
    for same in places.values():
        whole = function(*(torch.cat([x[i] for i in same]) for x in parts))
        for i, x in zip(same, whole.split([len(first[i]) for i in same]), strict=True):
            found[i] = x
    return found


def lerp(old: Tensor, new: Tensor, weight: Number, in_place: bool) -> Tensor:
    """``old + weight * (new - old)``, in the dtype of ``old``; in place, into ``old``."""
    weight = weight.to(old.dtype) if isinstance(weight, Tensor) else weight
    return torch.lerp(old, new.to(old.dtype), weight, out=old if in_place else None)


def stored(x: Tensor, slot: Tensor, in_place: bool) -> Tensor:
    """``x`` in the dtype of a slot; in place, copied into the slot."""
    return slot.copy_(x) if in_place else x.to(slot.dtype)


@lru_cache(maxsize=256)
def numel_of(layout: BatchLayout, dtype: torch.dtype) -> Tensor:
    """Entries of every tensor, its bias among them: ``[T]``."""
    sizes = [x for b in layout.all for x in (b.sizes if isinstance(b, FlatBatch) else len(b.names) * [b.R * b.K])]
    return torch.tensor(sizes, dtype=dtype, device=layout.device)


def norm_of(x: Tensor) -> Tensor:
    """Frobenius norm of every matrix ``[N, R, C]``, plus ``TINY``: ``[N, 1, 1]``, at least float32.

    It is rounded to the precision of ``x``: to have torch convert all entries takes four times as long.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm.to(torch.promote_types(x.dtype, torch.float32)) + TINY


def repeated(x: Tensor, parts: Tensor) -> Tensor:
    """One number per tensor ``[N]`` -> one per matrix that the tensors hold: ``[N', 1, 1]``."""
    times = len(parts) // len(x)
    return (x.repeat_interleave(times) if times > 1 else x).view(-1, 1, 1)


# --------------------------------------------------------------------- tensors without a gradient at this step
def with_gradient(layout: BatchLayout, grads: Weights) -> dict[str, bool] | None:
    """For every tensor, whether it has a gradient at this step; None if all have."""
    live = {n: n in grads for n in layout.names}
    return None if all(live.values()) else live


def completed(b: TensorBatch | FlatBatch, grads: Weights, params: Weights) -> Weights:
    """Gradients of all tensors of a batch; zero for those that have none."""
    names = b.names if isinstance(b, FlatBatch) else b.names + b.biases
    if all(n in grads for n in names):
        return grads
    like = next(iter((grads or params).values()))
    return {n: grads[n] if n in grads else torch.zeros_like(params[n], dtype=like.dtype) for n in names}


def kept_state(layout: BatchLayout, old: State, new: State, live: dict[str, bool]) -> State:
    """The new state, with the old one of tensors without a gradient; what a pair shares is the matrix's."""

    def mask(names: Collection[str]) -> Tensor:
        return torch.tensor([live[n] for n in names], device=layout.device)

    kept: State = {"network": new["network"]}
    kept["tensor"] = {k: torch.where(mask(layout.members), x, old["tensor"][k]) for k, x in new["tensor"].items()}
    for b in layout.all:
        own = biases = entries = mask(b.names)
        if isinstance(b, FlatBatch):
            own = entries = own.index_select(0, b.segment)
        elif b.biases:
            biases = mask(b.biases)
            entries = torch.cat([own[:, None, None].expand(-1, 1, b.C), biases[:, None, None]], -1)
        kept[b.key] = {}
        for k, x in new[b.key].items():
            moved = entries if k in ("m", "last_update") else biases if k in ("v_bias", "snr", "bias_scale") else own
            moved = moved if moved.ndim == x.ndim else moved.view(-1, *[1] * (x.ndim - 1))
            kept[b.key][k] = x if k in FRAME else torch.where(moved, x, old[b.key][k])
    return kept


# ------------------------------------------------------------------------------------------- fresh state
def fresh_network(layout: BatchLayout, like: Tensor, dtype: torch.dtype) -> Slots:
    """Numbers of the whole network, 0-d, and the log-scale of its units."""
    zeros = {k: like.new_zeros((), dtype=dtype) for k in ("clock", *Measured._fields)}
    zeros["beta1"] = zeros["clock"] + auto_lr.BETA1
    if any(s.kind != "sign" for s in layout.symmetry.scales.values()):
        zeros["log_scale"] = like.new_zeros(layout.n_scales + 1, dtype=dtype)
    return zeros


def fresh_slots(b: TensorBatch | FlatBatch, like: Tensor, dtype: torch.dtype, n_scales: int) -> Slots:
    """Zero slots of a batch, and a frame of ones.

    Returns:
        Of a flat batch ``m``, ``v``, ``last_update`` and ``scale``, each ``[Z]``. Else ``m`` and ``last_update``
        ``[N, R, K]``; of thin matrices ``v [N, R, C]``; with biases ``v_bias [N, R]`` and ``snr [N]``; for a whitened
        axis i of d units ``moment{i} [N, d, d // 2 + 1]`` (:func:`whitening.packed`) and ``root{i} [N, d, d]``, of
        columns with a bias ``[N, padded, padded]``; for other axes ``diag{i} [N, d]``; of the frame ``row_scale`` and
        ``col_scale``, or ``scale``. :func:`learned_opt.rules.refresh.derived` adds ``scale{i} [N, d]`` (``v^(-1/4)``,
        not of the frame), ``bias_scale [N, 1]`` and ``seen_scale``.
    """

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return like.new_zeros(shape, dtype=dtype)

    if isinstance(b, FlatBatch):
        slots = {k: zeros(len(b.segment)) for k in ("m", "v")} | {
            "last_update": zeros(len(b.segment), dtype=narrow(dtype))
        }
        return slots | ({"scale": zeros(len(b.segment)) + 1} if b.scaling is not None else {})
    n = len(b.names)
    slots = {"m": zeros(n, b.R, b.K), "last_update": zeros(n, b.R, b.K, dtype=narrow(dtype))}
    if b.biases:
        slots |= {"v_bias": zeros(n, b.R), "snr": zeros(n) + 1}
    if b.thin:
        slots["v"] = zeros(n, b.R, b.C)
    whitened = () if b.factored else whitened_axes(b)
    for i in whitened if b.thin else b.axes:
        d = b.shape[i]
        if i in whitened:
            root_ = extended(b, i, zeros(n, d, d, dtype=root_dtype(d, dtype)))
            slots |= {f"moment{i}": zeros(n, d, d // 2 + 1), f"root{i}": root_}
        else:
            slots[f"diag{i}"] = zeros(n, d)
    if b.scaling is not None:
        slots |= scales(b, like.new_zeros(n_scales + 1, dtype=dtype))
    return slots


def narrow(dtype: torch.dtype) -> torch.dtype:
    """In which the last update is kept, of which only a cosine is taken."""
    return torch.bfloat16 if dtype == torch.float32 else dtype
