"""The hand-made rule: orthogonalized momentum between inverse roots of second moments ("whitened polar steps").

All of this is computed in the *frame* (:mod:`learned_opt.frame`), where the scale of each hidden unit is divided out.
For a matrix ``w`` [R, C] with gradient ``g``, whose bias is one more column, as the weight of an input of size 3:

    m <- beta1 m + (1 - beta1) g
    n  = beta1 m + (1 - beta1) g                                  (Nesterov)
    d  = P polar(P n P) P,    rescaled to the norm of the polar factor
    w <- w - rate * 0.2 (512 / C)^(1/4) sqrt(max(R, C)) * weight_rms_ratio * d - builtin_decay * w

``polar(U S V^T) = U V^T``, by Newton-Schulz iterations. ``P = A^(-1/8)`` for the second moment ``A`` of a hidden axis
(:mod:`learned_opt.rules.whitening`). An axis that no label permutes, or of more than ``BOUND`` units, has no ``P``:
there ``n`` is divided by ``v^(1/4)`` first, where ``v`` holds the mean square gradient of each index of the axis.

Vectors, gains and thin matrices step along Adam's ``m / sqrt(v)``. Embeddings do too, with ``v`` the product of one
factor per axis, as in Adafactor (Shazeer and Stern 2018, arXiv:1804.04235). A gradient of more than ``CLIP_FACTOR``
times its tensor's usual RMS is clipped.

Momentum and directions are computed at every step. Second moments, roots, frame and sizes of weights are refreshed at
some steps (:mod:`learned_opt.rules.clock`) and held between. They are covariant functions of the state when they are
refreshed, so holding them keeps the equivariance exact (docs/theorem.md). Sources of the constants:
experiments/README.md.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from learned_opt.across import HERE, Across
from learned_opt.batch_layout import batches_of
from learned_opt.batches import BatchLayout, FlatBatch, TensorBatch, scales
from learned_opt.rules import auto_lr, whitening
from learned_opt.rules.auto_lr import Measured, Number
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.clock import Clock, when
from learned_opt.rules.directions import (
    BETA2,
    factored_direction,
    flat_direction,
    preconditioned,
    product_dtype,
    step_scale,
    thin_direction,
)
from learned_opt.rules.newton_schulz import newton_schulz
from learned_opt.rules.numerics import TINY, is_known_zero
from learned_opt.rules.refresh import derived, refresh_frame, update_moments
from learned_opt.rules.slots import (
    PER_TENSOR,
    Slots,
    by_shape,
    completed,
    framed,
    fresh_network,
    fresh_slots,
    gathered,
    kept_state,
    lerp,
    negligible,
    norm_of,
    norms,
    numel_of,
    repeated,
    stored,
    times,
    whitened_axes,
    with_gradient,
    without_negligible,
)
from learned_opt.symmetry import Symmetry

ITERATIONS = 4  # of Newton and Schulz
CLIP_FACTOR = 4.0  # times the RMS of those before it: what a gradient counts at most


class Control(NamedTuple):
    """What a learned rule changes of the steps of a batch of N matrices.

    Attributes:
        fresh: multiplies the gradient where it joins the momentum ``[N]``.
        bias: multiplies the steps of biases ``[N]``.
        units: factors of rows and columns of directions, as from a ``Scaling``.
    """

    fresh: Tensor
    bias: Tensor
    units: Slots


class WhitenedPolar(UpdateRule):
    """Whitened polar steps on matrices, Adam's on the rest.

    Args:
        measure_lr: whether the rate is measured (:mod:`learned_opt.rules.auto_lr`), or the schedule's.
    """

    ends = sets_rate = spreads = True

    def __init__(self, measure_lr: bool = True) -> None:
        super().__init__()
        self.measure_lr = measure_lr

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        some = next(iter(params.values()))
        layout = batches_of(symmetry, tuple(params), some.device)
        wide = torch.promote_types(some.dtype, torch.float32)
        numbers = {k: some.new_zeros(len(layout.members), dtype=wide) for k in PER_TENSOR}
        state = {"network": fresh_network(layout, some, wide), "tensor": numbers}
        state |= {b.key: fresh_slots(b, some, wide, layout.n_scales) for b in layout.all}
        self.derive(layout, state)
        return state

    def derive(self, layout: BatchLayout, state: State) -> None:
        """Slots that follow from others, which alone are saved."""
        for b in layout.all:
            if "log_scale" in state["network"]:
                state[b.key] |= scales(b, state["network"]["log_scale"])
            if isinstance(b, TensorBatch) and b.is_matrix:
                state[b.key] |= derived(b, state[b.key])

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
        across: Across = HERE,
    ) -> tuple[Weights, State]:
        if not grads and across is HERE:
            return {}, state
        some = next(iter(params.values()))
        layout = batches_of(symmetry, tuple(params) if names is None else names, some.device)
        live = with_gradient(layout, grads)
        in_place = in_place and live is None
        network, tensor = state["network"], state["tensor"]
        t, step = network["clock"] + 1, tensor["step"] + 1
        moving = step if live is None else step[[i for i, n in enumerate(layout.members) if live[n]]]
        clock = Clock(t, step, moving, ages)
        new = {"network": network | {"clock": t}, "tensor": tensor | {"step": step}}
        new |= {b.key: dict(state[b.key]) for b in layout.all}

        # the frame, and in it the sizes of weights (slow clock)
        refresh_frame(layout, params, new, clock, total_steps, across)

        # gradients in the frame, none far larger than usual
        g = {}
        for b in layout.all:
            g[b.key] = framed(b, gathered(b, completed(b, grads, params), in_place), new[b.key], in_place)
        g, norm = self._clipped(layout, g, new, clock)

        # the rate, from the slope along the last step (slow clock)
        if self.measure_lr:
            self._measure(layout, g, norm, new, clock, total_steps, across)
        beta1 = new["network"]["beta1"]

        # momentum; second moments and roots (slow clock)
        warmup = auto_lr.warmup_weight(clock.now, total_steps)
        squares, ages_ = new["tensor"]["mean_square"].split(layout.counts), clock.ages_of(layout.counts)
        floors = negligible(new["tensor"]["mean_square"]).split(layout.counts)
        for b, square, floor, age in zip(layout.all, squares, floors, ages_, strict=True):
            own = new[b.key]
            m = lerp(own["m"], g[b.key], 1 - beta1, in_place)
            if clock.frame is not False:
                m = when(clock.frame, without_negligible(b, m, floor, in_place), m)
            own["m"] = m
            update_moments(b, g[b.key], own, square, age, clock, warmup, in_place)
        if self.measure_lr:
            self._correlate(layout, new, clock, total_steps, across)
        rate = self._rate(new, clock, total_steps)

        controls = self.controls(layout, params, g, new, clock, total_steps)

        # directions and steps
        updates: Weights = {}
        lengths = []
        largest_square = across.most(new["tensor"]["mean_square"].amax())
        sizes = (-rate * new["tensor"]["size"]).split(layout.counts)
        for b, size, square, floor, age in zip(layout.all, sizes, squares, floors, ages_, strict=True):
            own = new[b.key]
            if isinstance(b, FlatBatch):
                d = flat_direction(b, own, size, square, largest_square, age)
            elif b.factored:
                d = factored_direction(b, own, size, square, age)
            elif b.thin:
                d = thin_direction(b, g.pop(b.key), own, beta1, size, square, age, warmup)
            else:
                d = matrix_direction(b, g.pop(b.key), own, beta1, size, floor, controls.get(b.key), in_place)
            if clock.before_slope is not False:
                own["last_update"] = stored(d, own["last_update"], in_place)
                lengths.append(norms(b, d))
            updates |= b.scatter(framed(b, d, own, in_place))
        if lengths:
            new["tensor"]["update_norm"] = torch.cat(lengths)
        if live is not None:
            new = kept_state(layout, state, new, live)
        return self._decayed(layout, params, grads, updates, rate, weight_decay, new, in_place), new

    def controls(
        self,
        layout: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        clock: Clock,
        total_steps: Number | None,
    ) -> dict[str, Control]:
        """What a learned rule changes of the steps of matrices, by batch. It may change what ``new`` holds."""
        return {}

    def momentum(self, measured: Tensor, network: Slots) -> Tensor:
        """Decay rate of the momentum (0-d), from what the slope says."""
        return measured

    def _clipped(
        self, layout: BatchLayout, g: dict[str, Tensor], new: State, clock: Clock
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of at most ``CLIP_FACTOR`` times the usual size, and the norms of all tensors' [T]."""
        tensor, numel = new["tensor"], numel_of(layout, new["tensor"]["mean_square"].dtype)
        norm = torch.cat([norms(b, g[b.key]) for b in layout.all])
        factor = clip_factor(norm, tensor["mean_square"], clock.age - 1, numel)
        norm = norm * factor
        tensor["mean_square"] = torch.lerp(tensor["mean_square"], norm.square() / numel, 1 - BETA2)
        if not is_known_zero(factor - 1):
            g = {b.key: times(b, g[b.key], f) for b, f in zip(layout.all, factor.split(layout.counts), strict=True)}
        return g, norm

    def _measure(
        self,
        layout: BatchLayout,
        g: dict[str, Tensor],
        norm: Tensor,
        new: State,
        clock: Clock,
        total_steps: Number | None,
        across: Across,
    ) -> None:
        """The slope along the last step, and what follows from it."""
        if clock.slope is False:
            return
        network = new["network"]
        old = Measured(*(network[k] for k in Measured._fields))
        up = torch.stack([(g[b.key] * new[b.key]["last_update"]).sum() for b in layout.all]).sum()
        most = (norm * new["tensor"]["update_norm"]).sum()
        up, most = across.total(torch.stack([up, most])).unbind()
        slope = torch.lerp(old.slope, -up / most.clamp(min=TINY), 1 - auto_lr.AVERAGE)
        network["slope"] = when(clock.slope, slope, old.slope)
        if clock.between(0, auto_lr.LONGEST) is not False:
            network["log_lr"] = auto_lr.log_lr(old, slope, clock.t, total_steps)
        beta1 = self.momentum(auto_lr.beta1(clock.t, slope), network)
        network["beta1"] = when(clock.slope, beta1, network["beta1"])

    def _correlate(
        self, layout: BatchLayout, new: State, clock: Clock, total_steps: Number | None, across: Across
    ) -> None:
        """The correlation of gradients, from twice to three times the warm-up."""
        end = auto_lr.warmup_steps(total_steps)
        if clock.between(2 * end, 3 * end) is False:
            return
        network, tensor = new["network"], new["tensor"]
        old = Measured(*(network[k] for k in Measured._fields))
        m = torch.stack([new[b.key]["m"].square().sum() for b in layout.all]).sum()
        v = (tensor["mean_square"] * numel_of(layout, m.dtype) / (1 - BETA2 ** tensor["step"])).sum()
        m, v = across.total(torch.stack([m, v])).unbind()
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
        in_place: bool,
    ) -> Weights:
        """The step of every tensor that has a gradient, less a share of its weights: its own, or what is asked for."""
        asked = weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(grads, weight_decay)
        own: dict[str, Tensor] = {}
        for b, x in zip(layout.all, (rate * state["tensor"]["decay"]).split(layout.counts), strict=True):
            if isinstance(b, TensorBatch) and b.is_matrix:
                share = x.view(-1, *[1] * len(b.shape)) * state[b.key]["seen_scale"]
                own |= zip(b.names, share.unbind(), strict=True)
        found = {}
        for n in grads:
            wd = asked.get(n)
            decay = own.get(n) if wd is None else rate * wd if wd else None
            if decay is None:
                found[n] = updates[n]
            else:
                out = updates[n] if in_place else None
                found[n] = torch.addcmul(updates[n], params[n], decay, value=-1, out=out)
        return found


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
    b: TensorBatch,
    g: Tensor,
    own: Slots,
    beta1: Tensor,
    size: Tensor,
    floor: Tensor,
    control: Control | None = None,
    in_place: bool = False,
) -> Tensor:
    """``P polar(P n P) P`` at its size, times ``size`` [N]: ``[N, R, K]``. In place, it uses up the gradient."""
    g = times(b, g, control.fresh) if control else g
    n = torch.lerp(g, own["m"].to(g.dtype), beta1, out=g if in_place else None)
    dtype, fast = n.dtype, product_dtype(b, n)
    if fast == torch.float32:  # bfloat16 units of processors have no subnormal numbers, and float64 stays exact
        n = without_negligible(b, n, floor, in_place)
    roots = {i: own[f"root{i}"].to(fast) for i in whitened_axes(b)}
    n = preconditioned(b, n, own, roots, in_place)
    if b.padded > b.K:
        x = n.new_zeros(len(n), b.R, b.padded, dtype=fast)
        x[..., : b.K] = n
    else:
        x = n.to(fast)
    del g, n  # of a large matrix every copy counts
    x = whitening.multiplied(b, x, roots)
    polar = by_shape(lambda part: newton_schulz(part, ITERATIONS), b.split(x))
    x = whitening.multiplied(b, b.join(polar), roots)[..., : b.K].to(dtype)
    x = b.scaled(x, control.units) if control else x

    def sized(part: Tensor, factor: Tensor, size: Tensor) -> Tensor:
        unit = step_scale(part.shape[-2], part.shape[-1], bool(b.biases))
        return torch.mul(part, size * unit * (norm_of(factor) / norm_of(part)), out=part if in_place else None)

    parts = b.split(x)
    d = b.join(by_shape(sized, parts, polar, [repeated(size, part) for part in parts]))
    if b.biases:
        d[..., -1].mul_(own["bias_scale"] * control.bias[:, None] if control else own["bias_scale"])
    return d
