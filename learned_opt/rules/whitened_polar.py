"""The hand-made rule: whitened polar steps in the frame, on two clocks.

On every matrix of fan-in C (with its bias b as one more column, of an input of size 3), in the frame of its units'
scales, with gradient g, momentum m and roots P of second moments:

    m <- beta1 m + (1 - beta1) g
    n  = beta1 m + (1 - beta1) g                          one step ahead (Nesterov)
    d  = P polar(P n P) P,   at the size 0.9 sqrt(min(R, K))
    w <- w - rate * 0.2 (512 / C)^(1/4) sqrt(max(R, C)) * weight_rms_ratio * d - builtin_decay * w

Axes that no label permutes (the network's inputs and outputs) and those of more than ``BOUND`` units have no P; their
matrices take ``n / v^(1/4)`` for n, v of rank one. Other vectors, gains and thin matrices move along Adam's direction
``m / sqrt(v)``, and so do embeddings, whose v is of rank one. Gradients that are far larger than usual are clipped.

Every step does this. What is slow happens on a slow clock: second moments, roots, frame and the sizes of weights. All
of these are covariant functions of the state when they are taken, so holding them keeps the rule's equivariance exact
(docs/theorem.md). Where every number comes from: experiments/README.md.
"""

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from learned_opt.batches import (
    BFLOAT16_ABOVE,
    BatchLayout,
    FlatBatch,
    TensorBatch,
    batches_of,
    has_matrix,
    root_dtype,
    scales,
)
from learned_opt.frame import potentials
from learned_opt.rules import auto_lr, whitening
from learned_opt.rules.auto_lr import Measured, Number
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.clock import EVERY_MOMENTS, Clock, when
from learned_opt.rules.newton_schulz import newton_schulz
from learned_opt.rules.numerics import ROUNDING, TINY, root, rsqrt
from learned_opt.symmetry import Symmetry

BETA2 = 0.99  # decay rate of mean squares
ITERATIONS, SIZE = 3, 0.9  # of Newton and Schulz, and the size of their result over sqrt(min(R, K))
VECTOR = 2.0  # times the Adam direction of gains, embeddings and vectors that are no matrix's bias
BIAS, SNR = 3.0, 0.2  # size of the input that a bias stands for; RMS of Adam's direction below which biases step less
USUAL, SMALLEST = 0.5, 0.1  # RMS times root fan-in of usual weights; relative to that, what smaller ones count as
CLIP_FACTOR = 4.0  # times the RMS of those before it: what a gradient counts at most
BUILTIN_DECAY = 0.025  # of a matrix's step goes straight toward zero weights, over 800 steps and at FAN_IN
FAN_IN = 512  # at which a matrix takes steps of RMS 0.2

Slots = dict[str, Tensor]


class Control(NamedTuple):
    """What a learned rule changes of the steps of a batch of N tensors.

    Attributes:
        gain: multiplies the size ``[N]``.
        fresh: of matrices, multiplies the gradient where it joins the momentum ``[N]``.
        units: of matrices, factors of rows and columns of directions, as from a ``Scaling``.
    """

    gain: Tensor
    fresh: Tensor
    units: Slots


