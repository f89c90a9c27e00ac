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
from learned_opt.rules.numerics import ROUNDING, root, rsqrt
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
        units: of matrices, factors of rows and columns of directions, as from a ``Scaling``; None: no hidden unit.
    """

    gain: Tensor
    fresh: Tensor
    units: tuple[Tensor, Tensor] | None


class WhitenedPolar(UpdateRule):
    """Whitened polar steps on matrices, Adam's on the rest.

    Args:
        measure_lr: whether the rate is measured (:mod:`learned_opt.rules.auto_lr`), or the schedule's.
    """

    ends = True

    def __init__(self, measure_lr: bool = True) -> None:
        super().__init__()
        self.measure_lr = measure_lr

    # ------------------------------------------------------------------------------------------- state
    def init(self, params: Weights, symmetry: Symmetry) -> State:
        some = next(iter(params.values()))
        layout = batches_of(symmetry, tuple(params), some.device)
        wide = torch.promote_types(some.dtype, torch.float32)
        numbers = {k: some.new_zeros(len(layout.members), dtype=wide) for k in NUMBERS}
        state = {"network": fresh_network(layout, some, wide), "tensor": numbers}
        return state | {b.key: fresh_slots(b, some, wide, layout.n_scales) for b in layout.all}

    # -------------------------------------------------------------------------------------------- step
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
        names = tuple(params) if names is None else names
        layout = batches_of(symmetry, names, next(iter(grads.values())).device)
        numel = _numel(layout, next(iter(grads.values())).dtype)
        network, tensor = state["network"], state["tensor"]
        t, step = network["clock"] + 1, tensor["step"] + 1
        clock = Clock(t, step, ages)
        live = _live(layout, grads)
        in_place = in_place and live is None
        new: State = {"network": {"clock": t}, "tensor": {"step": step}}

        # the slow clock: frame, and in it the sizes of weights
        slots = {b.key: dict(state[b.key]) for b in layout.all}
        if "log_scale" in network:
            log_scale = when(clock.frame, lambda: potentials(symmetry, params), network["log_scale"])
            new["network"]["log_scale"] = log_scale
            for b in layout.all:
                slots[b.key] |= scales(b, log_scale) if clock.frame is not False else {}
        rms = when(clock.frame, lambda: weight_rms(layout, params, slots), tensor["weight_rms"])
        new["tensor"]["weight_rms"] = rms

        # gradients in the frame, none far larger than usual
        g = {b.key: framed(b, b.gather(_complete(b, grads, params)), slots[b.key]) for b in layout.all}
        norm = torch.cat([norms(b, g[b.key]) for b in layout.all])
        factor = clip_factor(norm, tensor["mean_square"], tensor["step"], numel)
        norm = norm * factor
        square = torch.lerp(tensor["mean_square"], norm.square() / numel, 1 - BETA2)
        new["tensor"]["mean_square"] = square
        g = {b.key: times(b, g[b.key], f) for b, f in zip(layout.all, factor.split(layout.counts), strict=True)}

        # momentum, second moments, rate
        beta1 = auto_lr.beta1(t, network["slope"])
        for b in layout.all:
            own = slots[b.key]
            own["m"] = lerp(own["m"], g[b.key], 1 - beta1, in_place)
            update_moments(b, g[b.key], own, clock, in_place)
        rate = self._rate(layout, g, slots, norm, tensor, network, new, t, beta1, total_steps, clock)

        controls = self.controls(layout, params, g, slots, state, new, clock, beta1, total_steps)

        # directions
        each = zip(*(x.split(layout.counts) for x in (rms, square, step)), strict=True)
        decays = {}
        lengths = []
        updates: Weights = {}
        loudest = square.amax()
        for b, (own_rms, own_square, own_step) in zip(layout.all, each, strict=True):
            own, control = slots[b.key], controls[b.key] if controls else None
            if isinstance(b, FlatBatch):
                d = flat_direction(b, own, own_square, own_step, own_rms, loudest)
            elif b.factored:
                d = factored_direction(b, own, own_square, own_step)
            else:
                ratio = (rate * control.gain if control else rate) * weight_rms_ratio(b, own_rms)
                d = matrix_direction(b, g[b.key], own, beta1, ratio, own_step, control)
                lengths.append(ratio * step_norm(b) * (own_square > 0))
                relative = lengths[-1] * rsqrt(own_rms.square() * (b.R * b.C))
                scale = BUILTIN_DECAY * fan_in_scale(b.C) * auto_lr.decay_scale(t, total_steps)
                decays |= dict(zip(b.names, (scale * relative).unbind(), strict=True))
            if isinstance(b, FlatBatch) or b.factored:
                d = times(b, d, rate * control.gain) if control else rate * d
                lengths.append(norms(b, d))
            own["last_update"] = stored(-d, own["last_update"], in_place)
            updates |= b.scatter(framed(b, -d, own))
        new["tensor"]["update_norm"] = torch.cat(lengths)
        new |= slots
        if live is not None:
            new = _kept(layout, state, new, live)
        asked = weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(grads, weight_decay)
        return {n: decayed(updates[n], params[n], asked.get(n), rate, decays.get(n)) for n in grads}, new

    def controls(
        self,
        layout: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        slots: Mapping[str, Slots],
        old: State,
        new: State,
        clock: Clock,
        beta1: Tensor,
        total_steps: Number | None,
    ) -> dict[str, Control] | None:
        """What a learned rule changes of this step, by batch; None: nothing. It may add to ``new``."""
        return None

    def _rate(
        self,
        layout: BatchLayout,
        g: dict[str, Tensor],
        slots: dict[str, Slots],
        norm: Tensor,
        tensor: Slots,
        network: Slots,
        new: State,
        t: Tensor,
        beta1: Tensor,
        total_steps: Number | None,
        clock: Clock,
    ) -> Tensor:
        old = Measured(network["slope"], network["log_lr"], network["correlation"])
        up = torch.stack([(g[b.key] * slots[b.key]["last_update"]).sum() for b in layout.all]).sum()
        most = (norm * tensor["update_norm"]).sum()
        cosine = -up / torch.where(most > 0, most, 1)
        end = auto_lr.warmup_steps(total_steps)

        def correlation() -> Tensor:
            m = torch.stack([slots[b.key]["m"].square().sum() for b in layout.all]).sum()
            v = new["tensor"]["mean_square"] / (1 - BETA2 ** new["tensor"]["step"])
            v = (v * _numel(layout, v.dtype)).sum()
            return ((1 + beta1) / (1 - beta1) * m / v).nan_to_num(0.0, posinf=0.0)

        a = when(clock.between(2 * end, 3 * end), correlation, old.correlation)
        measured = auto_lr.measure(old, cosine, a, t, total_steps)
        new["network"] |= measured._asdict()
        if self.measure_lr:
            return auto_lr.measured_rate(measured, t, total_steps)
        return auto_lr.RATE * auto_lr.schedule(t, total_steps)


# ----------------------------------------------------------------------------------------- the slow clock
def weight_rms(layout: BatchLayout, params: Weights, slots: Mapping[str, Slots]) -> Tensor:
    """Of every tensor in the frame, without its bias: ``[T]``."""
    found = []
    for b in layout.all:
        w = framed(b, b.gather(params), slots[b.key], inverse=True)
        if isinstance(b, FlatBatch):
            found.append(root(b.sums(w.square()) / torch.tensor(b.sizes, device=w.device)))
        else:
            found.append(root(w[..., : b.C].square().mean((-2, -1))))
    return torch.cat(found)


def update_moments(b: TensorBatch | FlatBatch, g: Tensor, own: Slots, clock: Clock, in_place: bool) -> None:
    """Second moments: of entries and of embeddings' axes at every step, of matrices' axes and their roots when due."""
    if isinstance(b, FlatBatch):
        own["v"] = lerp(own["v"], g.square(), 1 - BETA2, in_place)
        return
    if b.biases:
        own["v_bias"] = lerp(own["v_bias"], g[..., -1].square(), 1 - BETA2, in_place)
    if b.factored:
        for i in b.axes:
            own[f"diag{i}"] = lerp(own[f"diag{i}"], whitening.mean_square(b, g, i), 1 - BETA2, in_place)
        return
    if clock.moments is False:
        return
    weight = 1 - whitening.AVERAGE ** torch.where(clock.t <= 3, 1, EVERY_MOMENTS)
    whitened = whitened_axes(b)
    for i in b.axes:
        slot, of = ("moment", whitening.second_moment) if i in whitened else ("diag", whitening.mean_square)
        old, new = own[f"{slot}{i}"], lerp(own[f"{slot}{i}"], of(b, g, i), weight, in_place)
        own[f"{slot}{i}"] = when(clock.moments, lambda new=new: new, old)
        if i in whitened:
            due = clock.roots if isinstance(clock.roots, bool) else clock.roots | (own[f"root{i}"][..., 0, 0] == 0)
            root_ = whitening.inverse_root(own[f"moment{i}"], own[f"root{i}"], due)
            own[f"root{i}"] = stored(root_, own[f"root{i}"], in_place) if due is not False else own[f"root{i}"]


def whitened_axes(b: TensorBatch) -> tuple[int, ...]:
    """Axes of a matrix that step in whitened units: those of hidden units that are not too many."""
    return tuple(i for i in b.axes if i in b.hidden and has_matrix(b.shape[i]))


# ----------------------------------------------------------------------------------------- every step
def clip_factor(norm: Tensor, mean_square: Tensor, step: Tensor, numel: Tensor) -> Tensor:
    """What to multiply gradients by, so that their RMS is at most ``CLIP_FACTOR`` times that of those before: ``[T]``.

    Args:
        norm: of the gradients.
        mean_square: the averages up to the step before; 1 where they are zero: all gradients before were.
        step: how many steps those are.
        numel: entries.
    """
    usual = mean_square / (1 - BETA2 ** step.clamp(min=1))
    known = usual > 0
    most = CLIP_FACTOR * (torch.where(known, usual, 1) * numel).sqrt()
    return torch.where(known, most / norm.clamp(min=1e-30), 1).clamp(max=1.0)


def matrix_direction(
    b: TensorBatch, g: Tensor, own: Slots, beta1: Tensor, ratio: Tensor, step: Tensor, control: Control | None = None
) -> Tensor:
    """``P polar(P n P) P`` at its size, times ``ratio`` [N]: ``[N, R, K]``."""
    n = torch.lerp(g if control is None else times(b, g, control.fresh), own["m"].to(g.dtype), beta1)
    if b.biases:
        n[..., -1] *= BIAS
    roots = {i: own[f"root{i}"] for i in whitened_axes(b)}
    n = preconditioned(b, n, own, roots)
    x = whitening.multiplied(b, n.to(product_dtype(b, n)), roots)
    x = b.join([newton_schulz(part, ITERATIONS) for part in b.split(x)])
    x = whitening.multiplied(b, x, roots)
    if control is not None and control.units is not None:
        x = b.scaled(x, *control.units)
    d = b.join([part * (unit * _repeated(ratio, part) / _safe_norm(part)) for part, unit in sized(b, x)])
    if b.biases:
        d[..., -1] *= BIAS * snr_scale(own, step)[:, None]
    return d


def preconditioned(b: TensorBatch, n: Tensor, own: Slots, roots: Mapping[int, Tensor]) -> Tensor:
    """``n / v^(1/4)`` with v of rank one, where not every axis is whitened."""
    if len(roots) == len(b.axes):
        return n
    for i in b.axes:
        v = own[f"moment{i}"].diagonal(dim1=-2, dim2=-1) if i in roots else own[f"diag{i}"]
        mean = v.mean(-1, keepdim=True)
        n = along(b, n, i, rsqrt(rsqrt(1 / (v / torch.where(mean > 0, mean, 1) + 1e-8))))
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


def sized(b: TensorBatch, x: Tensor) -> list[tuple[Tensor, float]]:
    """The matrices ``[N', R', K']`` of a batch, and the norm of a usual step of each at unit rate."""
    return [(part, _unit(part.shape[-2], part.shape[-1], b)) for part in b.split(x)]


def _unit(rows: int, columns: int, b: TensorBatch) -> float:
    fan_in = columns - bool(b.biases)
    return 0.2 * fan_in_scale(fan_in) * max(rows, fan_in) ** 0.5 * SIZE * min(rows, columns) ** 0.5


def step_norm(b: TensorBatch) -> float:
    """The norm of a usual step of a tensor at unit rate."""
    if b.pack is None:
        return math.sqrt(sum(_unit(r, b.K, b) ** 2 for r in b.parts))
    return math.sqrt(sum(block.shape[0] * _unit(*block.shape[1:], b) ** 2 for block in b.pack.blocks))


def fan_in_scale(fan_in: int) -> float:
    """``(512 / C)^(1/4)``."""
    return (FAN_IN / fan_in) ** 0.25


def weight_rms_ratio(b: TensorBatch, rms: Tensor) -> Tensor:
    """The weights' RMS relative to usual ones, 1 for those that are not small: ``[N]``."""
    return (rms * (b.C**0.5 / USUAL)).clamp(SMALLEST, 1.0)


def snr_scale(own: Slots, step: Tensor) -> Tensor:
    """How much of their steps biases make: all, unless their gradients alternate, ``[N]``. Rounding noise (of keys'
    biases beside those of queries and values) does not count.
    """
    v = own["v_bias"]
    heard = v > (ROUNDING * torch.finfo(v.dtype).eps) ** 2 * v.amax(-1, keepdim=True)
    adam = own["m"][..., -1] * rsqrt(v) * bias_correction(step)[:, None] * heard
    return (root(adam.square().sum(-1) / heard.sum(-1).clamp(min=1)) / SNR).clamp(max=1.0)


def bias_correction(step: Tensor) -> Tensor:
    """What ``m / sqrt(v)`` is to be multiplied by at an age."""
    return (1 - BETA2**step).sqrt() / (1 - auto_lr.BETA1**step)


def flat_direction(b: FlatBatch, own: Slots, square: Tensor, step: Tensor, rms: Tensor, loudest: Tensor) -> Tensor:
    """Adam's direction of every entry, ``[Z]``; zero for vectors whose gradients are rounding noise beside the others'."""
    fan_in = [s[0] if len(s) < 2 else math.prod(s[1:]) for s in b.shapes]
    usual = (rms * rms.new_tensor([c**0.5 / USUAL for c in fan_in])).clamp(SMALLEST, 1.0)
    thin = torch.tensor(b.thin, device=rms.device)
    heard = square > (ROUNDING * torch.finfo(square.dtype).eps) ** 2 * loudest
    factor = torch.where(thin, usual, VECTOR * heard) * bias_correction(step)
    epsilon = 1e-16 * square
    both = torch.stack([factor, epsilon]).index_select(1, b.segment)
    return own["m"].to(both.dtype) * rsqrt(own["v"] + both[1]) * both[0]


def factored_direction(b: TensorBatch, own: Slots, square: Tensor, step: Tensor) -> Tensor:
    """Adam's direction with v of rank one: ``[N, R, K]``."""
    d = own["m"].to(square.dtype)
    known = torch.where(square > 0, square, 1)
    for i in b.axes:
        d = along(b, d, i, rsqrt(own[f"diag{i}"] / known[:, None] + 1e-16))
    return d * (VECTOR * bias_correction(step) * known.rsqrt())[:, None, None]


def decayed(u: Tensor, w: Tensor, asked: float | None, rate: Tensor, builtin: Tensor | None) -> Tensor:
    """An update, less a share of the weights: what is asked for (times the rate); the rule's own where nothing is."""
    if asked is None:
        return u if builtin is None else torch.addcmul(u, w, builtin, value=-1)
    return u - rate * asked * w if asked else u


# --------------------------------------------------------------------------------- batches and their slots
def framed(b: TensorBatch | FlatBatch, x: Tensor, own: Slots, inverse: bool = False) -> Tensor:
    """Where gradients enter the frame and updates leave it; with ``inverse`` where weights enter it."""
    if b.scaling is None:
        return x
    if isinstance(b, FlatBatch):
        return x / own["scale"] if inverse else x * own["scale"]
    r, c = own["row_scale"], own["col_scale"]
    x = x if len(r) == len(x) else x.reshape(len(r), -1, x.shape[-1])
    x = x / r / c if inverse else x * r * c
    return x.reshape(-1, b.R, x.shape[-1])


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


def _safe_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.clamp(min=1e-30)


def _repeated(x: Tensor, parts: Tensor) -> Tensor:
    """A number of every tensor for each of its matrices: ``[N'  , 1, 1]``."""
    times = len(parts) // len(x)
    return (x.repeat_interleave(times) if times > 1 else x)[:, None, None]


# ------------------------------------------------------------------------------- tensors that sit a step out
def _live(layout: BatchLayout, grads: Weights) -> Tensor | None:
    """Which tensors move (a matrix only with its bias); None: all."""
    paired = {n: b for batch in layout.batches for n, b in zip(batch.names, batch.biases, strict=False)}
    live = [n in grads and paired.get(n, n) in grads for n in layout.members]
    return None if all(live) else torch.tensor(live, device=next(iter(grads.values())).device)


def _complete(b: TensorBatch | FlatBatch, grads: Weights, params: Weights) -> Weights:
    """Gradients of all tensors of a batch; zero for those that have none."""
    names = b.names if isinstance(b, FlatBatch) else b.names + b.biases
    if all(n in grads for n in names):
        return grads
    like = next(iter(grads.values()))
    return {n: grads[n] if n in grads else torch.zeros_like(params[n], dtype=like.dtype) for n in names}


def _kept(layout: BatchLayout, old: State, new: State, live: Tensor) -> State:
    """The new state, but the old one of tensors that sit this step out."""
    kept: State = {"network": new["network"]}
    kept["tensor"] = {k: torch.where(live, x, old["tensor"][k]) for k, x in new["tensor"].items()}
    for b, own in zip(layout.all, live.split(layout.counts), strict=True):
        mask = own.index_select(0, b.segment) if isinstance(b, FlatBatch) else own
        kept[b.key] = {
            k: x if k.endswith("scale") else torch.where(mask.view(-1, *[1] * (x.ndim - 1)), x, old[b.key][k])
            for k, x in new[b.key].items()
        }
    return kept


# ------------------------------------------------------------------------------------------- fresh state
def fresh_network(layout: BatchLayout, like: Tensor, dtype: torch.dtype) -> Slots:
    """Numbers of the whole network, 0-d, and the log-scale of its units."""
    zeros = {k: like.new_zeros((), dtype=dtype) for k in ("clock", *Measured._fields)}
    if any(s.kind != "sign" for s in layout.symmetry.scales.values()):
        zeros["log_scale"] = like.new_zeros(layout.n_scales + 1, dtype=dtype)
    return zeros


NUMBERS = ("step", "mean_square", "weight_rms", "update_norm")  # of every tensor


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
        slots["v_bias"] = zeros(n, b.R)
    whitened = () if b.factored else whitened_axes(b)
    for i in b.axes:
        d = b.shape[i]
        if i in whitened:
            slots |= {f"moment{i}": zeros(n, d, d), f"root{i}": zeros(n, d, d, dtype=root_dtype(d, dtype))}
        else:
            slots[f"diag{i}"] = zeros(n, d)
    if b.scaling is not None:
        slots |= scales(b, like.new_zeros(n_scales + 1, dtype=dtype))
    return slots


def narrow(dtype: torch.dtype) -> torch.dtype:
    """In which the last update is kept, of which only a cosine is taken."""
    return torch.bfloat16 if dtype == torch.float32 else dtype