class WhitenedPolar(UpdateRule):
    """Whitened polar steps on matrices, Adam's on the rest.

    Args:
        measure_lr: whether the rate is measured (:mod:`learned_opt.rules.auto_lr`), or the schedule's.
    """

    ends = True

    def __init__(self, measure_lr: bool = True) -> None:
        super().__init__()
        self.measure_lr = measure_lr

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        some = next(iter(params.values()))
        layout = batches_of(symmetry, tuple(params), some.device)
        wide = torch.promote_types(some.dtype, torch.float32)
        numbers = {k: some.new_zeros(len(layout.members), dtype=wide) for k in NUMBERS}
        state = {"network": fresh_network(layout, some, wide), "tensor": numbers}
        return state | {b.key: fresh_slots(b, some, wide, layout.n_scales) for b in layout.all}

    def derive(self, layout: BatchLayout, state: State) -> None:
        """Slots that follow from others, which alone are saved."""
        for b in layout.all:
            if "log_scale" in state["network"]:
                state[b.key] |= scales(b, state["network"]["log_scale"])
            if isinstance(b, TensorBatch) and b.is_matrix:
                state[b.key] |= preconditioners(b, state[b.key])

    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: Number | None = None,
        weight_decay: float | None | Mapping[str, float | None] = None,
        names: tuple[str, ...] | None = None,
        ages: Collection[int] | None = None,
        in_place: bool = False,
    ) -> tuple[Weights, State]:
        if not grads:
            return {}, state
        some = next(iter(grads.values()))
        layout = batches_of(symmetry, tuple(params) if names is None else names, some.device)
        live = _live(layout, grads)
        in_place = in_place and live is None
        network, tensor = state["network"], state["tensor"]
        t, step = network["clock"] + 1, tensor["step"] + 1
        moving = step if live is None else step[[i for i, n in enumerate(layout.members) if live[n]]]
        clock = Clock(t, step, moving, ages)
        new = {"network": network | {"clock": t}, "tensor": tensor | {"step": step}}
        new |= {b.key: dict(state[b.key]) for b in layout.all}

        # the frame, and in it the sizes of weights (slow clock)
        refresh_frame(layout, params, new, clock, total_steps)

        # gradients in the frame, none far larger than usual
        whole = {b.key: gathered(b, _complete(b, grads, params), in_place) for b in layout.all}
        g = {b.key: framed(b, whole[b.key], new[b.key], in_place) for b in layout.all}
        g, norm = self._clipped(layout, g, new, clock)

        # the rate, from the slope along the last step (slow clock)
        if self.measure_lr:
            self._measure(layout, g, norm, new, clock, total_steps)
        beta1 = new["network"]["beta1"]

        # momentum; second moments and roots (slow clock)
        warmup = auto_lr.warmup_weight(clock.now, total_steps)
        squares, ages_ = new["tensor"]["mean_square"].split(layout.counts), clock.ages_of(layout.counts)
        for b, square, age in zip(layout.all, squares, ages_, strict=True):
            own = new[b.key]
            own["m"] = lerp(own["m"], g[b.key], 1 - beta1, in_place)
            update_moments(b, g[b.key], own, square, age, clock, warmup, in_place)
        if self.measure_lr:
            self._correlate(layout, new, clock, total_steps)
        rate = self._rate(new, clock, total_steps)

        controls = self.controls(layout, params, g, new, clock, total_steps)

        # directions and steps
        updates: Weights = {}
        lengths = []
        sizes = (-rate * new["tensor"]["size"]).split(layout.counts)
        for b, size, square, age in zip(layout.all, sizes, squares, ages_, strict=True):
            own, control = new[b.key], controls[b.key] if controls else None
            size = size * control.gain if control else size  # noqa: PLW2901
            if isinstance(b, FlatBatch):
                d = flat_direction(b, own, size, square, new["tensor"]["mean_square"].amax(), age)
            elif b.factored:
                d = factored_direction(b, own, size, square, age)
            elif b.thin:
                d = thin_direction(b, g[b.key], own, beta1, size, square, age, warmup)
            else:
                d = matrix_direction(b, g[b.key], own, beta1, size, control)
            if clock.before_slope is not False:
                own["last_update"] = stored(d, own["last_update"], in_place)
                lengths.append(norms(b, d))
            updates |= b.scatter(framed(b, d, own, in_place))
        if lengths:
            new["tensor"]["update_norm"] = torch.cat(lengths)
        if live is not None:
            new = _kept(layout, state, new, live)
        return self._decayed(layout, params, grads, updates, rate, weight_decay, new), new

    def controls(
        self,
        layout: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        clock: Clock,
        total_steps: Number | None,
    ) -> dict[str, Control] | None:
        """What a learned rule changes of this step, by batch; None: nothing. It may change what ``new`` holds."""
        return None

    def _clipped(
        self, layout: BatchLayout, g: dict[str, Tensor], new: State, clock: Clock
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of at most ``CLIP_FACTOR`` times the usual size, and the norms of all tensors' [T]."""
        tensor, numel = new["tensor"], _numel(layout, new["tensor"]["mean_square"].dtype)
        norm = torch.cat([norms(b, g[b.key]) for b in layout.all])
        factor = clip_factor(norm, tensor["mean_square"], clock.age - 1, numel)
        norm = norm * factor
        tensor["mean_square"] = torch.lerp(tensor["mean_square"], norm.square() / numel, 1 - BETA2)
        return {
            b.key: times(b, g[b.key], f) for b, f in zip(layout.all, factor.split(layout.counts), strict=True)
        }, norm

    def _measure(
        self,
        layout: BatchLayout,
        g: dict[str, Tensor],
        norm: Tensor,
        new: State,
        clock: Clock,
        total_steps: Number | None,
    ) -> None:
        """The slope along the last step, and what follows from it."""
        if clock.slope is False:
            return
        network = new["network"]
        old = Measured(*(network[k] for k in Measured._fields))
        up = torch.stack([(g[b.key] * new[b.key]["last_update"]).sum() for b in layout.all]).sum()
        most = (norm * new["tensor"]["update_norm"]).sum()
        slope = torch.lerp(old.slope, -up / most.clamp(min=TINY), 1 - auto_lr.AVERAGE)
        network["slope"] = when(clock.slope, slope, old.slope)
        if clock.between(0, auto_lr.LONGEST) is not False:
            network["log_lr"] = auto_lr.log_lr(old, slope, clock.t, total_steps)
        network["beta1"] = when(clock.slope, auto_lr.beta1(clock.t, slope), network["beta1"])

    def _correlate(self, layout: BatchLayout, new: State, clock: Clock, total_steps: Number | None) -> None:
        """The correlation of gradients, from twice to three times the warm-up."""
        end = auto_lr.warmup_steps(total_steps)
        if clock.between(2 * end, 3 * end) is False:
            return
        network, tensor = new["network"], new["tensor"]
        old = Measured(*(network[k] for k in Measured._fields))
        m = torch.stack([new[b.key]["m"].square().sum() for b in layout.all]).sum()
        v = (tensor["mean_square"] * _numel(layout, m.dtype) / (1 - BETA2 ** tensor["step"])).sum()
        a = ((1 + network["beta1"]) / (1 - network["beta1"]) * m / v).nan_to_num(0.0, posinf=0.0)
        network["correlation"] = auto_lr.mean_correlation(old, a, clock.t, total_steps)

    def _rate(self, new: State, clock: Clock, total_steps: Number | None) -> Tensor:
        """What directions are multiplied by at this step (0-d)."""
        network = new["network"]
        end = auto_lr.warmup_steps(total_steps)
        if self.measure_lr and clock.between(0, 3 * end + 1) is not False:
            old = Measured(*(network[k] for k in Measured._fields))
            network["lr_scale"] = auto_lr.lr_scale(old, clock.t, total_steps)
        elif not self.measure_lr and clock.between(0, 1) is not False:
            scale = 1.0 if total_steps is None else auto_lr.horizon_scale(total_steps)
            network["lr_scale"] = torch.ones_like(network["lr_scale"]) * scale
        return network["lr_scale"] * (auto_lr.RATE * auto_lr.decay(clock.now, total_steps))

    def _decayed(
        self,
        layout: BatchLayout,
        params: Weights,
        grads: Weights,
        updates: Weights,
        rate: Tensor,
        weight_decay: float | None | Mapping[str, float | None],
        state: State,
    ) -> Weights:
        """The step of every tensor that has a gradient, less a share of its weights: its own, or what is asked for."""
        asked = weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(grads, weight_decay)
        own: dict[str, Tensor] = {}
        for b, x in zip(layout.all, (rate * state["tensor"]["decay"]).split(layout.counts), strict=True):
            if isinstance(b, TensorBatch) and b.is_matrix:
                own |= zip(b.names, seen_rows(b, state[b.key], x).unbind(), strict=True)
        found = {}
        for n in grads:
            wd = asked.get(n)
            share = own.get(n) if wd is None else rate * wd if wd else None
            found[n] = updates[n] if share is None else torch.addcmul(updates[n], params[n], share, value=-1)
        return found


# ----------------------------------------------------------------------------------------- the slow clock
def refresh_frame(layout: BatchLayout, params: Weights, new: State, clock: Clock, total_steps: Number | None) -> None:
    """The scales of units, and what follows from the sizes of weights in the frame: sizes of steps, and decays."""
    if clock.frame is False:
        return
    network, tensor = new["network"], new["tensor"]
    if "log_scale" in network:
        found = potentials(layout.symmetry, params)
        assert found is not None
        network["log_scale"] = when(clock.frame, found, network["log_scale"])
        for b in layout.all:
            new[b.key] |= scales(b, network["log_scale"])
    sizes, decays = [], []
    scale = BUILTIN_DECAY * auto_lr.decay_scale(clock.now, total_steps)
    for b in layout.all:
        w = framed(b, b.gather(params), new[b.key], False, inverse=True)
        if isinstance(b, FlatBatch):
            sizes.append(w.new_full([len(b.names)], VECTOR))
            decays.append(w.new_zeros(len(b.names)))
        elif b.factored:
            sizes.append(w.new_full([len(w)], VECTOR))
            decays.append(w.new_zeros(len(w)))
        else:
            norm = torch.linalg.vector_norm(w[..., : b.C], dim=(-2, -1))
            ratio = weight_rms_ratio(b, norm / math.sqrt(b.R * b.C))
            sizes.append(ratio)
            relative = step_norm(b) * ratio / norm.clamp(min=TINY) * (norm > 0)
            decays.append(torch.zeros_like(norm) if b.thin else scale * fan_in_scale(b.C) * relative)
    tensor["size"] = when(clock.frame, torch.cat(sizes), tensor["size"])
    tensor["decay"] = when(clock.frame, torch.cat(decays), tensor["decay"])


def update_moments(
    b: TensorBatch | FlatBatch,
    g: Tensor,
    own: Slots,
    square: Tensor,
    age: Number,
    clock: Clock,
    warmup: Number,
    in_place: bool,
) -> None:
    """Second moments: of entries and of embeddings' axes at every step, of matrices' axes and their roots when due."""
    if isinstance(b, FlatBatch) or b.thin:
        own["v"] = lerp(own["v"], g.square(), 1 - BETA2, in_place)
    if isinstance(b, FlatBatch) or (b.thin and isinstance(warmup, float) and warmup == 0):
        return
    if b.factored:
        for i in b.axes:
            own[f"diag{i}"] = lerp(own[f"diag{i}"], whitening.mean_square(b, g, i), 1 - BETA2, in_place)
        return
    whitened = whitened_axes(b)
    if clock.moments is not False:
        every = EVERY_MOMENTS - (EVERY_MOMENTS - 1) * (clock.now <= 3)
        every = every.to(g.dtype) if isinstance(every, Tensor) else every
        dtype = product_dtype(b, g)
        for i in whitened if b.thin else b.axes:
            slot = f"moment{i}" if i in whitened else f"diag{i}"
            found = whitening.second_moment(b, g, i, dtype) if i in whitened else whitening.mean_square(b, g, i)
            found = lerp(own[slot], found, 1 - whitening.AVERAGE**every, in_place)
            own[slot] = when(clock.moments, found, own[slot])
        if b.biases:
            v = lerp(own["v_bias"], g[..., -1].square(), 1 - BETA2**every, in_place)
            own["v_bias"] = when(clock.moments, v, own["v_bias"])
            own["snr"] = when(clock.moments, snr_scale(own, square, age), own["snr"])
        own |= preconditioners(b, own) if b.is_matrix else {}
    if clock.roots is not False:
        for i in whitened:
            d = b.shape[i]
            due = clock.roots if isinstance(clock.roots, bool) else clock.roots | (own[f"root{i}"][..., 0, 0] == 0)
            power = whitening.WARMUP_POWER if b.thin else whitening.POWER
            found = whitening.inverse_root(own[f"moment{i}"], own[f"root{i}"][..., :d, :d], due, power)
            own[f"root{i}"] = stored(extended(b, i, found), own[f"root{i}"], in_place)


def extended(b: TensorBatch, axis: int, root: Tensor) -> Tensor:
    """A root of columns with one more for the bias, which it leaves alone."""
    if not whitening.is_extended(b, axis):
        return root
    corner = torch.zeros(b.K, b.K, dtype=root.dtype, device=root.device)
    corner[-1, -1] = 1
    return functional.pad(root, (0, 1, 0, 1)) + corner


def whitened_axes(b: TensorBatch) -> tuple[int, ...]:
    """Axes of a matrix that step in whitened units: those of hidden units that are not too many."""
    return tuple(i for i in b.axes if i in b.hidden and has_matrix(b.shape[i]))


# ----------------------------------------------------------------------------------------- every step
def clip_factor(norm: Tensor, mean_square: Tensor, step: Number, numel: Tensor) -> Tensor:
    """What to multiply gradients by, so that their RMS is at most ``CLIP_FACTOR`` times that of those before: ``[T]``.

    Args:
        norm: of the gradients.
        mean_square: the averages up to the step before; where they are zero, all gradients before were: 1.
        step: how many steps those are.
        numel: entries.
    """
    usual = mean_square * (numel * CLIP_FACTOR**2)
    most = (usual / (1 - BETA2**step + TINY)).sqrt()
    return torch.where(usual > 0, most / norm.clamp(min=TINY), 1).clamp(max=1.0)


def matrix_direction(
    b: TensorBatch, g: Tensor, own: Slots, beta1: Tensor, size: Tensor, control: Control | None = None
) -> Tensor:
    """``P polar(P n P) P`` at its size, times ``size`` [N]: ``[N, R, K]``."""
    n = torch.lerp(times(b, g, control.fresh) if control else g, own["m"].to(g.dtype), beta1)
    roots = {i: own[f"root{i}"] for i in whitened_axes(b)}
    x = preconditioned(b, n, own, roots).to(product_dtype(b, n))
    x = whitening.multiplied(b, x, roots)
    x = b.join([newton_schulz(part, ITERATIONS) for part in b.split(x)])
    x = whitening.multiplied(b, x, roots).to(n.dtype)
    x = b.scaled(x, control.units) if control else x
    d = b.join([part * (_unit(part, b) * _repeated(size, part) / _norm(part)) for part in b.split(x)])
    if b.biases:
        d[..., -1] *= BIAS * own["snr"][:, None]
    return d


def preconditioners(b: TensorBatch, own: Slots) -> Slots:
    """Along axes that are not whitened, ``v^(-1/4)`` for v of rank one, which is relative to its mean."""
    found = {}
    whitened = whitened_axes(b)
    for i in b.axes:
        if i not in whitened:
            v = own[f"diag{i}"]
            found[f"scale{i}"] = root(rsqrt(v / v.mean(-1, keepdim=True).clamp(min=TINY) + 1e-8))
    return found


def preconditioned(b: TensorBatch, n: Tensor, own: Slots, roots: Mapping[int, Tensor]) -> Tensor:
    """``n / v^(1/4)`` along axes that are not whitened; a bias is the weight of an input of size ``BIAS``."""
    for i in b.axes:
        if i not in roots:
            n = along(b, n, i, own[f"scale{i}"])
    if b.biases:
        n[..., -1] *= BIAS
    return n


def along(b: TensorBatch, x: Tensor, axis: int, vector: Tensor) -> Tensor:
    """``[N, R, K]`` times ``[N, d]`` along an axis of the tensors; biases have the rows of their matrices."""
    if b.is_plain and b.is_row(axis):
        return x * vector[:, :, None]
    if b.is_plain:
        vector = vector.repeat(1, b.kernel)
        if b.biases:
            vector = torch.cat([vector, torch.ones_like(vector[:, :1])], -1)
        return x * vector[:, None, :]
    shape = [len(x)] + [1] * len(b.shape)
    shape[axis + 1] = -1
    return b.matrices(b.tensors(x) * vector.view(shape))


def _unit(part: Tensor, b: TensorBatch) -> float:
    """The norm of a usual step of matrices ``[N', R', K']`` at unit rate."""
    return unit_norm(part.shape[-2], part.shape[-1], bool(b.biases))


def unit_norm(rows: int, columns: int, has_bias: bool) -> float:
    """The norm of a usual step of a matrix at unit rate."""
    fan_in = columns - has_bias
    return 0.2 * fan_in_scale(fan_in) * max(rows, fan_in) ** 0.5 * SIZE * min(rows, columns) ** 0.5


def step_norm(b: TensorBatch) -> float:
    """The norm of a usual step of a tensor at unit rate."""
    if b.pack is None:
        return math.sqrt(sum(unit_norm(r, b.K, bool(b.biases)) ** 2 for r in b.parts))
    return math.sqrt(sum(block.shape[0] * unit_norm(*block.shape[1:], False) ** 2 for block in b.pack.blocks))


def fan_in_scale(fan_in: int) -> float:
    """``(512 / C)^(1/4)``."""
    return (FAN_IN / fan_in) ** 0.25


def seen_rows(b: TensorBatch, own: Slots, x: Tensor) -> Tensor:
    """Numbers ``[N]`` for the rows that have had a gradient, zero for the others: ``[N, ...]`` like the tensors."""
    x = x.view(-1, *[1] * len(b.shape))
    for i in b.axes:
        if b.is_row(i):
            v = own[f"diag{i}"] if f"diag{i}" in own else own[f"moment{i}"].diagonal(dim1=-2, dim2=-1)
            x = x * (v > 0).view(len(v), *[-1 if k == i else 1 for k in range(len(b.shape))])
    return x


def weight_rms_ratio(b: TensorBatch, rms: Tensor) -> Tensor:
    """The weights' RMS relative to usual ones, 1 for those that are not small: ``[N]``."""
    return (rms * (b.C**0.5 / USUAL)).clamp(SMALLEST, 1.0)


def snr_scale(own: Slots, square: Tensor, age: Number) -> Tensor:
    """How much of their steps biases make: all, unless their gradients alternate, or are rounding noise: ``[N]``."""
    v = (own["v_bias"] + 1e-16 * square[:, None]).clamp(min=TINY)
    return (root((own["m"][..., -1].square() / v).mean(-1)) * (bias_correction(age) / SNR)).clamp(max=1.0)


def bias_correction(age: Number) -> Number:
    """What ``m / sqrt(v)`` is to be multiplied by at an age."""
    return (1 - BETA2**age) ** 0.5 / (1 - auto_lr.BETA1**age)


def flat_direction(b: FlatBatch, own: Slots, size: Tensor, square: Tensor, loudest: Tensor, age: Number) -> Tensor:
    """Adam's direction of every entry, ``[Z]``; zero for vectors whose gradients are rounding noise beside others'."""
    heard = square > (ROUNDING * torch.finfo(square.dtype).eps) ** 2 * loudest
    factor = size * bias_correction(age) * heard
    factor, epsilon = torch.stack([factor, 1e-16 * square]).index_select(1, b.segment)
    return own["m"].to(factor.dtype) * rsqrt(own["v"] + epsilon) * factor


def thin_direction(
    b: TensorBatch,
    g: Tensor,
    own: Slots,
    beta1: Tensor,
    size: Tensor,
    square: Tensor,
    age: Number,
    warmup: Number,
) -> Tensor:
    """Adam's direction of thin matrices, ``[N, R, C]``; in the warm-up turned to ``A^(-3/4) n``, at its size.

    They read the network's inputs or write its outputs, and the first gradients of all hidden units agree on where to
    go: a long way along that saturates a policy for good, before it has learned anything else (experiments, 48).
    """
    adam = own["m"].to(g.dtype) * rsqrt(own["v"] + 1e-16 * square[:, None, None])
    roots = {i: own[f"root{i}"] for i in whitened_axes(b)}
    if roots and not (isinstance(warmup, float) and warmup == 0):
        whitened = whitening.multiplied(b, torch.lerp(g, own["m"].to(g.dtype), beta1), roots)
        norm = _norm(adam)
        turned = torch.lerp(adam, whitened * (norm / _norm(whitened)), warmup)
        adam = turned * (norm / _norm(turned))
    return adam * (size * bias_correction(age))[:, None, None]


def factored_direction(b: TensorBatch, own: Slots, size: Tensor, square: Tensor, age: Number) -> Tensor:
    """Adam's direction with v of rank one: ``[N, R, K]``."""
    d = own["m"].to(square.dtype)
    for i in b.axes:
        d = along(b, d, i, rsqrt(own[f"diag{i}"] / square.clamp(min=TINY)[:, None] + 1e-16))
    return d * (size * bias_correction(age) * rsqrt(square))[:, None, None]


# --------------------------------------------------------------------------------- batches and their slots
def gathered(b: TensorBatch | FlatBatch, tensors: Weights, in_place: bool) -> Tensor:
    """The tensors of a batch; new memory where it may be written to."""
    return b.copied(tensors) if in_place and isinstance(b, TensorBatch) else b.gather(tensors)


def framed(b: TensorBatch | FlatBatch, x: Tensor, own: Slots, in_place: bool, inverse: bool = False) -> Tensor:
    """Where gradients enter the frame and updates leave it; with ``inverse`` where weights enter it."""
    if b.scaling is None:
        return x
    shape = x.shape
    for scale in (own[k] for k in ("scale", "row_scale", "col_scale") if k in own):
        if isinstance(b, TensorBatch) and len(scale) != len(x):
            x = x.reshape(len(scale), -1, shape[-1])
        x = x / scale if inverse else torch.mul(x, scale, out=x if in_place and isinstance(b, TensorBatch) else None)
    return x.reshape(shape)


def norms(b: TensorBatch | FlatBatch, x: Tensor) -> Tensor:
    """Of the tensors of a batch, with their biases."""
    if isinstance(b, FlatBatch):
        return root(b.sums(x.square()))
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def times(b: TensorBatch | FlatBatch, x: Tensor, factor: Tensor) -> Tensor:
    """The tensors of a batch, each times a number."""
    return x * (factor.index_select(0, b.segment) if isinstance(b, FlatBatch) else factor[:, None, None])


def lerp(old: Tensor, new: Tensor, weight: Number, in_place: bool) -> Tensor:
    """``old + weight (new - old)``, in the precision of the old one."""
    weight = weight.to(old.dtype) if isinstance(weight, Tensor) else weight
    return torch.lerp(old, new.to(old.dtype), weight, out=old if in_place else None)


def stored(x: Tensor, slot: Tensor, in_place: bool) -> Tensor:
    """As what a slot holds, in its precision."""
    return slot.copy_(x) if in_place else x.to(slot.dtype)


def product_dtype(b: TensorBatch, x: Tensor) -> torch.dtype:
    """In which a batch's products of matrices are taken: bfloat16 where that is faster, never for float64."""
    fast = x.dtype == torch.float32 and min(b.R, b.K) > BFLOAT16_ABOVE and has_bfloat16(x.device)
    return torch.bfloat16 if fast else x.dtype


@lru_cache(maxsize=16)
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return device.type == "mps"


@lru_cache(maxsize=256)
def _numel(layout: BatchLayout, dtype: torch.dtype) -> Tensor:
    """Entries of every tensor, its bias among them: ``[T]``."""
    sizes = [x for b in layout.all for x in (b.sizes if isinstance(b, FlatBatch) else len(b.names) * [b.R * b.K])]
    return torch.tensor(sizes, dtype=dtype, device=layout.device)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + TINY


def _repeated(x: Tensor, parts: Tensor) -> Tensor:
    """A number of every tensor for each of its matrices: ``[N'  , 1, 1]``."""
    times = len(parts) // len(x)
    return (x.repeat_interleave(times) if times > 1 else x)[:, None, None]


# ------------------------------------------------------------------------------- tensors that sit a step out
def _live(layout: BatchLayout, grads: Weights) -> dict[str, bool] | None:
    """Which tensors have a gradient; None: all."""
    live = {n: n in grads for n in layout.names}
    return None if all(live.values()) else live


def _complete(b: TensorBatch | FlatBatch, grads: Weights, params: Weights) -> Weights:
    """Gradients of all tensors of a batch; zero for those that have none."""
    names = b.names if isinstance(b, FlatBatch) else b.names + b.biases
    if all(n in grads for n in names):
        return grads
    like = next(iter(grads.values()))
    return {n: grads[n] if n in grads else torch.zeros_like(params[n], dtype=like.dtype) for n in names}


def _kept(layout: BatchLayout, old: State, new: State, live: dict[str, bool]) -> State:
    """The new state, but the old one of tensors that sit this step out; what a pair shares is the matrix's."""

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
            moved = entries if k in ("m", "last_update") else biases if k in ("v_bias", "snr") else own
            moved = moved if moved.ndim == x.ndim else moved.view(-1, *[1] * (x.ndim - 1))
            kept[b.key][k] = x if "scale" in k else torch.where(moved, x, old[b.key][k])
    return kept


# ------------------------------------------------------------------------------------------- fresh state
def fresh_network(layout: BatchLayout, like: Tensor, dtype: torch.dtype) -> Slots:
    """Numbers of the whole network, 0-d, and the log-scale of its units."""
    zeros = {k: like.new_zeros((), dtype=dtype) for k in ("clock", *Measured._fields)}
    zeros["beta1"] = zeros["clock"] + auto_lr.BETA1
    if any(s.kind != "sign" for s in layout.symmetry.scales.values()):
        zeros["log_scale"] = like.new_zeros(layout.n_scales + 1, dtype=dtype)
    return zeros


NUMBERS = ("step", "mean_square", "size", "decay", "update_norm")  # of every tensor


def fresh_slots(b: TensorBatch | FlatBatch, like: Tensor, dtype: torch.dtype, n_scales: int) -> Slots:
    """Zero slots of a batch, and a frame of ones."""

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
            slots |= {f"moment{i}": zeros(n, d, d), f"root{i}": root_}
        else:
            slots[f"diag{i}"] = zeros(n, d)
            slots |= {} if b.factored else {f"scale{i}": zeros(n, d) + 1}
    if b.scaling is not None:
        slots |= scales(b, like.new_zeros(n_scales + 1, dtype=dtype))
    return slots


def narrow(dtype: torch.dtype) -> torch.dtype:
    """In which the last update is kept, of which only a cosine is taken."""
    return torch.bfloat16 if dtype == torch.float32 else dtype
